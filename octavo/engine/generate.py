"""`generate`: token lists in, token lists and log-probabilities out, as mistral-inference's."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.defaults import MAX_NUM_BATCHED_TOKENS, default_num_seqs
from octavo.engine.engine import Engine, check_positive
from octavo.engine.sampling_params import SamplingParams
from octavo.model import Transformer

TOP_P = 0.8  # mistral-inference's, wherever it samples


def generate(
    encoded_prompts: Sequence[Sequence[int]],
    model: Transformer,
    *,
    max_tokens: int,
    temperature: float,
    chunk_size: int | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Continue each prompt by at most `max_tokens`.

    Args:
        encoded_prompts: token ids of each prompt.
        model: from `Transformer.from_folder`.
        max_tokens: 0 only scores the prompts.
        temperature: 0 is greedy; above, tokens are drawn with top_p 0.8.
        chunk_size: tokens in one forward pass; None is the engine's default. The result does not
            depend on it, memory does.
        eos_id: ends an answer, and is not part of it.
        seed: makes sampling repeatable.

    Returns:
        The generated ids of each prompt, and natural log-probabilities: of the prompt's tokens
        from the second on, then of the generated ones.

    Raises:
        RequestError: an empty or over-long prompt, or a token outside the vocabulary.
        ConfigError: a chunk_size that is no positive integer.
    """
    check_positive(chunk_size=chunk_size)
    chunk_size = chunk_size or MAX_NUM_BATCHED_TOKENS
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=TOP_P if temperature > 0 else 1.0,
        logprobs=0,
        prompt_logprobs=0,
        seed=seed,
    )
    engine = Engine(
        model,
        eos_id=eos_id,
        max_num_seqs=min(chunk_size, default_num_seqs(model.device)),
        max_num_batched_tokens=chunk_size,
    )
    request_ids = [engine.add_request(list(prompt), params) for prompt in encoded_prompts]
    outputs = {output.request_id: output for output in engine.run(request_ids)}
    all_tokens, all_logprobs = [], []
    for request_id in request_ids:
        answer = outputs[request_id].outputs[0]
        tokens = answer.token_ids
        if tokens and tokens[-1] == eos_id:
            tokens = tokens[:-1]
        prompt = outputs[request_id].prompt_token_ids
        prompt_rows = outputs[request_id].prompt_logprobs or []
        logprobs = [
            row[token].logprob for token, row in zip(prompt, prompt_rows, strict=True) if row
        ]
        logprobs += [
            row[token].logprob for token, row in zip(tokens, answer.logprobs or [], strict=False)
        ]
        all_tokens.append(tokens)
        all_logprobs.append(logprobs)
    return all_tokens, all_logprobs
