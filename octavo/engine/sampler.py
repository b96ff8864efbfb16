"""From rows of logits to a token each. Each step is a function of its own.

Everything is computed where the logits are, and the host waits once, for the tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo import kernels
from octavo.device import to_device
from octavo.engine.sampling_params import SamplingParams
from octavo.kernels.long_rows import BLOCK, blocks_of, largest, pick

_NEVER = float("-inf")


def sample(
    logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> list[int]:
    """Choose a token for each row: temperature, min_p, top_k, top_p, then one draw.

    Args:
        logits: [R, vocab_size] fp32, adjusted already; not changed.
        params: [R].
        uniforms: [R] in 0…1, from `uniform`.

    Returns:
        [R] token ids; -1 where a row has NaN.
    """
    best, tokens = likeliest(logits)
    drawn = [row for row, each in enumerate(params) if not each.greedy]
    if drawn:
        index = to_device(torch.tensor(drawn), logits.device)
        with kernels.reuse_memory(logits.device):
            weights = kernels.empty((len(drawn), logits.shape[1]), logits.dtype, logits.device)
            torch.index_select(logits, 0, index, out=weights).sub_(best[index, None])
            chosen = _draw(
                weights, [params[row] for row in drawn], [uniforms[row] for row in drawn]
            )
        tokens = tokens.index_copy(0, index, chosen)
    sampled: list[int] = tokens.masked_fill(best.isnan(), -1).tolist()
    return sampled


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but a sequence's seed and the token's position.

    So an answer does not depend on what else is in the batch, on preemption, or on whether tokens
    were guessed.
    """
    digest = blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 * (1 - 2**-52)


def adjust(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    banned_ids: Sequence[int] = (),
) -> Tensor:
    """One row's logits with everything that depends on the sequence: [vocab_size].

    Args:
        logits: [vocab_size] fp32, -inf where a constraint forbids a token; not changed.
        params: how to sample.
        prompt_ids, output_ids: what the penalties count.
        banned_ids: tokens that may not come now (`min_tokens`), unless no others may.
    """
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    if params.penalizes:
        logits = penalize(logits, params, prompt_ids, output_ids)
    if banned_ids:
        ids = to_device(torch.tensor(list(banned_ids)), logits.device)
        others = logits.index_fill(0, ids, _NEVER)
        logits = torch.where((others > _NEVER).any(), others, logits)
    return logits


