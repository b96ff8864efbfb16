"""Every operation against its definition, worked by hand, in fp64, or by the plain reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from octavo import kernels
from octavo.kernels import blockwise, fused, int8, reference, widened
from octavo.kernels.cpu import attention as native
from octavo.model.rope import rotary_angles

pytestmark = pytest.mark.usefixtures("two_threads")


def test_rms_norm_against_fp64() -> None:
    x, weight = torch.randn(5, 32), torch.randn(32)
    x64 = x.double()
    expected = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert torch.allclose(kernels.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [1, 100, 2**21])
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 40, 33), (300, 64, 130)])
def test_linear_in_widened_blocks_rounds_only_its_result(
    dtype: torch.dtype,
    block: int,
    shape: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widened, "BLOCK_ELEMENTS", block)
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    exact = (x.double() @ weight.double().t()).float()
    for product in (widened.linear_widened, widened.linear):
        result = product(x, weight)
        assert result.dtype == dtype
        bound = torch.finfo(dtype).eps * exact.abs() + 1e-5
        assert ((result.float() - exact).abs() <= bound).all()


def test_silu_mul_by_hand() -> None:
    gate, up = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 2.0]])
    expected = torch.tensor([[0.0, 2.0 / (1.0 + math.exp(-1.0))]])
    assert torch.allclose(kernels.silu_mul(gate, up), expected)


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    theta, head_dim = 100.0, 4  # frequencies 1 and 1/10
    cos, sin = rotary_angles(torch.tensor([3]), head_dim, theta)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (x0, x2) and (x1, x3)
    turned = kernels.apply_rotary(x, cos, sin)[0, 0]
    expected = [math.cos(3.0), -2.0 * math.sin(0.3), math.sin(3.0), 2.0 * math.cos(0.3)]
    assert torch.allclose(turned, torch.tensor(expected))


def test_rotary_depends_on_distance_alone_at_the_far_end_of_the_context() -> None:
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(q_position: int, k_position: int) -> float:
        turned_q = kernels.apply_rotary(q, *rotary_angles(torch.tensor([q_position]), 32, 1e8))
        turned_k = kernels.apply_rotary(k, *rotary_angles(torch.tensor([k_position]), 32, 1e8))
        return float((turned_q * turned_k).sum())

    assert score(131_071, 131_000) == pytest.approx(score(71, 0), abs=1e-4)


def test_per_token_quantisation_by_hand() -> None:
    x = torch.tensor([[127.0, -63.6, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.0, 0.0]])
    q, scale, _ = kernels.quantize_per_token(x)
    assert q.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 50, 0]]
    assert torch.allclose(scale[:, 0], torch.tensor([1.0, 1.0, 0.02]))


@pytest.mark.parametrize("product", [reference.int8_product, int8.int8_product_fp32])
@pytest.mark.parametrize(
    "shape", [(1, 64, 48), (3, 1030, 64), (17, 128, 2000), (2, 4096, 300), (5, 12_288, 8)]
)
def test_int8_product_is_exact(
    product: Callable[..., torch.Tensor], shape: tuple[int, int, int]
) -> None:
    n_tokens, in_features, out_features = shape
    q = torch.randint(-128, 128, (n_tokens, in_features), dtype=torch.int8)
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    result = product(q, weight)
    assert torch.equal(result.long(), q.long() @ weight.long().t())
    half = in_features // 2  # columns of a larger matrix, as groups are
    part = product(q[:, half:], weight[:, half:])
    assert torch.equal(part.long(), q[:, half:].long() @ weight[:, half:].long().t())


def test_a_device_other_than_a_cpu_multiplies_int8_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "_on_cpu", None)
    q, weight = (torch.empty(n, 20, dtype=torch.int8, device="meta") for n in (1, 7))
    assert int8.int8_product(q, weight).shape == (1, 7)


@pytest.mark.parametrize("product", [reference.int8_product, int8.int8_product_fp32])
@pytest.mark.parametrize("values", [(-128, -128), (-128, 127), (127, 127)])
def test_int8_product_is_exact_at_the_ends_of_the_range(
    product: Callable[..., torch.Tensor], values: tuple[int, int]
) -> None:
    for in_features in (1023, 1024, 1025, 14_336):
        q = torch.full((2, in_features), values[0], dtype=torch.int8)
        weight = torch.full((3, in_features), values[1], dtype=torch.int8)
        assert product(q, weight).unique().tolist() == [values[0] * values[1] * in_features]


@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 96, 64), (17, 128, 256), (33, 12_288, 8)])
def test_w8a8_product_is_the_exact_integer_one(shape: tuple[int, int, int]) -> None:
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features)
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    weight_scale = torch.rand(out_features) + 0.1
    q, scale, _ = kernels.quantize_per_token(x)
    exact = q.to(torch.int64) @ weight.to(torch.int64).t()
    expected = exact.double() * scale.double() * weight_scale.double()
    result = kernels.linear_w8a8(x, weight, weight_scale).double()
    assert torch.allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_w8a8_accumulates_beyond_16_bits() -> None:
    x = torch.ones(2, 12_288)
    weight = torch.full((4, 12_288), -128, dtype=torch.int8)
    result = kernels.linear_w8a8(x, weight, torch.ones(4))
    assert torch.allclose(result, torch.full((2, 4), -128.0 * 12_288))


def test_int4_numbers_are_packed_lowest_bits_first() -> None:
    q = torch.tensor([[-8, 7, 0, 1, -1, 2, 3, -7], [7, 7, 7, 7, 7, 7, 7, 7]], dtype=torch.int8)
    words = [sum((value + 8) << (4 * i) for i, value in enumerate(row)) for row in q.tolist()]
    packed = kernels.pack_int4(q)
    assert packed.dtype == torch.int32 and packed.shape == (2, 1)
    assert [word % 2**32 for word in packed[:, 0].tolist()] == words
    assert torch.equal(kernels.unpack_int4(packed), q)


def test_every_int4_number_survives_packing_in_every_place() -> None:
    q = torch.randint(-8, 8, (40, 256), dtype=torch.int8)
    packed = kernels.pack_int4(q)
    assert packed.shape == (40, 32)
    assert torch.equal(kernels.unpack_int4(packed), q)
    assert torch.equal(kernels.unpack_int4(packed[::3, 4:]), q[::3, 32:])


def int4_weight(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random [N, K] int8 in -8…7 and [N, K/128] fp32 scales."""
    weight = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
    return weight, torch.rand(out_features, in_features // 128) + 0.1


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, K] in fp64: each scale repeated over its 128 inputs."""
    return weight.double() * scale.double().repeat_interleave(128, dim=1)


int4_shapes = pytest.mark.parametrize("shape", [(1, 128, 48), (3, 256, 5), (17, 1280, 2000)])


@int4_shapes
def test_w4a8_against_fp64(shape: tuple[int, int, int]) -> None:
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features)
    weight, scale = int4_weight(out_features, in_features)
    q, token_scale, _ = kernels.quantize_per_token(x)
    expected = (q.double() * token_scale.double()) @ dequantized(weight, scale).t()
    result = kernels.linear_w4a8(x, weight, scale)
    assert result.dtype == x.dtype
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-4)


@int4_shapes
def test_w4a16_against_fp64(shape: tuple[int, int, int]) -> None:
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features)
    weight, scale = int4_weight(out_features, in_features)
    packed = kernels.pack_int4(weight)
    expected = x.double() @ dequantized(weight, scale).t()
    result = kernels.linear_w4a16(x, packed, scale).double()
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-3)
    half = kernels.linear_w4a16(x.bfloat16(), packed, scale)
    assert half.dtype == torch.bfloat16
    assert (half.double() - expected).square().mean().sqrt() < 0.01 * expected.std()


def test_w4a16_takes_single_columns_out_exactly() -> None:
    weight, scale = int4_weight(300, 256)
    columns = kernels.linear_w4a16(torch.eye(256), kernels.pack_int4(weight), scale)
    assert torch.equal(columns.t().double(), dequantized(weight, scale).float().double())


def test_fp8_rounding_by_hand() -> None:
    # Between 16 and 32 the steps are 2, between 256 and 448 they are 32; ties go to even.
    x = torch.tensor([[448.0, 16.9, 17.0, 19.0, -300.0, 0.0], [0.0] * 6, [0.0, -4.48, 0, 0, 0, 0]])
    q, scale = kernels.quantize_fp8(x)
    assert q.dtype == torch.float8_e4m3fn
    assert q.float().tolist() == [
        [448.0, 16.0, 16.0, 20.0, -288.0, 0.0],
        [0.0] * 6,
        [0.0, -448.0, 0.0, 0.0, 0.0, 0.0],
    ]
    assert torch.allclose(scale[:, 0], torch.tensor([1.0, 1.0, 0.01]))


def test_a_static_fp8_scale_cuts_what_is_too_large() -> None:
    x = torch.tensor([[1e6, -1e6, 8.0, 1.0]])
    q, scale = kernels.quantize_fp8(x, torch.tensor([0.5]))
    assert q.float().tolist() == [[448.0, -448.0, 16.0, 2.0]] and scale.tolist() == [0.5]


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 100, 5), (17, 1280, 2000)])
def test_fp8_against_fp64(shape: tuple[int, int, int], static: bool) -> None:
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features)
    weight = (torch.randn(out_features, in_features) * 100).to(torch.float8_e4m3fn)
    weight_scale = torch.rand(1 if static else out_features) + 0.1
    input_scale = torch.tensor([0.02]) if static else None
    q, scale = kernels.quantize_fp8(x, input_scale)
    exact = q.double() @ weight.double().t()
    expected = exact * scale.double() * weight_scale.double()
    result = kernels.linear_fp8(x, weight, weight_scale, input_scale)
    assert result.dtype == x.dtype
    assert torch.allclose(
        result.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert (expected - x.double() @ weight.double().t() * weight_scale).std() < 0.1 * expected.std()


def test_attention_by_hand() -> None:
    # Two keys of one dimension, scores 0 and ln 3: weights 1/4 and 3/4 for the second query.
    q = torch.tensor([[[1.0]], [[1.0]]])
    k = torch.tensor([[[0.0]], [[math.log(3.0)]]])
    v = torch.tensor([[[4.0]], [[8.0]]])
    assert reference.attention(q, k, v, None).flatten().tolist() == pytest.approx([4.0, 7.0])
    assert reference.attention(q, k, v, 1).flatten().tolist() == pytest.approx([4.0, 8.0])


@pytest.mark.parametrize(
    "attend",
    [reference.attention, blockwise.attention, fused.attention, native.attention],
    ids=["reference", "blockwise", "fused", "native"],
)
def test_attention_reads_no_key_outside_its_window(attend: Callable[..., torch.Tensor]) -> None:
    q, k, v = torch.randn(6, 4, 32), torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    before = attend(q, k, v, 5)
    k[:10], v[:10] = 1e9, -1e9  # the first query stands at position 14 and sees 10…14
    assert torch.equal(before, attend(q, k, v, 5))


FASTER = pytest.mark.parametrize(
    "attend",
    [blockwise.attention, fused.attention, native.attention],
    ids=["blockwise", "fused", "native"],
)


@FASTER
@pytest.mark.parametrize("window", [None, 1, 2, 7, 64, 1000, 5000])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(1, 1), (1, 3000), (5, 5), (300, 300), (257, 2600), (700, 1030)]
)
def test_faster_attention_equals_the_definition(
    attend: Callable[..., torch.Tensor], n_queries: int, n_keys: int, window: int | None
) -> None:
    q = torch.randn(n_queries, 6, 32)
    k, v = torch.randn(n_keys, 2, 32), torch.randn(n_keys, 2, 32)
    expected = reference.attention(q, k, v, window)
    assert torch.allclose(attend(q, k, v, window), expected, atol=2e-6)


@FASTER
def test_faster_attention_survives_scores_that_overflow_an_exponential(
    attend: Callable[..., torch.Tensor],
) -> None:
    q, k = torch.randn(3, 2, 32) * 100, torch.randn(2000, 1, 32) * 100
    v = torch.randn(2000, 1, 32)
    expected = reference.attention(q, k, v, None)
    assert torch.allclose(attend(q, k, v, None), expected, atol=1e-5)


@FASTER
@pytest.mark.parametrize("n_keys", [900, 1500])
def test_faster_attention_in_bf16_rounds_only_its_inputs_and_output(
    attend: Callable[..., torch.Tensor], n_keys: int
) -> None:
    q, k, v = (torch.randn(n, h, 32).bfloat16() for n, h in ((40, 4), (n_keys, 2), (n_keys, 2)))
    expected = reference.attention(q, k, v, 700)
    result = attend(q, k, v, 700)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), expected.float(), atol=2**-8)
