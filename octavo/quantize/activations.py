"""The residual stream of all samples: rows in a mapped file, and the chunks that visit them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_TOKENS = 2048  # whole sequences are put together up to this


@dataclass(frozen=True)
class Chunk:
    """Neighbouring sequences that go through a layer in one piece.

    Attributes:
        start: row of the first token.
        seqlens: tokens of each sequence.
    """

    start: int
    seqlens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.n_tokens)


def make_chunks(seqlens: Sequence[int], start: int = 0) -> list[Chunk]:
    """Sequences in order, in chunks of about CHUNK_TOKENS; the first row is `start`."""
    chunks: list[Chunk] = []
    pending: list[int] = []
    for length in seqlens:
        if pending and sum(pending) + length > CHUNK_TOKENS:
            chunks.append(Chunk(start, tuple(pending)))
            start, pending = start + sum(pending), []
        pending.append(length)
    if pending:
        chunks.append(Chunk(start, tuple(pending)))
    return chunks


class Activations:
    """[n_rows, width] in a file, so that they may be larger than the memory and outlive a run.

    Args:
        path: the file; taken as it is if it has the right size, else made anew. All of it is
            allocated at once: a mapping cannot report later that the disk is full.
        n_rows, width, dtype: the shape, and the dtype of the rows.
        resident: whether the pages may stay in memory. If not, each goes back to the system as
            soon as it was read or written, so that any number of rows takes no room.

    Raises:
        OSError: no room on the disk, or the file cannot be written.
    """

    def __init__(
        self, path: Path, n_rows: int, width: int, dtype: torch.dtype, resident: bool
    ) -> None:
        self.path = path
        self.resident = resident
        n_bytes = n_rows * width * dtype.itemsize
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            if os.fstat(file.fileno()).st_size != n_bytes:
                _allocate(file.fileno(), n_bytes)
            self._map = mmap.mmap(file.fileno(), n_bytes)
        self._rows = torch.frombuffer(self._map, dtype=dtype).view(n_rows, width)

    def read(self, rows: slice) -> Tensor:
        """A copy of these rows."""
        copy = self._rows[rows].clone()
        self._release(rows)
        return copy

    def write(self, rows: slice, values: Tensor) -> None:
        """Store these rows."""
        self._rows[rows] = values
        self._release(rows)

    def flush(self) -> None:
        """Bring everything to the disk."""
        self._map.flush()

    def delete(self) -> None:
        """Remove the file; the object is of no use afterwards."""
        self.path.unlink(missing_ok=True)

    def _release(self, rows: slice) -> None:
        """Give pages back: what was written stays in the file, and in the system's cache."""
        if self.resident:
            return
        row_bytes = self._rows.shape[1] * self._rows.element_size()
        start = rows.start * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, rows.stop * row_bytes - start)


def _allocate(descriptor: int, n_bytes: int) -> None:
    """Give a file its size, and all of the disk that it will need where the system can do that."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, n_bytes)
    os.ftruncate(descriptor, n_bytes)  # last: a file of the right size passes for one with room


class Derived:
    """Rows computed from others, chunk by chunk: kept where there is room, else computed again.

    Args:
        compute: the rows of a chunk, [n_tokens, width].
        kept: [n_rows, width] to keep them in, or None.
    """

    def __init__(self, compute: Callable[[Chunk], Tensor], kept: Tensor | None) -> None:
        self._compute = compute
        self._kept = kept
        self._known: set[int] = set()

    def __call__(self, chunk: Chunk) -> Tensor:
        if self._kept is None:
            return self._compute(chunk)
        if chunk.start not in self._known:
            self._kept[chunk.rows] = self._compute(chunk)
            self._known.add(chunk.start)
        return self._kept[chunk.rows]

    def forget(self) -> None:
        """Compute every row anew: what makes them has changed.

        Dividing what is kept would be quicker where that is all that changed, but rounds in another
        place than the model will: then the output would depend on how much memory there was.
        """
        self._known.clear()
