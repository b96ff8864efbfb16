"""Each step of sampling by hand, and the draw's distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from octavo import SamplingParams
from octavo.engine import sampler
from octavo.errors import RequestError

PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor) -> list[int]:
    return torch.isfinite(logits).nonzero().flatten().tolist()


def draw(n: int = 1, output: tuple[int, ...] = (), **params: Any) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    chosen = SamplingParams(**params)
    return [sampler.sample(LOGITS, chosen, [], output, generator) for _ in range(n)]


def test_top_k() -> None:
    assert kept(sampler.keep_top_k(LOGITS, 2)) == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.9, [0, 1, 2]), (0.01, [0])],
)
def test_top_p_is_the_smallest_set_that_reaches_it(top_p: float, expected: list[int]) -> None:
    # Shuffled, so that the order of the vocabulary does not help.
    order = torch.tensor([3, 0, 4, 2, 1])
    assert sorted(order[kept(sampler.keep_top_p(LOGITS[order], top_p))].tolist()) == expected


def test_min_p() -> None:
    assert kept(sampler.keep_min_p(LOGITS, 0.3)) == [0, 1, 2]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0])
    params = SamplingParams(repetition_penalty=2.0)
    penalized = sampler.penalize(logits, params, prompt_ids=[0], output_ids=[1])
    assert penalized.tolist() == [1.0, -4.0, 2.0, -2.0]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.5)
    penalized = sampler.penalize(torch.zeros(3), params, prompt_ids=[2, 2], output_ids=[0, 0, 1])
    assert penalized.tolist() == [-2.0, -1.5, 0.0]


def test_greedy_takes_the_likeliest() -> None:
    assert draw(3, temperature=0) == [0, 0, 0]
    assert draw(1, output=(0,), temperature=0, presence_penalty=2.0) == [1]


def test_draws_follow_the_probabilities_and_the_temperature() -> None:
    for temperature in (1.0, 2.0):
        counts = torch.bincount(torch.tensor(draw(20_000, temperature=temperature)), minlength=5)
        expected = (LOGITS / temperature).softmax(-1)
        # Four standard deviations of a count.
        bound = 4 * (expected * (1 - expected) * 20_000).sqrt()
        assert ((counts - 20_000 * expected).abs() < bound).all()


def test_cut_off_tokens_are_never_drawn() -> None:
    assert set(draw(500, top_k=3)) == {0, 1, 2}
    assert set(draw(500, top_p=0.6)) == {0, 1}
    assert set(draw(500, min_p=0.3)) == {0, 1, 2}


def test_banned_tokens_are_never_drawn() -> None:
    params = SamplingParams(temperature=0)
    assert sampler.sample(LOGITS, params, [], [], torch.Generator(), banned_ids=[0, 1]) == 2


def test_banned_tokens_come_where_nothing_else_may() -> None:
    only_first = torch.tensor([0.0, -math.inf, -math.inf])
    params = SamplingParams()
    assert sampler.sample(only_first, params, [], [], torch.Generator(), banned_ids=[0]) == 0


def test_logit_bias_is_added_before_the_temperature() -> None:
    assert sampler.add_bias(LOGITS, {1: 2.0, 4: -1.0}).tolist() == pytest.approx(
        (LOGITS + torch.tensor([0, 2.0, 0, 0, -1.0])).tolist()
    )
    assert draw(3, temperature=0, logit_bias={4: 100}) == [4, 4, 4]
    assert set(draw(500, logit_bias={0: -100, 1: -100})) == {2, 3, 4}
    even = draw(2_000, logit_bias={4: math.log(0.5 / 0.04)}, top_k=2)
    assert abs(even.count(4) - 1_000) < 4 * 2_000**0.5 / 2


def test_logprobs_rank_the_chosen_and_the_likeliest() -> None:
    row = sampler.top_logprobs(LOGITS[None], torch.tensor([3]), 2)[0]
    assert list(row) == [3, 0, 1]
    assert row[3][0] == pytest.approx(math.log(0.06), abs=1e-6) and row[3][1] == 4
    assert row[0][0] == pytest.approx(math.log(0.5), abs=1e-6) and row[0][1] == 1
    assert sampler.top_logprobs(LOGITS[None], torch.tensor([0]), 99)[0].keys() == set(range(5))


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p must be in 0…1"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens 20 is more than max_tokens 16"),
        ({"stop": ""}, "stop must be"),
        ({"stop": [3]}, "stop must be"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"seed": "x"}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"1": 1}}, "a token id of logit_bias must be an integer"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be an integer"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be in -100…100"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs must be StructuredOutputsPar"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(params: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        SamplingParams(**params)
