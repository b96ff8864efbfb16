"""A quantisation that is stopped goes on from the last finished layer, with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from octavo import Transformer
from octavo.checkpoint import writer
from octavo.errors import CheckpointError, OctavoError, QuantizeError
from octavo.quantize import streaming
from octavo.quantize.activations import Activations
from octavo.quantize.report import Report
from octavo.quantize.streaming import OnProgress
from tests.quantising import contents, run, write_source, write_texts

ROOT = Path(__file__).parent.parent

# Stops in the middle of the first layer, and waits there to be killed.
WAITS = """
import signal
import sys
from pathlib import Path
from tests.quantising import run

def wait(done, total):
    if done > 1.5:
        print("here", flush=True)
        signal.pause()

run(Path(sys.argv[1]), Path(sys.argv[2]), on_progress=wait)
"""


class Stopped(Exception):
    """What comes from outside."""


@dataclass(frozen=True)
class Whole:
    """A run that nothing stopped."""

    source: Path
    contents: dict[str, Any]
    progress: list[float]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("resume")
    source = write_source(folder / "source")
    progress: list[float] = []
    report = run(source, folder / "whole", on_progress=lambda done, total: progress.append(done))
    return Whole(source, contents(report.folder), progress)


def stop_at(point: float) -> OnProgress:
    def watch(done: float, total: int) -> None:
        if done >= point:
            raise Stopped

    return watch


def stop(whole: Whole, output: Path, point: float = 1.5, **changes: Any) -> Path:
    """The folder of a run that was stopped."""
    with pytest.raises(Stopped):
        run(whole.source, output, on_progress=stop_at(point), **changes)
    assert not output.exists()
    return output.with_name(f"{output.name}.unfinished")


def kept_files(unfinished: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in unfinished.iterdir() if file.name != ".lock"}


def refused(whole: Whole, output: Path, **changes: Any) -> str:
    """Why a stopped run does not go on; nothing that it finished may be lost by asking."""
    unfinished = output.with_name(f"{output.name}.unfinished")
    before = kept_files(unfinished)
    with pytest.raises(QuantizeError) as caught:
        run(whole.source, output, **changes)
    assert kept_files(unfinished) == before and not output.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_stopped_at_random_points_it_gives_the_same_bytes(
    whole: Whole, tmp_path: Path, seed: int
) -> None:
    for point in sorted(random.Random(seed).sample(whole.progress, 2)):
        stop(whole, tmp_path / "out", point)
    assert contents(run(whole.source, tmp_path / "out").folder) == whole.contents


@pytest.mark.parametrize("point", [0, 1, 2, 2.9, 3, 3.5, 4], ids=str)
def test_stopped_between_two_steps_or_in_the_head(
    whole: Whole, tmp_path: Path, point: float
) -> None:
    """The steps are 0, the embedding; 1 and 2, the layers; 3, the head; at 4 all is done."""
    unfinished = stop(whole, tmp_path / "out", point)
    done = len(list(unfinished.glob("*.safetensors")))
    assert done == int(point)
    again: list[float] = []
    report = run(whole.source, tmp_path / "out", on_progress=lambda at, total: again.append(at))
    assert contents(report.folder) == whole.contents
    assert again[0] == done  # nothing is done twice
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (writer, "copy_tokenizer"),
        (writer, "write_index"),
        (writer, "write_config"),
        (Report, "write"),
        (Path, "rename"),
    ],
)
def test_stopped_while_it_is_finishing(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def stopped(*arguments: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, stopped)
        unfinished = stop(whole, tmp_path / "out", point=99)
    assert contents(run(whole.source, tmp_path / "out").folder) == whole.contents
    assert not unfinished.exists()


def test_a_killed_process_leaves_what_another_goes_on_from(whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", WAITS, str(whole.source), str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "here\n"
            assert refused(whole, output).endswith("another process is quantising into it")
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    again: list[float] = []
    report = run(whole.source, output, on_progress=lambda done, total: again.append(done))
    assert contents(report.folder) == whole.contents and again[0] == 1


def test_it_goes_on_only_with_what_it_was_begun_with(whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "out"
    unfinished = stop(whole, output)
    other_texts = write_texts(tmp_path / "others.jsonl", 20, seed=5)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"scheme": "W4A8"}, "it was begun with scheme 'W8A8', not 'W4A8'"),
        ({"smoothing_strength": 0.5}, "begun with smoothing_strength 0.8, not 0.5"),
        ({"smoothing_strength": None}, "begun with smoothing_strength 0.8, not None"),
        ({"ignore": []}, "begun with ignore ['lm_head'], not []"),
        ({"rounding": "nearest"}, "begun with rounding 'gptq', not 'nearest'"),
        ({"num_calibration_samples": 5}, "begun with num_calibration_samples 10, not 5"),
        ({"attention_pattern": "full"}, "begun with attention_pattern [None, 8], not [None]"),
        ({"dtype": "bfloat16"}, "begun with dtype 'float32', not 'bfloat16'"),
        ({"dataset_id": other_texts}, "the calibration texts changed since"),
    ]
    for change, problem in changes:
        message = refused(whole, output, **change)
        assert message.startswith(f"{unfinished}: an unfinished quantisation that cannot go on: ")
        assert f"{problem}; put that back, remove the folder" in message
    assert contents(run(whole.source, output).folder) == whole.contents


def test_it_does_not_go_on_with_another_model(whole: Whole, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stop(whole, output)
    file = whole.source / "consolidated.safetensors"
    stat, weights = file.stat(), file.read_bytes()
    file.write_bytes(weights)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "the model's files changed since; put that back" in refused(whole, output)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents(run(whole.source, output).folder) == whole.contents


def test_a_model_that_changes_under_its_reader_is_noticed(whole: Whole, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")

    def touch(done: float, total: int) -> None:
        if done == 2:
            os.utime(source / "consolidated.safetensors", ns=(1, 1))

    with pytest.raises(QuantizeError, match="source: changed while it was read; start again"):
        run(source, tmp_path / "out", on_progress=touch)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("point", "problem"),
    [(1, "consolidated.safetensors: is gone"), (4, "source: changed while it was read")],
)
def test_a_model_that_is_removed_under_its_reader_is_named(
    whole: Whole, tmp_path: Path, point: int, problem: str
) -> None:
    source = write_source(tmp_path / "source")
    file = source / "consolidated.safetensors"
    stat = file.stat()

    def remove(done: float, total: int) -> None:
        if done == point:
            file.rename(tmp_path / "kept")

    with pytest.raises(OctavoError, match=problem):
        run(source, tmp_path / "out", on_progress=remove)
    shutil.move(tmp_path / "kept", file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert contents(run(source, tmp_path / "out").folder) == whole.contents


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "{",
        lambda values: "[]",
        lambda values: "{}",
        lambda values: json.dumps(values | {"settings": []}),
        lambda values: json.dumps(values | {"linears": [3]}),
        lambda values: json.dumps(values | {"linears": [{"linear": "lm_head"}]}),
        lambda values: json.dumps(values | {"steps_done": "two"}),
        lambda values: json.dumps(values | {"steps_done": -1}),
        lambda values: json.dumps(values | {"seconds": None}),
        lambda values: json.dumps(values | {"divergence": {"kl": 3}}),
    ],
)
def test_a_damaged_journal_is_named(
    whole: Whole, stopped: Path, damage: Callable[[dict[str, Any]], str]
) -> None:
    journal = stopped.with_name(f"{stopped.name}.unfinished") / "progress.json"
    kept = journal.read_text()
    journal.write_text(damage(json.loads(kept)))
    try:
        message = refused(whole, stopped)
        assert message == f"{journal}: damaged; remove {journal.parent} and start again"
    finally:
        journal.write_text(kept)


@pytest.fixture(scope="module")
def stopped(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was stopped and will not go on."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    stop(whole, output)
    return output


def test_activations_that_are_gone_are_named(whole: Whole, tmp_path: Path) -> None:
    """Made anew they would be zeros, and the model that came of them worthless."""
    unfinished = stop(whole, tmp_path / "out")
    file = unfinished / "activations-0.bin"
    kept = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(kept[:-1])):
        damage()
        assert "activations-0.bin: is missing or damaged" in refused(whole, tmp_path / "out")
    file.write_bytes(kept)
    assert contents(run(whole.source, tmp_path / "out").folder) == whole.contents


def test_an_unfinished_folder_is_no_model(stopped: Path) -> None:
    unfinished = stopped.with_name(f"{stopped.name}.unfinished")
    with pytest.raises(CheckpointError, match="unfinished: an unfinished quantisation; run the"):
        Transformer.from_folder(unfinished)


def test_a_second_run_in_the_same_process_waits_its_turn(whole: Whole, tmp_path: Path) -> None:
    problems: list[str] = []

    def begin_again(done: float, total: int) -> None:
        if done == 1:
            with pytest.raises(QuantizeError) as caught:
                run(whole.source, tmp_path / "out")
            problems.append(str(caught.value))

    report = run(whole.source, tmp_path / "out", on_progress=begin_again)
    assert problems == [f"{tmp_path / 'out'}.unfinished: another process is quantising into it"]
    assert contents(report.folder) == whole.contents


@pytest.mark.parametrize("changes", [{}, {"scheme": "W4A16"}, {"scheme": "W4A8"}], ids=str)
def test_activations_on_disk_give_the_same_bytes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The rows between two linears, too, then are computed again and not kept."""
    expected = contents(run(whole.source, tmp_path / "resident", **changes).folder)
    opened: list[bool] = []
    plain = Activations.__init__

    def watch(self: Activations, path: Path, n: int, width: int, dtype: Any, kept: bool) -> None:
        opened.append(kept)
        plain(self, path, n, width, dtype, kept)

    monkeypatch.setattr(Activations, "__init__", watch)
    monkeypatch.setattr(streaming, "plan", lambda *arguments: (False, 0))
    assert contents(run(whole.source, tmp_path / "on-disk", **changes).folder) == expected
    assert opened == [False] * 4
