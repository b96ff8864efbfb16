"""What the quantiser's benchmarks share: their command line, texts, tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.checkpoint import Checkpoint, open_checkpoint, writer
from octavo.quantize.calibration import Samples, read_samples
from octavo.tokenizer import Tokenizer

MAX_LENGTH = 2048  # tokens of a text
PACKAGES = ("octavo", "llmcompressor", "compressed-tensors", "transformers", "torch")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser for the module with this docstring, with `--json`."""
    parser = argparse.ArgumentParser(
        description=(doc or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say which model is quantised, and on how much."""
    parser.add_argument("--model", default="demo", help="folder, hub id or `demo`, unquantised")
    parser.add_argument("--samples", type=int, default=1024, help="calibration texts")


def samples_of(source: Path, n_samples: int, dataset_id: str | None = None) -> Samples:
    """The same texts for every method and every runtime."""
    return read_samples(
        source,
        Tokenizer.for_model(source, open_checkpoint(source).config),
        dataset_id=dataset_id,
        dataset_split="train",
        num_samples=n_samples,
        max_length=MAX_LENGTH,
    )


def write_unquantised(checkpoint: Checkpoint, state: dict[str, Tensor], folder: Path) -> None:
    """A model of this architecture in Hugging Face's layout, as transformers needs it.

    Args:
        checkpoint: the original.
        state: its weights, or such as do the same, by their names in `octavo.model`.
        folder: is made.
    """
    if checkpoint.config.quantization is not None:
        raise SystemExit(f"--model: {checkpoint.folder} is quantised already; give its original")
    writer.require_expressible(checkpoint.config)
    folder.mkdir()
    writer.write_shard(folder / writer.shard_name(1, 1), state)
    writer.write_index(folder)
    writer.write_config(folder, checkpoint.config, checkpoint.dtype, (), {})


def conditions(samples: Samples) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "calibration_tokens": sum(map(len, samples.calibration)),
        "held_out_tokens": sum(map(len, samples.held_out)),
        "versions": {name: version(name) for name in PACKAGES},
    }


def print_table(title: str, result: Mapping[str, Any], rows: Sequence[Mapping[str, str]]) -> None:
    """The figures, for people; all rows have the same columns."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{title} ({versions})")
    print(
        f"calibrated on {result['calibration_tokens']:,} tokens, "
        f"measured on {result['held_out_tokens']:,} others\n"
    )
    for cells in (list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print(f"| {' | '.join(cells)} |")
