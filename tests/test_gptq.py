"""GPTQ: by hand, against the paper's form in float64, and never worse than plain rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from octavo.kernels import unpack_int4
from octavo.model.linear import Linear
from octavo.quantize import gptq as gptq_module
from octavo.quantize import statistics as statistics_module
from octavo.quantize.activations import Chunk
from octavo.quantize.gptq import (
    MOST_DAMPENING,
    factorize,
    gptq,
    gptq_reference,
    keep_better_rows,
)
from octavo.quantize.grid import WeightGrid
from octavo.quantize.linears import LinearQuantizer
from octavo.quantize.recipe import Recipe
from octavo.quantize.statistics import InputStatistics
from octavo.schemes import SCHEMES
from tests.checkpoints import quantized_config

DAMPENING = 0.1
SHAPES = {  # of [N, K] matrices, by scheme; groups need a multiple of 128
    "W8A8": [(1, 1), (5, 2), (8, 127), (8, 128), (8, 129), (6, 300)],
    "W4A16": [(8, 128), (6, 256), (4, 384)],
    "W4A8": [(8, 128), (6, 384)],
    "FP8": [(5, 1), (8, 130)],
    "FP8_DYNAMIC": [(5, 3), (8, 128), (6, 300)],
}
CASES = [(scheme, shape) for scheme, shapes in SHAPES.items() for shape in shapes]
cases = pytest.mark.parametrize(("scheme", "shape"), CASES)


def grid(scheme: str) -> WeightGrid:
    return WeightGrid(SCHEMES[scheme], torch.bfloat16)


def inputs(n_inputs: int, n_tokens: int, seed: int = 0) -> Tensor:
    """[T, K] that hang together, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_inputs, n_inputs, generator=generator) / n_inputs**0.5
    size = torch.randn(n_inputs, generator=generator).exp()
    x = torch.randn(n_tokens, n_inputs, generator=generator)
    return (x + 2 * x @ mix) * size


