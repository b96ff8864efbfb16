"""Tool calls in a model's answer: `[TOOL_CALLS]` and a JSON list of names and arguments."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.tokenizer import Tokenizer

_ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9  # what the V3 template requires of a call's id


def new_tool_call_id() -> str:
    """Nine random letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(ID_LENGTH))


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for.

    Attributes:
        name: the function's.
        arguments: a JSON object, as text.
        id: nine characters, to be repeated by the tool message that answers.
    """

    name: str
    arguments: str
    id: str = field(default_factory=new_tool_call_id)

    def to_openai(self) -> dict[str, object]:
        """As OpenAI's assistant messages carry it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


def split_answer(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[str, list[ToolCall]]:
    """An answer's text before any tool call, and its calls.

    Args:
        tokenizer: the model's.
        token_ids: what it generated.

    Returns:
        (content, calls). If what follows [TOOL_CALLS] is not a list of calls, as when the answer
        was cut off, there are no calls and the content is the whole answer's text.
    """
    ids = list(token_ids)
    if tokenizer.tool_calls_id not in ids:
        return tokenizer.decode(ids), []
    at = ids.index(tokenizer.tool_calls_id)
    calls = parse_tool_calls(tokenizer.decode(ids[at + 1 :]))
    if calls is None:
        return tokenizer.decode(ids), []
    return tokenizer.decode(ids[:at]), calls


def parse_tool_calls(text: str) -> list[ToolCall] | None:
    """The calls in the JSON that follows [TOOL_CALLS], or None where it is no such JSON."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list) or not entries:
        return None
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return None
        arguments = entry.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        given_id = entry.get("id")
        if isinstance(given_id, str) and len(given_id) == ID_LENGTH and given_id.isalnum():
            calls.append(ToolCall(entry["name"], text, given_id))
        else:
            calls.append(ToolCall(entry["name"], text))
    return calls


@dataclass(frozen=True)
class ContentDelta:
    text: str


@dataclass(frozen=True)
class CallStarted:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    index: int
    text: str


Event = ContentDelta | CallStarted | ArgumentsDelta


class ToolCallParser:
    """Parses at the end; to be replaced by the streaming one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.content = ""
        self.calls: list[ToolCall] = []
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def add(self, token_ids: Sequence[int]) -> list[Event]:
        self._ids.extend(token_ids)
        return []

    def finish(self) -> list[Event]:
        self.content, self.calls = split_answer(self._tokenizer, self._ids)
        events: list[Event] = [ContentDelta(self.content)] if self.content else []
        for i, call in enumerate(self.calls):
            events += [CallStarted(i, call.id, call.name), ArgumentsDelta(i, call.arguments)]
        return events
