"""Text that repeats itself, with prompt lookup and without: the same tokens, how much sooner.

    python -m benchmarks.prompt_lookup

The model has the 8B's shape and random weights but for two things. What its layers add is
multiplied by zero, so that the stream stays the token's embedding; and the head is the embedding
with its rows moved on by one within every run of `--period`. So each token is followed by the next
of its run, and the text goes round. All the work is done all the same, whatever the numbers.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from octavo.bench.random_model import random_state
from octavo.bench.shapes import find_shape, quantised
from octavo.config import ModelConfig
from octavo.engine.engine import Engine
from octavo.engine.sampling_params import SamplingParams
from octavo.model import Transformer


def main() -> None:
    """Both ways, a table, and whether they said the same."""
    options = parse_arguments()
    config = quantised(find_shape(options.shape, options.layers), "w8a8", "bf16")
    if config.vocab_size % options.period:
        raise SystemExit(f"--period: {options.period} does not divide {config.vocab_size} tokens")
    with torch.device("meta"):
        model = Transformer(config)
    model.with_weights(repeating_state(config, options.period)).pack()
    rows = {on: measure(model, options, on) for on in (False, True)}
    same = rows[True]["tokens"] == rows[False]["tokens"]
    result: dict[str, Any] = {
        "layers": config.n_layers,
        "tokens": options.tokens,
        "threads": torch.get_num_threads(),
        "off_tok_s": rows[False]["tok_s"],
        "on_tok_s": rows[True]["tok_s"],
        "passes": {"off": rows[False]["passes"], "on": rows[True]["passes"]},
        "same_tokens": same,
        "ratio": rows[True]["tok_s"] / rows[False]["tok_s"],
    }
    print("| prompt lookup | tokens/s | passes |\n| --- | --- | --- |")
    for on, name in ((False, "off"), (True, "on")):
        print(f"| {name} | {rows[on]['tok_s']:.2f} | {rows[on]['passes']} |")
    print(
        f"\n{result['ratio']:.2f} times as fast; the tokens are {'the same' if same else 'OTHERS'}"
    )
    write_figures(result, options.json)
    if not same:
        raise SystemExit("prompt lookup changed the answer")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="ministral-8b", help="as octavo bench takes it")
    parser.add_argument("--layers", type=int, default=4, help="of the shape's")
    parser.add_argument("--period", type=int, default=64, help="tokens after which it repeats")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="that are generated")
    parser.add_argument("--kv", default="auto", help="dtype of the KV cache")
    return parser.parse_args()


def repeating_state(config: ModelConfig, period: int) -> dict[str, Tensor]:
    """Weights with which every token is followed by the next of its run of `period`."""
    state = random_state(config)
    for name, tensor in state.items():
        if name.endswith(("wo.weight_scale", "w2.weight_scale")):
            tensor.zero_()
    embedding = state["tok_embeddings.weight"].unflatten(0, (-1, period))
    state["output.weight"] = embedding.roll(1, dims=1).flatten(0, 1)
    return state


def measure(model: Transformer, options: argparse.Namespace, on: bool) -> dict[str, Any]:
    """Tokens a second after the first, the passes that made them, and the tokens."""
    engine = Engine(
        model, max_model_len=options.prompt + options.tokens, max_num_seqs=1, speculate=on,
        kv_cache_dtype=options.kv,
    )  # fmt: skip
    prompt = [i % options.period for i in range(options.prompt)]
    params = SamplingParams(max_tokens=options.tokens, temperature=0)
    n_passes, n_first, started = 0, 0, 0.0
    for output in engine.stream(engine.add_request(prompt, params)):
        tokens = list(output.outputs[0].token_ids)
        if not n_first:
            n_first, started = len(tokens), time.perf_counter()
        else:
            n_passes += 1
    seconds = time.perf_counter() - started
    return {"tok_s": (len(tokens) - n_first) / seconds, "passes": n_passes, "tokens": tokens}


if __name__ == "__main__":
    main()
