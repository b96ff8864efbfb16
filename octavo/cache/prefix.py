"""The prefix cache: blocks whose tokens are known, found again by what stands in and before them.

A prompt that begins as an earlier sequence did takes that sequence's blocks over. A full layer
needs every block before the hit; a windowed layer needs only those that the next query still sees.
So a hit far longer than the window costs a window of pages, and pages behind it may go.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from octavo.cache.layout import CacheLayout

if TYPE_CHECKING:
    from octavo.cache.pool import Block

# (not evicted first, last used, -depth, a number of its own, the block)
Entry = tuple[bool, int, int, int, "Block"]

DIGEST_BYTES = 16  # collisions would hand one user's context to another: no short hash


def block_digests(
    token_ids: Sequence[int], page_size: int, before: Sequence[bytes] = ()
) -> list[bytes]:
    """A digest for each whole block of a sequence, of its tokens and all before them.

    Args:
        token_ids: the whole sequence.
        page_size: tokens a block.
        before: digests of its first blocks, as far as they are known.
    """
    digests = list(before)
    for start in range(len(digests) * page_size, len(token_ids) - page_size + 1, page_size):
        parent = digests[-1] if digests else b""
        content = array("q", token_ids[start : start + page_size]).tobytes()
        digests.append(blake2b(parent + content, digest_size=DIGEST_BYTES).digest())
    return digests


@dataclass(frozen=True)
class Hit:
    """What a prompt takes over.

    Attributes:
        n_blocks: of the prompt, that need not be computed.
        blocks: for each kind the first block that is still needed, and the blocks from there on.
    """

    n_blocks: int
    blocks: tuple[tuple[int, list[Block]], ...]

    @property
    def n_pages(self) -> int:
        return sum(len(block.pages) for _, blocks in self.blocks for block in blocks)

    @property
    def n_unheld_pages(self) -> int:
        """Those that nobody holds, and that others could have."""
        unheld = [block for _, blocks in self.blocks for block in blocks if not block.references]
        return sum(len(block.pages) for block in unheld)


class PrefixCache:
    """Blocks by kind and digest, and the order in which those that nobody holds are evicted.

    That order is:

    1. blocks of windowed layers that a window had passed and that no hit has ever used: they serve
       only hits shorter than those that the rest of their sequence serves;
    2. the least recently used; of those that were let go together, the deepest first, since
       without a block those behind it are of no use.

    Args:
        layout: the cache's shape.
        enabled: if not, nothing is ever remembered.
    """

    def __init__(self, layout: CacheLayout, enabled: bool = True) -> None:
        self.layout = layout
        self.enabled = enabled
        self.n_unheld_pages = 0
        self._blocks: dict[tuple[int, bytes], Block] = {}
        # Entries of blocks that were taken again, or moved up, stay until they come to the top.
        self._order: list[Entry] = []
        self._n_pushed = 0

    def insert(self, block: Block, digest: bytes) -> None:
        """Remember a block that a sequence has filled; a twin that is known already stays."""
        if self.enabled and block.digest is None and (block.kind, digest) not in self._blocks:
            block.digest = digest
            self._blocks[block.kind, digest] = block

    def knows(self, digest: bytes) -> bool:
        """Whether the block with this digest is there in the layers of every kind."""
        return all((kind, digest) in self._blocks for kind in range(len(self.layout.windows)))

    def match(self, digests: Sequence[bytes]) -> Hit | None:
        """The longest hit for a prompt whose blocks have these digests."""
        n_kinds = len(self.layout.windows)
        found: list[list[Block | None]] = [
            [self._blocks.get((kind, digest)) for digest in digests] for kind in range(n_kinds)
        ]
        # How many blocks up to this one, itself included, are there without a gap.
        runs = [0] * n_kinds
        longest = 0
        for n_blocks in range(1, len(digests) + 1):
            position = n_blocks * self.layout.page_size
            usable = True
            for kind in range(n_kinds):
                runs[kind] = runs[kind] + 1 if found[kind][n_blocks - 1] else 0
                needed = n_blocks - self.layout.first_block(kind, position)
                usable = usable and runs[kind] >= needed
            if usable:
                longest = n_blocks
        if not longest:
            return None
        blocks = []
        for kind in range(n_kinds):
            first = self.layout.first_block(kind, longest * self.layout.page_size)
            blocks.append((first, [b for b in found[kind][first:longest] if b is not None]))
        return Hit(longest, tuple(blocks))

    def keep(self, block: Block) -> None:
        """Nobody holds this block any more, but it is remembered."""
        self.n_unheld_pages += len(block.pages)
        self._n_pushed += 1
        passed = block.passed and not block.was_hit
        entry = (not passed, block.last_used, -block.depth, self._n_pushed, block)
        heapq.heappush(self._order, entry)
        if len(self._order) > 1000 + 2 * self.n_unheld_pages:  # most are of the past
            self._order = [entry for entry in self._order if _is_current(entry)]
            heapq.heapify(self._order)

    def take(self, block: Block) -> None:
        """A sequence takes over a block that nobody held."""
        self.n_unheld_pages -= len(block.pages)

    def evict(self) -> Block | None:
        """Forget the block that comes first; its pages are the caller's. None: there is none."""
        while self._order:
            entry = heapq.heappop(self._order)
            if _is_current(entry):
                block = entry[-1]
                assert block.digest is not None
                del self._blocks[block.kind, block.digest]
                block.digest = None
                self.n_unheld_pages -= len(block.pages)
                return block
        return None


def _is_current(entry: Entry) -> bool:
    """Whether nothing has happened to the block since the entry was made."""
    _, last_used, _, _, block = entry
    return not block.references and block.last_used == last_used and block.digest is not None
