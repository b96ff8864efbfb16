"""A small model that brings its texts, so that quantising it takes about a second.

source = write_source(folder)                     # bf16, Mistral's layout, two layers
report = run(source, folder / "out", scheme="W4A16")
tensors = read_tensors(report.folder)
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from octavo import Transformer
from octavo.checkpoint import DEMO
from octavo.config import ModelConfig
from octavo.errors import OctavoError
from octavo.evaluate.divergence import Divergence
from octavo.quantize.calibration import Samples, read_samples
from octavo.quantize.quantize import quantize
from octavo.quantize.report import Report
from octavo.tokenizer import Tokenizer
from tests.checkpoints import (
    State,
    hugging_face_module,
    quantized_config,
    write_hugging_face,
    write_mistral,
)

N_CALIBRATION, N_HELD_OUT = 10, 4
# Of a run's wall clock and memory, and so never the same twice.
MEASURED = ("seconds", "peak_rss_bytes")


def source_config(windows: tuple[int | None, ...] = (None, 8), **overrides: Any) -> ModelConfig:
    """Two layers whose inputs groups of 128 divide, with the bundled tokenizer's vocabulary."""
    sizes = {"n_layers": 2, "vocab_size": 2048, "max_seq_len": 512}
    return quantized_config(windows, **sizes | overrides)


def write_source(
    folder: Path,
    config: ModelConfig | None = None,
    state: State | None = None,
    dtype: torch.dtype = torch.bfloat16,
    hugging_face: bool = False,
) -> Path:
    """A random model with the bundled tokenizer and texts of its own; gives `folder` back."""
    config = config or source_config()
    if hugging_face:
        model_type = "ministral" if len(set(config.windows)) > 1 else "mistral"
        write_hugging_face(folder, config, state, dtype=dtype, model_type=model_type)
    else:
        write_mistral(folder, config, state, dtype=dtype)
    shutil.copy(DEMO / "tekken.json", folder)
    write_texts(folder / "calibration.jsonl", N_CALIBRATION)
    write_texts(folder / "held_out.jsonl", N_HELD_OUT, seed=1)
    return folder


def write_texts(path: Path, n: int, seed: int = 0) -> Path:
    """`n` texts of a few dozen random words."""
    draw = random.Random(seed)
    words = ["model", "the", "scale", "of", "seven", "weights", "rounds", "under", "and", "paper"]
    lines = [{"text": " ".join(draw.choices(words, k=draw.randint(20, 60)))} for _ in range(n)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def run(source: Path | str, output: Path, **changes: Any) -> Report:
    """`quantize` in fp32, on all the texts that the source brings, without a sample prompt."""
    options: dict[str, Any] = {"sample_prompt": None, "dtype": "float32", "device": "cpu"}
    options["num_calibration_samples"] = N_CALIBRATION
    return quantize(source, output_dir=output, **options | changes)


def fails(source: Path | str, output: Path, **changes: Any) -> str:
    """The one line of a run that must fail, and leave no model behind."""
    with pytest.raises(OctavoError) as caught:
        run(source, output, **changes)
    assert "\n" not in str(caught.value)
    assert not (output / "config.json").exists()
    return str(caught.value)


def samples_of(source: Path, num_samples: int = N_CALIBRATION) -> Samples:
    """The texts that `run` quantises a source by."""
    return read_samples(
        source,
        Tokenizer.from_folder(source),
        dataset_id=None,
        dataset_split="train",
        num_samples=num_samples,
        max_length=512,
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by its name there."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes by its name; the report without what is never the same twice."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = json.loads(files["report.json"])
    assert all(report.pop(name) > 0 for name in MEASURED)
    return files | {"report.json": report}


def divergence(source: Path, found: Callable[[Tensor], Tensor]) -> Divergence:
    """Of the logits that `found` gives for each held-out text, from the source's in fp32."""
    original = Transformer.from_folder(source, dtype="float32")
    total = Divergence()
    for text in samples_of(source).held_out:
        ids = torch.tensor(text)
        total.add(original(ids, [len(ids)]), found(ids), ids[1:])
    return total


def lost(source: Path, folder: Path) -> Divergence:
    """As `divergence`, of the quantised model in octavo."""
    model = Transformer.from_folder(folder, dtype="float32")
    return divergence(source, lambda ids: model(ids, [len(ids)]))


def quantised_modules(folder: Path) -> set[str]:
    """Hugging Face names of the linears that have scales on disk."""
    suffix = ".weight_scale"
    return {name.removesuffix(suffix) for name in read_tensors(folder) if name.endswith(suffix)}


def all_modules(*but: str) -> set[str]:
    """Hugging Face names of all linears of a source, without those that end in one of `but`."""
    names = map(hugging_face_module, source_config().linear_names())
    return {name for name in names if not name.endswith(but)}
