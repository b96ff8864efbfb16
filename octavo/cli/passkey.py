"""`octavo eval passkey MODEL`: how often a number hidden in a long text is found."""

from __future__ import annotations

import gc
import json
import platform
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from octavo.cache import KV_DTYPES
from octavo.checkpoint import read_config, resolve_model
from octavo.checkpoint.writer import write_json
from octavo.cli import options
from octavo.config import format_size, parse_size
from octavo.engine.llm import LLM
from octavo.errors import ConfigError
from octavo.evaluate.passkey_report import PasskeyReport, draw
from octavo.evaluate.passkey_run import ANSWER_TOKENS, Trial, make_trials, run_trial
from octavo.version import __version__

MOST_DEPTHS = 101
PICTURES = (".png", ".svg", ".pdf")
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def passkey(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="Folders, hub ids, or `demo`.", show_default=False),
    ],
    lengths: Annotated[
        str, typer.Option(help="Tokens of template, prompt and answer: 4k,16k,64k,128k.")
    ] = "4k,16k",
    depths: Annotated[
        str, typer.Option(help="A number of depths from 0 to 100 %, or the depths: 0,50,100.")
    ] = "11",
    tries: Annotated[int, typer.Option(help="Of each length, spread over the depths.")] = 20,
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            "--kv-cache-dtype",
            "--kv_cache_dtype",
            help="auto, bf16 or int8; for several models one for all or one each: auto,int8.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    seed: Annotated[int, typer.Option(help="Other keys.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON, written anew after each try.")
    ] = Path("passkey.json"),
    picture: Annotated[Path, typer.Option(help="Right and wrong by length and depth.")] = (
        Path("passkey.png")
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Take over the tries that --output has.")
    ] = False,
) -> None:
    """Hide a number in texts of given lengths, and ask one model or several for it.

    Ctrl-C ends the run and shows what there is; with --resume it goes on from there.
    """
    sizes = list(dict.fromkeys(parse_size(text, "--lengths") for text in lengths.split(",")))
    fractions = parse_depths(depths)
    trials = make_trials(sizes, fractions, tries, seed)
    kv_dtypes = _one_each(kv_cache_dtype, len(models))
    _check_contexts(models, max(sizes))
    draws = _check_picture(picture)
    settings = {
        "octavo": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "lengths": sizes,
        "depths": fractions,
        "tries": tries,
        "seed": seed,
        "answer_tokens": ANSWER_TOKENS,
    }
    reports = [
        PasskeyReport(model, "", kv, sizes, fractions)
        for model, kv in zip(models, kv_dtypes, strict=True)
    ]
    if resume:
        _take_over(output, reports, trials)

    def write() -> None:
        try:
            begun = [report.to_json() for report in reports if report.outcomes]
            write_json(output, settings | {"models": begun})
        except OSError as error:
            raise ConfigError(f"--output: {output}: cannot be written: {error.strerror}") from None

    write()  # a path that cannot be written is known before an hour has gone
    try:
        with _Bar(reports, trials) as bar:
            for report in reports:
                left = trials[len(report.outcomes) :]
                if not left:
                    continue
                llm = _load(report.model, max(sizes), report.kv_cache_dtype, device, dtype, memory)
                weights = _weights(llm)
                if report.outcomes and report.weights != weights:
                    raise ConfigError(
                        f"--resume: {output}: {report.model} had {report.weights} weights, not "
                        f"{weights}; give another --output"
                    )
                report.weights = weights
                for trial in left:
                    bar.show(report, trial)
                    report.outcomes.append(run_trial(llm, trial))
                    write()
                del llm
                gc.collect()  # what it had is free before the next is loaded
    finally:  # after Ctrl-C and after an error too
        try:
            write()  # an answer that Ctrl-C kept from being written is in the tables, too
        finally:
            _print(reports, output, picture if draws else None)


