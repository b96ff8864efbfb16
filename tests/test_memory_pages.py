"""Memory that begins with a page of the system."""

from __future__ import annotations

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
    for make in (memory.empty, memory.zeros):
        tensors = [make(shape, dtype) for _ in range(3)]
        for tensor in tensors:
            assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
            assert tensor.data_ptr() % page == 0 or not tensor.numel()
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        assert all(bool((tensor == i).all()) for i, tensor in enumerate(tensors))
    assert not memory.zeros(shape, dtype).any()


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        memory.empty((1 << 60,), torch.int8)
