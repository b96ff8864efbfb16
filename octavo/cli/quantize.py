"""`octavo quantize --model_id MODEL`: the options of the model card's llm-compressor script."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand

import octavo
from octavo.cli import options

_NOT_NEEDED = {
    "num_gpus": "one layer at a time goes to one device, so a second GPU would have nothing to do",
    "device_map": "no more than one layer is ever in memory, so there is no model to spread out",
    "trust_remote_code": "octavo runs the model in its own code and never code from a repository",
}


def _option(*names: str, help: str) -> Any:
    """An option by the script's name, underscores and all, and with dashes."""
    spellings = [s for name in names for s in (f"--{name}", f"--{name.replace('_', '-')}")]
    return typer.Option(*dict.fromkeys(spellings), help=help)


class Command(TyperCommand):
    """Takes any number of names after one `--ignore`, none included, as the script does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread_ignore(args))


def spread_ignore(args: list[str]) -> list[str]:
    """`--ignore a b` as `--ignore a --ignore b`; no name at all is the empty one."""
    spread: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        spread.append(word)
        if word != "--ignore":
            continue
        names = [rest.pop(0)] if rest and not rest[0].startswith("--") else [""]
        while rest and not rest[0].startswith("-"):
            names.append(rest.pop(0))
        spread.append(names[0])
        for name in names[1:]:
            spread += ["--ignore", name]
    return spread


def quantize(
    model_id: Annotated[str, _option("model_id", help="A folder, a hub id, or `demo`.")],
    dataset_id: Annotated[
        str | None,
        _option(
            "dataset_id",
            help="A dataset on the hub, or JSONL of `messages` or `text`. Default: the model's own "
            "calibration.jsonl, else neuralmagic/LLM_compression_calibration.",
        ),
    ] = None,
    dataset_split: Annotated[str, _option("dataset_split", help="Of a dataset on the hub.")] = (
        "train"
    ),
    num_calibration_samples: Annotated[
        int, _option("num_calibration_samples", help="Texts to calibrate on.")
    ] = 1024,
    max_sequence_length: Annotated[
        int, _option("max_sequence_length", help="Tokens of a text; the rest is cut off.")
    ] = 4096,
    scheme: Annotated[
        str, _option("scheme", help="W8A8, W4A16, W4A8, FP8 or FP8_DYNAMIC.")
    ] = "W8A8",
    output_dir: Annotated[
        Path | None, _option("output_dir", help="The folder to make; default MODEL_ID-SCHEME.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            help="Linears to leave as they are: lm_head (the default), or re: and a pattern; "
            "none quantises the head too.",
        ),
    ] = None,
    smoothing_strength: Annotated[
        float, _option("smoothing_strength", help="SmoothQuant's alpha, 0 to 1.")
    ] = 0.8,
    smoothing: Annotated[bool, typer.Option(help="Move outliers into the weights first.")] = True,
    dampening_frac: Annotated[float, _option("dampening_frac", help="GPTQ's dampening.")] = 0.1,
    rounding: Annotated[str, typer.Option(help="gptq, or nearest for plain rounding.")] = "gptq",
    clipping: Annotated[
        bool, typer.Option(help="Let scales cut off outliers where the error gets less.")
    ] = True,
    inner_smoothing: Annotated[
        bool, typer.Option(help="Smooth the inputs of o_proj and down_proj too.")
    ] = True,
    sample_prompt: Annotated[
        str, _option("sample_prompt", help="The quantised model goes on with it at the end.")
    ] = "Hello my name is",
    tokenizer: options.TokenizerFile = None,
    attention_pattern: options.Pattern = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:1: where layers are computed.")
    ] = ("auto"),
    dtype: Annotated[
        str, typer.Option(help="Of the computation: auto, bfloat16, float16 or float32.")
    ] = "auto",
    max_memory: Annotated[
        str,
        _option("max_memory", help="Of the host, and of a GPU; activations past it live on disk."),
    ] = "8G",
    num_gpus: Annotated[int | None, _option("num_gpus", help="Accepted; not needed.")] = None,
    device_map: Annotated[str | None, _option("device_map", help="Accepted; not needed.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Not needed.")
    ] = False,
) -> None:
    """Quantise a model; run the same command again to go on where it stopped."""
    given = {
        "num_gpus": num_gpus,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code or None,
    }
    for name, value in given.items():
        if value is not None:
            print(f"octavo: --{name} is not needed: {_NOT_NEEDED[name]}", file=sys.stderr)
    with LayerProgress(Console(stderr=True)) as progress:
        report = octavo.quantize(
            model_id,
            dataset_id=dataset_id,
            dataset_split=dataset_split,
            num_calibration_samples=num_calibration_samples,
            max_sequence_length=max_sequence_length,
            scheme=scheme,
            output_dir=output_dir,
            ignore=["lm_head"] if ignore is None else [name for name in ignore if name],
            smoothing_strength=smoothing_strength if smoothing else None,
            dampening_frac=dampening_frac,
            rounding=rounding,  # type: ignore[arg-type]  # checked by the recipe
            clipping=clipping,
            inner_smoothing=inner_smoothing,
            sample_prompt=sample_prompt,
            tokenizer=tokenizer,
            attention_pattern=attention_pattern,
            device=device,
            dtype=dtype,
            max_memory=max_memory,
            on_progress=progress.update,
        )
    for note in report.notes:
        print(f"octavo: {note}", file=sys.stderr)
    console = Console(highlight=False)
    console.print(report.render())
    console.rule("Sample generation")
    console.print(report.sample, markup=False)
    console.rule()
    print(report.folder)


class LayerProgress:
    """A bar over the layers with the time left; a line a layer where nobody watches."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._task = self._bar.add_task("reading", total=None)
        self._started, self._first = 0.0, 0  # the step that time is reckoned from
        self._last = -1

    def __enter__(self) -> LayerProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt and self._last > 0:
            self._console.print("Stopped; the same command goes on from the last finished layer.")

    def update(self, done: float, total: int) -> None:
        """`done` of the run's `total` steps: the embedding, each layer, the head."""
        step = int(done)
        if step and self._last < 0:
            self._console.print(f"Going on after {step} of {total} steps.")
        if step and not self._first:  # the embedding takes no time to reckon by
            self._started, self._first = time.monotonic(), step
        name = "embedding" if step == 0 else f"layer {step} of {total - 2}"
        name = name if step < total - 1 else "head"
        self._bar.update(self._task, description=name, completed=done, total=total)
        if step > self._last >= 0 and not self._console.is_terminal:
            line = f"{step} of {total} steps done"
            if step > self._first:
                left = (time.monotonic() - self._started) / (step - self._first) * (total - step)
                line += f", about {left:,.0f} s left"
            self._console.print(line)
        self._last = step