def parse_depths(text: str) -> list[float]:
    """`5` is five depths from 0 to 1, `0,25,50` are those percentages.

    Raises:
        ConfigError: no number, one outside 0 to 100, or too many.
    """
    wrong = ConfigError(
        f"--depths: {text!r} is neither a count from 1 to {MOST_DEPTHS} nor percentages such as "
        "0,25,50,75,100"
    )
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise wrong from None
    if len(numbers) == 1:
        if numbers[0] not in range(1, MOST_DEPTHS + 1):
            raise wrong
        count = int(numbers[0])
        return [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    if len(numbers) > MOST_DEPTHS or not all(0 <= number <= 100 for number in numbers):
        raise wrong
    return sorted({number / 100 for number in numbers})


def _one_each(text: str, count: int) -> list[str]:
    """A KV cache dtype for each model, from one for all or a list with commas."""
    names = text.split(",")
    for name in names:
        if name not in KV_DTYPES:
            raise ConfigError(f"--kv-cache-dtype: {name!r} is not one of {', '.join(KV_DTYPES)}")
    if len(names) not in (1, count):
        raise ConfigError(
            f"--kv-cache-dtype: {len(names)} for {count} models; give one for all or one each"
        )
    return names if len(names) == count else names * count


def _check_contexts(models: list[str], longest: int) -> None:
    """Every model is there and has the context, before the first is loaded."""
    for model in models:
        context = read_config(resolve_model(model)).max_seq_len
        if longest > context:
            raise ConfigError(
                f"--lengths: {format_size(longest)} is more than the context of {model}, "
                f"{format_size(context)}"
            )


def _check_picture(path: Path) -> bool:
    """Whether it can be drawn; without matplotlib a line says that it cannot."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--picture: {path}: not one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture: {path.parent}: no such folder")
    if find_spec("matplotlib") is None:
        print(
            "octavo: no picture without matplotlib; pip install 'octavo[evaluate]'",
            file=sys.stderr,
        )
        return False
    return True


def _take_over(path: Path, reports: list[PasskeyReport], trials: list[Trial]) -> None:
    """Give each model the outcomes that a file of an earlier run has of it, if any."""
    try:
        entries = json.loads(path.read_text())["models"]
        for report in reports:
            for entry in entries:
                named = entry["model"], entry["kv_cache_dtype"]
                if named == (report.model, report.kv_cache_dtype):
                    report.take_over(entry, trials)
    except OSError as error:
        raise ConfigError(f"--resume: {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--resume: {path}: not a file that `octavo eval passkey` wrote"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"--resume: {path}: {error}; give another --output") from None


def _load(
    model: str, longest: int, kv_cache_dtype: str, device: str, dtype: str, memory: str | None
) -> LLM:
    further: dict[str, Any] = {}
    if kv_cache_dtype != "auto":
        further["kv_cache_dtype"] = kv_cache_dtype
    return LLM(
        model, max_model_len=longest, max_num_seqs=1, device=device, dtype=dtype, memory=memory,
        **further,
    )  # fmt: skip


def _weights(llm: LLM) -> str:
    quantization = llm.model.config.quantization
    return _DTYPE_NAMES[llm.model.dtype] if quantization is None else quantization.scheme.name


def _print(reports: list[PasskeyReport], output: Path, picture: Path | None) -> None:
    """The tables, the picture, and where the files are; nothing before the first answer."""
    shown = [report for report in reports if report.outcomes]
    if not shown:
        return
    console = Console(highlight=False)
    for report in shown:
        console.print(report.table())
    files = [output]
    if picture is not None:
        try:
            draw(shown, picture)
        except OSError as error:
            raise ConfigError(f"--picture: {picture}: {error.strerror}") from None
        files.append(picture)
    print(f"Written: {', '.join(map(str, files))}")


class _Bar:
    """A bar over the tokens of all trials, on a terminal."""

    def __init__(self, reports: list[PasskeyReport], trials: list[Trial]) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        total = sum(trial.length for report in reports for trial in trials[len(report.outcomes) :])
        self._task = self._bar.add_task("loading", total=total)
        self._n_trials = len(trials)
        self._begun = 0  # tokens of the trial that is running

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, report: PasskeyReport, trial: Trial) -> None:
        """A trial begins, so the one before it is done."""
        right, done = report.score()
        self._bar.update(
            self._task,
            advance=self._begun,
            description=(
                f"{report.title}, {format_size(trial.length)}: try {done + 1} of "
                f"{self._n_trials}, {right} right"
            ),
        )
        self._begun = trial.length
