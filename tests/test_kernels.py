"""Every operation against its definition, worked by hand, in fp64, or by the plain reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from octavo import kernels
from octavo.kernels import blockwise, reference
from octavo.model.rope import rotary_angles


def test_rms_norm_against_fp64() -> None:
    x, weight = torch.randn(5, 32), torch.randn(32)
    x64 = x.double()
    expected = x64 / torch.sqrt((x64**2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert torch.allclose(kernels.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-6)


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
    q, scale = kernels.quantize_per_token(x)
    assert q.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 50, 0]]
    assert torch.allclose(scale[:, 0], torch.tensor([1.0, 1.0, 0.02]))


@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 96, 64), (17, 128, 256), (33, 12_288, 8)])
def test_w8a8_product_is_the_exact_integer_one(shape: tuple[int, int, int]) -> None:
    n_tokens, in_features, out_features = shape
    x = torch.randn(n_tokens, in_features)
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    weight_scale = torch.rand(out_features) + 0.1
    q, scale = reference.quantize_per_token(x)
    exact = q.to(torch.int64) @ weight.to(torch.int64).t()
    expected = exact.double() * scale.double() * weight_scale.double()
    result = kernels.linear_w8a8(x, weight, weight_scale).double()
    assert torch.allclose(result, expected, rtol=1e-6, atol=1e-6)


def test_w8a8_accumulates_beyond_16_bits() -> None:
    x = torch.ones(2, 12_288)
    weight = torch.full((4, 12_288), -128, dtype=torch.int8)
    result = kernels.linear_w8a8(x, weight, torch.ones(4))
    assert torch.allclose(result, torch.full((2, 4), -128.0 * 12_288))


def test_attention_by_hand() -> None:
    # Two keys of one dimension, scores 0 and ln 3: weights 1/4 and 3/4 for the second query.
    q = torch.tensor([[[1.0]], [[1.0]]])
    k = torch.tensor([[[0.0]], [[math.log(3.0)]]])
    v = torch.tensor([[[4.0]], [[8.0]]])
    assert reference.attention(q, k, v, None).flatten().tolist() == pytest.approx([4.0, 7.0])
    assert reference.attention(q, k, v, 1).flatten().tolist() == pytest.approx([4.0, 8.0])


@pytest.mark.parametrize("attend", [reference.attention, blockwise.attention])
def test_attention_reads_no_key_outside_its_window(attend: Callable[..., torch.Tensor]) -> None:
    q, k, v = torch.randn(6, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    before = attend(q, k, v, 5)
    k[:10], v[:10] = 1e9, -1e9  # the first query stands at position 14 and sees 10…14
    assert torch.equal(before, attend(q, k, v, 5))


@pytest.mark.parametrize("window", [None, 1, 2, 7, 64, 1000, 5000])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"), [(1, 1), (1, 3000), (5, 5), (300, 300), (257, 2600), (700, 1030)]
)
def test_blockwise_attention_equals_the_definition(
    n_queries: int, n_keys: int, window: int | None
) -> None:
    q = torch.randn(n_queries, 6, 16)
    k, v = torch.randn(n_keys, 2, 16), torch.randn(n_keys, 2, 16)
    expected = reference.attention(q, k, v, window)
    assert torch.allclose(blockwise.attention(q, k, v, window), expected, atol=2e-6)


def test_blockwise_attention_survives_scores_that_overflow_an_exponential() -> None:
    q, k, v = torch.randn(3, 2, 8) * 100, torch.randn(2000, 1, 8) * 100, torch.randn(2000, 1, 8)
    expected = reference.attention(q, k, v, None)
    assert torch.allclose(blockwise.attention(q, k, v, None), expected, atol=1e-5)


def test_blockwise_attention_in_bf16_rounds_only_its_inputs_and_output() -> None:
    q, k, v = (torch.randn(n, h, 16).bfloat16() for n, h in ((40, 4), (1500, 2), (1500, 2)))
    expected = reference.attention(q, k, v, 700)
    result = blockwise.attention(q, k, v, 700)
    assert result.dtype == torch.bfloat16
    assert torch.allclose(result.float(), expected.float(), atol=2**-8)
