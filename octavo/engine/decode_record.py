"""Decode steps on a CPU, recorded once for each kind of batch and replayed by one call.

What `decode_graph` is to a GPU: a step that brings one token a sequence is a dozen calls a layer of
the C++ library, and Python between them takes a tenth of its time. A recording repeats the same
calls on the same memory, so a step's embeddings, lengths and page tables are put in fixed places.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from octavo.engine.speculation import MOST
from octavo.engine.step_limits import StepLimits
from octavo.kernels.cpu import memory
from octavo.kernels.cpu.arena import Arena, ArenaFull
from octavo.kernels.cpu.library import keep_little
from octavo.kernels.cpu.recording import NotRecorded, Recording
from octavo.kernels.lens import Lens
from octavo.model import Transformer
from octavo.model.rope import rotary_angles

MOST_TOKENS = 1 + MOST  # of a step of one sequence: with what prompt lookup guesses
# What Python and the library hold of a call, and how many there are of a layer.
CALL_BYTES = 1280
CALLS_A_LAYER = 14
ROUNDING = 2**16  # bytes: of all tensors, to lines of the cache

_Kind = tuple[tuple[int, ...], int]  # new tokens of each sequence, and threads

logger = logging.getLogger("octavo")


class _Step(NamedTuple):
    """A recorded step: what it reads beside the inputs' places, and where its results are."""

    recording: Recording
    pages: PassPages
    hidden: Tensor  # [T, dim]
    logits: Tensor  # [T, vocab_size], in the model's dtype


