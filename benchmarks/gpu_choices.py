"""What the GPU's kernels were reckoned to gain, measured: each choice beside what it replaced.

    python -m benchmarks.gpu_choices --json build/gpu_choices.json

Both ways of a choice take turns in this process, on the same model and the same random numbers; the
faster of each way's rounds counts. A ratio above 1 says that the choice is right on this GPU. Those
of Hopper alone change nothing elsewhere.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import attention
from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from benchmarks.gpu import last_prompt
from octavo import kernels
from octavo.bench.random_model import random_model
from octavo.bench.run import Run
from octavo.bench.settings import BenchSettings
from octavo.bench.shapes import find_shape, quantised
from octavo.device import choose_device, current
from octavo.errors import ConfigError
from octavo.kernels.cuda import (
    append,
    call,
    decode,
    dequantize,
    prefill,
    quantize,
    tiling,
    top_p,
    w8a8,
)
from octavo.kernels.cuda.call import Blocks
from octavo.model import Transformer
from octavo.version import __version__

LAUNCHING = (append, call, decode, dequantize, quantize, top_p, w8a8)
ROWS = 64  # that are sampled at once
Instead = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Choice:
    """One of the kernels' choices.

    Attributes:
        name: what is chosen.
        measured: `step`, a decode step of one sequence; `bf16` or `int8`, attention of a chunk over
            keys and values in that; `top_p`, of 64 rows.
        instead: while it lasts, what was before the choice.
    """

    name: str
    measured: str
    instead: Instead


def launched_in_turn() -> ExitStack:
    """Kernels begin when the one before has ended."""
    stack = ExitStack()
    for module in LAUNCHING:
        stack.enter_context(patch.object(module, "early_launch", dict))
    return stack


def short_blocks() -> AbstractContextManager[object]:
    """Attention of a chunk in blocks of 64 keys, or as few as they are of."""
    chosen = prefill.block_sizes

    def at_most_64(*arguments: Any) -> Blocks:
        blocks = chosen(*arguments)
        return blocks._replace(keys=min(blocks.keys, 64))

    return patch.object(prefill, "block_sizes", at_most_64)


CHOICES = (
    Choice("kernels are launched early", "step", launched_in_turn),
    Choice(
        "weights are asked for before their inputs are there", "step",
        partial(patch.object, w8a8, "FETCHED_BYTES", 0),
    ),
    Choice(
        "six blocks of a weight are under way, not four", "step",
        partial(patch.object, tiling, "DEEP", 4),
    ),
    Choice("attention in blocks of 128 keys, not 64", "bf16", short_blocks),
    Choice(
        "int8 keys and values are written out first", "int8",
        partial(patch.object, dequantize, "MANY_QUERIES", 2**30),
    ),
    Choice(
        "top_p by the bits of the least weight, not by sorting", "top_p",
        partial(patch.object, top_p, "usable", lambda: False),
    ),
)  # fmt: skip


def main() -> None:
    """Measure every choice; print a table."""
    options = parse_arguments()
    try:
        device = choose_device(options.device)
    except ConfigError as error:
        sys.exit(f"benchmarks.gpu_choices needs a GPU that PyTorch can use: {error}")
    # Attention says on stdout how far it is.
    options.device = device
    with torch.inference_mode(), current(device), redirect_stdout(sys.stderr):
        rows = measure(options)
    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "versions": {"octavo": __version__, "torch": torch.__version__},
        "rows": rows,
    }
    print(f"{result['gpu'] or device}, {result['date']}\n")
    print("| choice | of | chosen (ms) | instead (ms) | ratio |")
    print("| --- " * 5 + "|")
    for row in rows:
        chosen, instead = 1000 * row["chosen_s"], 1000 * row["instead_s"]
        print(
            f"| {row['choice']} | {row['of']} | {chosen:.3f} | {instead:.3f} | {row['ratio']:.3f} |"
        )
    write_figures(result, options.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try it")
    parser.add_argument("--shape", default="ministral-8b", help="as octavo bench takes it")
    parser.add_argument("--layers", type=int, default=8, help="of the shape's")
    parser.add_argument("--context", type=int, default=1024, help="tokens before decoding")
    parser.add_argument("--steps", type=int, default=64, help="of decoding")
    parser.add_argument("--queries", type=int, default=4096, help="of a chunk")
    parser.add_argument("--keys", type=int, default=131_072, help="that end with the chunk's own")
    parser.add_argument("--seconds", type=float, default=0.5, help="of attention, a round")
    parser.add_argument("--rounds", type=int, default=2, help="of each way")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each choice."""
    config = quantised(find_shape(options.shape, options.layers), "w8a8", "bf16")
    model = random_model(config, 0, options.device)
    last = last_prompt(options.context)
    settings = BenchSettings(
        shape=options.shape, layers=options.layers, prompt=last, context=options.context - last,
        decode=options.steps, device=str(options.device),
    )  # fmt: skip
    ways: dict[str, Callable[[], float]] = {
        "step": partial(step_seconds, settings, model),
        "bf16": partial(chunk_seconds, "bf16", options),
        "int8": partial(chunk_seconds, "int8", options),
        "top_p": partial(top_p_seconds, config.vocab_size, options),
    }
    names = {
        "step": f"a decode step of {config.n_layers} layers after {options.context:,} tokens",
        **{kv: f"{options.queries:,} x {options.keys:,}, {kv}" for kv in ("bf16", "int8")},
        "top_p": f"{ROWS} rows of {config.vocab_size:,}",
    }
    rows = []
    for choice in CHOICES:
        chosen, instead = [], []
        for _ in range(options.rounds):
            chosen.append(ways[choice.measured]())
            with choice.instead():
                instead.append(ways[choice.measured]())
        rows.append(
            {
                "choice": choice.name,
                "of": names[choice.measured],
                "chosen_s": min(chosen),
                "instead_s": min(instead),
                "ratio": min(instead) / min(chosen),
            }
        )
        print(f"{choice.name}: {rows[-1]['ratio']:.3f}", flush=True)
    return rows


def step_seconds(settings: BenchSettings, model: Transformer) -> float:
    """The median step, as `octavo bench` has it, by graphs captured anew."""
    run = Run(settings, model)
    run.read_prompts()
    return statistics.median(run.generate().seconds)


def chunk_seconds(kv: str, options: argparse.Namespace) -> float:
    """Attention of a chunk at the end of its keys, in full; the fastest."""
    own = argparse.Namespace(
        queries=[options.queries], keys=options.keys, window=options.keys, context=options.keys,
        seconds=options.seconds, device=options.device,
    )  # fmt: skip
    return float(next(attention.measure(kv, own))["seconds"])


def top_p_seconds(vocab_size: int, options: argparse.Namespace) -> float:
    """The choice of tokens that reach 0.9, for a batch; the fastest."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, vocab_size, generator=generator)
    weights = logits.softmax(-1).to(options.device)
    shares = torch.full((ROWS, 1), 0.9, device=options.device)
    return attention.best_seconds(lambda: kernels.keep_top_p(weights.clone(), shares), options)


if __name__ == "__main__":
    main()
