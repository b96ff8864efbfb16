"""Whether PyTorch's products and octavo's kernels share their threads, or fight for the cores.

    python -m benchmarks.openmp

Two OpenMP runtimes at work in one process would each keep threads that spin while they wait, and
take the cores from one another. So: how many threads the first product starts, and the first
attention after it (none, if they share them); how long the two take in turn, beside each by itself;
and which copies are loaded. One that does no work starts no threads: sentencepiece brings its own.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from octavo import kernels
from octavo.kernels.cpu import library

RUNTIME = re.compile(r"lib(?:gomp|omp|iomp)[^/]*\.so[^/]*$")
Work = Callable[[], object]


def main() -> None:
    """Measure, print, write."""
    options = parse_arguments()
    if library.load() is None:
        raise SystemExit("octavo was built without a C++ compiler: there are no kernels to measure")
    n_threads = [count_threads()]
    # Small, so that waking and waiting are a good part of it.
    multiply = partial(torch.matmul, torch.ones(32, 1024), torch.ones(1024, 1024))
    q, kv = torch.ones(64, 8, 64), torch.ones(256, 4, 64)
    attend = partial(kernels.attention, q, kv, kv, None)
    with torch.inference_mode():
        for work in (multiply, attend):
            work()
            n_threads.append(count_threads())
        result = measure(multiply, attend, options.times, options.rounds)
    result |= {
        "threads": torch.get_num_threads(),
        "started_by_products": n_threads[1] - n_threads[0],
        "started_by_attention": n_threads[2] - n_threads[1],
        "runtimes": loaded_runtimes(),
    }
    print(f"threads that products started: {result['started_by_products']}, ", end="")
    print(f"that attention started after them: {result['started_by_attention']}")
    print(f"{options.times} of each, the fastest of {options.rounds} rounds:")
    for name in ("products", "attention", "in_turn"):
        print(f"  {name.replace('_', ' '):10} {result[f'{name}_s'] * 1e3:8.1f} ms")
    print(f"in turn they take {result['ratio']:.3f} of the sum")
    print(f"loaded: {', '.join(result['runtimes'])}")
    write_figures(result, options.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--times", type=int, default=200, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=10, help="of which the fastest counts")
    return parser.parse_args()


def measure(multiply: Work, attend: Work, times: int, rounds: int) -> dict[str, Any]:
    """Seconds of products alone, of attention alone, and of one after the other."""

    def in_turn() -> None:
        multiply()
        attend()

    works = {"products_s": multiply, "attention_s": attend, "in_turn_s": in_turn}
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            started = time.perf_counter()
            for _ in range(times):
                work()
            best[name] = min(best[name], time.perf_counter() - started)
    return best | {"ratio": best["in_turn_s"] / (best["products_s"] + best["attention_s"])}


def loaded_runtimes() -> list[str]:
    """The files of all OpenMP runtimes that this process has loaded."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    files = {line.split(maxsplit=5)[-1] for line in lines if RUNTIME.search(line)}
    return sorted("/".join(Path(file).parts[-3:]) for file in files)


def count_threads() -> int:
    """Those of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    main()
