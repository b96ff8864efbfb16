"""Decode steps as CUDA graphs: batches of a few sizes, whose inputs always lie in the same place.

A step of few tokens is hundreds of small kernels, and takes the host longer to start than a GPU to
run. Captured once, they are started by one call. A graph repeats the same kernels on the same
memory, so a batch is padded to the next size that there is a graph of. The tokens that fill it up
store what nobody reads in a page that the pool keeps for that.

Most steps bring one token a sequence. Those in which some bring guesses have graphs of their own,
for as many tokens as such a step may have: which sequence brings how many is read on the device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.cache import (
    CacheLayout,
    PagePool,
    PassPages,
    RaggedCache,
    fill_table,
    new_tokens,
    slot_mapping,
)
from octavo.cache.planner import FP32, activation_bytes
from octavo.device import capturing
from octavo.engine.speculation import SPECULATED_ROWS
from octavo.engine.step_limits import StepLimits
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
RUNS = 640  # of keys, whose sums a step with guesses has at once: they fill a large device
RELATIVE_ERROR = 0.02  # of a graph's results: cuBLAS may take other kernels while it is captured

logger = logging.getLogger("octavo")


_Lens = tuple[list[int], list[int]]  # of sequences: new tokens, and all once these are stored


class Bucket(NamedTuple):
    """What one graph serves: steps of up to `size` sequences of up to `context` tokens.

    Attributes:
        guesses: whether sequences bring guesses as well, up to SPECULATED_ROWS tokens in all.
    """

    size: int
    context: int
    guesses: bool = False

    @property
    def n_tokens(self) -> int:
        """Of the graph's step."""
        return SPECULATED_ROWS if self.guesses else self.size

    @property
    def n_sequences(self) -> int:
        """Of the graph's step; with guesses, the last brings what the others leave."""
        return self.size + self.guesses

    @property
    def bounds(self) -> _Lens:
        """The most that each sequence may bring and have."""
        most = self.n_tokens if self.guesses else 1
        return [most] * self.n_sequences, [self.context] * self.n_sequences

    def filled(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> _Lens:
        """These sequences and others, to as many sequences and tokens as there have to be."""
        missing = self.size - len(query_lens)
        others = [1] * missing
        if self.guesses:
            others = [0] * missing + [self.n_tokens - sum(query_lens)]
        return [*query_lens, *others], [*kv_lens, *others]

    def lengths(self, layout: CacheLayout) -> list[int]:
        """How many integers of the inputs are token ids, positions, both lengths of the sequences,
        and each kind's page table and slots.
        """
        entries = self.n_sequences * layout.n_blocks(self.context)
        tables = (rows * n for rows in layout.rows for n in (entries, self.n_tokens))
        return [self.n_tokens, self.n_tokens, self.n_sequences, self.n_sequences, *tables]


class _Inputs(NamedTuple):
    """A step's inputs where they lie, all int64.

    Attributes:
        token_ids, positions: [T].
        query_lens, kv_lens: [B].
        tables: of each kind of layer, page tables [rows, B, n_blocks] and slots [rows, T].
    """

    token_ids: Tensor
    positions: Tensor
    query_lens: Tensor
    kv_lens: Tensor
    tables: list[tuple[Tensor, Tensor]]


class DecodeGraphs:
    """Runs decode steps of a model over a pool.

    A bucket's first step is captured, or all buckets at once by `warm_up`. What a graph computes is
    compared with the same step run without one; if it is wrong, or cannot be captured, a line says
    so and all steps are run kernel by kernel.

    Args:
        model: its weights may not move from here on.
        pool: of all sequences' pages.
        limits: of all steps.
        capture: without, the same steps run kernel by kernel, on any device.

    Attributes:
        buckets: that there may be graphs of, the largest first.
    """

    def __init__(
        self,
        model: Transformer,
        pool: PagePool,
        limits: StepLimits,
        capture: bool = True,
    ) -> None:
        self.model = model
        self.pool = pool
        self.buckets = _buckets(limits)
        self._speculate = limits.speculate
        self._capture = capture
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        self._stream = torch.cuda.Stream(model.device) if capture else None
        config, device = model.config, model.device
        n_inputs, n_tokens = _places(pool.layout, self.buckets)
        self._inputs = torch.zeros(n_inputs, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(n_tokens, config.dim, dtype=model.dtype, device=device)
        self._logits = torch.zeros(n_tokens, config.vocab_size, device=device)

    def takes(self, query_lens: Sequence[int]) -> bool:
        """As `DecodeSteps.takes`: one of each sequence, or few in all."""
        return max(query_lens) == 1 or (self._speculate and sum(query_lens) <= SPECULATED_ROWS)

    def run(
        self,
        token_ids: Sequence[int],
        caches: Sequence[RaggedCache],
        query_lens: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DecodeSteps.run`."""
        query_lens = query_lens or [1] * len(caches)
        kv_lens = [cache.length + n for cache, n in zip(caches, query_lens, strict=True)]
        bucket = self._bucket(query_lens, kv_lens)
        lens = bucket.filled(query_lens, kv_lens)
        self._put(self._on_host(bucket, token_ids, caches, lens))
        if self._capture and bucket not in self._graphs:
            self._add_graph(bucket)
        if self._capture:
            self._graphs[bucket].replay()
        else:
            self._compute(bucket, lens)
        for cache, n in zip(caches, query_lens, strict=True):
            cache.length += n
        return self._hidden[: len(token_ids)], self._logits[: len(token_ids)]

    def _bucket(self, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Bucket:
        """The smallest that serves such a step."""
        guesses = max(query_lens) > 1
        return next(
            bucket
            for bucket in reversed(self.buckets)
            if bucket.guesses == guesses
            and bucket.size >= len(query_lens)
            and bucket.context >= max(kv_lens)
        )

    def warm_up(self) -> None:
        """Capture all buckets, the largest first, whose memory serves the others.

        Nobody may run meanwhile. The steps are of sequences that end in the middle of the bucket's
        contexts and have the spare page alone.
        """
        started = time.perf_counter()
        for bucket in self.buckets:
            if not self._capture:
                return
            if bucket in self._graphs:
                continue
            middle = bucket.context // 2 + 1
            each, rest = divmod(bucket.n_tokens, bucket.size)
            new = [min(each + (i < rest), middle) for i in range(bucket.size)]
            # All of the same token: what several write to one place is the same.
            lens = bucket.filled(new, [middle] * bucket.size)
            self._put(self._on_host(bucket, [], [], lens))
            self._add_graph(bucket)
        logger.info(
            "octavo: %d CUDA graphs of decode steps were captured in %.1f s",
            len(self._graphs),
            time.perf_counter() - started,
        )

    def _put(self, host: Tensor) -> None:
        """The inputs of the next step, to their place in the device's own time."""
        self._inputs[: len(host)].copy_(host, non_blocking=True)

    def _split(self, inputs: Tensor, bucket: Bucket) -> _Inputs:
        """Its parts."""
        rows, lengths = self.pool.layout.rows, bucket.lengths(self.pool.layout)
        ids, positions, query_lens, kv_lens, *tables = inputs[: sum(lengths)].split(lengths)
        shaped = [
            (table.view(n, bucket.n_sequences, -1), slots.view(n, -1))
            for n, table, slots in zip(rows, tables[::2], tables[1::2], strict=True)
        ]
        return _Inputs(ids, positions, query_lens, kv_lens, shaped)

    def _on_host(
        self, bucket: Bucket, token_ids: Sequence[int], caches: Sequence[RaggedCache], lens: _Lens
    ) -> Tensor:
        """The inputs of a step, in one piece for one copy.

        Args:
            token_ids: the first; 0 those that fill up.
            caches: the first sequences'; the spare page is all that the others have.
            lens: of all sequences.
        """
        # New memory each time: the copy of the last step's may not be over yet.
        pinned = self._inputs.device.type == "cuda"
        n_numbers = sum(bucket.lengths(self.pool.layout))
        host = torch.zeros(n_numbers, dtype=torch.int64, pin_memory=pinned)
        inputs = self._split(host, bucket)
        inputs.token_ids[: len(token_ids)] = torch.tensor(token_ids)
        owners, inputs.positions[:] = new_tokens(*lens)
        inputs.query_lens[:], inputs.kv_lens[:] = map(torch.tensor, lens)
        page_size = self.pool.layout.page_size
        for kind, (table, slots) in enumerate(inputs.tables):
            fill_table(table, caches, kind)
            table[:, len(caches) :] = self.pool.spare_page
            slots[:] = slot_mapping(table, owners, inputs.positions, page_size)
        return host

    def _compute(self, bucket: Bucket, lens: _Lens | None = None) -> None:
        """One step from the inputs to hidden states and logits.

        Args:
            lens: of the step's sequences; None for a step that is captured, of which the host knows
                bounds alone. Kernels on a device read them from there.
        """
        inputs = self._split(self._inputs, bucket)
        lens, are_bounds = (lens, False) if lens is not None else (bucket.bounds, True)
        query_lens, kv_lens = (
            Lens(on_host, on_device.int(), are_bounds=are_bounds)
            for on_host, on_device in zip(lens, (inputs.query_lens, inputs.kv_lens), strict=True)
        )
        pages = PassPages(self.pool, query_lens, kv_lens, inputs.tables)
        hidden = self.model.run(inputs.token_ids, inputs.positions, query_lens, pages)
        self._hidden[: bucket.n_tokens] = hidden
        self._logits[: bucket.n_tokens] = self.model.logits(hidden)

    def _add_graph(self, bucket: Bucket) -> None:
        """Capture the step whose inputs are in place, or from now on no step at all."""
        # The plain step to compare with knows no more of the lengths than these: by others, keys
        # are cut into other runs, which round otherwise, and layers make more of it (10 % of the
        # logits of eight layers of random weights in W8A8).
        results = self._hidden[: bucket.n_tokens], self._logits[: bucket.n_tokens]
        graph = torch.cuda.CUDAGraph()
        try:
            # Kernels are compiled, tried and tuned, none of which a capture can take.
            self._compute(bucket)
            expected = [each.clone() for each in results]
            with capturing(graph, self._stream, self._memory):
                self._compute(bucket)
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
            "octavo: decode steps of up to %d answers and %s tokens%s run as a CUDA graph",
            bucket.size,
            f"{bucket.context:,}",
            ", with guesses," if bucket.guesses else "",
        )


def graph_bytes(layout: CacheLayout, model: Transformer, limits: StepLimits) -> int:
    """Bytes that the graphs of all buckets keep: arguments as in `DecodeGraphs`; an estimate."""
    config, buckets = model.config, _buckets(limits)
    n_inputs, n_tokens = _places(layout, buckets)
    results = n_tokens * (config.dim * model.dtype.itemsize + config.vocab_size * FP32)
    # One pool of memory serves all graphs: the largest batch's. Logits are there in both dtypes.
    logits = n_tokens * config.vocab_size * (model.dtype.itemsize + FP32)
    made = activation_bytes(config, n_tokens) + logits
    if limits.speculate:
        made += (
            RUNS * SPECULATED_ROWS * config.n_heads // config.n_kv_heads * config.head_dim * FP32
        )
    n_kernels = len(buckets) * config.n_layers * KERNELS_A_LAYER
    return 8 * n_inputs + results + made + n_kernels * KERNEL_BYTES


def _buckets(limits: StepLimits) -> list[Bucket]:
    """The largest first, whose memory serves the others."""
    contexts = _steps(SHORTEST_CONTEXT, CONTEXT_FACTOR, limits.max_model_len)
    buckets = [Bucket(*each) for each in product(_steps(1, 2, limits.max_num_seqs), contexts)]
    if limits.speculate:
        sizes = _steps(1, 2, min(limits.max_num_seqs, SPECULATED_ROWS))
        buckets += (Bucket(*each, guesses=True) for each in product(sizes, contexts))
    return sorted(buckets, key=lambda bucket: (bucket.n_tokens, bucket), reverse=True)


def _places(layout: CacheLayout, buckets: Sequence[Bucket]) -> tuple[int, int]:
    """How many numbers are the inputs of any of them, and how many tokens a step has at most."""
    n_inputs = max(sum(bucket.lengths(layout)) for bucket in buckets)
    return n_inputs, max(bucket.n_tokens for bucket in buckets)


def _steps(first: int, factor: int, last: int) -> list[int]:
    """first, first · factor, … below last, and last."""
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]
