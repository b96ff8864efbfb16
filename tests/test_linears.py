"""Linears: every implementation against its definition."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo import kernels
from octavo.kernels import QuantizedTokens, quantized, reference
from octavo.kernels.cpu import library, linear, onednn, w8a8
from octavo.kernels.cpu.arena import Arena
from octavo.kernels.cuda import launch
from octavo.kernels.cuda import w8a8 as triton_w8a8
from octavo.model.linear import LinearW8A8, pack_linears, run_in_parts, run_linears
from octavo.schemes import SCHEMES

pytestmark = pytest.mark.usefixtures("two_threads")
SHAPES = [
    (1, 1, 16), (1, 100, 64), (2, 33, 48), (5, 70, 9000), (7, 128, 2048), (9, 300, 100),
    (13, 16, 1040), (24, 40, 4096), (200, 50, 96), (4, 16, 64), (40, 90, 192), (70, 530, 2112),
    (600, 40, 64), (16, 145, 1044), (6, 640, 260), (17, 130, 1100), (32, 70, 64), (33, 600, 1040),
    (48, 48, 4100), (49, 40, 1024), (50, 33, 1044), (100, 20, 36), (300, 48, 2092),
]  # fmt: skip
each_isa = pytest.mark.parametrize("isa", range(len(library.ISAS)), ids=library.ISAS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def require(isa: int) -> None:
    if not library.runs(isa):
        pytest.skip(f"no {library.ISAS[isa]} here")


def panels(isa: int, tokens: QuantizedTokens, weight: Tensor, weight_scale: Tensor) -> Tensor:
    require(isa)
    return linear.PanelWeight(weight, isa).multiply(tokens, weight_scale)


def tiles(tokens: QuantizedTokens, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """By Triton, wherever its kernels run."""
    tokens = tokens._replace(q=tokens.q.to(launch.DEVICE), scale=tokens.scale.to(launch.DEVICE))
    weight, weight_scale = weight.to(launch.DEVICE), weight_scale.to(launch.DEVICE)
    return triton_w8a8._by_tiles(tokens, weight, weight_scale, None).cpu()


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    **{name: partial(panels, isa) for isa, name in enumerate(library.ISAS)},
    "triton": tiles,
}
each_product = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS.keys())


def random_linear(shape: tuple[int, int, int], largest: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    n_tokens, n_outputs, n_inputs = shape
    x = torch.randn(n_tokens, n_inputs) * torch.rand(n_tokens, 1)
    weight = torch.randint(-largest, largest, (n_outputs, n_inputs), dtype=torch.int8)
    return x, weight, torch.rand(n_outputs)


@each_product
@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_products_give_the_definition_bit_by_bit(
    shape: tuple[int, int, int], dtype: torch.dtype, product: Callable[..., Tensor]
) -> None:
    x, weight, weight_scale = random_linear(shape)
    tokens = quantized.quantize_per_token(x.to(dtype))
    result = product(tokens, weight, weight_scale)
    assert result.dtype == dtype
    assert torch.equal(result, quantized.linear_w8a8(tokens, weight, weight_scale))


@each_isa
def test_a_last_piece_of_few_tokens_reads_its_own_inputs(isa: int) -> None:
    x, weight, weight_scale = random_linear((9505, 64, 16))  # 99 pieces of 96 tokens, and one of 1
    tokens = quantized.quantize_per_token(x)
    expected = quantized.linear_w8a8(tokens, weight, weight_scale)
    assert torch.equal(panels(isa, tokens, weight, weight_scale), expected)


@each_isa
@each_dtype
@pytest.mark.parametrize("n_tokens", [1, 5, 200])
def test_products_in_one_call_are_those_of_each(
    n_tokens: int, dtype: torch.dtype, isa: int
) -> None:
    require(isa)
    x = random_linear((n_tokens, 1, 96))[0].to(dtype)
    tokens = quantized.quantize_per_token(x)
    parts = [random_linear((1, n_outputs, 96))[1:] for n_outputs in (200, 1, 16, 33, 700)]
    weights, scales = zip(*parts, strict=True)
    expected = quantized.linears_w8a8(x, weights, scales)
    packed = [linear.PanelWeight(weight, isa) for weight in weights]
    results = linear.multiply_all(tokens, packed, scales)
    by_each = [kernels.linear_w8a8(tokens, *part) for part in parts]
    mixed = kernels.linears_w8a8(x, [packed[0], *weights[1:]], scales)
    for found in (results, by_each, mixed, kernels.linears_w8a8(x, packed, scales)):
        assert [each.dtype for each in found] == [dtype] * len(parts)
        assert all(map(torch.equal, found, expected))


@each_isa
@pytest.mark.parametrize("n_tokens", [1, 33, 100, 145, 300])
def test_inputs_are_laid_out_within_what_is_asked_for(isa: int, n_tokens: int) -> None:
    require(isa)
    x, weight, weight_scale = random_linear((n_tokens, 16, 1044))
    tokens = quantized.quantize_per_token(x)
    packed = linear.PanelWeight(weight, isa)
    arena = Arena(2**23)
    arena.memory[:] = 77
    with library.within(arena, lambda *call: None):  # so that all is in the arena, this at the end
        result = packed.multiply(tokens, weight_scale)
    assert torch.equal(result, quantized.linear_w8a8(tokens, weight, weight_scale))
    end = arena.empty((1,), torch.uint8).data_ptr() - arena.memory.ctypes.data
    assert end == result.nbytes  # all else was let go of
    assert (arena.memory[arena._stop :] == 77).all()
    if n_tokens > 100:
        assert (
            arena._stop - end >= tokens.q.nbytes and (arena.memory[end : arena._stop] != 77).any()
        )


@each_isa
def test_inputs_laid_out_in_kept_memory_are_a_calls_and_a_threads_own(isa: int) -> None:
    require(isa)

    def runs(n_tokens: int, n_inputs: int, times: int = 1, n_outputs: int = 16) -> bool:
        x, weight, weight_scale = random_linear((n_tokens, n_outputs, n_inputs))
        tokens = quantized.quantize_per_token(x)
        expected = quantized.linear_w8a8(tokens, weight, weight_scale)
        packed = linear.PanelWeight(weight, isa)
        with library.reuse_memory():
            results = [packed.multiply(tokens, weight_scale) for _ in range(times)]
        return all(torch.equal(result, expected) for result in results)

    # It grows, and is enough.
    assert all(map(runs, [40, 100, 7, 1040, 33], [128, 256, 128, 16_448, 256]))
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(runs, [48, 40], [1024, 1024], [60, 60], [256, 256]))
        assert all(pool.map(runs, [148, 140], [1024, 1024], [60, 60], [256, 256]))


@pytest.mark.parametrize("quantizes", [False, True])
@pytest.mark.parametrize(
    ("most", "sizes"),
    [(None, [10]), (10, [10]), (11, [10]), (9, [5, 5]), (4, [4, 4, 2]), (1, [1] * 10)],
)
def test_tokens_are_run_in_parts_of_about_the_same_size(
    most: int | None, sizes: list[int], quantizes: bool
) -> None:
    tokens = torch.randn(10, 8)
    x = quantized.quantize_per_token(tokens) if quantizes else tokens
    seen: list[int] = []

    def double(part: Tensor | QuantizedTokens) -> Tensor:
        if isinstance(part, QuantizedTokens):
            part = part.q * part.scale
        seen.append(len(part))
        return 2 * part

    expected = 2 * (x.q * x.scale) if isinstance(x, QuantizedTokens) else 2 * x
    assert torch.equal(run_in_parts(double, x, most), expected) and seen == sizes


def test_a_hook_sees_its_linears_output_though_they_run_together() -> None:
    modules = [LinearW8A8(64, n, SCHEMES["W8A8"]) for n in (32, 48)]
    for module in modules:
        _, module.weight, module.weight_scale = random_linear((1, len(module.weight_scale), 64))
    pack_linears(torch.nn.ModuleList(modules))
    x = random_linear((3, 1, 64))[0]
    together = run_linears(x, *modules)
    seen: list[Tensor] = []
    hook = modules[1].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    assert all(map(torch.equal, run_linears(x, *modules), together))
    assert len(seen) == 1 and torch.equal(seen[0], together[1])
    hook.remove()
    assert all(map(torch.equal, run_linears(x, *modules), together)) and len(seen) == 1


@each_product
def test_products_do_not_saturate(product: Callable[..., Tensor]) -> None:
    """Without VNNI a CPU's own product of bytes stops at 32,767 for two of them."""
    for value in (-128, -127, 127):
        weight = torch.full((20, 4096), value, dtype=torch.int8)
        tokens = QuantizedTokens(
            torch.full((3, 4096), 127, dtype=torch.int8), torch.ones(3, 1), torch.float32
        )
        result = product(tokens, weight, torch.ones(20))
        assert result.unique().tolist() == [value * 127 * 4096]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_gives_the_definition_where_its_sums_do_not_saturate(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    # Up to 64, two products fit in 16 bits on every CPU: 2 · 64 · 255 = 32,640.
    x, weight, weight_scale = random_linear(shape, largest=64)
    tokens = quantized.quantize_per_token(x.to(dtype))
    result = onednn.OneDNNWeight(weight).multiply(tokens, weight_scale)
    expected = quantized.linear_w8a8(tokens, weight, weight_scale)
    assert result.dtype == dtype
    rounding = 1e-6 if dtype == torch.float32 else 2**-7
    assert torch.allclose(result.float(), expected.float(), rtol=rounding, atol=rounding)


def test_onednn_is_used_only_where_it_is_exact() -> None:
    x, weight, weight_scale = random_linear((5, 64, 256))
    tokens = quantized.quantize_per_token(x.sign())  # all of them ±127
    weight.fill_(127)
    result = onednn.OneDNNWeight(weight).multiply(tokens, weight_scale)
    expected = quantized.linear_w8a8(tokens, weight, weight_scale)
    assert onednn.usable() == torch.allclose(result, expected, rtol=1e-5, atol=1e-3)


@each_isa
@pytest.mark.parametrize(
    "shape",
    [
        (1, 5, 16),
        (3, 9, 4096),
        (4, 64, 128),
        (5, 7, 48),
        (17, 130, 2080),
        (32, 70, 256),
        (20, 176, 96),
        (1, 16, 32),
        (64, 80, 160),
        (8, 49, 4096),
        (10, 33, 64),
        (16, 100, 1056),
        (96, 50, 512),
    ],
)
def test_few_tokens_by_bf16_weights(shape: tuple[int, int, int], isa: int) -> None:
    require(isa)
    n_tokens, n_outputs, n_inputs = shape
    x, weight = torch.randn(n_tokens, n_inputs), torch.randn(n_outputs, n_inputs)
    x, weight = x.bfloat16(), weight.bfloat16()
    result = linear._linear_bf16(x, weight, isa)
    expected = reference.linear(x, weight)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), expected.float(), rtol=2**-7, atol=1e-3)
    alone = torch.cat([linear._linear_bf16(row, weight, isa) for row in x.split(1)])
    assert torch.equal(alone, result)  # a token's result does not depend on its company


