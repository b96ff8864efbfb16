"""Which sequences run in a step, and how many of their tokens; who waits, and who makes room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from octavo.cache import PagePool, RaggedCache, block_digests
from octavo.engine.sequence import Sequence

# Rows of a step up to which a guessed token is worth its place: reading the weights takes most of
# the time of so few.
SPECULATED_ROWS = 16


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


class Scheduler:
    """First come, first served, under a budget of tokens a step and of pages.

    Answers being written go first, a token each, so that a long prompt delays them by one chunk at
    most; prompts share what is left of the budget in order of arrival. When pages run out, whoever
    came last gives its own back and waits at the front of the queue; it will go on where it was.

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
            self.waiting.append(sibling)

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
        self.waiting.appendleft(sequence)
        self.n_preempted += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a cache, with what the prefix cache knows of it.

        All that is known of it must fit, beside what the running ones have yet to read: else the
        newcomer would soon make room again.
        """
        pool = self.pool
        cache = RaggedCache(pool)
        sequence.cache = cache
        if pool.prefix.enabled and sequence.params.prompt_logprobs is None:
            page_size = pool.layout.page_size
            sequence.digests = block_digests(sequence.token_ids, page_size, sequence.digests)
            # The last token is always computed: its logits are what is wanted.
            usable = sequence.digests[: (sequence.n_tokens - 1) // page_size]
            if (hit := pool.prefix.match(usable)) is not None:
                cache.take_over(hit)
        promised = sum(self._still_needed(running) for running in self.running)
        needed = self._still_needed(sequence)
        if self.running and needed + promised > pool.n_available:
            cache.free()
            sequence.cache = None
            return False
        sequence.n_remembered = cache.length // pool.layout.page_size
        if sequence.n_cached is None:
            sequence.n_cached = cache.length
        return True

    def _still_needed(self, sequence: Sequence) -> int:
        """Pages that the sequence's known tokens will take beyond what it holds."""
        assert sequence.cache is not None
        chunk = min(sequence.n_pending, self.max_num_batched_tokens)
        most = self.pool.layout.pages_needed(sequence.n_tokens, chunk)
        return max(0, most - sequence.cache.n_pages)

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
