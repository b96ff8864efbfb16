"""Which sequences run in a step, and how many of their tokens; who waits, and who makes room."""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from octavo.cache import PagePool, RaggedCache, block_digests
from octavo.cache.prefix import Hit
from octavo.engine.sequence import Sequence
from octavo.engine.speculation import SPECULATED_ROWS


@dataclass
class Scheduled:
    """A sequence's part in a step.

    Attributes:
        sequence: whose.
        n_tokens: of its pending tokens.
        draft: guessed tokens behind them.
    """

    sequence: Sequence
    n_tokens: int
    draft: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Refusal:
    """Why the first in the queue was not let in.

    Attributes:
        sequence: which.
        needed: pages that it would take.
        missing: digest of the first block that the prefix cache did not have; None if it had all.
    """

    sequence: Sequence
    needed: int
    missing: bytes | None


class Scheduler:
    """First come, first served, under a budget of tokens a step and of pages.

    Answers being written go first, a token each, so that a long prompt delays them by one chunk at
    most; prompts share what is left of the budget in order of arrival. When pages run out, whoever
    came last gives its own back and waits in its place by arrival; it will go on where it was.

    Args:
        pool: of pages.
        max_num_seqs: answers in the making at once.
        max_num_batched_tokens: tokens of a step.
        speculate: whether tokens are guessed by prompt lookup.

    Attributes:
        waiting: in order of arrival.
        running: in order of arrival; each holds pages.
        n_preempted: how often one made room.
    """

    def __init__(
        self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int, speculate: bool
    ) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.speculate = speculate
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.n_preempted = 0
        self._refusal: Refusal | None = None

    def schedule(self) -> list[Scheduled]:
        """The next step. Their caches have the pages for it."""
        batch: dict[Sequence, Scheduled] = {}
        budget = self.max_num_batched_tokens
        # Answers first. A preempted sequence is not in `running` any more.
        for sequence in sorted(self.running, key=lambda s: s.n_pending > 1):
            n_tokens = min(sequence.n_pending, budget)
            if not n_tokens or sequence.cache is None:
                continue
            budget += self._make_room(sequence, n_tokens, batch)
            if sequence.cache is not None:
                batch[sequence] = Scheduled(sequence, n_tokens)
                budget -= n_tokens
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            assert sequence.cache is not None
            self.running.append(sequence)
            n_tokens = min(sequence.n_pending, budget)
            sequence.cache.prepare(n_tokens)
            batch[sequence] = Scheduled(sequence, n_tokens)
            budget -= n_tokens
        if self.speculate:
            self._add_drafts(list(batch.values()), budget)
        return list(batch.values())

    def fork(self, sequence: Sequence, sibling: Sequence) -> None:
        """Start a sibling from the same prompt, with the same pages; if need be, later."""
        assert sequence.cache is not None
        enough = self.pool.n_available >= sum(self.pool.layout.rows)
        if len(self.running) < self.max_num_seqs and enough:
            sibling.cache = sequence.cache.copy()
            sibling.n_remembered = sequence.n_remembered
            self.running.append(sibling)
        else:
            self._wait(sibling)

    def remove(self, request_id: int) -> None:
        """Forget a request; its pages are free at once."""
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        for sequence in [s for s in self.running if s.request_id == request_id]:
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence needs its pages no more."""
        self.running.remove(sequence)
        assert sequence.cache is not None
        sequence.cache.free()
        sequence.cache = None

    def remember(self, sequence: Sequence) -> None:
        """Let the prefix cache know what the sequence has stored."""
        if not self.pool.prefix.enabled or sequence.cache is None:
            return
        page_size = self.pool.layout.page_size
        if sequence.cache.length // page_size > sequence.n_remembered:
            sequence.digests = block_digests(sequence.token_ids, page_size, sequence.digests)
            sequence.n_remembered = sequence.cache.remember(sequence.digests, sequence.n_remembered)

    def _make_room(
        self, sequence: Sequence, n_tokens: int, batch: dict[Sequence, Scheduled]
    ) -> int:
        """Take pages for a running sequence's tokens, at the cost of those that came after it.

        Returns:
            Tokens of this step that others gave up with their pages. If the sequence is itself the
            last, it gives up its own, and has no cache any more.
        """
        given_up = 0
        while sequence.cache is not None:
            if sequence.cache.pages_to_take(n_tokens) <= self.pool.n_available:
                sequence.cache.prepare(n_tokens)
                break
            last = self.running[-1]
            self._preempt(last)
            if last in batch:
                given_up += batch.pop(last).n_tokens
        return given_up

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence)
        sequence.n_remembered = 0
        self._wait(sequence)
        self.n_preempted += 1

    def _wait(self, sequence: Sequence) -> None:
        """Queue a sequence before all that came later."""
        insort(self.waiting, sequence, key=lambda s: (s.request_id, s.index))

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a cache, with what the prefix cache knows of it.

        All that is known of it must fit, beside what the running ones have yet to read: else the
        newcomer would soon make room again.
        """
        free = self.pool.n_available - sum(map(self._still_needed, self.running))
        if self.running and self._is_still_refused(sequence, free):
            return False
        usable = self._usable_digests(sequence)
        hit = self.pool.prefix.match(usable)
        n_known = hit.n_blocks if hit else 0
        needed = self._needed(sequence, hit)
        if self.running and needed > free:
            missing = usable[n_known] if n_known < len(usable) else None
            self._refusal = Refusal(sequence, needed, missing)
            return False
        self._refusal = None
        sequence.cache = RaggedCache(self.pool)
        if hit is not None:
            sequence.cache.take_over(hit)
        sequence.n_remembered = n_known
        if sequence.n_cached is None:
            sequence.n_cached = sequence.cache.length
        return True

    def _is_still_refused(self, sequence: Sequence, free: int) -> bool:
        """Whether another match, which takes a while for a long prompt, would change nothing."""
        refusal = self._refusal
        if refusal is None or refusal.sequence is not sequence or refusal.needed <= free:
            return False
        return refusal.missing is None or not self.pool.prefix.knows(refusal.missing)

    def _usable_digests(self, sequence: Sequence) -> list[bytes]:
        """Of the blocks that a waiting sequence may take over where the prefix cache has them."""
        scores_prompt = sequence.index == 0 and sequence.params.prompt_logprobs is not None
        is_scored = len(sequence.prompt_logprobs) == len(sequence.prompt_ids)
        if not self.pool.prefix.enabled or (scores_prompt and not is_scored):
            return []
        page_size = self.pool.layout.page_size
        sequence.digests = block_digests(sequence.token_ids, page_size, sequence.digests)
        # The last token is always computed: its logits are what is wanted.
        return sequence.digests[: (sequence.n_tokens - 1) // page_size]

    def _needed(self, sequence: Sequence, hit: Hit | None) -> int:
        """Pages that a waiting sequence's known tokens will take, but for those others hold."""
        if hit is None:
            return self._most_pages(sequence.n_tokens, sequence.n_tokens)
        n_pending = sequence.n_tokens - hit.n_blocks * self.pool.layout.page_size
        most = self._most_pages(sequence.n_tokens, n_pending)
        return max(0, most - hit.n_pages) + hit.n_unheld_pages

    def _still_needed(self, sequence: Sequence) -> int:
        """Pages that a running sequence's known tokens will take beyond what it holds."""
        assert sequence.cache is not None
        most = self._most_pages(sequence.n_tokens, sequence.n_pending)
        return max(0, most - sequence.cache.n_pages)

    def _most_pages(self, n_tokens: int, n_pending: int) -> int:
        chunk = min(n_pending, self.max_num_batched_tokens)
        return self.pool.layout.pages_needed(n_tokens, chunk)

    def _add_drafts(self, batch: list[Scheduled], budget: int) -> None:
        """Guess tokens behind the answers that are being written, where there is room for them."""
        room = min(budget, SPECULATED_ROWS - sum(s.n_tokens == 1 for s in batch))
        for scheduled in batch:
            sequence = scheduled.sequence
            if room <= 0:
                return
            left = sequence.max_tokens - len(sequence.output_ids) - 1
            if sequence.n_pending != 1 or not sequence.output_ids or left <= 0:
                continue
            draft = sequence.lookup.propose(sequence.token_ids, min(room, left))
            assert sequence.cache is not None
            if not draft or sequence.cache.pages_to_take(1 + len(draft)) > self.pool.n_available:
                continue
            sequence.cache.prepare(1 + len(draft))
            scheduled.draft = draft
            room -= len(draft)