def test_a_packed_linear_computes_what_it_did() -> None:
    x, weight, weight_scale = random_linear((6, 40, 128))
    module = LinearW8A8(128, 40, SCHEMES["W8A8"])
    assert module.weight is not None
    module.weight.copy_(weight)
    module.weight_scale.copy_(weight_scale)
    before = module(x)
    module.pack()
    module.pack()  # once more is nothing
    packed = linear.best_isa() is not None or onednn.usable()
    assert (module.weight is None) == packed
    assert torch.allclose(module(x), before, rtol=1e-6)
    assert torch.equal(module(quantized.quantize_per_token(x)), module(x))


@pytest.mark.parametrize("isa", [None, 0])
def test_onednn_multiplies_where_the_library_does_not(
    isa: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(0)
    monkeypatch.setattr(onednn, "usable", lambda: True)
    monkeypatch.setattr(linear, "best_isa", lambda: isa)
    packed = w8a8.pack_w8a8(random_linear((1, 24, 64))[1])
    assert isinstance(packed, onednn.OneDNNWeight if isa is None else linear.PanelWeight)


def test_an_odd_number_of_inputs_has_only_the_definition() -> None:
    x, weight, weight_scale = random_linear((3, 8, 37))
    assert not linear.PanelWeight.serves(weight)
    expected = quantized.linear_w8a8(x, weight, weight_scale)
    assert torch.equal(kernels.linear_w8a8(x, weight, weight_scale), expected)


@pytest.fixture
def reconsidered() -> Iterator[None]:
    """What can be used is tried anew, and again after the test."""
    cached = (library.load, linear.best_isa, onednn.usable)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


@pytest.mark.parametrize("case", ["no library", "wrong library"])
def test_without_the_library_linears_run_on_pytorch_and_say_so_once(
    case: str,
    reconsidered: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if case == "no library":
        monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    else:
        require(0)
        linear.best_isa.cache_clear()
        monkeypatch.setattr(linear.PanelWeight, "multiply", lambda *_: torch.zeros(7, 33))
    monkeypatch.setattr(onednn, "OneDNNWeight", None)  # as in a release without the operator
    x, weight, weight_scale = random_linear((4, 24, 64))
    with caplog.at_level(logging.WARNING, "octavo"):
        assert w8a8.pack_w8a8(weight) is None
        result = kernels.linear_w8a8(x, weight, weight_scale)
        norm = kernels.rms_norm_quantize(x, torch.ones(64), 1e-5)
        gate = kernels.silu_mul_quantize(x, x)
        half = kernels.linear(x.bfloat16(), x.bfloat16())
    assert torch.equal(result, quantized.linear_w8a8(x, weight, weight_scale))
    assert torch.equal(norm.q, quantized.rms_norm_quantize(x, torch.ones(64), 1e-5).q)
    assert torch.equal(gate.q, quantized.silu_mul_quantize(x, x).q)
    assert half.shape == (4, 4)
    assert caplog.text.count("PyTorch") == 1
