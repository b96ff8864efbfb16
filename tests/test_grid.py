"""The grids of the five schemes: scales and rounding by hand, clipping, and what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.quantize import grid as grid_module
from octavo.quantize.grid import WeightGrid
from octavo.schemes import SCHEMES, find_scheme
from tests.checkpoints import quantize_weight

schemes = pytest.mark.parametrize("scheme", SCHEMES)


def grid(scheme: str, scale_dtype: torch.dtype = torch.float32) -> WeightGrid:
    return WeightGrid(SCHEMES[scheme], scale_dtype)


def padded(*values: float, length: int = 128) -> Tensor:
    """[length], zeros after the values."""
    return torch.tensor([*values, *[0.0] * (length - len(values))])


def rounding_error(weights: WeightGrid, weight: Tensor, scale: Tensor, cost: Tensor) -> Tensor:
    """[N, G]: what plain rounding with these scales costs each group."""
    grouped = weight.double().view(*scale.shape, -1)
    rounded = weights.round_matrix(weight, scale).double().view_as(grouped)
    error = (rounded * scale[..., None].double() - grouped).square()
    return (error * cost.double().view(scale.shape[1], -1)).sum(-1)


def test_int8_has_127_steps_on_either_side() -> None:
    weight = torch.tensor([[127.0, -63.7, 0.4, 1.6], [-12.7, 0.3, 12.66, 0.0], [0.0] * 4])
    scale = grid("W8A8").find_scales(weight)
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.1], [1.0]]))
    rounded = grid("W8A8").round_matrix(weight, scale)
    assert rounded.dtype == torch.int8
    assert rounded.tolist() == [[127, -64, 0, 2], [-127, 3, 127, 0], [0] * 4]
    # Never -128, which the positive side has no counterpart for.
    assert grid("W8A8").round(torch.tensor([-1000.0]), torch.tensor(1.0)).item() == -127


@pytest.mark.parametrize("scheme", ["W4A16", "W4A8"])
def test_int4_goes_from_minus_8_to_7_in_groups_of_128(scheme: str) -> None:
    first = padded(7.5, -7.4, 3.2, -3.6)
    weight = torch.cat([first, first / 10, padded()])[None]
    scale = grid(scheme).find_scales(weight)
    torch.testing.assert_close(scale, torch.tensor([[1.0, 0.1, 1.0]]))
    rounded = grid(scheme).round_matrix(weight, torch.tensor([[1.0, 0.1, 1.0]]))
    assert rounded[0, [0, 1, 2, 3, 128, 129, 130, 131]].tolist() == [7, -7, 3, -4] * 2
    assert rounded.count_nonzero() == 8 and rounded.dtype == torch.int8
    assert grid(scheme).round(torch.tensor([-7.9, -99.0]), torch.tensor(1.0)).tolist() == [-8, -8]


def test_float8_keeps_three_bits_of_the_mantissa() -> None:
    weight = torch.tensor([[448.0, 18.9, -17.1, 2.0**-9 * 0.6, 2.0**-9 * 0.4], [0.0] * 5])
    scale = grid("FP8_DYNAMIC").find_scales(weight)
    assert scale.tolist() == [[1.0], [1.0]]
    rounded = grid("FP8_DYNAMIC").round_matrix(weight, scale)
    assert rounded.dtype == torch.float8_e4m3fn
    assert rounded.float().tolist() == [[448.0, 18.0, -18.0, 2.0**-9, 0.0], [0.0] * 5]
    assert grid("FP8").round(torch.tensor([1e4, -1e4]), torch.tensor(1.0)).tolist() == [448, -448]


def test_fp8_has_one_scale_a_tensor() -> None:
    weight = torch.tensor([[448.0, 1.0], [-896.0, 2.0], [0.0, 0.0]])
    assert grid("FP8").find_scales(weight).tolist() == [[2.0]] * 3
    assert grid("FP8").find_scales(torch.zeros(3, 2)).tolist() == [[1.0]] * 3
    stored = grid("FP8").stored(grid("FP8").round_matrix(weight, torch.full((3, 1), 2.0)),
                                torch.full((3, 1), 2.0))  # fmt: skip
    assert stored["weight_scale"].shape == (1,) and stored["weight_scale"].item() == 2.0


def test_scales_are_rounded_to_their_dtype_before_any_weight_is() -> None:
    """1 / 127 is 0.00787402 and, in bf16, 0.00787354: 0.49999 falls on the other side of 63.5."""
    weight = torch.tensor([[1.0, 0.49999]])
    exact, stored = grid("W8A8"), grid("W8A8", torch.bfloat16)
    assert exact.round_matrix(weight, exact.find_scales(weight)).tolist() == [[127, 63]]
    scale = stored.find_scales(weight)
    assert scale.dtype == torch.float32 and scale.item() == 0.00787353515625
    rounded = stored.round_matrix(weight, scale)
    assert rounded.tolist() == [[127, 64]]
    assert torch.equal(stored.stored(rounded, scale)["weight_scale"].float(), scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@schemes
def test_weights_too_small_for_a_scale_round_to_zero(scheme: str, dtype: torch.dtype) -> None:
    weight = torch.full((2, 128), 1e-38)
    weight[1] = 0.0
    scale = grid(scheme, dtype).find_scales(weight, torch.ones(128))
    assert scale.isfinite().all() and (scale > 0).all()
    assert not grid(scheme, dtype).round_matrix(weight, scale).float().any()


@schemes
def test_the_stored_tensors_are_compressed_tensors_own(scheme: str) -> None:
    """Against the writer of the other tests, which knows nothing of the grid."""
    weight = torch.randn(24, 256).bfloat16()
    weights = grid(scheme, torch.bfloat16)
    scale = weights.find_scales(weight.float())
    stored = weights.stored(weights.round_matrix(weight.float(), scale), scale)
    expected = quantize_weight(weight, scheme)
    assert stored.keys() == expected.keys()
    for kind, tensor in expected.items():
        assert stored[kind].dtype == tensor.dtype
        assert torch.equal(stored[kind], tensor), kind


@pytest.mark.parametrize("heavy_tails", [False, True])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "W4A8"])
def test_clipping_never_costs_more_than_leaving_it_out(scheme: str, heavy_tails: bool) -> None:
    lessened = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(20, 256, generator=generator)
        if heavy_tails:
            weight = weight**3
        weight[3] = 0.0
        cost = torch.rand(256, generator=generator) ** 4
        cost[:64] = 0.0
        weights = grid(scheme, torch.bfloat16)
        plain, clipped = weights.find_scales(weight), weights.find_scales(weight, cost)
        before = rounding_error(weights, weight, plain, cost)
        after = rounding_error(weights, weight, clipped, cost)
        assert (after <= before * (1 + 1e-5)).all()
        # With 4 bits a positive weight is met at 7 and not at 7.5.
        most = 1.0 if scheme == "W8A8" else 15 / 14
        assert (clipped <= 1.004 * most * plain).all()  # rounded to bf16
        assert (clipped >= 0.49 * plain).all()
        lessened += int((after < 0.99 * before).sum())
    assert lessened > 8  # and somewhere it is of use


def test_clipping_cuts_off_a_weight_that_hardly_counts() -> None:
    weight = torch.linspace(-1, 1, 128)[None].clone()
    weight[0, 0] = 2.0
    cost = torch.ones(128)
    cost[0] = 1e-6
    weights = grid("W4A16")
    assert weights.find_scales(weight, cost).item() < 0.6 * weights.find_scales(weight).item()
    cost[0] = 1e6
    rounded = weights.find_scales(weight, cost).item() * 7
    assert rounded == pytest.approx(2.0, rel=0.02)  # what counts most is met


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC"])
def test_a_float_grid_is_never_clipped(scheme: str) -> None:
    weight = torch.randn(5, 64) ** 3
    assert torch.equal(
        grid(scheme).find_scales(weight, torch.rand(64)), grid(scheme).find_scales(weight)
    )


def test_the_search_for_scales_takes_rows_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, cost = torch.randn(11, 256), torch.rand(256)
    whole = grid("W4A8").find_scales(weight, cost)
    monkeypatch.setattr(grid_module, "SLAB", 3)
    assert torch.equal(grid("W4A8").find_scales(weight, cost), whole)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"W4A16 shares a scale among 128 inputs.*with 96"):
        grid("W4A16").find_scales(torch.zeros(2, 96))


def test_schemes_are_found_in_any_case_and_others_are_named() -> None:
    assert find_scheme("w4a16").name == "W4A16" and find_scheme("fp8_dynamic").name == "FP8_DYNAMIC"
    with pytest.raises(ConfigError, match="scheme: 'W3A3' is not one of W8A8, W4A16, W4A8, FP8"):
        find_scheme("W3A3")
