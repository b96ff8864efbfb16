"""Each step of sampling by hand, and the draw's distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo import SamplingParams, kernels
from octavo.engine import sampler
from octavo.errors import RequestError
from octavo.kernels.cuda import top_p as cuda_top_p
from octavo.kernels.cuda.launch import DEVICE

Keep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def by_triton(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """On a GPU, or in the interpreter."""
    return cuda_top_p._keep(weights.to(DEVICE), top_p.to(DEVICE)).cpu()


each_way = pytest.mark.parametrize("keep_top_p", [kernels.keep_top_p, by_triton])
PROBABILITIES = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
LOGITS = PROBABILITIES.log()


def kept(weights: torch.Tensor) -> list[int]:
    return weights.nonzero().flatten().tolist()


def column(value: float) -> torch.Tensor:
    return torch.tensor([[value]])


def draw(n: int = 1, output: tuple[int, ...] = (), **params: Any) -> list[int]:
    chosen = SamplingParams(**params)
    row = sampler.adjust(LOGITS, chosen, [], output)
    uniforms = [sampler.uniform(7, i) for i in range(n)]
    return sampler.sample(row.expand(n, -1), [chosen] * n, uniforms)


def test_top_k() -> None:
    assert kept(sampler.keep_top_k(PROBABILITIES[None].clone(), column(2).long())[0]) == [0, 1]


@each_way
@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.5, [0]), (0.51, [0, 1]), (0.75, [0, 1]), (0.9, [0, 1, 2]), (0.01, [0])],
)
def test_top_p_is_the_smallest_set_that_reaches_it(
    top_p: float, expected: list[int], keep_top_p: Keep
) -> None:
    # Shuffled, so that the order of the vocabulary does not help.
    order = torch.tensor([3, 0, 4, 2, 1])
    rows = keep_top_p(PROBABILITIES[order][None], column(top_p))
    assert sorted(order[kept(rows[0])].tolist()) == expected


def test_min_p() -> None:
    assert kept(sampler.keep_min_p(PROBABILITIES[None].clone(), column(0.3))[0]) == [0, 1, 2]


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
    assert set(draw(500, min_p=0.29)) == {0, 1, 2}
    assert set(draw(500, top_p=1e-50, logit_bias={2: 5})) == {2}
    assert draw(500, top_k=10**30) == draw(500)


def test_banned_tokens_are_never_drawn() -> None:
    params = SamplingParams(temperature=0)
    row = sampler.adjust(LOGITS, params, [], [], banned_ids=[0, 1])
    assert sampler.sample(row[None], [params], [0.5]) == [2]


def test_a_row_is_drawn_as_it_would_be_alone() -> None:
    """Each row has its own parameters; what else is in the batch changes nothing."""
    logits = torch.randn(8, 50)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(top_p=0.3),
        SamplingParams(min_p=0.2),
        SamplingParams(),
        SamplingParams(temperature=2.0, top_k=-1, top_p=0.9),
        SamplingParams(top_k=1),
        SamplingParams(top_k=200, min_p=0.01),
    ]
    for trial in range(200):
        uniforms = [sampler.uniform(trial, i) for i in range(8)]
        alone = [sampler.sample(logits[i : i + 1], [params[i]], [uniforms[i]])[0] for i in range(8)]
        assert sampler.sample(logits, params, uniforms) == alone
        assert alone[0] == int(logits[0].argmax()) and alone[6] == int(logits[6].argmax())
        assert alone[1] in logits[1].topk(3).indices


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1e6}, {"repetition_penalty": 1e-6}, {"repetition_penalty": 1e6}]
)
def test_draws_at_the_ends_of_the_range_are_tokens_with_probability(params: Any) -> None:
    chosen = SamplingParams(**params)
    logits = torch.tensor([-math.inf, 20.0, -math.inf, 20.0, -math.inf])
    row = sampler.adjust(logits, chosen, list(range(5)), [])[None]
    assert sampler.sample(row, [chosen], [0.0]) == [1]
    assert sampler.sample(row, [chosen], [1 - 2**-52]) == [3]


def test_uniforms_are_uniform_and_depend_on_seed_and_position_alone() -> None:
    drawn = torch.tensor([sampler.uniform(seed, i) for seed in range(50) for i in range(200)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn.float(), 10, 0, 1)
    assert ((counts - 1000).abs() < 4 * 30).all()
    assert sampler.uniform(3, 5) == sampler.uniform(3, 5) != sampler.uniform(5, 3)


def test_banned_tokens_come_where_nothing_else_may() -> None:
    only_first = torch.tensor([0.0, -math.inf, -math.inf])
    params = SamplingParams()
    row = sampler.adjust(only_first, params, [], [], banned_ids=[0])
    assert sampler.sample(row[None], [params], [0.5]) == [0]


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
        ({"temperature": 1e39}, r"temperature must be at least 0 and at most 1e\+06, not 1e\+39"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p must be at least 0 and at most 1, not 1.1"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n must be an integer of at least 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens 20 is more than max_tokens 16"),
        ({"stop": ""}, "stop must be"),
        ({"stop": [3]}, "stop must be"),
        ({"stop": 5}, "stop must be one or more non-empty strings, not 5"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of integers, not 5"),
        ({"seed": "x"}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be at least 1e-06 and at most"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"1": 1}}, "a token id of logit_bias must be an integer"),
        ({"logit_bias": {-1: 1}}, "a token id of logit_bias must be an integer"),
        ({"logit_bias": {1: 101}}, "logit_bias of token 1 must be at least -100"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs must be StructuredOutputsPar"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(params: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        SamplingParams(**params)


# Sizes on and off the edges of blocks, and beyond the first candidates.
each_size = pytest.mark.parametrize("n_tokens", [1, 5, 255, 256, 257, 1000, 6000])


@each_way
@each_size
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_top_p_by_sorting_every_token(
    n_tokens: int, spread: float, top_p: float, keep_top_p: Keep
) -> None:
    weights = (torch.randn(3, n_tokens) * spread).exp()
    kept = keep_top_p(weights.clone(), torch.tensor([[top_p], [1.0], [top_p]]))
    assert torch.equal(kept[1], weights[1])
    for row, original in zip(kept[::2], weights[::2], strict=True):
        chosen = row > 0
        assert torch.equal(row[chosen], original[chosen])
        probabilities = original.double() / original.double().sum()
        ordered = probabilities.sort(descending=True).values
        n_kept = int(chosen.sum())
        assert torch.equal(probabilities[chosen].sort(descending=True).values, ordered[:n_kept])
        if top_p == 1:
            assert n_kept == n_tokens
            continue
        # As few as reach it, but for what sums in fp32 are wrong by.
        assert ordered[:n_kept].sum() >= top_p - 1e-4
        assert n_kept == 1 or ordered[: n_kept - 1].sum() < top_p + 1e-4


@each_way
def test_top_p_keeps_whole_sets_of_equals_no_more_than_it_needs(keep_top_p: Keep) -> None:
    kept = keep_top_p(torch.ones(1, 5000), column(0.5))
    assert abs(int(kept.count_nonzero()) - 2500) <= 1


@each_way
def test_top_p_keeps_of_equals_before_lesser_ones_no_more_than_it_needs(keep_top_p: Keep) -> None:
    weights = torch.ones(1, 5000)
    weights[0, 4000:] = 0.5  # so that those that may go are 500 of the 4,000 greatest
    kept = keep_top_p(weights, column(3500 / 4500))
    assert abs(int(kept.count_nonzero()) - 3500) <= 1 and kept.max() == kept[kept > 0].min() == 1


@each_way
def test_top_p_leaves_a_row_with_nan_alone(keep_top_p: Keep) -> None:
    weights = torch.rand(2, 300)
    weights[0, 7] = math.nan
    kept = keep_top_p(weights.clone(), torch.tensor([[0.5], [0.5]]))
    assert kept[0].isnan().any()  # and nothing is drawn from it
    assert 0.5 <= kept[1].sum() / weights[1].sum() < 0.51


def test_top_p_of_a_whole_vocabulary_needs_no_sorting_on_a_gpu() -> None:
    weights = (torch.randn(2, 131_072) * 3).softmax(-1)
    top_p = torch.tensor([[0.9], [0.99]])
    found, expected = by_triton(weights.clone(), top_p), kernels.keep_top_p(weights.clone(), top_p)
    differ = (found > 0) != (expected > 0)
    assert differ.sum() <= 4 and weights[differ].sum() < 1e-5
    assert torch.equal(found[found > 0], weights[found > 0])


@pytest.mark.parametrize("n_tokens", [40, 1000, 40_000])
@pytest.mark.parametrize("k", [1, 7, 256])
def test_top_k_by_sorting_every_token(n_tokens: int, k: int) -> None:
    weights = torch.rand(3, n_tokens)
    weights[1] = weights[1].sort().values  # the likeliest side by side
    kept = sampler.keep_top_k(weights.clone(), torch.tensor([[k], [k], [0]]))
    assert torch.equal(kept[2], weights[2])
    for row, original in zip(kept[:2], weights[:2], strict=True):
        least = original.sort(descending=True).values[:k][-1]
        assert torch.equal(row, torch.where(original < least, 0, original))


@each_size
def test_the_likeliest_is_the_first_of_the_largest(n_tokens: int) -> None:
    logits = torch.randint(0, 50, (20, n_tokens)).float()
    logits[3] = -math.inf
    logits[4, n_tokens // 2] = math.nan
    values, tokens = sampler.likeliest(logits)
    for row, value, token in zip(logits, values, tokens.tolist(), strict=True):
        if row.isnan().any():
            assert value.isnan() and row[token].isnan()
        else:
            assert value == row.max() and token == int((row == value).nonzero()[0])


@each_size
def test_draws_invert_the_cumulative_sum(n_tokens: int) -> None:
    """But for what blocks' sums in fp32 are wrong by."""
    probabilities = (torch.randn(50, n_tokens) * 3).softmax(-1)
    probabilities[:, 1:][torch.rand(50, n_tokens - 1) < 0.5] = 0
    drawn = torch.rand(50, 1, dtype=torch.float64)
    drawn[0], drawn[1] = 0, 1 - 2**-52
    sums = probabilities.double().cumsum(-1)
    for row, token, before, end in zip(
        probabilities, sampler.invert(probabilities, drawn).tolist(),
        drawn * sums[:, -1:] - 1e-6, drawn * sums[:, -1:] + 1e-6, strict=True,
    ):  # fmt: skip
        assert row[token] > 0
        up_to = row[: token + 1].double().sum()
        assert up_to >= before and up_to - row[token] <= end


def test_a_row_of_nan_has_no_token_and_spoils_no_other() -> None:
    logits = torch.randn(3, 700)
    logits[1] = math.nan
    for top_p in (0.5, 1.0):
        params = [SamplingParams(top_p=top_p)] * 3
        tokens = sampler.sample(logits, params, [0.2, 0.5, 0.7])
        alone = [
            sampler.sample(logits[i][None], params[:1], [x])[0] for i, x in ((0, 0.2), (2, 0.7))
        ]
        assert tokens == [alone[0], -1, alone[1]]
