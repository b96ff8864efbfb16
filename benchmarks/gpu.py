"""octavo on a GPU beside transformers and the GPU's own rates: random weights of one shape.

    python -m benchmarks.gpu --json build/gpu.json

Every measurement is a process of its own, and should have the GPU to itself; all together take no
more than `--minutes`. transformers runs the same shape in bf16. The figures go to `--json` after
every part, and the table of targets, which is printed, beside it. A part that fails is named, the
others go on, and the benchmark exits with 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_targets import BATCHES, rows_of
from benchmarks.performance_page import targets_table
from benchmarks.processes import run, run_to_file
from octavo.bench.random_model import DTYPE
from octavo.bench.shapes import find_shape
from octavo.checkpoint import writer
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
    result = Benchmark(options, device).measure()
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


class Benchmark:
    """All parts of one run.

    Args:
        options: the command line's.
        device: where it runs.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options = options
        self.device = device
        self._end = time.monotonic() + 60 * options.minutes
        # What picks its device by itself takes the same.
        self._env = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}

    def measure(self) -> Result:
        """One part after another; what there is so far is in the file after each."""
        options = self.options
        config = find_shape(options.shape, options.layers)
        shapes = [config.linear_shape(name) for name in config.linear_names()[:-1]]
        result: Result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"system": platform.platform(terse=True), "gpu": self._gpu()},
            "versions": {"octavo": __version__, "torch": torch.__version__},
            "shape": options.shape,
            "context": options.context,
            "linear_operations_per_token": 2 * sum(n * k for n, k in shapes),
            "failed": {},
        }
        parts: dict[str, Callable[[], Result]] = {
            f"decode_{batch}": partial(self.decode, batch) for batch in options.decode
        }
        parts |= {
            "prefill": self.prefill,
            "transformers": self.transformers,
            "attention": self.attention,
            "long": self.long,
            "passkey": self.passkey,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            try:
                result[name] = part()
            except SystemExit as error:  # the others are worth having without it
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                result["failed"][name] = str(error)
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result

    def decode(self, batch: int) -> Result:
        """Steps of a batch, after a context that is filled in but for its end."""
        last = min(LAST_PROMPT, self.options.context // 2)
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
            command = [
                sys.executable, str(TRANSFORMERS), folder, "--device", str(self.device),
                "--prefill", str(options.prefill), "--decode", *map(str, options.decode),
                "--context", str(options.context), "--steps", str(options.steps),
            ]  # fmt: skip
            if options.compile:
                command.append("--compile")
            return run_to_file(command, self._env, self._left())

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
                "--output", "-m", "octavo", "eval", "passkey", "demo", "--lengths",
                str(options.passkey), "--tries", str(options.tries), "--picture",
                str(Path(folder) / "passkey.png"),
            )  # fmt: skip
        if options.cpu_passkey is not None:
            on_cpu = json.loads(options.cpu_passkey.read_text(encoding="utf-8"))
            same = ("lengths", "depths", "tries", "seed")
            if any(on_cpu[name] != figures[name] for name in same):
                sys.exit(f"--cpu-passkey: {options.cpu_passkey} is of other {', '.join(same)}")
            figures["right_on_cpu"] = on_cpu["models"][0]["right"]
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
        figures: Result = json.loads(run(command, self._env, self._left()).stdout)
        return figures

    def _written_by(self, flag: str, *arguments: str) -> Result:
        """What a program of this Python writes to the file that `flag` names."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            run([sys.executable, *arguments, flag, str(path)], self._env, self._left())
            figures: Result = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def _left(self) -> float:
        """Seconds that are left for a process."""
        left = self._end - time.monotonic()
        if left <= 0:
            sys.exit(f"not begun: --minutes {self.options.minutes:g} are over")
        return left

    def _gpu(self) -> str | None:
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else None


if __name__ == "__main__":
    main()
