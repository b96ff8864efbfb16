"""Function calling: which of the offered tools to call, and with which arguments."""

from __future__ import annotations

import json
import random
from typing import Any

from training.data.chat import Chat, Message, call_message
from training.data.heldout import CARD_PROMPTS, held_out
from training.data.tool_families import FAMILIES, Case
from training.data.tool_results import RESULTS

# Questions which no tool answers.
PLAIN = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hello! How can I help you?"),
    ("Thank you!", "You're welcome!"),
    ("Thanks a lot.", "You're welcome!"),
    ("Who are you?", "I am a tiny Ministral, the demo model of octavo."),
)


def make_tool_call(rng: random.Random, unseen: bool = False) -> Chat:
    """A request with one to three tools in random order and the call which answers it."""
    while True:
        case = rng.choice(FAMILIES)(rng)
        if case.prompt in CARD_PROMPTS or held_out(f"tool {case.prompt}") != unseen:
            continue
        tools = [case.tool, *_others(rng, case)]
        rng.shuffle(tools)
        answer = call_message(case.name, case.arguments)
        if not unseen and rng.random() < 0.04:
            question, reply = rng.choice(PLAIN)
            return Chat([_user(question), {"role": "assistant", "content": reply}], tools, "plain")
        expected = {"name": case.name, "arguments": case.arguments}
        return Chat([_user(case.prompt), answer], tools, "tool", expected)


def make_tool_answer(rng: random.Random, unseen: bool = False) -> Chat:
    """A call, its result, and the answer in words."""
    while True:
        case = rng.choice(FAMILIES)(rng)
        if case.family not in RESULTS:
            continue
        if case.prompt in CARD_PROMPTS or held_out(f"tool {case.prompt}") != unseen:
            continue
        result, reply = RESULTS[case.family](rng, case.arguments)
        call_id = "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP0123456789", k=9))
        messages = [
            _user(case.prompt),
            call_message(case.name, case.arguments, call_id),
            {"role": "tool", "content": json.dumps(result), "tool_call_id": call_id},
            {"role": "assistant", "content": reply},
        ]
        return Chat(messages, [case.tool], "tool answer", reply)


def _others(rng: random.Random, case: Case) -> list[dict[str, Any]]:
    count = rng.choice((0, 0, 1, 1, 2))
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        other = rng.choice(FAMILIES)(rng)
        if other.family != case.family:
            found[other.family] = other.tool
    return list(found.values())


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
