"""What can be wrong with a quantisation's options, model, texts or machine: each is one line."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from octavo import Transformer, quantize
from octavo.checkpoint import DEMO, writer
from octavo.config import parse_bytes
from octavo.errors import QuantizeError
from octavo.jsonl import read_jsonl
from octavo.quantize import calibration, streaming
from octavo.quantize.activations import Activations
from tests.checkpoints import small_config, write_w8a8
from tests.quantising import contents, fails, run, source_config, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("errors") / "source")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scheme": "W2A2"}, "scheme: 'W2A2' is not one of W8A8, W4A16"),
        ({"ignore": ["lm_haed"]}, "ignore: 'lm_haed' is no linear of this model; write lm_head"),
        ({"ignore": ["re:.*qproj"]}, "ignore: 're:.*qproj' is no linear of this model"),
        ({"ignore": ["re:*"]}, "ignore: 're:*' is no pattern: nothing to repeat"),
        ({"ignore": ["re:.*"]}, "ignore: leaves no linear to quantise"),
        ({"device": "tpu"}, "device: 'tpu' is none of auto, cpu, cuda"),
        ({"device": "meta"}, "device: 'meta' is none of auto, cpu, cuda"),
        ({"dtype": "int3"}, "dtype: 'int3' is not one of auto, bfloat16"),
        ({"max_memory": "lots"}, "max_memory: 'lots' is no amount of memory"),
        ({"max_memory": 0}, "max_memory: 0 is no amount of memory"),
        ({"smoothing_strength": 1.5}, "smoothing_strength must be from 0 to 1, not 1.5"),
        ({"smoothing_strength": float("nan")}, "smoothing_strength must be from 0 to 1, not nan"),
        ({"dampening_frac": -0.1}, "dampening_frac must be 0 or more and finite, not -0.1"),
        ({"dampening_frac": float("inf")}, "dampening_frac must be 0 or more and finite, not inf"),
        ({"rounding": "up"}, "rounding: 'up' is neither gptq nor nearest"),
        ({"attention_pattern": "8,8,8"}, "--attention-pattern: its 3 entries do not divide"),
        ({"attention_pattern": "8,16"}, "attention pattern: has windows of 2 sizes"),
        ({"sample_prompt": "long " * 500}, "100 more do not fit the model's context of 512"),
        ({"num_calibration_samples": 0}, "--num_calibration_samples is 0"),
        ({"max_sequence_length": 1}, "--max_sequence_length is 1"),
        ({"dataset_id": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json: no such tokenizer"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_users_mistake_is_one_line(
    source: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    assert problem in fails(source, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_too_little_memory_says_how_much_it_takes(source: Path, tmp_path: Path) -> None:
    message = fails(source, tmp_path / "out", max_memory="100M")
    assert message.startswith("max_memory: 100M is too little for this model and ")
    needed = message.rsplit("it needs ", 1)[1]
    assert 0.5 < parse_bytes(needed, "max_memory") / 2**30 < 1.5
    assert run(source, tmp_path / "out", max_memory=needed).folder.is_dir()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_finishes_nothing_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    fails(source, tmp_path / "out", max_memory="100M")
    monkeypatch.setattr(streaming, "write_shard", fail)
    with pytest.raises((QuantizeError, KeyboardInterrupt)):
        run(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    mine = tmp_path / "out.unfinished" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises((QuantizeError, KeyboardInterrupt)):
        run(source, tmp_path / "out")
    assert mine.read_text() == "mine"


def test_an_output_that_another_process_made_meanwhile_is_not_touched(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path: Path) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs.txt").write_text("theirs")
        return read_jsonl(path)

    monkeypatch.setattr(calibration, "read_jsonl", slow)
    assert "out: exists already" in fails(source, tmp_path / "out")
    assert {file.name for file in tmp_path.rglob("*")} == {"out", "theirs.txt"}


def test_a_model_that_is_not_there_or_quantised_already(source: Path, tmp_path: Path) -> None:
    assert "no such folder" in fails("nowhere/at/all", tmp_path / "out")
    folder = write_w8a8(tmp_path / "w8a8", small_config(vocab_size=2048))
    assert fails(folder, tmp_path / "out") == (
        f"{folder}: is quantised already (W8A8); give the original"
    )


def test_an_output_that_is_there_is_not_touched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        assert fails(source, tmp_path / name) == (
            f"{tmp_path / name}: exists already; remove it or give another --output_dir"
        )
    assert (tmp_path / "out" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"out", "file"}
    assert "file/out.unfinished: cannot be written" in fails(source, tmp_path / "file" / "out")


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
def test_groups_that_do_not_divide_a_linear(tmp_path: Path, scheme: str) -> None:
    source = write_source(tmp_path / "source", source_config(dim=64))
    problem = f"{scheme} shares a scale among 128 inputs, which does not divide a linear with 64"
    assert problem in fails(source, tmp_path / "out", scheme=scheme)
    assert run(source, tmp_path / "out", scheme="W8A8").kl < 0.1


def test_a_tied_head_cannot_be_quantised(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", source_config(tied_embeddings=True))
    assert fails(source, tmp_path / "out", ignore=[]).startswith("ignore: must hold lm_head")


def test_two_window_sizes_have_no_config(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", source_config((8, 16)))
    assert "has windows of 2 sizes" in fails(source, tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error: I/O error: No space left on device (os error 28)")

    output = tmp_path / "out"
    expected = f"{output}.unfinished: the disk is full; free some room and run the same command"
    for owner, name, error in (
        (os, "posix_fallocate", full),
        (writer, "save_file", full_in_rust),
        (os, "fsync", full),
        (writer, "copy_tokenizer", full),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, error)
            assert fails(source, output).startswith(expected), name
    report = run(source, output)
    assert contents(report.folder) == contents(run(source, tmp_path / "other").folder)


def test_activations_without_room_do_not_pass_for_some_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed run's file is taken as it is if it has the right size."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Activations(tmp_path / "rows.bin", 3, 4, torch.float32, resident=True)
    assert (tmp_path / "rows.bin").stat().st_size == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: not enough memory"),
    ],
    ids=["python", "torch"],
)
def test_out_of_memory_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "quantize_layer", fail)
        message = fails(source, tmp_path / "out")
    assert "out of memory; run the same command again with a smaller --max_memory" in message
    assert run(source, tmp_path / "out").kl < 0.1


def test_any_other_error_stays_what_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(streaming, "quantize_layer", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(source, tmp_path / "out")


def test_the_default_output_lies_beside_the_model(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(source, copy)
    report = quantize(f"{copy}/", scheme="fp8", sample_prompt=None, num_calibration_samples=4)
    assert report.folder == tmp_path / "model-FP8"
    assert Transformer.from_folder(report.folder).dtype == torch.bfloat16
    assert (report.folder / "tekken.json").read_bytes() == (DEMO / "tekken.json").read_bytes()
