"""From one row of logits to one token. Each step is a function of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.engine.sampling_params import SamplingParams

_NEVER = float("-inf")


def sample(
    logits: Tensor,
    params: SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    generator: torch.Generator,
    banned_ids: Sequence[int] = (),
) -> int:
    """Choose the next token: bias, penalties, temperature, min_p, top_k, top_p, then one draw.

    Args:
        logits: [vocab_size] fp32, -inf where a constraint forbids a token; not changed.
        params: how to sample.
        prompt_ids, output_ids: what the penalties count.
        generator: of this sequence alone, so that a seed means the same in any company.
        banned_ids: tokens that may not come now (`min_tokens`), unless no others may.
    """
    if params.logit_bias:
        logits = add_bias(logits, params.logit_bias)
    if params.penalizes:
        logits = penalize(logits, params, prompt_ids, output_ids)
    if banned_ids:
        ids = torch.tensor(list(banned_ids), device=logits.device)
        others = logits.index_fill(0, ids, _NEVER)
        logits = others if bool((others > _NEVER).any()) else logits
    if params.greedy:
        return int(logits.argmax())
    logits = logits / params.temperature
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    if 0 < params.top_k < logits.numel():
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def add_bias(logits: Tensor, bias: dict[int, float]) -> Tensor:
    """Each token's bias added to its logit (OpenAI's logit_bias)."""
    ids = torch.tensor(list(bias), device=logits.device)
    return logits.index_add(0, ids, torch.tensor(list(bias.values())).to(logits))


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


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only tokens at least as likely as the k-th."""
    threshold = logits.topk(k).values[-1]
    return logits.masked_fill(logits < threshold, _NEVER)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman 2020)."""
    ordered, indices = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    # A token stays if those before it have not reached top_p yet; so the first always stays.
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(0, indices, dropped), _NEVER)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Tokens with at least `min_p` of the likeliest one's probability."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), _NEVER)


def top_logprobs(logits: Tensor, chosen: Tensor, count: int) -> list[dict[int, tuple[float, int]]]:
    """Log-probabilities and ranks of the chosen and of the likeliest tokens.

    Args:
        logits: [T, vocab_size] fp32, as the model gave them.
        chosen: [T] token ids.
        count: of the likeliest tokens to report.

    Returns:
        T dicts: token id to (log-probability, rank); the chosen token comes first.
    """
    logprobs = logits.log_softmax(-1)
    of_chosen = logprobs.gather(1, chosen[:, None])
    ranks = (logprobs > of_chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(count, logprobs.shape[1]), dim=-1)
    rows = zip(
        chosen.tolist(), of_chosen[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(),
        strict=True,
    )  # fmt: skip
    result = []
    for token, logprob, rank, top_ids, top_values in rows:
        row = {token: (logprob, rank)}
        for i, (top_id, value) in enumerate(zip(top_ids, top_values, strict=True)):
            row.setdefault(top_id, (value, i + 1))
        result.append(row)
    return result


def _counts(token_ids: Sequence[int], like: Tensor) -> Tensor:
    """How often each token of the vocabulary occurs; [vocab_size] int64."""
    ids = torch.tensor(list(token_ids), dtype=torch.int64, device=like.device)
    return torch.bincount(ids, minlength=like.numel())
