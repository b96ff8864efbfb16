"""Rotary and append: queries and keys turned, keys and values in their slots and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo import kernels
from octavo.kernels import append, reference
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages, quantize_kv
from octavo.model.rope import rotary_angles

PAGE = 4


def filled_pages(n_pages: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KVPages:
    """Pages that hold 7 and 8 everywhere, their scales too."""
    shape = (n_pages, n_kv_heads, PAGE, head_dim)
    keys, values = torch.full(shape, 7, dtype=dtype), torch.full(shape, 8, dtype=dtype)
    if dtype != torch.int8:
        return KVPages(keys, values)
    scales = (torch.full(shape[:3], float(x), dtype=SCALE_DTYPE) for x in (7, 8))
    return KVPages(keys, values, *scales)


def in_slots(pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """[T, ...] what stands in the slots, and [n, ...] what stands in all others."""
    flat = pages.transpose(1, 2).flatten(0, 1)
    others = torch.ones(len(flat), dtype=torch.bool)
    others[slots] = False
    return flat[slots], flat[others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_new_tokens_are_turned_and_stored_in_their_slots_alone(
    dtype: torch.dtype, kept: torch.dtype
) -> None:
    pages = filled_pages(5, 2, 32, kept)
    q, k, v = (torch.randn(3, n_heads, 32).to(dtype) for n_heads in (6, 2, 2))
    slots = torch.tensor([2 * PAGE + 3, 0, 4 * PAGE + 1])
    cos, sin = rotary_angles(torch.tensor([0, 5, 1000]), 32, 1e4)
    turned = kernels.rotary_append(q, k, v, cos, sin, pages, slots)
    assert turned.dtype == dtype
    assert torch.allclose(turned, reference.apply_rotary(q, cos, sin), atol=1e-6, rtol=2**-8)
    turned_keys = reference.apply_rotary(k, cos, sin)
    for new, stored, scales, filler in (
        (turned_keys, pages.keys, pages.key_scales, 7),
        (v, pages.values, pages.value_scales, 8),
    ):
        found, others = in_slots(stored, slots)
        assert (others == filler).all()
        if scales is None:
            assert torch.allclose(found.float(), new.float(), atol=1e-6, rtol=2**-7)
            continue
        own_scales, other_scales = in_slots(scales, slots)
        assert (other_scales == filler).all()
        error = (found * own_scales[..., None].float() - new.float()).abs()
        # Half a step, and as much again for an input that was rounded the other way.
        assert (error <= 1.01 * own_scales[..., None].float()).all()


def test_keys_and_values_in_int8_by_hand() -> None:
    x = torch.tensor([[[127.0, -63.6, 0.4], [0.0, 0.0, 0.0]], [[-254.0, 1.0, 0.0], [1.0, -1, 0.5]]])
    q, scale = quantize_kv(x)
    assert q.tolist() == [[[127, -64, 0], [0, 0, 0]], [[-127, 0, 0], [127, -127, 64]]]
    assert scale.dtype == torch.bfloat16 and scale[0].tolist() == [1, 1] and scale[1, 0] == 2
    # 1/127 rounded to bf16.
    assert float(scale[1, 1]) == pytest.approx(1 / 127, rel=2**-8)


def test_rounding_to_int8_costs_half_a_step_a_number() -> None:
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    q, scale = quantize_kv(x)
    error = (q * scale[..., None].float() - x).abs()
    # That the scale is rounded too may cut the largest number, but by less.
    assert (error <= 0.5001 * scale[..., None].float()).all()


def test_append_alone_turns_nothing() -> None:
    pages = filled_pages(2, 2, 32, torch.float32)
    k, v = torch.randn(1, 2, 32), torch.randn(1, 2, 32)
    append.append_kv(k, v, pages, torch.tensor([5]))
    assert torch.equal(pages.keys[1, :, 1], k[0]) and torch.equal(pages.values[1, :, 1], v[0])
