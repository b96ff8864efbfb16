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
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.figures import write_figures
from octavo import Transformer
from octavo.checkpoint import Checkpoint, open_checkpoint, resolve_model
from octavo.checkpoint.writer import copy_tokenizer
from octavo.evaluate.divergence import Divergence
from octavo.evaluate.outliers import with_outliers
from octavo.quantize.quantize import quantize

CHANNELS, FACTOR = (3, 40, 101), 256.0  # of the outliers
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
            samples = common.samples_of(source, options.samples)
            for method in METHODS:
                folder = Path(temporary) / "quantised"
                row = run_worker(method, model, source, folder, options)
                row |= measure(open_checkpoint(source), folder, samples.held_out)
                rows.append({"model": model.name, "method": method} | row)
                print(rows[-1], file=sys.stderr, flush=True)
                folder.rename(Path(temporary) / f"{model.name}-{method.replace(' ', '-')}")
    result = common.conditions(samples) | {
        "scheme": options.scheme,
        "dtype": options.dtype,
        "rows": rows,
    }
    common.print_table(
        f"{options.scheme}, computed in {options.dtype}", result, [cells(row) for row in rows]
    )
    write_figures(result, options.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = common.make_parser(__doc__)
    common.add_model(parser)
    parser.add_argument("--scheme", default="W8A8", help="of all methods")
    parser.add_argument("--dtype", default="float32", help="that both compute in")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_outliers(checkpoint: Checkpoint, folder: Path) -> None:
    """The copy with outliers, with everything that lies beside the model."""
    state = with_outliers(checkpoint.load(), CHANNELS, FACTOR)
    common.write_unquantised(checkpoint, state, folder)
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
        from benchmarks import llm_compressor

        checkpoint = open_checkpoint(Path(options.model))
        samples = common.samples_of(options.source, options.samples)
        with tempfile.TemporaryDirectory() as temporary:
            unquantised = Path(temporary) / "unquantised"
            common.write_unquantised(checkpoint, checkpoint.load(), unquantised)
            llm_compressor.quantize(
                unquantised, samples.calibration, options.output, options.dtype, options.scheme
            )
        return
    plain = options.worker == "plain rounding"
    quantize(
        options.model,
        scheme=options.scheme,
        num_calibration_samples=options.samples,
        max_sequence_length=common.MAX_LENGTH,
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


def cells(row: Row) -> dict[str, str]:
    """A row of the table."""
    return {
        "model": row["model"],
        "method": row["method"],
        "KL, nats a token": f"{row['kl']:.6f}",
        "perplexity": f"{row['perplexity']:.3f} (original {row['perplexity_original']:.3f})",
        "seconds": f"{row['seconds']:.1f}",
        "peak memory": f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
    }


if __name__ == "__main__":
    main()
