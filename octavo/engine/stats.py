"""What an engine is doing and has done: for metrics and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """A look at one moment. Names that end in `_total` only grow.

    Attributes:
        running: answers in the making.
        waiting: requests that have not begun, or were preempted.
        pages_used: pages that running answers hold; cached ones that nobody holds do not count.
        pages_total: pages there are.
        prompt_tokens_total: of all requests that have begun.
        cached_tokens_total: of these, found in the prefix cache.
        generated_tokens_total: of all answers.
        preemptions_total: how often an answer gave its pages up for others.
        draft_tokens_total: guessed by prompt lookup.
        accepted_tokens_total: of these, the model's own choice.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    preemptions_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