class RecordedDecode:
    """Runs decode steps of a model over a pool.

    The first step of a number of sequences runs as any pass does, the second is recorded, and those
    after it are replays; so do steps of one sequence with so many guesses. The first of all replays
    is compared with what was recorded. Steps that others than the library compute too run as any
    pass does.

    Args:
        model: its weights may not move from here on.
        pool: of all sequences' pages.
        limits: of all steps.
    """

    def __init__(self, model: Transformer, pool: PagePool, limits: StepLimits) -> None:
        self.model = model
        self.pool = pool
        self._is_right: bool | None = None  # what replays compute; None: not compared yet
        self._seen: set[_Kind] = set()
        self._steps: dict[_Kind, _Step | None] = {}  # None: cannot be recorded
        config, layout = model.config, pool.layout
        n_tokens = self._n_tokens = _most_tokens(limits)
        # Of the system's small pages: of these a step of one token fills few.
        self._arena = Arena(torch.empty(arena_bytes(model, n_tokens), dtype=torch.uint8).numpy())
        self._x = torch.zeros(n_tokens, config.dim, dtype=model.dtype)
        self._logits = torch.empty(n_tokens, config.vocab_size)
        self._cos, self._sin = torch.zeros(2, n_tokens, config.head_dim // 2)
        self._kv_lens = torch.ones(limits.max_num_seqs, dtype=torch.int64)
        n_blocks = layout.n_blocks(limits.max_model_len)
        self._page_tables = [
            memory.zeros((rows, limits.max_num_seqs, n_blocks), torch.int64) for rows in layout.rows
        ]
        self._slots = [torch.zeros(rows, n_tokens, dtype=torch.int64) for rows in layout.rows]

    def takes(self, query_lens: Sequence[int]) -> bool:
        """As `DecodeSteps.takes`."""
        return max(query_lens) == 1 or (len(query_lens) == 1 and query_lens[0] <= self._n_tokens)

    def run(
        self,
        token_ids: Sequence[int],
        caches: Sequence[RaggedCache],
        query_lens: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `DecodeSteps.run`."""
        keep_little()
        query_lens = query_lens or [1] * len(caches)
        kind = (tuple(query_lens), torch.get_num_threads())  # calls hold both
        if kind in self._seen and kind not in self._steps:
            self._put(token_ids, caches, query_lens)
            step = self._steps[kind] = self._record(query_lens)
        elif (step := self._steps.get(kind)) is not None:
            self._put(token_ids, caches, query_lens)
            step.recording.replay()
        self._seen.add(kind)
        if step is None:
            hidden = self.model.hidden(torch.tensor(token_ids), query_lens, caches)
            logits = self.model.output(hidden)
        else:
            hidden, logits = step.hidden, step.logits
            for cache, n in zip(caches, query_lens, strict=True):
                cache.length += n
        return hidden, self._logits[: len(token_ids)].copy_(logits)

    def _put(
        self, token_ids: Sequence[int], caches: Sequence[RaggedCache], query_lens: Sequence[int]
    ) -> None:
        """The inputs of a step to their places."""
        n_tokens, config, page_size = len(token_ids), self.model.config, self.pool.layout.page_size
        weight = self.model.tok_embeddings.weight
        torch.index_select(weight, 0, torch.tensor(token_ids), out=self._x[:n_tokens])
        kv_lens = [cache.length + n for cache, n in zip(caches, query_lens, strict=True)]
        self._kv_lens[: len(caches)] = torch.tensor(kv_lens)
        owners, positions = new_tokens(query_lens, kv_lens)
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta)
        self._cos[:n_tokens], self._sin[:n_tokens] = cos, sin
        for kind, page_table in enumerate(self._page_tables):
            fill_table(page_table, caches, kind)
            slots = slot_mapping(page_table, owners, positions, page_size)
            self._slots[kind][:, :n_tokens] = slots

    def _record(self, query_lens: Sequence[int]) -> _Step | None:
        """Compute the step whose inputs are in place; None if it cannot be replayed."""
        if self._is_right is False:
            return None
        count, n_tokens = len(query_lens), sum(query_lens)
        tables = [
            (page_table[:, :count], slots[:, :n_tokens])
            for page_table, slots in zip(self._page_tables, self._slots, strict=True)
        ]
        new = Lens(query_lens, on_host=torch.tensor(query_lens))
        kept = Lens(self._kv_lens[:count].tolist(), on_host=self._kv_lens[:count])
        pages = PassPages(self.pool, new, kept, tables)
        rotary = (self._cos[:n_tokens], self._sin[:n_tokens])
        recording = Recording(self._arena.twin())
        try:
            with recording.record():
                hidden = self.model.run_layers(self._x[:n_tokens], rotary, new, pages)
                step = _Step(recording, pages, hidden, self.model.output(hidden))
        except (ArenaFull, NotRecorded) as reason:
            logger.info("octavo: steps of %d tokens run a call at a time: %s", n_tokens, reason)
            return None
        if self._is_right is None:
            self._is_right = _gives_the_same(step)
            if not self._is_right:
                logger.warning("octavo: a replayed decode step computes wrong; they take longer")
                return None
        return step


def _gives_the_same(step: _Step) -> bool:
    """Whether a replay gives what was recorded."""
    expected = step.hidden.clone(), step.logits.clone()
    step.recording.overwrite()
    step.recording.replay()
    return torch.equal(step.hidden, expected[0]) and torch.equal(step.logits, expected[1])


def arena_bytes(model: Transformer, n_tokens: int) -> int:
    """Bytes of what a step of so many tokens computes; an upper estimate."""
    logits = n_tokens * model.config.vocab_size * model.dtype.itemsize
    return activation_bytes(model.config, n_tokens) + logits + ROUNDING


def recording_bytes(layout: CacheLayout, model: Transformer, limits: StepLimits) -> int:
    """Bytes that recordings of all kinds keep: arguments as in `RecordedDecode`; an estimate."""
    n_tokens = _most_tokens(limits)
    n_kinds = limits.max_num_seqs + (MOST if limits.speculate else 0)
    n_calls = n_kinds * (model.config.n_layers + 1) * CALLS_A_LAYER
    entries = limits.max_num_seqs * layout.n_blocks(limits.max_model_len)
    tables = 8 * sum(layout.rows) * entries
    logits = FP32 * n_tokens * model.config.vocab_size
    return arena_bytes(model, n_tokens) + n_calls * CALL_BYTES + tables + logits


def _most_tokens(limits: StepLimits) -> int:
    """Of a step."""
    return max(limits.max_num_seqs, MOST_TOKENS if limits.speculate else 0)