def _draw(weights: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token from each row's distribution, by inverting its cumulative sum.

    Args:
        weights: [R, vocab_size], logits less the row's greatest. They become the tokens' weights in
            place: of a vocabulary of 131,072 each copy is half a megabyte a row, and to have that
            much memory from the system anew takes longer than to compute with it.

    Returns:
        [R] int64.
    """

    def column(name: str) -> Tensor:
        values = [getattr(each, name) for each in params]
        return to_device(torch.tensor(values, dtype=torch.float32)[:, None], weights.device)

    weights.div_(column("temperature")).exp_()
    if any(each.min_p > 0 for each in params):
        keep_min_p(weights, column("min_p"))
    if any(each.top_k > 0 for each in params):
        n_tokens = weights.shape[1]  # a larger top_k may be more than a tensor can hold
        top_k = [min(each.top_k, n_tokens) for each in params]
        keep_top_k(weights, torch.tensor(top_k)[:, None])
    if any(each.top_p < 1 for each in params):
        kernels.keep_top_p(weights, column("top_p"))
    drawn = to_device(torch.tensor(uniforms, dtype=torch.float64)[:, None], weights.device)
    return invert(weights, drawn)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first token that has it, both [R]; NaN is the largest.

    As `logits.max(-1)`; by blocks, since that goes through a row a number at a time.
    """
    blocks = blocks_of(logits, _NEVER)
    best = blocks.amax(-1).max(-1, keepdim=True)
    within = pick(blocks, best.indices).argmax(-1)
    return best.values[:, 0], best.indices[:, 0] * BLOCK + within


def invert(weights: Tensor, drawn: Tensor) -> Tensor:
    """The first token of each row at which the sum of weights passes a share of their total.

    It has a weight above zero. Blocks are summed up in fp32, all else in fp64.

    Args:
        weights: [R, vocab_size] fp32.
        drawn: [R, 1] fp64 in [0, 1).

    Returns:
        [R] int64.
    """
    blocks = blocks_of(weights, 0.0)
    ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = drawn * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # NaN
    within = pick(blocks, block).cumsum(-1, dtype=torch.float64)
    left = target - F.pad(ends, (1, 0)).gather(1, block)
    # Summed up otherwise, a block may end before the target.
    last = torch.searchsorted(within, within[:, -1:].contiguous())
    token = torch.searchsorted(within, left, right=True).minimum(last)
    return (block * BLOCK + token)[:, 0]


def add_bias(logits: Tensor, bias: dict[int, float]) -> Tensor:
    """Each token's bias added to its logit (OpenAI's logit_bias)."""
    ids = to_device(torch.tensor(list(bias)), logits.device)
    values = torch.tensor(list(bias.values()), dtype=logits.dtype)
    return logits.index_add(0, ids, to_device(values, logits.device))


def penalize(
    logits: Tensor, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> Tensor:
    """Repetition penalty over prompt and answer; presence and frequency over the answer."""
    answered = _counts(output_ids, logits)
    seen = (answered + _counts(prompt_ids, logits)) > 0
    penalized = torch.where(
        logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty
    )
    logits = torch.where(seen, penalized, logits)
    logits = logits - params.frequency_penalty * answered
    return logits - params.presence_penalty * (answered > 0)


def keep_top_k(weights: Tensor, k: Tensor) -> Tensor:
    """Only tokens at least as likely as the k-th; below 1 keeps all. In place, as the others.

    [R, vocab_size], k [R, 1] int64 on the CPU, where the largest is asked for.
    """
    n_tokens = weights.shape[-1]
    count = torch.where(k < 1, n_tokens, k).clamp(max=n_tokens)
    values, _ = largest(weights, int(count.max()))
    return _drop_below(weights, values.gather(-1, to_device(count - 1, weights.device)))


def keep_min_p(weights: Tensor, min_p: Tensor) -> Tensor:
    """Tokens with at least `min_p` [R, 1] of the likeliest one's probability, [R, vocab_size]."""
    return _drop_below(weights, min_p * weights.amax(-1, keepdim=True))


def _drop_below(weights: Tensor, least: Tensor) -> Tensor:
    """Weights [R, vocab_size] less than a row's least [R, 1] become 0."""
    below = kernels.empty(weights.shape, torch.bool, weights.device)
    return weights.masked_fill_(torch.lt(weights, least, out=below), 0.0)


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> list[dict[int, tuple[float, int]]]:
    """Log-probabilities and ranks of the chosen and of the likeliest tokens.

    Args:
        logits: [T, vocab_size] fp32, as the model gave them.
        chosen: [T] token ids, on the CPU.
        count: of the likeliest tokens to report.

    Returns:
        T dicts: token id to (log-probability, rank); the chosen token comes first.
    """
    logprobs = logits.log_softmax(-1)
    of_chosen = logprobs.gather(1, to_device(chosen, logits.device)[:, None])
    ranks = (logprobs > of_chosen).sum(-1, keepdim=True) + 1
    values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    # In one table, since the host waits for each that it reads; fp64 holds all of it exactly.
    table = torch.cat([part.double() for part in (of_chosen, ranks, ids, values)], dim=1).tolist()
    result = []
    for token, (logprob, rank, *top) in zip(chosen.tolist(), table, strict=True):
        row = {token: (logprob, int(rank))}
        n_top = len(top) // 2
        for i, (top_id, value) in enumerate(zip(top[:n_top], top[n_top:], strict=True)):
            row.setdefault(int(top_id), (value, i + 1))
        result.append(row)
    return result


def _counts(token_ids: Sequence[int], like: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs; [vocab_size] int64."""
    ids = torch.tensor(list(token_ids), dtype=torch.int64)
    # On the host: a GPU would be asked for the largest first.
    return to_device(torch.bincount(ids, minlength=like.numel()), like.device)
