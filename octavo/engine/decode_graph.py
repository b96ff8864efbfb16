"""Decode steps as CUDA graphs: batches of a few sizes, whose inputs always lie in the same place.

A step that brings one token a sequence is hundreds of small kernels, and takes the host longer to
start than a GPU to run. Captured once, they are started by one call. A graph repeats the same
kernels on the same memory, so a batch is padded to the next size that there is a graph of. The rows
that fill it up store what nobody reads in a page that the pool keeps for that.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.cache import CacheLayout, PagePool, PassPages, RaggedCache, fill_table
from octavo.cache.planner import FP32, activation_bytes
from octavo.errors import in_one_line
from octavo.kernels.lens import Lens
from octavo.model import Transformer

# A kernel's grid is that of the longest context of its graph: few lengths, and short ones for short
# contexts.
SHORTEST_CONTEXT = 4096
CONTEXT_FACTOR = 4
# What a captured kernel takes of the device's memory beside what it computes with, and how many
# there are of a layer: estimates.
KERNEL_BYTES = 8 * 2**10
KERNELS_A_LAYER = 20
RELATIVE_ERROR = 0.02  # of a graph's results: cuBLAS may take other kernels while it is captured

logger = logging.getLogger("octavo")


class Bucket(NamedTuple):
    """What one graph serves: batches of up to `size` sequences of up to `context` tokens."""

    size: int
    context: int

    def lengths(self, layout: CacheLayout) -> list[int]:
        """How many integers of the inputs are token ids, positions, and each kind's page table."""
        entries = self.size * layout.n_blocks(self.context)
        return [self.size, self.size, *(rows * entries for rows in layout.rows)]