def problem(scheme: str, shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its scales, and the Hessian of correlated inputs."""
    x = inputs(shape[1], 4 * shape[1] + 8, seed)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))
    hessian = x.t() @ x
    return weight, grid(scheme).find_scales(weight, hessian.diagonal()), hessian


def dampened(hessian: Tensor, dampening_frac: float) -> Tensor:
    mean = hessian.diagonal().mean()
    return hessian + dampening_frac * mean * torch.eye(len(hessian))


def row_errors(weight: Tensor, rounded: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """[N] fp64: what each row's outputs are off by, squared."""
    dequantized = rounded.double().view(*scale.shape, -1) * scale.double()[..., None]
    error = weight.double() - dequantized.view_as(weight)
    return ((error @ hessian.double()) * error).sum(1)


def output_error(weight: Tensor, rounded: Tensor, scale: Tensor, hessian: Tensor) -> float:
    return float(row_errors(weight, rounded, scale, hessian).sum())


def test_two_columns_by_hand() -> None:
    """Column 0 counts more (4 > 3) and goes first: 0.4 becomes 0. With the error 0.4 · H01 / H11 =
    0.267 added, column 1 is 0.567 and becomes 1, where plain rounding makes it 0.
    """
    hessian = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    weight, scale = torch.tensor([[0.4, 0.3]]), torch.ones(1, 1)
    rounded = gptq(weight, scale, factorize(hessian, 0.0), grid("W8A8"))
    assert rounded.tolist() == [[0, 1]]
    # 4 · 0.4² + 2 · 2 · 0.4 · (-0.7) + 3 · 0.7², and 4 · 0.4² + 2 · 2 · 0.4 · 0.3 + 3 · 0.3².
    assert output_error(weight, rounded, scale, hessian) == pytest.approx(0.99, rel=1e-6)
    plain = grid("W8A8").round_matrix(weight, scale)
    assert output_error(weight, plain, scale, hessian) == pytest.approx(1.39, rel=1e-6)
    # With the columns' worth exchanged, the other goes first: 0.3 is 0, and 0.4 + 0.2 is 1.
    swapped = hessian.flip(0, 1)
    assert gptq(weight, scale, factorize(swapped, 0.0), grid("W8A8")).tolist() == [[1, 0]]


def test_dampening_by_hand() -> None:
    """With 10 times the mean diagonal, 3.5, added, 2 / 38 of the error is no longer enough."""
    hessian = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    factorization = factorize(hessian, 10.0)
    assert factorization.order.tolist() == [1, 0] and factorization.dampening_frac == 10.0
    expected = torch.tensor([[38.0, 2.0], [2.0, 39.0]])
    upper = factorization.upper
    torch.testing.assert_close(upper.t() @ upper, expected)
    weight = torch.tensor([[0.4, 0.3]])
    assert gptq(weight, torch.ones(1, 1), factorization, grid("W8A8")).tolist() == [[0, 0]]
    assert hessian.tolist() == [[4.0, 2.0], [2.0, 3.0]]  # not changed


@cases
def test_gptq_is_the_papers_in_float64(scheme: str, shape: tuple[int, int]) -> None:
    """But for a row whose value lies so near the middle of two that fp32 rounds it the other way;
    from there on the row is another.
    """
    for seed in range(3):
        weight, scale, hessian = problem(scheme, shape, seed)
        ours = gptq(weight, scale, factorize(hessian, DAMPENING), grid(scheme))
        reference = gptq_reference(weight, scale, hessian, grid(scheme), DAMPENING)
        assert ours.dtype == reference.dtype == grid(scheme).dtype
        other_rows = (ours.float() != reference.float()).any(1).sum()
        assert other_rows <= (1 if weight.numel() > 500 else 0)
        target = dampened(hessian, DAMPENING)
        assert output_error(weight, ours, scale, target) == pytest.approx(
            output_error(weight, reference, scale, target), rel=0.02
        )


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8"])
def test_blocks_and_slabs_change_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale, hessian = problem(scheme, (11, 256))
    factorization = factorize(hessian, DAMPENING)
    whole = gptq(weight, scale, factorization, grid(scheme))
    for block, slab in ((1, 100), (7, 4), (1000, 1), (64, 10)):
        monkeypatch.setattr(gptq_module, "BLOCK", block)
        monkeypatch.setattr(gptq_module, "SLAB", slab)
        again = gptq(weight, scale, factorization, grid(scheme))
        assert (again != whole).any(1).sum() <= 1  # sums in another order
    assert not torch.equal(whole, grid(scheme).round_matrix(weight, scale))


@cases
def test_gptq_is_never_worse_than_plain_rounding(scheme: str, shape: tuple[int, int]) -> None:
    """By the outputs on the calibration data themselves, each row; and with the usual dampening, or
    on a grid that nothing runs off the end of, far better.
    """
    for seed in range(6):
        weight, scale, hessian = problem(scheme, shape, seed)
        plain = grid(scheme).round_matrix(weight, scale)
        before = row_errors(weight, plain, scale, hessian)
        for dampening in (DAMPENING, 1e-6):
            rounded = gptq(weight, scale, factorize(hessian, dampening), grid(scheme))
            keep_better_rows(weight, rounded, scale, hessian, grid(scheme))
            after = row_errors(weight, rounded, scale, hessian)
            assert (after <= before * (1 + 1e-5)).all()
            if shape[1] > 100 and (dampening == DAMPENING or scheme == "W8A8"):
                assert after.sum() < 0.7 * before.sum()


def test_rows_that_ran_off_the_grid_are_plainly_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no dampening, columns of 4 bits are asked for more than they can give."""
    weight, scale, hessian = problem("W4A16", (8, 128))
    plain = grid("W4A16").round_matrix(weight, scale)
    rounded = gptq(weight, scale, factorize(hessian, 1e-6), grid("W4A16"))
    before = row_errors(weight, rounded, scale, hessian)
    worse = before > row_errors(weight, plain, scale, hessian)
    assert 0 < worse.sum() < 8 and rounded.abs().max() == 8
    for compared in (2048, 3):
        monkeypatch.setattr(gptq_module, "COMPARED", compared)
        mended = rounded.clone()
        assert keep_better_rows(weight, mended, scale, hessian, grid("W4A16")) == worse.sum()
        assert torch.equal(mended, torch.where(worse[:, None], plain, rounded))
        assert keep_better_rows(weight, mended, scale, hessian, grid("W4A16")) == 0


def test_a_linear_is_written_with_the_better_rows() -> None:
    """As above, by the quantiser itself: without those rows plainly rounded it would be worse."""
    recipe = Recipe(SCHEMES["W4A16"], dampening_frac=1e-6)
    config = quantized_config()
    config = replace(config, quantization=recipe.quantization(config))
    x, (weight, scale, hessian) = inputs(128, 520), problem("W4A16", (128, 128))
    owner = nn.Module()
    owner.wq = Linear(128, 128)
    owner.wq.weight = nn.Parameter(weight, requires_grad=False)
    chunk = Chunk(0, (520,))
    quantizer = LinearQuantizer(config, recipe, torch.bfloat16, [chunk], [chunk], lambda n: None)
    quantizer.quantize(owner, ("wq",), "layers.0.attention.", lambda chunk: x)
    stored = quantizer.tensors["layers.0.attention.wq"]
    assert torch.equal(stored["weight_scale"], scale.bfloat16())
    written = row_errors(weight, unpack_int4(stored["weight_packed"]), scale, hessian)
    plain = grid("W4A16").round_matrix(weight, scale)
    before = row_errors(weight, plain, scale, hessian)
    assert (written <= before * (1 + 1e-5)).all() and written.sum() < before.sum()


def test_output_error_is_that_of_the_outputs() -> None:
    weight, scale, _ = problem("W4A16", (6, 256))
    x = inputs(256, 50)
    rounded = grid("W4A16").round_matrix(weight, scale)
    dequantized = rounded.double().view(6, 2, 128) * scale.double()[..., None]
    expected = ((weight.double() - dequantized.view(6, 256)) @ x.double().t()).square().sum()
    assert output_error(weight, rounded, scale, x.t() @ x) == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_independent_inputs_leave_plain_rounding() -> None:
    weight, scale, _ = problem("W8A8", (5, 40))
    hessian = torch.rand(40).diag()
    rounded = gptq(weight, scale, factorize(hessian, 0.0), grid("W8A8"))
    assert torch.equal(rounded, grid("W8A8").round_matrix(weight, scale))


def test_a_singular_hessian_is_dampened_until_it_can_be_factorised() -> None:
    for x in (inputs(60, 3), inputs(60, 300) * (torch.arange(60) > 20)):
        hessian = x.t() @ x
        factorization = factorize(hessian, 0.0)
        assert 0 < factorization.dampening_frac < MOST_DAMPENING
        weight = torch.randn(4, 60)
        scale = grid("W8A8").find_scales(weight)
        rounded = gptq(weight, scale, factorization, grid("W8A8"))
        plain = grid("W8A8").round_matrix(weight, scale)
        assert factorization.upper.isfinite().all()
        assert output_error(weight, rounded, scale, hessian) < output_error(
            weight, plain, scale, hessian
        )


def test_inputs_that_are_always_zero_leave_plain_rounding() -> None:
    factorization = factorize(torch.zeros(10, 10), DAMPENING)
    weight = torch.randn(4, 10)
    scale = grid("W8A8").find_scales(weight, torch.zeros(10))
    rounded = gptq(weight, scale, factorization, grid("W8A8"))
    assert torch.equal(rounded, grid("W8A8").round_matrix(weight, scale))
    assert factorization.dampening_frac == DAMPENING


@pytest.mark.parametrize("panel", [4, 5, 2048])
def test_the_hessian_is_that_of_float64(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_module, "PANEL", panel)
    x = inputs(13, 90)
    statistics = InputStatistics(13, 90, torch.device("cpu"))
    for chunk in x.split([1, 40, 7, 42]):
        statistics.add(chunk)
    statistics.mirror()
    expected = x.double().t() @ x.double()
    torch.testing.assert_close(statistics.hessian.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(statistics.hessian, statistics.hessian.t())
    assert torch.equal(statistics.largest, x.abs().amax(0)) and statistics.n_tokens == 90
    scale = torch.linspace(0.5, 3, 13)
    statistics.divide(scale)
    divided = (x / scale).double()
    torch.testing.assert_close(
        statistics.hessian.double(), divided.t() @ divided, rtol=1e-5, atol=1e-3
    )
    torch.testing.assert_close(statistics.largest, divided.float().abs().amax(0))
    torch.testing.assert_close(statistics.sample(), divided.float())


def test_statistics_go_without_a_hessian_where_nothing_asks_for_it() -> None:
    statistics = InputStatistics(7, 20, torch.device("cpu"), with_hessian=False)
    statistics.add(torch.ones(20, 7))
    statistics.mirror()
    statistics.divide(torch.full((7,), 2.0))
    assert statistics.hessian.numel() == 0 and statistics.largest.tolist() == [0.5] * 7


@pytest.mark.parametrize("parts", [[10], [1, 4, 5], [3] * 3 + [1], [1] * 10])
def test_the_sample_is_spread_over_all_tokens(
    parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics_module, "MOST_SAMPLED", 4)
    statistics = InputStatistics(1, 10, torch.device("cpu"))
    for chunk in torch.arange(10.0)[:, None].split(parts):
        statistics.add(chunk)
    assert statistics.sample().flatten().tolist() == [0.0, 3.0, 6.0, 9.0]
    assert statistics.sample(2).flatten().tolist() == [0.0, 6.0]
