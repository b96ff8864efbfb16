"""What Triton's linears have of their own: tiles, parts, the choice of a product, and fallbacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from octavo.kernels import QuantizedTokens, quantized, reference
from octavo.kernels.cuda import append, backend, quantize, w8a8
from octavo.kernels.cuda.fastest import Fastest
from octavo.kernels.cuda.launch import DEVICE
from octavo.kernels.cuda.tiling import FEW_TOKENS, Processors, Tiling, tiles, tiling

H100 = Processors(132, 227 * 2**10)
L4 = Processors(58, 99 * 2**10)
MI300 = Processors(304, 64 * 2**10)
GUARD = 64  # numbers before and after each output
POISON = 0x5B
each_dtype = pytest.mark.parametrize("dtype", quantize.FLOATS)


def random_product(
    n_tokens: int, n_outputs: int, n_inputs: int, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedTokens, Tensor, Tensor, Tensor]:
    """Tokens, weight, its scales and a bias."""
    q = torch.randint(-127, 128, (n_tokens, n_inputs), dtype=torch.int8)
    weight = torch.randint(-128, 128, (n_outputs, n_inputs), dtype=torch.int8)
    scale, weight_scale, bias = (
        torch.rand(n_tokens, 1),
        torch.rand(n_outputs),
        torch.randn(n_outputs),
    )
    tokens = QuantizedTokens(q.to(DEVICE), scale.to(DEVICE), dtype)
    return tokens, weight.to(DEVICE), weight_scale.to(DEVICE), 1000 * bias.to(DEVICE)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What kernels allocate lies between poisoned numbers, which are still there at the end."""
    buffers: list[Tensor] = []
    empty = torch.empty

    def between_guards(
        *size: int | torch.Size, dtype: torch.dtype = torch.float32, device: torch.device
    ) -> Tensor:
        inside = empty(*size, dtype=dtype, device=device)  # type: ignore[arg-type]
        width = GUARD * inside.element_size()
        buffer = empty(inside.nbytes + 2 * width, dtype=torch.uint8, device=device)
        buffers.extend((buffer.fill_(POISON)[:width], buffer[width + inside.nbytes :]))
        return buffer[width : width + inside.nbytes].view(dtype).view(inside.shape)

    monkeypatch.setattr(torch, "empty", between_guards)
    yield buffers
    assert buffers and all((guard == POISON).all() for guard in buffers)


@each_dtype
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("cut", [Tiling(16, 32, 64, 4), Tiling(32, 16, 32, 4, n_parts=3)])
@pytest.mark.parametrize("shape", [(1, 8, 64), (16, 32, 128), (37, 70, 200), (20, 33, 37)])
def test_any_tiling_gives_the_definition_bit_by_bit_and_writes_nothing_else(
    shape: tuple[int, int, int],
    cut: Tiling,
    has_bias: bool,
    dtype: torch.dtype,
    guarded: list[Tensor],
) -> None:
    x, weight, weight_scale, bias = random_product(*shape, dtype)
    operands = x, weight, weight_scale, bias if has_bias else None
    result = w8a8._by_tiles(*operands, cut)
    assert result.dtype == dtype
    assert torch.equal(result, quantized.linear_w8a8(*operands))


def test_tiles_go_down_a_few_rows_before_they_go_across() -> None:
    """More rows of tiles than are neighbours, and a number that is no multiple of it."""
    operands = random_product(16 * (w8a8._NEIGHBOURS + 3), 70, 32)
    result = w8a8._by_tiles(*operands, Tiling(16, 32, 32, 4))
    assert torch.equal(result, quantized.linear_w8a8(*operands))


@each_dtype
@pytest.mark.parametrize("has_bias", [False, True])
def test_pytorchs_product_with_tritons_scales_gives_the_definition(
    has_bias: bool, dtype: torch.dtype, guarded: list[Tensor]
) -> None:
    x, weight, weight_scale, bias = random_product(65, 1032, 40, dtype)
    operands = x, weight, weight_scale, bias if has_bias else None
    result = w8a8._by_int_mm(*operands)
    assert result.dtype == dtype
    assert torch.equal(result, quantized.linear_w8a8(*operands))


@pytest.mark.parametrize("n_tokens", [1, 20, FEW_TOKENS, FEW_TOKENS + 1])
def test_the_backend_gives_the_definition_for_few_tokens_and_many(n_tokens: int) -> None:
    tokens, weight, weight_scale, bias = random_product(n_tokens, 24, 64)
    x = torch.randn(n_tokens, 64, device=DEVICE)
    for given in (tokens, x):
        result = backend.linear_w8a8(given, weight, weight_scale, bias)
        assert torch.equal(result, quantized.linear_w8a8(given, weight, weight_scale, bias))