class DecodeGraphs:
    """Runs decode steps of a model over a pool.

    A bucket's first step is captured, or all buckets at once by `warm_up`. What a graph computes is
    compared with the same step run without one; if it is wrong, or cannot be captured, a line says
    so and all steps are run kernel by kernel.

    Args:
        model: its weights may not move from here on.
        pool: of all sequences' pages.
        max_num_seqs: the most sequences of a step.
        max_model_len: tokens of the longest sequence.
        capture: without, the same steps run kernel by kernel, on any device.
    """

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        max_num_seqs: int,
        max_model_len: int,
        capture: bool = True,
    ) -> None:
        self.model = model
        self.pool = pool
        self.sizes = _sizes(max_num_seqs)
        self.contexts = _contexts(max_model_len)
        self._capture = capture
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(model.device) if capture else None
        config, device = model.config, model.device
        largest = Bucket(max_num_seqs, max_model_len)
        self._inputs = torch.zeros(
            sum(largest.lengths(pool.layout)), dtype=torch.int64, device=device
        )
        self._hidden = torch.zeros(max_num_seqs, config.dim, dtype=model.dtype, device=device)
        self._logits = torch.zeros(max_num_seqs, config.vocab_size, device=device)

    def takes(self, query_lens: Sequence[int]) -> bool:
        """As `DecodeSteps.takes`: one of each sequence."""
        return max(query_lens) == 1

    def run(
        self,
        token_ids: Sequence[int],
        caches: Sequence[RaggedCache],
        query_lens: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DecodeSteps.run`."""
        assert query_lens is None or self.takes(query_lens)
        count = len(caches)
        kv_lens = [cache.length + 1 for cache in caches]
        bucket = Bucket(_fitting(self.sizes, count), _fitting(self.contexts, max(kv_lens)))
        self._put(self._on_host(bucket, token_ids, caches))
        kv_lens += [1] * (bucket.size - count)
        if self._capture and bucket not in self._graphs:
            self._add_graph(bucket)
        if self._capture:
            self._graphs[bucket].replay()
        else:
            self._compute(bucket, kv_lens)
        for cache in caches:
            cache.length += 1
        return self._hidden[:count], self._logits[:count]

    def warm_up(self) -> None:
        """Capture all buckets, the largest first, whose memory serves the others.

        Nobody may run meanwhile. The steps are of sequences that end in the middle of the bucket's
        contexts and have the spare page alone.
        """
        started = time.perf_counter()
        for size, context in product(reversed(self.sizes), reversed(self.contexts)):
            bucket = Bucket(size, context)
            if not self._capture:
                return
            if bucket in self._graphs:
                continue
            host = self._on_host(bucket, [], [])
            # All rows the same: they write to the same place.
            host[size : 2 * size] = context // 2
            self._put(host)
            self._add_graph(bucket)
        logger.info(
            "octavo: %d CUDA graphs of decode steps were captured in %.1f s",
            len(self._graphs),
            time.perf_counter() - started,
        )

    def _put(self, host: Tensor) -> None:
        """The inputs of the next step, to their place in the device's own time."""
        self._inputs[: len(host)].copy_(host, non_blocking=True)

    def _split(self, inputs: Tensor, bucket: Bucket) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Token ids [B], positions [B] and each kind's page table [rows, B, n_blocks]."""
        lengths = bucket.lengths(self.pool.layout)
        token_ids, positions, *tables = inputs[: sum(lengths)].split(lengths)
        rows = self.pool.layout.rows
        shaped = (table.view(n, bucket.size, -1) for n, table in zip(rows, tables, strict=True))
        return token_ids, positions, list(shaped)

    def _on_host(
        self, bucket: Bucket, token_ids: Sequence[int], caches: Sequence[RaggedCache]
    ) -> Tensor:
        """The inputs of a step, in one piece for one copy."""
        # New memory each time: the copy of the last step's may not be over yet.
        pinned = self._inputs.device.type == "cuda"
        n_numbers = sum(bucket.lengths(self.pool.layout))
        host = torch.zeros(n_numbers, dtype=torch.int64, pin_memory=pinned)
        ids, positions, tables = self._split(host, bucket)
        count = len(caches)
        ids[:count] = torch.tensor(token_ids)
        positions[:count] = torch.tensor([cache.length for cache in caches])
        for kind, table in enumerate(tables):
            fill_table(table, caches, kind)
            table[:, count:] = self.pool.spare_page
        return host

    def _compute(self, bucket: Bucket, kv_lens: Sequence[int]) -> None:
        """One step from the inputs to hidden states and logits.

        Args:
            kv_lens: [size], of the step's sequences; or, for a step that is captured, bounds of
                what they will be. Kernels on a device read them from there.
        """
        token_ids, positions, page_tables = self._split(self._inputs, bucket)
        page_size = self.pool.layout.page_size
        blocks, offsets = positions // page_size, positions % page_size
        tables = []
        for table in page_tables:
            pages = table.gather(2, blocks.expand(len(table), -1)[..., None])[..., 0]
            tables.append((table, pages * page_size + offsets))
        ones = Lens([1] * bucket.size, torch.ones_like(positions, dtype=torch.int32))
        lens = Lens(kv_lens, (positions + 1).int())
        hidden = self.model.run(
            token_ids, positions, ones, PassPages(self.pool, ones, lens, tables)
        )
        self._hidden[: bucket.size] = hidden
        self._logits[: bucket.size] = self.model.logits(hidden)

    def _add_graph(self, bucket: Bucket) -> None:
        """Capture the step whose inputs are in place, or from now on no step at all."""
        # The plain step to compare with knows no more of the lengths than these: by others, keys
        # are cut into other runs, which round otherwise, and layers make more of it (10 % of the
        # logits of eight layers of random weights in W8A8).
        bounds = [bucket.context] * bucket.size
        results = self._hidden[: bucket.size], self._logits[: bucket.size]
        graph = torch.cuda.CUDAGraph()
        try:
            # Kernels are compiled, tried and tuned, none of which a capture can take.
            self._compute(bucket, bounds)
            expected = [each.clone() for each in results]
            # `torch.cuda.graph` alone would leave this thread on its stream where a capture fails.
            # Other threads may go on using the GPU.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(
                    graph, self._memory, self._stream, capture_error_mode="thread_local"
                ),
            ):
                self._compute(bucket, bounds)
            for each in results:
                each.fill_(torch.nan)  # so that a replay has to write it
            graph.replay()
            errors = [
                (found - wanted).norm() / wanted.norm()
                for found, wanted in zip(results, expected, strict=True)
            ]
            is_right = all(float(error) <= RELATIVE_ERROR for error in errors)  # and no NaN
            reason = "" if is_right else "a captured one computes wrong"
        except Exception as failure:  # a compiler's and a driver's errors share no class
            reason = in_one_line(failure)
        if reason:
            logger.warning(
                "octavo: decode steps do not run as CUDA graphs here (%s); they take longer", reason
            )
            self._capture = False
            self._graphs.clear()
            return
        self._graphs[bucket] = graph
        logger.info(
            "octavo: decode steps of up to %d answers and %s tokens run as a CUDA graph",
            bucket.size,
            f"{bucket.context:,}",
        )


def graph_bytes(
    layout: CacheLayout, model: Transformer, max_num_seqs: int, max_model_len: int
) -> int:
    """Bytes that the graphs of all buckets keep: arguments as in `DecodeGraphs`; an estimate."""
    config, largest = model.config, Bucket(max_num_seqs, max_model_len)
    inputs = 8 * sum(largest.lengths(layout))
    results = max_num_seqs * (config.dim * model.dtype.itemsize + config.vocab_size * FP32)
    # One pool of memory serves all graphs: the largest batch's. Logits are there in both dtypes.
    logits = max_num_seqs * config.vocab_size * (model.dtype.itemsize + FP32)
    made = activation_bytes(config, max_num_seqs) + logits
    n_graphs = len(_sizes(max_num_seqs)) * len(_contexts(max_model_len))
    n_kernels = n_graphs * config.n_layers * KERNELS_A_LAYER
    return inputs + results + made + n_kernels * KERNEL_BYTES


def _sizes(max_num_seqs: int) -> list[int]:
    return _steps(1, 2, max_num_seqs)


def _contexts(max_model_len: int) -> list[int]:
    return _steps(SHORTEST_CONTEXT, CONTEXT_FACTOR, max_model_len)


def _steps(first: int, factor: int, last: int) -> list[int]:
    """first, first · factor, … below last, and last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]


def _fitting(steps: list[int], wanted: int) -> int:
    """The first that is not below."""
    return steps[bisect_left(steps, wanted)]
