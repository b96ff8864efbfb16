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

from octavo.device import to_device
from octavo.engine.sampling_params import SamplingParams

BLOCK = 256  # tokens whose maximum or sum is taken first
CANDIDATES = (256, 4096)  # the likeliest, among which top_p is looked for before all are sorted
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
        rows = logits[index] if len(drawn) < len(params) else logits
        chosen = _draw(rows, [params[row] for row in drawn], [uniforms[row] for row in drawn])
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


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """One token from each row's distribution, by inverting its cumulative sum; [R] int64."""

    def column(name: str) -> Tensor:
        values = [getattr(each, name) for each in params]
        return to_device(torch.tensor(values, dtype=torch.float32)[:, None], logits.device)

    logits = logits / column("temperature")
    if any(each.min_p > 0 for each in params):
        logits = keep_min_p(logits, column("min_p"))
    if any(each.top_k > 0 for each in params):
        logits = keep_top_k(logits, torch.tensor([each.top_k for each in params])[:, None])
    if any(each.top_p < 1 for each in params):
        logits = keep_top_p(logits, column("top_p"))
    drawn = to_device(torch.tensor(uniforms, dtype=torch.float64)[:, None], logits.device)
    return invert(logits.softmax(-1), drawn)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first token that has it, both [R]; NaN is the largest.

    As `logits.max(-1)`; by blocks, since that goes through a row a number at a time.
    """
    blocks = _blocks(logits, _NEVER)
    best = blocks.amax(-1).max(-1, keepdim=True)
    within = _block(blocks, best.indices).argmax(-1)
    return best.values[:, 0], best.indices[:, 0] * BLOCK + within


def invert(probabilities: Tensor, drawn: Tensor) -> Tensor:
    """The first token of each row at which the sum of probabilities passes a share of their total.

    It has a probability above zero. Sums are in fp64, of blocks and then within one.

    Args:
        probabilities: [R, vocab_size] fp32.
        drawn: [R, 1] fp64 in [0, 1).

    Returns:
        [R] int64.
    """
    blocks = _blocks(probabilities, 0.0)
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = drawn * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)  # NaN
    within = _block(blocks, block).cumsum(-1, dtype=torch.float64)
    left = target - F.pad(ends, (1, 0)).gather(1, block)
    # Summed up in another order, a block may end before the target.
    last = torch.searchsorted(within, within[:, -1:].contiguous())
    token = torch.searchsorted(within, left, right=True).minimum(last)
    return (block * BLOCK + token)[:, 0]


def _blocks(rows: Tensor, filler: float) -> Tensor:
    """[R, vocab_size] as [R, n_blocks, BLOCK]."""
    if missing := -rows.shape[1] % BLOCK:
        rows = F.pad(rows, (0, missing), value=filler)
    return rows.unflatten(1, (-1, BLOCK))


def _block(blocks: Tensor, index: Tensor) -> Tensor:
    """Of each row the block with its index, [R, 1]: [R, BLOCK]."""
    return blocks.gather(1, index[..., None].expand(-1, -1, BLOCK))[:, 0]


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


def keep_top_k(logits: Tensor, k: Tensor) -> Tensor:
    """Only tokens at least as likely as the k-th; below 1 keeps all.

    [R, vocab_size], k [R, 1] int64 on the CPU, where the largest is asked for.
    """
    n_tokens = logits.shape[-1]
    count = torch.where(k < 1, n_tokens, k).clamp(max=n_tokens)
    values = logits.topk(int(count.max()), dim=-1).values
    last = to_device(count - 1, logits.device)
    return logits.masked_fill(logits < values.gather(-1, last), _NEVER)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman 2020).

    [R, vocab_size], top_p [R, 1]; 1 keeps all.
    """
    total = logits.logsumexp(-1, keepdim=True)
    n_tokens = logits.shape[1]
    # On a CPU sorting 131,072 logits takes 15 ms. A GPU sorts quickly, and is not waited for.
    few = CANDIDATES if logits.device.type == "cpu" else ()
    for count in (*(n for n in few if n < n_tokens), n_tokens):
        values, ids = logits.topk(count) if count < n_tokens else logits.sort(-1, descending=True)
        probabilities = (values - total).exp()
        sums = probabilities.cumsum(-1)
        if count < n_tokens and bool(((sums[:, -1:] >= top_p) | (top_p == 1)).all()):
            break
    # A token stays if those before it have not reached top_p yet; so the first always stays.
    values = values.masked_fill(sums - probabilities >= top_p, _NEVER)
    kept = torch.full_like(logits, _NEVER).scatter_(-1, ids, values)
    return torch.where(top_p < 1, kept, logits)


def keep_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Tokens with at least `min_p` [R, 1] of the likeliest one's probability, [R, vocab_size]."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), _NEVER)


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
