"""The choice of a step's tokens: all its rows are drawn at once, and the host reads them once."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.device import to_device
from octavo.engine import sampler
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.errors import CheckpointError


class Turn(NamedTuple):
    """An answer whose next token is to be chosen.

    Attributes:
        sequence: the answer.
        draft: guesses of what its next tokens are.
        row: its first row of the step's logits; each guess has one more.
    """

    sequence: Sequence
    draft: list[int]
    row: int


def choose(logits: Tensor, turns: list[Turn]) -> list[list[int]]:
    """Draw from the rows of all answers.

    Args:
        logits: [R, vocab_size] fp32; not changed.
        turns: several may have the same row.

    Returns:
        For each answer a token a row, the second as if the first guess were right, and so on. Only
        the first where a choice depends on the tokens before: for the others see `choose_adjusted`.

    Raises:
        CheckpointError: NaN in the logits.
    """
    adjusted = [turn.sequence.is_adjusted for turn in turns]
    counts = [1 if own else 1 + len(turn.draft) for turn, own in zip(turns, adjusted, strict=True)]
    rows = [turn.row + i for turn, n in zip(turns, counts, strict=True) for i in range(n)]
    given = pick(logits, rows)
    if any(adjusted) and given is logits:
        given = logits.clone()
    params: list[SamplingParams] = []
    uniforms: list[float] = []
    for turn, n, is_adjusted in zip(turns, counts, adjusted, strict=True):
        sequence = turn.sequence
        if is_adjusted:
            given[len(params)] = _adjusted(sequence, logits[turn.row])
        first = len(sequence.output_ids)
        for position in range(first, first + n):
            params.append(sequence.params)
            uniforms.append(_drawn(sequence, position))
    tokens = iter(_checked(sampler.sample(given, params, uniforms)))
    return [[next(tokens) for _ in range(n)] for n in counts]


def choose_adjusted(sequence: Sequence, logits: Tensor) -> int:
    """The next token from a row of its own, [vocab_size], where it depends on those before it."""
    drawn = _drawn(sequence, len(sequence.output_ids))
    row = _adjusted(sequence, logits)
    return _checked(sampler.sample(row[None], [sequence.params], [drawn]))[0]


def pick(x: Tensor, rows: Rows[int]) -> Tensor:
    """Rows of a matrix; itself, and no copy, if they are all of them in order."""
    if list(rows) == list(range(len(x))):
        return x
    return x[to_device(torch.tensor(rows), x.device)]


def _adjusted(sequence: Sequence, logits: Tensor) -> Tensor:
    return sampler.adjust(
        sequence.constraint.mask(logits) if sequence.constraint else logits,
        sequence.params,
        sequence.prompt_ids,
        sequence.output_ids,
        sequence.banned_ids(),
    )


def _drawn(sequence: Sequence, position: int) -> float:
    """What a token is drawn by; 0 where none is."""
    return 0.0 if sequence.params.greedy else sampler.uniform(sequence.seed, position)


def _checked(tokens: list[int]) -> list[int]:
    if min(tokens) < 0:
        raise CheckpointError(
            "the model computed NaN: its weights are damaged, or overflow in float16 "
            "(try dtype float32)"
        )
    return tokens
