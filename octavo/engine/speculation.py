"""Prompt lookup: guess the next tokens from what followed the same words earlier in the text.

Answers that quote their prompt (summaries, edited code, retrieved passages) repeat whole runs of
tokens. A guess costs no model; a pass that checks it reads the weights once for several tokens.
(Saxena 2023, "Prompt Lookup Decoding"; the check is speculative decoding's, Leviathan et al. 2023.)
Which tokens are accepted is decided by sampling as if nothing had been guessed, so that the answer
does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 3  # tokens that must have occurred before
MOST = 15  # tokens guessed at once
LONGEST_REST = 64  # steps
# Rows of a step up to which a guessed token is worth its place: reading the weights takes most of
# the time of so few.
SPECULATED_ROWS = 16


class PromptLookup:
    """The guesses for one sequence, longer while they are right, rarer while they are wrong."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram: what position followed it last
        self._n_known = 0
        self._length = 4
        self._rest = 0
        self._next_rest = 1

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """Up to `limit` tokens that may follow.

        Args:
            token_ids: prompt and answer so far; only appended to between calls.
            limit: the most that can be used.
        """
        n_tokens = len(token_ids)
        # All n-grams but the one at the end, which is looked for.
        for stop in range(max(self._n_known, NGRAM), n_tokens):
            self._after[tuple(token_ids[stop - NGRAM : stop])] = stop
        self._n_known = max(self._n_known, n_tokens)
        if self._rest:
            self._rest -= 1
            return []
        at = self._after.get(tuple(token_ids[n_tokens - NGRAM :]))
        if at is None:
            return []
        draft: list[int] = []
        for position in range(at, at + min(limit, self._length)):
            # What repeats until the end goes on repeating.
            known = position < n_tokens
            draft.append(token_ids[position] if known else draft[position - n_tokens])
        return draft

    def report(self, n_drafted: int, n_accepted: int) -> None:
        """How many of the last guesses were right."""
        if n_accepted:
            self._next_rest = 1
            full = n_accepted == n_drafted
            self._length = min(2 * n_accepted, MOST) if full else n_accepted + 1
        else:
            self._length = max(1, self._length // 2)
            self._rest = self._next_rest
            self._next_rest = min(2 * self._next_rest, LONGEST_REST)
