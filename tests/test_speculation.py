"""Prompt lookup: what it guesses, and how it learns whether guessing pays."""

from __future__ import annotations

from octavo.engine.speculation import LONGEST_REST, MOST, PromptLookup


def test_it_guesses_what_followed_the_same_words() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert lookup.propose(tokens, 10) == [4, 5, 6, 7]
    assert lookup.propose(tokens, 2) == [4, 5]
    assert lookup.propose([*tokens, 9], 10) == []


def test_the_latest_of_several_places_counts() -> None:
    tokens = [1, 2, 3, 7, 7, 1, 2, 3, 8, 8, 1, 2, 3]
    assert PromptLookup().propose(tokens, 2) == [8, 8]


def test_what_repeats_until_the_end_goes_on_repeating() -> None:
    assert PromptLookup().propose([5, 6, 5, 6, 5, 6], 4) == [5, 6, 5, 6]
    assert PromptLookup().propose([9, 9, 9, 9], 4) == [9, 9, 9, 9]


def test_too_few_tokens_give_no_guess() -> None:
    for tokens in ([], [1], [1, 1], [1, 1, 1]):
        assert PromptLookup().propose(tokens, 4) == []


def test_it_finds_the_same_whether_it_saw_the_tokens_at_once_or_one_by_one() -> None:
    tokens = [i * i % 13 for i in range(200)]
    grown = PromptLookup()
    for stop in range(1, 201):
        step_by_step = grown.propose(tokens[:stop], 4)
        assert step_by_step == PromptLookup().propose(tokens[:stop], 4)


def test_right_guesses_grow_and_wrong_ones_rest() -> None:
    lookup = PromptLookup()
    tokens = [3] * 50
    lengths = []
    for _ in range(5):
        draft = lookup.propose(tokens, 99)
        lengths.append(len(draft))
        lookup.report(len(draft), len(draft))
    assert lengths == [4, 8, 15, 15, 15] and max(lengths) == MOST
    lookup.report(15, 6)
    assert len(lookup.propose(tokens, 99)) == 7
    lookup.report(7, 0)
    assert lookup.propose(tokens, 99) == [] and len(lookup.propose(tokens, 99)) == 3


def test_a_text_that_never_repeats_its_runs_is_left_alone() -> None:
    lookup = PromptLookup()
    tokens = [3] * 50
    asked = 0
    for _ in range(1000):
        draft = lookup.propose(tokens, 99)
        if draft:
            asked += len(draft)
            lookup.report(len(draft), 0)
    assert asked < 1000 / LONGEST_REST + 20
