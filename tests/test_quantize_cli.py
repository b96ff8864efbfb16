"""`octavo quantize` as a user types it: the script's options, what it prints, how it fails."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import octavo
from octavo import Transformer
from octavo.cli.quantize import LayerProgress, spread_ignore
from octavo.quantize.report import Report
from tests.quantising import contents, source_config, write_source, write_texts
from tests.quantising import run as quantise
from tests.test_cli import Capsys, fails, run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("quantize-cli") / "source")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command asks of `octavo.quantize`, which then ends as a run that was stopped."""
    options: dict[str, Any] = {}

    def record(model_id: str, **given: Any) -> Report:
        options.update(given, model_id=model_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(octavo, "quantize", record)
    return options


def test_it_quantises_and_prints_what_that_cost(
    source: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as `octavo.quantize` with the same options."""
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(
        capsys, "quantize", "--model_id", source, "--output_dir", tmp_path / "out",
        "--num_calibration_samples", 100, "--scheme", "w4a8", "--dtype", "float32",
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    assert contents(tmp_path / "out") == contents(
        quantise(
            source,
            tmp_path / "other",
            num_calibration_samples=100,
            scheme="W4A8",
            sample_prompt="Hello my name is",
        ).folder
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"{report['kl']:.6f} nats a token" in out
    assert f"{report['perplexity_original']:.4f} before" in out
    assert f"{report['linears'][0]['nearest']:.2%} {report['linears'][0]['quantized']:.2%}" in out
    assert "tokens of calibration.jsonl, 10 of 10 texts" in " ".join(out.split())
    assert "Sample generation" in out and report["sample"][:20] in out
    assert out.endswith(f"{tmp_path / 'out'}\n")
    lines = err.splitlines()
    steps = [f"{step} of 4 steps done" for step in (1, 2, 3, 4)]
    assert [line.split(",")[0] for line in lines[:4]] == steps
    assert lines[4:] == ["octavo: asked for 100 samples, found 10"]


def test_the_default_output_is_model_and_scheme(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    shutil.copytree(source, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "quantize", "--model-id", "model", "--num-calibration-samples", 4,
        "--no-smoothing", "--rounding", "nearest", "--no-clipping", "--dtype", "float32",
        "--ignore",
    )  # fmt: skip
    assert code == 0 and out.endswith("model-W8A8\n")
    quantization = Transformer.from_folder(tmp_path / "model-W8A8").config.quantization
    assert quantization is not None
    assert quantization.linears == {*source_config().linear_names()}
    settings = json.loads((tmp_path / "model-W8A8" / "report.json").read_text())["settings"]
    assert settings["smoothing_strength"] is None and settings["rounding"] == "nearest"
    assert settings["clipping"] is False and settings["num_calibration_samples"] == 4


@pytest.mark.parametrize("dash", ["_", "-"])
def test_the_scripts_options_are_understood(
    asked: dict[str, Any], capsys: Capsys, dash: str
) -> None:
    values = {
        "model_id": "some/model",
        "dataset_id": "some/texts",
        "dataset_split": "test",
        "num_calibration_samples": 7,
        "max_sequence_length": 99,
        "scheme": "FP8",
        "output_dir": "there",
        "smoothing_strength": 0.25,
        "dampening_frac": 0.5,
        "sample_prompt": "Hi",
        "max_memory": "3G",
    }
    arguments = [x for k, v in values.items() for x in (f"--{k.replace('_', dash)}", v)]
    code, out, err = run(capsys, "quantize", *arguments)
    assert (code, out, err) == (130, "", "")
    given = {name: asked[name] for name in values}
    assert given == values | {"output_dir": Path("there")}


def test_the_defaults_are_the_scripts(asked: dict[str, Any], capsys: Capsys) -> None:
    run(capsys, "quantize", "--model_id", "demo")
    del asked["on_progress"]
    assert asked == {
        "model_id": "demo",
        "dataset_id": None,
        "dataset_split": "train",
        "num_calibration_samples": 1024,
        "max_sequence_length": 4096,
        "scheme": "W8A8",
        "output_dir": None,
        "ignore": ["lm_head"],
        "smoothing_strength": 0.8,
        "dampening_frac": 0.1,
        "rounding": "gptq",
        "clipping": True,
        "inner_smoothing": True,
        "sample_prompt": "Hello my name is",
        "tokenizer": None,
        "attention_pattern": None,
        "device": "auto",
        "dtype": "auto",
        "max_memory": "8G",
    }


@pytest.mark.parametrize(
    ("arguments", "ignore"),
    [
        (["--ignore"], []),
        (["--ignore", "lm_head"], ["lm_head"]),
        (["--ignore", "lm_head", "re:.*down_proj"], ["lm_head", "re:.*down_proj"]),
        (["--ignore=lm_head", "--ignore", "re:.*o_proj"], ["lm_head", "re:.*o_proj"]),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_ignore_takes_any_number_of_names(
    asked: dict[str, Any], capsys: Capsys, arguments: list[str], ignore: list[str], last: bool
) -> None:
    model = ["--model_id", "demo"]
    run(capsys, "quantize", *(model + arguments if last else arguments + model))
    assert asked["ignore"] == ignore and asked["model_id"] == "demo"


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ("", ""),
        ("--scheme FP8", "--scheme FP8"),
        ("--ignore a", "--ignore a"),
        ("--ignore a b c", "--ignore a --ignore b --ignore c"),
        ("--ignore a b --scheme FP8", "--ignore a --ignore b --scheme FP8"),
        ("--ignore a --ignore b c", "--ignore a --ignore b --ignore c"),
        ("--ignore=a --scheme FP8", "--ignore=a --scheme FP8"),
    ],
)
def test_names_after_ignore_are_spread(words: str, spread: str) -> None:
    assert spread_ignore(words.split()) == spread.split()


def test_ignore_without_a_name_is_the_empty_one() -> None:
    assert spread_ignore(["--ignore"]) == ["--ignore", ""]
    assert spread_ignore(["--ignore", "--scheme", "FP8"]) == ["--ignore", "", "--scheme", "FP8"]


def test_options_that_are_not_needed_are_explained_in_a_line_each(
    asked: dict[str, Any], capsys: Capsys
) -> None:
    arguments = ["--num_gpus", 2, "--device_map", "auto", "--trust_remote_code"]
    _, _, err = run(capsys, "quantize", "--model_id", "demo", *arguments)
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "--num_gpus is not needed",
        "--device_map is not needed",
        "--trust_remote_code is not needed",
    ]
    assert all(line.startswith("octavo: ") and len(line) > 60 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--scheme", "W1A1"], "scheme: 'W1A1' is not one of"),
        (["--ignore", "head"], "ignore: 'head' is no linear of this model"),
        (["--smoothing_strength", 2], "smoothing_strength must be from 0 to 1, not 2.0"),
        (["--rounding", "down"], "rounding: 'down' is neither gptq nor nearest"),
        (["--device", "tpu"], "device: 'tpu' is none of auto, cpu, cuda"),
        (["--max_memory", "1M"], "it needs "),
        (["--dataset_id", "none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_a_users_mistake_is_one_line(
    source: Path, tmp_path: Path, capsys: Capsys, arguments: list[Any], problem: str
) -> None:
    model = ["--model_id", source, "--output_dir", tmp_path / "out"]
    assert problem in fails(capsys, "quantize", *model, *arguments)


def test_a_model_is_asked_for(capsys: Capsys) -> None:
    code, _, err = run(capsys, "quantize")
    assert code == 2 and "--model_id" in err and "Traceback" not in err


def test_a_run_that_is_stopped_says_that_it_goes_on(
    source: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "texts.jsonl", 12)
    command = [
        "quantize", "--model_id", source, "--output_dir", tmp_path / "out",
        "--dataset_id", texts, "--num_calibration_samples", 8, "--dtype", "float32",
    ]  # fmt: skip
    update = LayerProgress.update

    def interrupt(self: LayerProgress, done: float, total: int) -> None:
        update(self, done, total)
        if done > 1.5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LayerProgress, "update", interrupt)
        code, out, err = run(capsys, *command)
    assert code == 130 and out == ""
    assert err.splitlines()[-1] == (
        "Stopped; the same command goes on from the last finished layer."
    )
    code, _, err = run(capsys, *command)
    assert code == 0 and err.startswith("Going on after 1 of 4 steps.\n2 of 4 steps done, about ")


def test_a_run_that_finished_nothing_does_not_say_that_it_goes_on() -> None:
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt), LayerProgress(Console(file=screen)) as progress:
        progress.update(0.5, 4)
        raise KeyboardInterrupt
    assert screen.getvalue() == ""


def test_progress_is_a_line_a_step_where_nobody_watches() -> None:
    screen = io.StringIO()
    with LayerProgress(Console(file=screen)) as progress:
        for done in (0, 1, 1.3, 1.9, 2, 2.5, 3, 4):
            progress.update(done, 4)
    first, *lines = screen.getvalue().splitlines()
    assert first == "1 of 4 steps done"  # no layer is done, by which the others could be reckoned
    words = [line.split(", about ")[0] for line in lines]
    assert words == [f"{step} of 4 steps done" for step in (2, 3, 4)]
    assert all(line.endswith(" s left") for line in lines)


def test_progress_is_a_bar_that_names_the_layer_where_somebody_does() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    shown = []
    with LayerProgress(console) as progress:
        for done in (0, 1.5, 2.5, 3.5, 4):
            progress.update(done, 4)
            shown.append(str(progress._bar.tasks[0].description))
    assert shown == ["embedding", "layer 1 of 2", "layer 2 of 2", "head", "head"]
    assert "steps done" not in screen.getvalue() and "100%" in screen.getvalue()
