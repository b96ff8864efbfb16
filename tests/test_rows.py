"""Operations on rows of activations: every implementation against its definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from octavo.kernels import QuantizedTokens, quantized, reference
from octavo.kernels.cpu import library, rows
from octavo.kernels.cuda import launch
from octavo.kernels.cuda import quantize as triton_quantize
from tests.test_linears import each_isa, panels, require, tiles

pytestmark = pytest.mark.usefixtures("two_threads")


def by_library(
    isa: int, operation: int, x: Tensor, second: Tensor | None = None, eps: float = 0.0
) -> QuantizedTokens:
    require(isa)
    return rows._quantize(isa, operation, x, second, eps)


def by_triton(
    operation: int, x: Tensor, second: Tensor | None = None, eps: float = 0.0
) -> QuantizedTokens:
    x, second = x.to(launch.DEVICE), None if second is None else second.to(launch.DEVICE)
    if second is None:
        tokens = triton_quantize._quantize(x)
    elif operation == rows._RMS_NORM:
        _, tokens = triton_quantize._rms_norm_quantize(x, second, eps)
    else:
        tokens = triton_quantize._silu_mul_quantize(x, second)
    return tokens._replace(q=tokens.q.cpu(), scale=tokens.scale.cpu())


QUANTIZE: dict[str, Callable[..., QuantizedTokens]] = {
    **{name: partial(by_library, isa) for isa, name in enumerate(library.ISAS)},
    "triton": by_triton,
}
each_quantize = pytest.mark.parametrize("quantize", QUANTIZE.values(), ids=QUANTIZE.keys())


@each_quantize
@pytest.mark.parametrize("dtype", library.FLOATS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (20, 4096)])
def test_rows_are_quantised_as_defined(
    shape: tuple[int, int], dtype: torch.dtype, quantize: Callable[..., QuantizedTokens]
) -> None:
    x = (torch.randn(shape) * 10 ** torch.linspace(-6, 4, shape[0])[:, None]).to(dtype)
    x[-1, ::2] = 0
    expected = quantized.quantize_per_token(x)
    result = quantize(rows._AS_IT_IS, x)
    assert torch.equal(result.q, expected.q) and torch.equal(result.scale, expected.scale)
    assert result.dtype == expected.dtype


@each_quantize
def test_zeros_and_ties_are_quantised_as_defined(
    quantize: Callable[..., QuantizedTokens],
) -> None:
    x = torch.zeros(3, 32)
    x[1, :6] = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 63.5])
    result = quantize(rows._AS_IT_IS, x)
    assert result.scale.flatten().tolist() == [1, 1, 1]
    assert result.q[1, :6].tolist() == [127, 0, 2, 0, -2, 64]
    assert not result.q[0].any()


@each_quantize
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "operation", [rows._AS_IT_IS, rows._RMS_NORM, rows._SILU_MUL], ids=["x", "norm", "silu"]
)
def test_what_is_no_number_reaches_the_result(
    operation: int, bad: float, quantize: Callable[..., QuantizedTokens]
) -> None:
    """A damaged model must not look like one that answers."""
    x = torch.randn(2, 64)
    x[1, 5] = bad
    second = {
        rows._AS_IT_IS: None,
        rows._RMS_NORM: torch.ones(64),
        rows._SILU_MUL: torch.ones(2, 64),
    }
    tokens = quantize(operation, x, second[operation], 1e-5)
    product = tiles if quantize is by_triton else partial(panels, 0)
    result = product(tokens, torch.ones(16, 64, dtype=torch.int8), torch.ones(16))
    assert result[0].isfinite().all() and not result[1].isfinite().any()


@each_quantize
@pytest.mark.parametrize("dtype", library.FLOATS)
@pytest.mark.parametrize("n_columns", [32, 4096])
def test_norms_and_gates_are_quantised_as_defined(
    n_columns: int, dtype: torch.dtype, quantize: Callable[..., QuantizedTokens]
) -> None:
    x = (torch.randn(9, n_columns) * 8).to(dtype)
    second, weight = torch.randn_like(x), (torch.rand(n_columns) + 0.5).to(dtype)
    cases = [
        (quantized.rms_norm_quantize(x, weight, 1e-5), (rows._RMS_NORM, x, weight)),
        (quantized.silu_mul_quantize(x, second), (rows._SILU_MUL, x, second)),
    ]
    for expected, arguments in cases:
        result = quantize(*arguments, eps=1e-5)
        assert result.dtype == dtype
        assert torch.allclose(result.scale, expected.scale, rtol=1e-5)
        # Sums in another order may move a number across the middle between two of the grid.
        apart = (result.q.int() - expected.q.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@each_isa
@pytest.mark.parametrize("dtype", library.FLOATS)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (20, 4096)])
def test_rows_are_added_normed_and_gated_as_defined(
    shape: tuple[int, int], dtype: torch.dtype, isa: int
) -> None:
    require(isa)
    x, y, weight = (torch.randn(shape) * 8).to(dtype), torch.randn(shape).to(dtype), None
    weight = (torch.rand(shape[1]) + 0.5).to(dtype)
    total = torch.empty_like(x)
    normed = rows._run(isa, rows._RMS_NORM, x, weight, 1e-5, added=y, total=total)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, rows._run(isa, rows._RMS_NORM, total, weight, 1e-5))
    # The definitions round what is between to x's dtype, too.
    error = 3 * torch.finfo(dtype).eps
    for result, expected in (
        (rows._run(isa, rows._RMS_NORM, x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)),
        (rows._run(isa, rows._SILU_MUL, x, y), reference.silu_mul(x, y)),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, rtol=error, atol=1e-6)


@each_isa
@pytest.mark.parametrize("dtype", library.FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(bad: float, dtype: torch.dtype, isa: int) -> None:
    require(isa)
    x, y = torch.randn(2, 64).to(dtype), torch.randn(2, 64).to(dtype)
    x[1, 5] = bad
    total = torch.empty_like(x)
    norm = rows._run(isa, rows._RMS_NORM, x, y[0], 1e-5, added=y, total=total)
    torch.testing.assert_close(total, x + y, equal_nan=True)
    assert norm[0].isfinite().all() and norm[1, 5].isnan()
    gated = rows._run(isa, rows._SILU_MUL, x, y.abs() + 1)
    assert gated[0].isfinite().all() and not gated[1, 5].isfinite()
