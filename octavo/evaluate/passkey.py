"""Passkey prompts: a five-digit number hidden in a long filler text, and the question for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. "
    "Find it and memorize it. I will quiz you about the important information there."
)
CLASSIC_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
ANSWER = "The pass key is {key}."


def passkey_prompt(
    n_tokens: int,
    depth: float,
    key: str,
    filler: Sequence[str] = CLASSIC_FILLER,
    count_tokens: Callable[[str], int] = len,
    start: int = 0,
) -> str:
    """A prompt of at most `n_tokens` tokens with the key at `depth`, 0 (start) to 1 (end).

    `filler`: sentences, from number `start` on and repeated as often as they fit. `count_tokens`:
    how many tokens a text has; the count of joined sentences is taken as the sum of theirs. Leave
    room for the chat template.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must be from 0 (start) to 1 (end)")
    needle = NEEDLE.format(key=key)
    room = n_tokens - sum(count_tokens(" " + part) for part in (INTRODUCTION, needle, QUESTION))
    if room < 0:
        raise ValueError(
            f"n_tokens is {n_tokens}; introduction, key and question need {-room} more"
        )
    turned = [*filler[start % len(filler) :], *filler[: start % len(filler)]]
    costs = [count_tokens(" " + sentence) for sentence in turned]
    sentences: list[str] = []
    while room >= costs[len(sentences) % len(costs)]:
        room -= costs[len(sentences) % len(costs)]
        sentences.append(turned[len(sentences) % len(turned)])
    before = round(depth * len(sentences))
    return " ".join([INTRODUCTION, *sentences[:before], needle, *sentences[before:], QUESTION])


def passkey_found(text: str, key: str) -> bool:
    """Whether an answer states the key, and no other five-digit number before it."""
    digits = "".join(c if c.isdigit() else " " for c in text).split()
    return bool(digits) and digits[0] == key
