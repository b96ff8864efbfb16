"""Memory that begins with a page of the system."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from octavo.kernels.cpu import memory
from octavo.kernels.cpu.memory import HUGE_PAGE, SMALL_PAGE


@pytest.mark.parametrize(
    ("shape", "dtype", "page"),
    [
        ((3, 5, 7), torch.bfloat16, SMALL_PAGE),
        ((HUGE_PAGE - 1,), torch.int8, SMALL_PAGE),
        ((2, HUGE_PAGE // 2), torch.int8, HUGE_PAGE),
        ((1000, 1000), torch.float32, HUGE_PAGE),
        ((0, 4), torch.int8, SMALL_PAGE),
    ],
)
def test_it_begins_with_a_page_and_has_its_size(
    shape: tuple[int, ...], dtype: torch.dtype, page: int
) -> None:
    tensors = [memory.zeros(shape, dtype) for _ in range(3)]
    for tensor in tensors:
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % page == 0 or not tensor.numel()
    for i, tensor in enumerate(tensors):
        tensor.fill_(i)
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))
    assert not memory.zeros(shape, dtype).any()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's huge pages")
def test_what_is_not_written_is_not_there() -> None:
    n_small = 64  # after a huge page, of which they would be the beginning of another
    tensor = memory.zeros((HUGE_PAGE + n_small * SMALL_PAGE,), torch.int8)
    tensor[HUGE_PAGE + SMALL_PAGE] = 1
    is_there = (ctypes.c_ubyte * n_small)()
    start = ctypes.c_void_p(tensor.data_ptr() + HUGE_PAGE)
    n_bytes = ctypes.c_size_t(n_small * SMALL_PAGE)
    assert ctypes.CDLL(None).mincore(start, n_bytes, is_there) == 0
    assert [each & 1 for each in is_there] == [0, 1] + [0] * (n_small - 2)


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        memory.zeros((1 << 60,), torch.int8)
