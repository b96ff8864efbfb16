"""Score a model on prompts that training never saw: `python -m training.evaluate [MODEL]`.

Greedy decoding through octavo's public interface; seeds are fixed, so a second run gives the same
prompts. The model is the bundled one unless a folder is named.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from octavo import LLM, SamplingParams
from octavo.engine.outputs import CompletionOutput
from octavo.evaluate.passkey import ANSWER, CLASSIC_FILLER, passkey_found, passkey_prompt
from training.data.chat import Chat, ChatEncoder, ask
from training.data.documentation import documents
from training.data.letters import make_letters
from training.data.passkey import make_key
from training.data.pools import held_out_words, story_sentences
from training.data.stories import make_story
from training.data.sums import make_sum
from training.data.tools import make_tool_answer, make_tool_call
from training.export import counter

# Prompts of every kind: a full run, a quick one.
COUNTS = {"sum": (300, 60), "letters": (300, 60), "tool call": (300, 60), "tool answer": (60, 12)}
PASSKEYS = {1024: (40, 8), 4096: (40, 8), 16384: (40, 2), 65536: (4, 0)}
PROSE = (100, 20)  # texts of each kind
LONGEST = 131072
TEMPLATE_ROOM = 24  # tokens left for the template and the answer

Result = dict[str, Any]


def right_number(answer: CompletionOutput, chat: Chat) -> bool:
    """The answer's last number is the expected one."""
    return re.findall(r"\d+", answer.text)[-1:] == [chat.expected]


def right_call(answer: CompletionOutput, chat: Chat) -> bool:
    """One call, of the right function, with exactly the right arguments."""
    if len(answer.tool_calls) != 1:
        return False
    call = answer.tool_calls[0]
    found = {"name": call.name, "arguments": json.loads(call.arguments)}
    return found == chat.expected


def right_text(answer: CompletionOutput, chat: Chat) -> bool:
    """Exactly the expected words."""
    return answer.text.strip() == chat.expected


def right_key(answer: CompletionOutput, chat: Chat) -> bool:
    """The key and no other number."""
    return passkey_found(answer.text, chat.expected)


def score(
    llm: LLM,
    name: str,
    chats: Sequence[Chat],
    is_right: Callable[[CompletionOutput, Chat], bool],
    max_tokens: int = 128,
    show: int = 0,
) -> Result:
    """How many chats' last message the model gets right; `show` prints so many wrong answers."""
    started = time.time()
    prompts = [llm.tokenizer.encode_chat(chat.messages[:-1], chat.tools or None) for chat in chats]
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    right = 0
    for chat, output in zip(chats, llm.generate(prompts, params), strict=True):
        answer = llm.with_tool_calls(output).outputs[0]
        good = is_right(answer, chat)
        right += good
        if not good and show > 0:
            show -= 1
            question = chat.messages[-2]["content"]
            print(f"  wrong: {question[-120:]!r} -> {answer.text!r}, expected {chat.expected!r}")
    return _report(name, right, len(chats), time.time() - started)


def passkey_chats(encoder: ChatEncoder, length: int, count: int) -> list[Chat]:
    """Prompts of about `length` tokens, depths at random; every other one in stories."""
    rng = random.Random(f"passkey {length}")
    fillers = (CLASSIC_FILLER, story_sentences(rng, 2000))
    count_tokens, chats = counter(encoder), []
    for number in range(count):
        key = make_key(rng, unseen=True)
        prompt = passkey_prompt(
            length - TEMPLATE_ROOM, rng.random(), key, fillers[number % 2], count_tokens
        )
        chats.append(ask(prompt, ANSWER.format(key=key), "passkey", key))
    return chats


def perplexity(llm: LLM, name: str, texts: Sequence[str]) -> Result:
    """Perplexity a token and bits a byte, each text read from <s> on."""
    nats, tokens, size = 0.0, 0, 0
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor(llm.tokenizer.encode(text))
            logits = llm.model(ids, [len(ids)])
            nats += float(F.cross_entropy(logits[:-1].float(), ids[1:], reduction="sum"))
            tokens += len(ids) - 1
            size += len(text.encode())
    result = {
        "name": name,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": tokens,
    }
    print(
        f"{name:24} perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.3f} bits a byte, {tokens:,} tokens",
        flush=True,
    )
    return result


def evaluate(llm: LLM, quick: bool = False, longest: int = 0, show: int = 0) -> list[Result]:
    """All scores; `longest` so many passkey prompts of 131,072 tokens as well."""
    encoder = ChatEncoder(llm.tokenizer.mistral)
    rng, words = random.Random(2024), held_out_words(encoder)
    makers: dict[str, tuple[Callable[[], Chat], Callable[[CompletionOutput, Chat], bool]]] = {
        "sum": (lambda: make_sum(rng, True), right_number),
        "letters": (lambda: make_letters(rng, words, True), right_number),
        "tool call": (lambda: make_tool_call(rng, True), right_call),
        "tool answer": (lambda: make_tool_answer(rng, True), right_text),
    }
    results = []
    for name, (make, is_right) in makers.items():
        chats = [make() for _ in range(COUNTS[name][quick])]
        results.append(score(llm, name, chats, is_right, show=show))
    for kind, texts in (
        ("stories", [make_story(rng) for _ in range(PROSE[quick])]),
        ("documentation", documents(unseen=True)[: PROSE[quick]]),
    ):
        results.append(perplexity(llm, kind, [text[:8000] for text in texts]))
    lengths = {length: counts[quick] for length, counts in PASSKEYS.items()} | {LONGEST: longest}
    for length, count in lengths.items():
        if count:
            chats = passkey_chats(encoder, length, count)
            # One at a time: side by side they would only need more memory.
            results.append(score_long(llm, length, chats, show))
    return results


def score_long(llm: LLM, length: int, chats: Sequence[Chat], show: int) -> Result:
    """Passkey prompts of one length, one after the other; both fillers are counted apart."""
    started, right = time.time(), [0, 0]
    params = SamplingParams(max_tokens=24, temperature=0)
    for number, chat in enumerate(chats):
        answer = llm.chat(chat.messages[:-1], params)[0].outputs[0]
        good = right_key(answer, chat)
        right[number % 2] += good
        if not good and show > 0:
            print(f"  wrong: key {chat.expected} -> {answer.text!r}")
    result = _report(f"passkey {length:,}", sum(right), len(chats), time.time() - started)
    return result | {"right_classic": right[0], "right_stories": right[1]}


def _report(name: str, right: int, total: int, seconds: float) -> Result:
    print(f"{name:24} {right}/{total} = {right / total:.1%}  ({seconds:.0f} s)", flush=True)
    return {"name": name, "right": right, "total": total, "seconds": round(seconds, 1)}


def main() -> None:
    """Print the scores, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, under three minutes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--longest", type=int, default=0, help="passkey prompts of 131,072 tokens")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each skill")
    parser.add_argument("--json", type=Path, help="write the scores here")
    options = parser.parse_args()
    llm = LLM(options.model, dtype=options.dtype)
    results = evaluate(llm, options.quick, options.longest, options.show)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
