"""octavo on a GPU beside transformers and the GPU's own rates: random weights of one shape.

    python -m benchmarks.gpu --json build/gpu.json

Every measurement is a process of its own, and should have the GPU to itself; all together take no
more than `--minutes`, and one no more than half of what is left of them. transformers runs the same
shape in bf16. The figures go to `--json` after every part, with what octavo warned of; the table of
targets, which is printed, lies beside it. A part that fails is named, and keeps what it had
measured, the others go on, and the benchmark exits with 1. What is not installed is said before
anything runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import read_figures, write_figures
from benchmarks.gpu_targets import BATCHES, rows_of
from benchmarks.performance_page import targets_table
from benchmarks.processes import Finished, run
from octavo.bench.random_model import DTYPE
from octavo.bench.shapes import find_shape
from octavo.checkpoint import writer
from octavo.config import ModelConfig
from octavo.device import choose_device
from octavo.errors import ConfigError
from octavo.version import __version__

TRANSFORMERS = Path(__file__).parent / "peers" / "run_transformers.py"
LAST_PROMPT = 128  # tokens of the context before decoding that are read and not filled in
LONG_STEPS = 8  # of decoding after the long prompt
Result = dict[str, Any]


def main() -> None:
    """Measure, print the table."""
    options = parse_arguments()
    try:
        device = choose_device(options.device)
    except ConfigError as error:
        sys.exit(f"benchmarks.gpu needs a GPU that PyTorch can use: {error}")
    if lacking := missing(device):
        sys.exit(f"benchmarks.gpu needs {'; '.join(lacking)}")
    result = Benchmark(options, device).measure()
    for part, lines in result["warnings"].items():
        print(f"{part}: {' | '.join(lines)}", file=sys.stderr)
    table = targets_table(rows_of(result))
    options.json.with_suffix(".md").write_text(f"{table}\n", encoding="utf-8")
    print(table)
    if result["failed"]:
        sys.exit(f"failed: {', '.join(result['failed'])}; why is in {options.json}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try it")
    parser.add_argument("--shape", default="ministral-8b", help="as octavo bench takes it")
    parser.add_argument("--layers", type=int, help="of the shape's; default all")
    parser.add_argument("--context", type=int, default=1024, help="tokens before decoding")
    parser.add_argument("--decode", type=int, nargs="*", default=list(BATCHES), help="batches")
    parser.add_argument("--steps", type=int, default=64, help="of decoding")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--long", type=int, default=131_072, help="tokens of the long prompt")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a pass of octavo")
    parser.add_argument("--keys", type=int, default=131_072, help="of attention alone")
    parser.add_argument("--window", type=int, default=32_768, help="of attention alone")
    parser.add_argument("--passkey", type=int, default=131_072, help="tokens of its prompts")
    parser.add_argument("--tries", type=int, default=5, help="of the passkey")
    parser.add_argument("--cpu-passkey", type=Path, help="the same tries' JSON from a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile transformers' model")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"), help="the figures")
    return parser.parse_args()


def missing(device: torch.device) -> list[str]:
    """What the parts need and this machine lacks, each with how to get it."""
    lacking = []
    if find_spec("transformers") is None:
        lacking.append("transformers (pip install '.[dev]')")
    if device.type == "cuda":
        # Triton compiles what starts its kernels; without it octavo would run on PyTorch, slower.
        if find_spec("triton") is None:
            lacking.append("triton (pip install triton)")
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            lacking.append("a C compiler for Triton (apt install gcc)")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            lacking.append("Python.h for Triton (apt install python3-dev)")
    return lacking


def last_prompt(context: int) -> int:
    """Tokens of a context that are read, and not filled in."""
    return min(LAST_PROMPT, context // 2)


class Unfinished(SystemExit):
    """A part that failed, and what it had measured before."""

    def __init__(self, why: str, figures: Result) -> None:
        super().__init__(why)
        self.figures = figures


def linears_of_a_prompt(config: ModelConfig) -> list[str]:
    """Those that all of its tokens go through: not the head, nor what the last layer leaves out."""
    after = tuple(
        f"layers.{config.n_layers - 1}.{name}" for name in ("attention.wo", "feed_forward")
    )
    return [name for name in config.linear_names()[:-1] if not name.startswith(after)]


class Benchmark:
    """All parts of one run.

    Args:
        options: the command line's.
        device: where it runs.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self._on_cpu: Result | None = options.cpu_passkey and read_figures(options.cpu_passkey)
        self._end = time.monotonic() + 60 * options.minutes
        # What picks its device by itself takes the same.
        self._env = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
        self._warnings: list[str] = []  # of the part that runs

    def measure(self) -> Result:
        """One part after another; what there is so far is in the file after each."""
        options = self.options
        config = find_shape(options.shape, options.layers)
        shapes = [config.linear_shape(name) for name in linears_of_a_prompt(config)]
        result: Result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"system": platform.platform(terse=True), "gpu": self._gpu()},
            "versions": {"octavo": __version__, "torch": torch.__version__},
            "shape": options.shape,
            "context": options.context,
            "linear_operations_per_token": 2 * sum(n * k for n, k in shapes),
            "warnings": {},
            "failed": {},
        }
        parts: dict[str, Callable[[], Result]] = {
            f"decode_{batch}": partial(self.decode, batch) for batch in options.decode
        }
        # Attention compiles what the long prompt runs; most can happen to the peer, which is last.
        parts |= {
            "prefill": self.prefill,
            "linears": self.linears,
            "attention": self.attention,
            "long": self.long,
            "passkey": self.passkey,
            "transformers": self.transformers,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_figures(result, options.json)  # a path that cannot be written is known at once
        for name, part in parts.items():
            self._warnings = []
            try:
                result[name] = part()
            except (SystemExit, Exception) as error:  # the others are worth having without it
                if isinstance(error, Unfinished):
                    result[name] = error.figures
                why = str(error) if isinstance(error, SystemExit) else repr(error)
                print(f"{name}: {why}", file=sys.stderr, flush=True)
                result["failed"][name] = why
            if self._warnings:
                result["warnings"][name] = self._warnings
            write_figures(result, options.json)
        return result

    def decode(self, batch: int) -> Result:
        """Steps of a batch, after a context that is filled in but for its end."""
        last = last_prompt(self.options.context)
        return self._bench(
            batch=batch, context=self.options.context - last, prompt=last,
            decode=self.options.steps, rounds=1,
        )  # fmt: skip

    def prefill(self) -> Result:
        """One prompt; of three rounds the fastest, since the first compiles kernels."""
        return self._bench(prompt=self.options.prefill, decode=1, rounds=3)

    def long(self) -> Result:
        """A prompt of the whole context, once, with int8 keys and values."""
        prompt = self.options.long - LONG_STEPS
        return self._bench(prompt=prompt, decode=LONG_STEPS, rounds=1, kv="int8")

    def transformers(self) -> Result:
        """The same prompts and batches by transformers."""
        options = self.options
        config = find_shape(options.shape, options.layers)
        with tempfile.TemporaryDirectory() as folder:
            writer.write_config(Path(folder), config, DTYPE, (), {})
            arguments = [
                str(TRANSFORMERS), folder, "--device", str(self.device),
                "--prefill", str(options.prefill), "--decode", *map(str, options.decode),
                "--context", str(options.context), "--steps", str(options.steps),
            ]  # fmt: skip
            if options.compile:
                arguments.append("--compile")
            return self._written_by("--out", *arguments)

    def linears(self) -> Result:
        """`benchmarks.linears`: those of a layer, of the prompt's chunks."""
        options = self.options
        return self._written_by(
            "--json", "-m", "benchmarks.linears", "--device", str(self.device), "--shape",
            options.shape, "--tokens", str(min(options.chunk, options.prefill)), "--seconds", "0.5",
        )  # fmt: skip

    def attention(self) -> Result:
        """`benchmarks.attention`: a chunk of queries at the end of a context."""
        options = self.options
        return self._written_by(
            "--json", "-m", "benchmarks.attention", "--device", str(self.device), "--queries",
            str(min(options.chunk, options.keys)), "--keys", str(options.keys), "--window",
            str(options.window), "--context", str(options.keys), "--seconds", "0.5", "--no-sdpa",
        )  # fmt: skip

    def passkey(self) -> Result:
        """`octavo eval passkey` of the bundled model."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            figures = self._written_by(
                "--output", "-m", "octavo", "eval", "passkey", "demo", "--device",
                str(self.device), "--lengths", str(options.passkey), "--tries",
                str(options.tries), "--picture", str(Path(folder) / "passkey.png"),
            )  # fmt: skip
        if self._on_cpu is not None:
            same = ("lengths", "depths", "tries", "seed")
            if any(self._on_cpu[name] != figures[name] for name in same):
                why = f"--cpu-passkey: {options.cpu_passkey} is of other {', '.join(same)}"
                raise Unfinished(why, figures)
            figures["right_on_cpu"] = self._on_cpu["models"][0]["right"]
        return figures

    def _bench(self, **flags: object) -> Result:
        """`octavo bench` with int8 weights and a head in bf16."""
        given = {
            "shape": self.options.shape, "layers": self.options.layers,
            "chunk": self.options.chunk, "device": self.device,
        } | flags  # fmt: skip
        words = [
            word for name, value in given.items() if value is not None
            for word in (f"--{name}", str(value))
        ]  # fmt: skip
        command = [sys.executable, "-m", "octavo", "bench", *words, "--json"]
        figures: Result = json.loads(self._run(command).stdout)
        return figures

    def _written_by(self, flag: str, *arguments: str) -> Result:
        """What a program of this Python writes to the file that `flag` names.

        Raises:
            Unfinished: it failed, and had written some of it.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            try:
                self._run([sys.executable, *arguments, flag, str(path)])
            except SystemExit as failure:
                if path.exists():
                    raise Unfinished(str(failure), read_figures(path)) from None
                raise
            return read_figures(path)

    def _run(self, command: list[str]) -> Finished:
        """Run it to its end, with the lines by which octavo warned."""
        finished = run(command, self._env, self._left())
        lines = finished.stderr.splitlines()
        self._warnings += [line for line in lines if line.startswith("octavo: ")]
        return finished

    def _left(self) -> float:
        """Seconds that a process may take: half of what there is, so that one that hangs is one."""
        left = self._end - time.monotonic()
        if left <= 0:
            sys.exit(f"not begun: --minutes {self.options.minutes:g} are over")
        return left / 2

    def _gpu(self) -> str | None:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else None


if __name__ == "__main__":
    main()
