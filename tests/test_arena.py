"""Memory that is kept from pass to pass: whose it is, and when it is free again."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
from torch import Tensor

from octavo import kernels
from octavo.kernels import reference
from octavo.kernels.cpu import library
from octavo.kernels.cpu.arena import LINE, Arena, ArenaFull
from octavo.kernels.cpu.memory import HUGE_PAGE

CPU = torch.device("cpu")
LARGE = (library.LARGE_BYTES // 64, 16)  # in fp32


def address(tensor: Tensor, arena: Arena) -> int:
    """Bytes from the arena's first line."""
    start: int = arena.memory.ctypes.data
    return tensor.data_ptr() - (start + -start % LINE)


def test_a_place_is_free_once_nobody_has_the_tensor_or_a_view_of_it() -> None:
    arena = Arena(1024)
    first, second = (arena.empty((3, 10), torch.float32) for _ in range(2))
    assert [address(each, arena) for each in (first, second)] == [0, 128]
    assert first.shape == (3, 10) and first.dtype == torch.float32
    view = first[1:].flatten()
    del first
    gc.collect()
    assert address(arena.empty((1,), torch.int8), arena) == 256  # and is free again
    del view
    gc.collect()
    third = arena.empty((64,), torch.bfloat16)
    assert address(third, arena) == 0
    del third, second
    gc.collect()
    assert address(arena.empty((1024,), torch.int8), arena) == 0  # neighbours are one place


def test_tensors_do_not_share_memory_and_begin_at_lines_of_the_cache() -> None:
    arena = Arena(10_000)
    tensors = [arena.empty((n,), torch.int8) for n in (1, 63, 64, 65, 100)]
    for i, tensor in enumerate(tensors):
        assert tensor.data_ptr() % LINE == 0
        tensor.fill_(i)
    assert [tensor.unique().tolist() for tensor in tensors] == [[i] for i in range(5)]


def test_what_does_not_fit_is_refused() -> None:
    arena = Arena(1000)
    with pytest.raises(ArenaFull, match=r"2000 more bytes"):
        arena.empty((1000,), torch.bfloat16)
    kept = arena.empty((600,), torch.int8)
    with pytest.raises(ArenaFull):
        arena.empty((600,), torch.int8)
    assert kept.shape == (600,)


def test_a_twin_gives_the_same_memory() -> None:
    arena = Arena(1000)
    first, second = arena.empty((10,), torch.int8), arena.twin().empty((10,), torch.int8)
    assert first.data_ptr() == second.data_ptr()


def test_memory_may_be_let_go_of_by_another_thread() -> None:
    arena = Arena(64 * 1000)
    errors: list[ArenaFull] = []

    def let_go(tensors: list[Tensor]) -> None:
        while tensors:
            tensors.pop()

    for _ in range(20):
        tensors = [arena.empty((64,), torch.int8) for _ in range(500)]
        threading.Thread(target=let_go, args=(tensors,)).start()
        while tensors:
            try:
                arena.empty((64 * 100,), torch.int8)
            except ArenaFull as error:
                errors.append(error)
    gc.collect()
    assert not errors
    assert arena.empty((64 * 1000,), torch.int8).shape == (64_000,)  # nothing is lost


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not take it back")
def test_what_is_free_goes_back_but_for_the_first_bytes() -> None:
    arena = Arena(20 * HUGE_PAGE)
    first = arena.empty((5 * HUGE_PAGE - 100,), torch.int8).fill_(1)
    kept = arena.empty((HUGE_PAGE,), torch.int8).fill_(2)
    last = arena.empty((8 * HUGE_PAGE,), torch.int8).fill_(3)
    del first, last
    arena.return_free(but=2 * HUGE_PAGE)
    of_pages = arena.memory.reshape(20, HUGE_PAGE).max(1).tolist()
    # The fifth and the sixth hold what is kept, and the seventh its end.
    assert of_pages[:6] == [1, 1, 0, 0, 2, 3] and of_pages[6:] == [0] * 14
    assert bool((kept == 2).all())
    arena.memory[12 * HUGE_PAGE] = 5
    arena.return_free(but=6 * HUGE_PAGE)  # nothing was given since
    assert arena.memory[12 * HUGE_PAGE] == 5
    again = arena.empty((9 * HUGE_PAGE,), torch.int8).fill_(4)
    assert int(again.sum(dtype=torch.int64)) == 4 * again.numel() and bool((kept == 2).all())


def test_little_is_left_as_it_is() -> None:
    arena = Arena(4 * HUGE_PAGE)
    arena.empty((3 * HUGE_PAGE,), torch.int8).fill_(1)
    arena.return_free(but=3 * HUGE_PAGE)
    assert bool((arena.memory[: 3 * HUGE_PAGE] == 1).all())


@pytest.mark.skipif(library.load() is None, reason="no C++ library")
def test_large_results_of_one_pass_are_where_the_last_ones_were() -> None:
    x = torch.randn(LARGE)

    def compute() -> Tensor:
        with kernels.reuse_memory(CPU):
            return kernels.silu_mul(kernels.silu_mul(x, x), x)

    place = compute().data_ptr()
    kept = compute()
    assert kept.data_ptr() == place
    another = compute()  # not where somebody has a result
    assert another.data_ptr() != place and torch.equal(kept, another)
    arena = library._of_thread.kept
    assert arena is not None
    start: int = arena.memory.ctypes.data
    assert start <= place < start + len(arena.memory)
    assert not start <= kernels.silu_mul(x, x).data_ptr() < start + len(arena.memory)
    with kernels.reuse_memory(CPU):
        small = kernels.silu_mul(x[:3], x[:3])
    assert not start <= small.data_ptr() < start + len(arena.memory)


@pytest.mark.skipif(library.load() is None, reason="no C++ library")
def test_what_does_not_fit_is_made_elsewhere() -> None:
    x = torch.randn(LARGE)
    arena = Arena(x.nbytes)
    with library.within(arena):
        first, second = kernels.silu_mul(x, x), kernels.silu_mul(x, x)
    assert torch.equal(first, second)
    start = arena.memory.ctypes.data
    assert start <= first.data_ptr() < start + len(arena.memory)
    assert not start <= second.data_ptr() < start + len(arena.memory)


def test_where_addresses_are_limited_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(_: int) -> Arena:
        raise MemoryError("Unable to allocate 1.00 GiB")

    monkeypatch.setattr(library, "Arena", too_much)
    monkeypatch.setattr(library._of_thread, "kept", None)
    x = torch.randn(LARGE)
    with kernels.reuse_memory(CPU):
        assert torch.allclose(kernels.silu_mul(x, x), reference.silu_mul(x, x), rtol=1e-4)
    assert library._of_thread.kept is None


def test_each_thread_keeps_its_own() -> None:
    found: list[object] = []

    def compute() -> None:
        with kernels.reuse_memory(CPU):
            found.append(library._of_thread.kept)

    compute()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found[0] is not found[1] and library._of_thread.arena is None
