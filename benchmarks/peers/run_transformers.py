"""Prefill and decode of transformers on a device, run by `benchmarks/gpu.py`.

A model of random weights in bf16 of the config in a folder, with the attention that is fastest of
those installed and its cache as it comes; nothing is compiled unless asked for. A step ends when
the host has its tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Make the model, measure what is asked for, write it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="with a config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="prompt lengths")
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="batch sizes")
    parser.add_argument("--context", type=int, default=1024, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=32, help="of decoding")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    options = parser.parse_args()
    device = torch.device(options.device)
    model = load(options.folder, device)
    if options.compile:
        model.forward = torch.compile(model.forward)
    import transformers

    result: dict[str, Any] = {
        "version": transformers.__version__,
        "attention": model.config._attn_implementation,
        "prefill_s": {},
        "decode_step_s": {},
    }
    with torch.inference_mode():
        for n_tokens in options.prefill:
            result["prefill_s"][n_tokens] = prefill(model, n_tokens)
            write(result, options.out)
        for batch in options.decode:
            gc.collect()  # the cache of the batch before
            step = decode_step(model, batch, options.context, options.steps)
            result["decode_step_s"][batch] = step
            write(result, options.out)


def write(result: dict[str, Any], path: Path) -> None:
    """What there is so far: the next measurement may find no memory, or no time."""
    path.with_suffix(".new").write_text(json.dumps(result), encoding="utf-8")
    path.with_suffix(".new").replace(path)


def load(folder: str, device: torch.device) -> Any:
    """The model, its weights made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    flash = device.type == "cuda" and find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    config = AutoConfig.from_pretrained(folder)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    return model.eval()


def prefill(model: Any, n_tokens: int) -> float:
    """Seconds for one prompt and its first token; the fastest of three, the first warms up."""
    ids = random_ids(model, 1, n_tokens)
    return min(timed(model, lambda: forward(model, ids, None)[0]) for _ in range(3))


def decode_step(model: Any, batch: int, context: int, steps: int) -> float:
    """Seconds of the median step, after prompts of `context` tokens."""
    token, cache = forward(model, random_ids(model, batch, context), None)
    seconds = []
    for _ in range(steps):

        def step() -> torch.Tensor:
            nonlocal token, cache
            token, cache = forward(model, token, cache)
            return token

        seconds.append(timed(model, step))
    return statistics.median(seconds)


def forward(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """The likeliest next token of each sequence [batch, 1], and the cache."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


def timed(model: Any, run: Callable[[], torch.Tensor]) -> float:
    """Seconds until the host has the tokens."""
    torch.get_device_module(model.device).synchronize()
    started = time.perf_counter()
    run().tolist()
    return time.perf_counter() - started


def random_ids(model: Any, batch: int, n_tokens: int) -> torch.Tensor:
    """[batch, n_tokens] on the model's device."""
    ids = torch.randint(model.config.vocab_size, (batch, n_tokens))
    return ids.to(model.device)


if __name__ == "__main__":
    main()
