"""Attention alone, at Ministral-8B's heads: a chunk of queries, and one query over a long context.

    python -m benchmarks.attention

Keys and values are random, in pages as the cache has them. Beside each stands PyTorch's
`scaled_dot_product_attention` in bf16 over the same numbers, which knows no pages and is given its
mask ready-made, and the rate at which the machine reads memory. Only what a query sees counts as
work: 4 operations for every query, head, key seen, and element of a head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import make_parser
from benchmarks.figures import write_figures
from octavo import kernels
from octavo.bench.context import fill
from octavo.bench.machine import measure_machine
from octavo.bench.random_model import DTYPE, RandomBlocks
from octavo.cache import CacheLayout, PagePool, RaggedCache, kv_dtype
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.device import choose_device, current

CONFIG = replace(MINISTRAL_8B, n_layers=1, windows=(None,))
HEADS, KV_HEADS, HEAD_DIM = CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim
Row = dict[str, Any]


def main() -> None:
    """Measure each dtype of the cache, then PyTorch's; print a table."""
    options = parse_arguments()
    with torch.inference_mode(), current(options.device):
        rows = [row for kv in options.kv for row in measure(kv, options)]
        if not options.no_sdpa:
            rows += measure_sdpa(options)
    machine = measure_machine(options.device)
    result: Row = {
        "rows": rows,
        "threads": torch.get_num_threads(),
        "device": str(options.device),
        "machine_read_gb_s": machine.read_gb_s,
        "machine_int8_tops": machine.int8_tops,
        "machine_bf16_tflops": machine.bf16_tflops,
    }
    print("| attention | queries | keys | window | TFLOP/s | GB/s of keys and values |")
    print("| --- " * 6 + "|")
    for row in rows:
        window = f"{row['window']:,}" if row["window"] else "none"
        print(
            f"| {row['by']} | {row['queries']:,} | {row['keys']:,} | {window} "
            f"| {row['tflop_s']:.3f} | {row['gb_s']:.1f} |"
        )
    print(
        f"\n{options.device}, {result['threads']} threads; the machine reads "
        f"{machine.read_gb_s:.1f} GB/s"
        + ("" if machine.int8_tops is None else f", does {machine.int8_tops:.2f} int8 TOPS")
        + ("" if machine.bf16_tflops is None else f" and {machine.bf16_tflops:.1f} bf16 TFLOP/s")
    )
    write_figures(result, options.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--kv", nargs="*", default=["bf16", "int8"], help="dtypes of the cache")
    parser.add_argument("--queries", type=int, nargs="*", default=[512, 1024], help="of a chunk")
    parser.add_argument("--keys", type=int, default=16_384, help="that end with the chunk's own")
    parser.add_argument("--window", type=int, default=4096, help="of the windowed measurements")
    parser.add_argument("--context", type=int, default=131_072, help="keys of the one query")
    parser.add_argument("--seconds", type=float, default=3.0, help="to repeat each measurement")
    parser.add_argument("--no-sdpa", action="store_true", help="leave PyTorch's out")
    parser.add_argument("--device", default="cpu", type=choose_device, help="cpu or cuda")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> Iterator[tuple[int, int, int | None]]:
    """Queries, keys and window of each measurement."""
    for window in (None, options.window):
        for n_queries in options.queries:
            yield n_queries, options.keys, window
    yield 1, options.context, None


def measure(kv: str, options: argparse.Namespace) -> Iterator[Row]:
    """octavo's, over a cache of one layer."""
    layout = CacheLayout.of(CONFIG, kv_dtype(kv, DTYPE))
    token_bytes = layout.page_bytes // layout.page_size
    for n_queries, n_keys, window in cases(options):
        pool = PagePool(layout, layout.n_blocks(n_keys), options.device)
        cache = RaggedCache(pool)
        fill(cache, n_keys, n_keys, RandomBlocks(0, options.device))
        pages, held = pool.layer(0), cache.tables[0]
        table = torch.from_numpy(held.ids[:, : held.stop]).to(options.device)
        q = torch.randn(n_queries, HEADS, HEAD_DIM, device=options.device).to(DTYPE)

        def run(
            q: Tensor = q, pages: Any = pages, table: Tensor = table, n_keys: int = n_keys,
            window: int | None = window,
        ) -> object:  # fmt: skip
            return kernels.paged_attention(q, pages, table, [len(q)], [n_keys], window)

        seconds = best_seconds(run, options)
        yield row_of(f"octavo, {kv} KV", n_queries, n_keys, window, seconds, token_bytes)


def measure_sdpa(options: argparse.Namespace) -> Iterator[Row]:
    """PyTorch's, over contiguous keys and values."""
    for n_queries, n_keys, window in cases(options):
        device = options.device
        q = torch.randn(1, HEADS, n_queries, HEAD_DIM, device=device).to(DTYPE)
        shape = (1, KV_HEADS, n_keys, HEAD_DIM)
        k, v = (torch.randn(shape, device=device).to(DTYPE) for _ in range(2))
        positions = torch.arange(n_keys, device=device)
        behind = positions[n_keys - n_queries :, None] - positions
        mask = (behind >= 0) & (behind < (window or n_keys))

        def run(
            q: Tensor = q, k: Tensor = k, v: Tensor = v,
            mask: Tensor | None = mask if n_queries > 1 else None,
        ) -> object:  # fmt: skip
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        seconds = best_seconds(run, options)
        token_bytes = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
        yield row_of("PyTorch, bf16", n_queries, n_keys, window, seconds, token_bytes)


def row_of(
    by: str, n_queries: int, n_keys: int, window: int | None, seconds: float, token_bytes: int
) -> Row:
    """The rates of one measurement."""
    first = n_keys - n_queries + 1  # keys that the first query sees without a window
    seen = sum(min(first + i, window or n_keys) for i in range(n_queries))
    n_read = min(n_keys, (window or n_keys) + n_queries - 1)
    print(json.dumps({"by": by, "queries": n_queries, "seconds": seconds}), flush=True)
    return {
        "by": by,
        "queries": n_queries,
        "keys": n_keys,
        "window": window,
        "seconds": seconds,
        "tflop_s": 4 * HEADS * HEAD_DIM * seen / seconds / 1e12,
        "gb_s": n_read * token_bytes / seconds / 1e9,
    }


def best_seconds(run: Callable[[], object], options: argparse.Namespace) -> float:
    """The fastest of as many runs as fit into `--seconds`, at least two."""
    wait = torch.get_device_module(options.device).synchronize
    run()
    wait()
    best, n_runs, started = float("inf"), 0, time.perf_counter()
    while n_runs < 2 or time.perf_counter() - started < options.seconds:
        before = time.perf_counter()
        run()
        wait()
        best, n_runs = min(best, time.perf_counter() - before), n_runs + 1
    return best


if __name__ == "__main__":
    main()
