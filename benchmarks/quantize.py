"""octavo's quantiser beside llm-compressor's: what both lose, how long they take, in what memory.

Both quantise the same model from the same token ids with the same recipe (SmoothQuant 0.8, GPTQ,
dampening 0.1, the head left out), each in a process of its own, timed from its start to its end.
octavo stands there twice: with that recipe alone, and as it is by default, with clipping and inner
smoothing. Plain rounding stands beside them. Each result then runs in octavo in fp32, and is
measured by KL divergence from the original on held-out text. octavo's time includes its own report
of the same, which llm-compressor does not make. A second model is the first one with activation
outliers: the same function, in which plain rounding must fail.

    python3 -m venv build/llm-compressor
    build/llm-compressor/bin/pip install torch==2.13.0 llmcompressor
    build/llm-compressor/bin/pip install --editable .
    build/llm-compressor/bin/python -m benchmarks.quantize
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from octavo import Transformer
from octavo.checkpoint import Checkpoint, open_checkpoint, resolve_model
from octavo.checkpoint.mistral import interleaved_from_half_split
from octavo.checkpoint.writer import copy_tokenizer, mistral_params, write_json
from octavo.evaluate.divergence import Divergence
from octavo.evaluate.outliers import with_outliers
from octavo.quantize import quantize
from octavo.quantize.calibration import Samples, read_samples
from octavo.tokenizer import Tokenizer

CHANNELS, FACTOR = (3, 40, 101), 256.0  # of the outliers
MAX_LENGTH = 2048
METHODS = ("plain rounding", "octavo, same recipe", "octavo", "llm-compressor")
Row = dict[str, Any]


def main() -> None:
    """Quantise each model by each method, measure, print a table."""
    options = parse_arguments()
    if options.worker:
        work(options)
        return
    source = resolve_model(options.model)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        outliers = Path(temporary) / "outliers"
        write_outliers(open_checkpoint(source), outliers)
        for model in (source, outliers):
            samples = samples_of(source, options.samples)
            for method in METHODS:
                folder = Path(temporary) / "quantised"
                row = run_worker(method, model, source, folder, options)
                row |= measure(open_checkpoint(source), folder, samples.held_out)
                rows.append({"model": model.name, "method": method} | row)
                print(rows[-1], file=sys.stderr, flush=True)
                folder.rename(Path(temporary) / f"{model.name}-{method.replace(' ', '-')}")
    result = {
        "calibration_tokens": sum(map(len, samples.calibration)),
        "held_out_tokens": sum(map(len, samples.held_out)),
        "scheme": options.scheme,
        "dtype": options.dtype,
        "versions": {
            name: version(name)
            for name in ("octavo", "llmcompressor", "compressed-tensors", "transformers", "torch")
        },
        "rows": rows,
    }
    print_table(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="demo", help="folder, hub id or `demo`, unquantised")
    parser.add_argument("--samples", type=int, default=1024, help="calibration texts")
    parser.add_argument("--scheme", default="W8A8", help="of all methods")
    parser.add_argument("--dtype", default="float32", help="that both compute in")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def samples_of(source: Path, n_samples: int) -> Samples:
    """The same texts for every method."""
    tokenizer = Tokenizer.for_model(source, open_checkpoint(source).config)
    return read_samples(
        source,
        tokenizer,
        dataset_id=None,
        dataset_split="train",
        num_samples=n_samples,
        max_length=MAX_LENGTH,
    )


def write_outliers(checkpoint: Checkpoint, folder: Path) -> None:
    """The copy with outliers, in Mistral's layout, with everything that lies beside the model."""
    state = with_outliers(checkpoint.load(), CHANNELS, FACTOR)
    for name, tensor in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            state[name] = interleaved_from_half_split(tensor, checkpoint.config.head_dim)
    folder.mkdir()
    write_json(folder / "params.json", mistral_params(checkpoint.config))
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "consolidated.safetensors")
    copy_tokenizer(checkpoint.folder, folder, checkpoint.folder / "tekken.json")
    for name in ("calibration.jsonl", "held_out.jsonl"):
        (folder / name).write_bytes((checkpoint.folder / name).read_bytes())


def run_worker(
    method: str, model: Path, source: Path, folder: Path, options: argparse.Namespace
) -> Row:
    """One method in a process of its own: seconds from start to end, and its peak of memory."""
    started = time.perf_counter()
    command = [
        sys.executable, "-m", "benchmarks.quantize",
        "--worker", method, "--model", str(model), "--source", str(source),
        "--output", str(folder), "--samples", str(options.samples), "--dtype", options.dtype,
        "--scheme", options.scheme,
    ]  # fmt: skip
    process = os.posix_spawn(
        sys.executable,
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{method} on {model} failed")
    return {"seconds": time.perf_counter() - started, "peak_rss_bytes": usage.ru_maxrss * 1024}


def work(options: argparse.Namespace) -> None:
    """What the process of a method does."""
    if options.worker == "llm-compressor":
        from benchmarks.llm_compressor import quantize as llm_compressor
        from benchmarks.llm_compressor import to_transformers

        checkpoint = open_checkpoint(Path(options.model))
        samples = samples_of(options.source, options.samples)
        with tempfile.TemporaryDirectory() as temporary:
            unquantised = Path(temporary)
            to_transformers(checkpoint, checkpoint.dtype).save_pretrained(unquantised)
            llm_compressor(
                unquantised,
                samples.calibration,
                options.output,
                MAX_LENGTH,
                options.dtype,
                options.scheme,
            )
        return
    plain = options.worker == "plain rounding"
    quantize(
        options.model,
        scheme=options.scheme,
        num_calibration_samples=options.samples,
        max_sequence_length=MAX_LENGTH,
        output_dir=options.output,
        smoothing_strength=None if plain else 0.8,
        rounding="nearest" if plain else "gptq",
        clipping=options.worker == "octavo",
        inner_smoothing=options.worker == "octavo",
        sample_prompt=None,
        dtype=options.dtype,
    )


@torch.inference_mode()
def measure(original: Checkpoint, folder: Path, texts: Sequence[list[int]]) -> Row:
    """KL divergence and perplexity of a quantised folder in octavo, computed in fp32."""
    reference = Transformer.from_checkpoint(original, torch.float32)
    quantized = Transformer.from_folder(folder, dtype=torch.float32)
    divergence = Divergence()
    for text in texts:
        ids = torch.tensor(text)
        divergence.add(reference(ids, [len(ids)]), quantized(ids, [len(ids)]), ids[1:])
    return {
        "kl": divergence.kl,
        "perplexity": divergence.perplexity,
        "perplexity_original": divergence.perplexity_reference,
    }


def print_table(result: dict[str, Any]) -> None:
    """The figures, for people."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{result['scheme']}, computed in {result['dtype']} ({versions})")
    print(
        f"calibrated on {result['calibration_tokens']:,} tokens, "
        f"measured on {result['held_out_tokens']:,} others\n"
    )
    print("| model | method | KL, nats a token | perplexity | seconds | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        print(
            f"| {row['model']} | {row['method']} | {row['kl']:.6f} | {row['perplexity']:.3f} "
            f"(original {row['perplexity_original']:.3f}) | {row['seconds']:.1f} "
            f"| {row['peak_rss_bytes'] / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