@each_dtype
@pytest.mark.parametrize("n_inputs", [64, 37])
@pytest.mark.parametrize("n_tokens", [1, 20, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("outputs", [(40,), (70, 33), (128, 32, 1)])
def test_several_linears_of_one_input_are_those_of_each(
    outputs: tuple[int, ...],
    n_tokens: int,
    n_inputs: int,
    dtype: torch.dtype,
    guarded: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert w8a8.usable()  # its self-check runs the kernel too
    several = Mock(wraps=w8a8._several)
    monkeypatch.setattr(w8a8, "_several", several)
    x = torch.randn(n_tokens, n_inputs, device=DEVICE).to(dtype)
    parts = [random_product(1, n, n_inputs)[1:3] for n in outputs]
    weights, scales = zip(*parts, strict=True)
    results = backend.linears_w8a8(x, weights, scales)
    assert several.call_count == (n_tokens <= FEW_TOKENS)
    assert [each.dtype for each in results] == [dtype] * len(outputs)
    assert all(map(torch.equal, results, quantized.linears_w8a8(x, weights, scales)))


def test_linears_with_too_few_tiles_for_a_device_are_cut_into_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(w8a8, "processors", lambda: Processors(64, 227 * 2**10))
    monkeypatch.setattr(w8a8, "_several", lambda *_: pytest.fail("in one launch"))
    x = torch.randn(1, 4096, device=DEVICE)
    parts = [random_product(1, n, 4096)[1:3] for n in (32, 64)]
    weights, scales = zip(*parts, strict=True)
    results = w8a8.linears_w8a8(x, weights, scales)
    assert all(map(torch.equal, results, quantized.linears_w8a8(x, weights, scales)))


def test_the_fastest_way_is_timed_once_a_key_and_then_taken() -> None:
    ways = [lambda: torch.tensor(0), lambda: torch.tensor(1)]
    times = iter([2.0, 1.0, 1.0, 2.0])
    fastest = Fastest(seconds=lambda way: next(times), may_time=lambda: True)
    assert [int(fastest.run("a", ways)) for _ in range(3)] == [1, 1, 1]
    assert [int(fastest.run("b", ways)) for _ in range(2)] == [0, 0]
    assert int(fastest.run("c", ways[:1])) == 0  # no choice, no time


def test_while_nothing_may_be_timed_the_first_way_runs_and_is_not_remembered() -> None:
    captured = True
    ways = [lambda: torch.tensor(0), lambda: torch.tensor(1)]
    fastest = Fastest(seconds=lambda way: -float(way()), may_time=lambda: not captured)
    assert int(fastest.run("a", ways)) == 0
    captured = False
    assert int(fastest.run("a", ways)) == 1
    captured = True
    assert int(fastest.run("a", ways)) == 1


@pytest.mark.parametrize(
    ("shape", "n_ways"),
    [((64, 16, 64), 1), ((65, 16, 64), 2), ((65, 12, 64), 1), ((65, 16, 36), 1)],
)
def test_only_many_tokens_of_shapes_that_pytorch_takes_have_a_choice(
    shape: tuple[int, int, int], n_ways: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, int]] = []

    class Watched(Fastest):
        def run(self, key: object, ways: list[Callable[[], Tensor]]) -> Tensor:  # type: ignore[override]
            seen.append((key, len(ways)))
            return ways[-1]()

    monkeypatch.setattr(w8a8, "_fastest", Watched())
    operands = random_product(*shape)
    result = w8a8.linear_w8a8(*operands)
    assert torch.equal(result, quantized.linear_w8a8(*operands))
    bucket = 64 if shape[0] == 64 else 128
    assert seen == [((bucket, *shape[1:]), n_ways)]


@pytest.mark.parametrize("device", [H100, L4, MI300])
def test_tiles_fit_the_device(device: Processors) -> None:
    for n_tokens in (1, 16, 17, 64, 65, 300, 8192):
        for n_outputs in (1024, 4096, 12288):
            cut = tiling(n_tokens, n_outputs, 4096, device)
            assert cut.n_stages * (cut.m + cut.n) * cut.k <= device.shared_memory
            assert cut._replace(n_parts=1) in tiles(device)


def test_few_tiles_are_parted_until_all_processors_have_work() -> None:
    assert tiling(1, 1024, 4096, H100).n_parts == 4  # 32 tiles
    assert tiling(1, 4096, 12288, H100).n_parts == 1  # 128
    assert tiling(1, 4096, 4096, MI300).n_parts == 2
    assert tiling(1, 32, 512, H100).n_parts == 1  # two blocks of inputs are not worth it
    assert tiling(8192, 4096, 4096, H100).n_parts == 1


def test_few_tokens_keep_enough_of_the_weight_under_way() -> None:
    for n_tokens in (1, 32, 64):
        cut = tiling(n_tokens, 4096, 12288, H100)  # a tile a multiprocessor
        assert (cut.n_stages - 1) * cut.n * cut.k > 29_000


def test_the_largest_tiles_are_for_many_tokens_and_much_shared_memory() -> None:
    assert tiling(8192, 4096, 4096, H100)[:2] == (128, 256)
    assert tiling(8192, 4096, 4096, L4)[:2] == (128, 128)
    assert tiling(65, 1024, 4096, H100)[:2] == (64, 128)
    assert [tiling(n, 4096, 4096, H100).m for n in (1, 16, 17, 33, 64)] == [16, 16, 32, 64, 64]


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 48), (2, 4097)])
def test_norms_and_gates_are_rounded_as_defined(
    shape: tuple[int, int], dtype: torch.dtype, guarded: list[Tensor]
) -> None:
    x = (torch.randn(shape, device=DEVICE) * 8).to(dtype)
    second = torch.randn(shape, device=DEVICE).to(dtype)
    weight = torch.rand(shape[1], device=DEVICE).to(dtype)
    total, normed_total = backend.add_rms_norm(x, second, weight, 1e-5)
    assert torch.equal(total, x + second)
    for result, expected in (
        (quantize._rms_norm(x, weight, 1e-5)[1], reference.rms_norm(x, weight, 1e-5)),
        (normed_total, reference.rms_norm(total, weight, 1e-5)),
        (quantize._silu_mul(x, second), reference.silu_mul(x, second)),
    ):
        assert result.dtype == dtype
        # Sums in another order may move one in many to the next number, and no further.
        assert torch.allclose(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        if dtype != torch.float32:
            assert (result != expected).float().mean() < 0.01


@each_dtype
@pytest.mark.parametrize("n_columns", [1, 37, 12288])
def test_rows_of_any_length_are_quantised_as_defined_and_nothing_else_is_written(
    n_columns: int, dtype: torch.dtype, guarded: list[Tensor]
) -> None:
    x, second = (torch.randn(3, n_columns, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(n_columns, device=DEVICE).to(dtype)
    x[1] = second[1] = 0
    for result, expected in (
        (quantize._quantize(x), quantized.quantize_per_token(x)),
        (
            quantize._rms_norm_quantize(x, weight, 1e-5)[1],
            quantized.rms_norm_quantize(x, weight, 1e-5),
        ),
        (
            backend.add_rms_norm_quantize(x, second, weight, 1e-5)[1],
            quantized.rms_norm_quantize(x + second, weight, 1e-5),
        ),
        (quantize._silu_mul_quantize(x, second), quantized.silu_mul_quantize(x, second)),
    ):
        assert torch.allclose(result.scale, expected.scale, rtol=1e-5) and result.scale[1] == 1
        apart = (result.q.int() - expected.q.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_rows_too_long_and_dtypes_that_the_kernels_do_not_take_run_on_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "_quantize", None)
    monkeypatch.setattr(w8a8, "_by_tiles", None)
    long = torch.randn(1, quantize.MOST_COLUMNS + 1, device=DEVICE)
    assert torch.equal(backend.quantize_per_token(long).q, quantized.quantize_per_token(long).q)
    _, weight, weight_scale, _ = random_product(3, 8, 16)
    wide = torch.randn(3, 16, device=DEVICE, dtype=torch.float64)
    result = backend.linear_w8a8(wide, weight, weight_scale)
    assert torch.equal(result, quantized.linear_w8a8(wide, weight, weight_scale))


@pytest.fixture
def reconsidered() -> Iterator[None]:
    """What can be used is tried anew, and again after the test."""
    cached = (quantize.usable, w8a8.usable, append.usable)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def test_a_kernel_that_computes_wrong_or_not_at_all_is_replaced_and_that_is_said_once(
    reconsidered: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*_: object) -> QuantizedTokens:
        raise RuntimeError("ptxas: unknown architecture\nand much more")

    monkeypatch.setattr(quantize, "_quantize", no_compiler)
    monkeypatch.setattr(w8a8, "_by_tiles", lambda x, weight, *_: torch.zeros(len(x.q), len(weight)))
    x, (_, weight, weight_scale, _) = torch.randn(4, 64, device=DEVICE), random_product(4, 24, 64)
    with caplog.at_level(logging.WARNING, "octavo"):
        for _ in range(2):
            result = backend.linear_w8a8(x, weight, weight_scale)
            norm = backend.rms_norm(x, x[0], 1e-5)
    assert torch.equal(result, quantized.linear_w8a8(x, weight, weight_scale))
    assert torch.equal(norm, reference.rms_norm(x, x[0], 1e-5))
    assert [record.message for record in caplog.records] == [
        "octavo: norms and quantising by Triton is not used here (RuntimeError: ptxas: unknown "
        "architecture … and much more); PyTorch's runs",
        "octavo: the W8A8 linear by Triton is not used here (it computes wrong); PyTorch's runs",
    ]
