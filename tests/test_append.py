"""Rotary and append: queries and keys turned, keys and values in their slots and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import append, reference
from octavo.kernels.cpu import append as native
from octavo.kernels.cpu import library
from octavo.kernels.cuda import append as triton_append
from octavo.kernels.cuda import launch
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages, quantize_kv
from octavo.model.rope import rotary_angles

pytestmark = pytest.mark.usefixtures("two_threads")
PAGE = 4


def by_library(isa: int, *tensors: Any) -> Tensor:
    if not library.runs(isa):
        pytest.skip(f"no {library.ISAS[isa]} here")
    q, k, v, cos, sin, pages, slots = tensors
    return native._append(isa, q, k, v, cos, sin, pages, slots)


def on_device(tensor: Any) -> Any:
    return None if tensor is None else tensor.to(launch.DEVICE)


def by_triton(*tensors: Any) -> Tensor:
    """By Triton, wherever its kernels run; the pages are changed here all the same."""
    *inputs, pages, slots = tensors
    there = KVPages(*map(on_device, pages))
    q, k, v, cos, sin = map(on_device, inputs)
    turned = triton_append._append(q, k, v, cos, sin, there, on_device(slots))
    for own, changed in zip(pages, there, strict=True):
        if own is not None:
            own.copy_(changed)
    return turned.cpu()


APPEND: dict[str, Callable[..., Tensor]] = {
    "definition": append.rotary_append,
    "chosen": native.rotary_append,
    "portable": partial(by_library, 0),
    "avx2": partial(by_library, 1),
    "triton": by_triton,
}
append_each = pytest.mark.parametrize("rotary_append", APPEND.values(), ids=APPEND.keys())


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


@append_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_new_tokens_are_turned_and_stored_in_their_slots_alone(
    dtype: torch.dtype, kept: torch.dtype, rotary_append: Callable[..., Tensor]
) -> None:
    pages = filled_pages(5, 2, 32, kept)
    q, k, v = (torch.randn(3, n_heads, 32).to(dtype) for n_heads in (6, 2, 2))
    slots = torch.tensor([2 * PAGE + 3, 0, 4 * PAGE + 1])
    cos, sin = rotary_angles(torch.tensor([0, 5, 1000]), 32, 1e4)
    turned = rotary_append(q, k, v, cos, sin, pages, slots)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("heads", [(6, 2, 32), (4, 4, 64), (8, 1, 96)])
def test_triton_stores_the_definition_bit_by_bit(
    heads: tuple[int, int, int], kept: torch.dtype, dtype: torch.dtype
) -> None:
    n_heads, n_kv_heads, head_dim = heads
    q, k, v = (torch.randn(2, n, head_dim).to(dtype) for n in (n_heads, n_kv_heads, n_kv_heads))
    k[0, 0] = 0
    if (dtype, kept) == (torch.float32, torch.int8):
        v[0, 0] = 1e-39  # its scale is nothing in bf16, whose subnormals the interpreter mistakes
    cos, sin = rotary_angles(torch.tensor([3, 4000]), head_dim, 1e4)
    both = [filled_pages(3, n_kv_heads, head_dim, kept) for _ in range(2)]
    expected = append.rotary_append(q, k, v, cos, sin, both[0], torch.tensor([9, 2]))
    assert torch.equal(by_triton(q, k, v, cos, sin, both[1], torch.tensor([9, 2])), expected)
    for a, b in zip(*both, strict=True):
        assert a is None or (b is not None and torch.equal(a, b))


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


@append_each
def test_zeros_and_what_is_no_number_are_stored_as_such(
    rotary_append: Callable[..., Tensor],
) -> None:
    pages = filled_pages(1, 2, 32, torch.int8)
    k = v = torch.zeros(2, 2, 32)
    v = v.clone()
    v[1, 1, 3] = float("nan")
    cos, sin = rotary_angles(torch.tensor([0, 1]), 32, 1e4)
    rotary_append(torch.zeros(2, 4, 32), k, v, cos, sin, pages, torch.tensor([1, 2]))
    assert pages.key_scales is not None and pages.value_scales is not None
    assert not pages.keys[0, :, 1:3].any() and (pages.key_scales[0, :, 1:3] == 1).all()
    assert pages.value_scales[0, 1, 2].isnan() and pages.value_scales[0, 1, 1] == 1


@append_each
def test_many_tokens_are_stored_as_one_by_one(rotary_append: Callable[..., Tensor]) -> None:
    q, k, v = (torch.randn(20, n_heads, 64) for n_heads in (4, 2, 2))
    cos, sin = rotary_angles(torch.arange(20) * 5000, 64, 1e8)
    slots = torch.randperm(6 * PAGE)[:20]
    together, alone = (filled_pages(6, 2, 64, torch.int8) for _ in range(2))
    turned = rotary_append(q, k, v, cos, sin, together, slots)
    for i in range(20):
        row = slice(i, i + 1)
        one = rotary_append(q[row], k[row], v[row], cos[row], sin[row], alone, slots[row])
        assert torch.equal(one, turned[row])
    for a, b in zip(together, alone, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
