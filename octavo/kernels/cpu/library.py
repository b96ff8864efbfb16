"""The C++ library (`native/`), where the package was built with a compiler.

It is loaded by its path and called with addresses, so that it belongs to no release of Python or
PyTorch. It is built with OpenMP and not linked to a copy of it, but finds PyTorch's: two copies in
one process, each with threads that spin while they wait, take the cores from one another.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.cpu.arena import Arena, ArenaFull

logger = logging.getLogger("octavo")

# By their numbers in native/isa.h; those emulated are for tests.
ISAS = (
    "portable", "avx2", "avx_vnni", "avx512", "amx", "dotprod", "avx_vnni_emulated",
    "avx512_emulated", "amx_emulated",
)  # fmt: skip
FLOATS = (torch.float32, torch.bfloat16)  # that the library computes with
# Who is told of calls: where the function is, its arguments, and the instructions.
Recorder = Callable[[int, ctypes.Structure, int], None]
LARGE_BYTES = 128 << 10  # from which on the system gives and takes memory back page by page
KEPT_BYTES = 1 << 30  # of addresses; of memory it is what a pass needs at its fullest moment,
FEW_BYTES = 16 << 20  # and between passes of many tokens no more than this
LIBRARY = Path(__file__).with_name("_native" + str(sysconfig.get_config_var("EXT_SUFFIX")))


@cache
def load() -> ctypes.CDLL | None:
    """The library; None, after a line that says why, where it cannot be had."""
    if not LIBRARY.is_file():
        logger.warning("octavo: built without a C++ compiler; it runs on PyTorch alone, slower")
        return None
    try:
        _offer_openmp()
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        logger.warning("octavo: %s; it runs on PyTorch alone, slower", error)
        return None


def widest_right(
    is_right: Callable[[int], bool], what: str, calls: Mapping[str, type[ctypes.Structure]]
) -> int | None:
    """The widest instructions here by which a kernel computes right, an index into ISAS.

    None: not the library. That some compute wrong is said.

    Args:
        is_right: the self-check, by given instructions.
        what: is checked.
        calls: the functions that it calls, by name, and their arguments.
    """
    library = load()
    if library is None or not all(_takes(library, *each) for each in calls.items()):
        return None
    best = widest()
    right = next((isa for isa in range(best, -1, -1) if runs(isa) and is_right(isa)), None)
    if right != best:
        instead = "PyTorch's" if right is None else f"that by {ISAS[right]}"
        logger.warning(
            "octavo: %s by %s of %s computes wrong here; %s runs",
            what, ISAS[best], LIBRARY, instead,
        )  # fmt: skip
    return right


def _takes(library: ctypes.CDLL, name: str, call: type[ctypes.Structure]) -> bool:
    """Whether a function's arguments are these, as far as their size tells."""
    try:
        n_bytes = ctypes.c_int64.in_dll(library, f"{name}_bytes").value
    except ValueError:  # there is no such name
        n_bytes = 0
    if n_bytes != ctypes.sizeof(call):
        _say_outdated()
    return n_bytes == ctypes.sizeof(call)


@cache
def _say_outdated() -> None:
    logger.warning(
        "octavo: %s was built from other sources than these; install octavo anew; until then it "
        "runs on PyTorch alone, slower", LIBRARY
    )  # fmt: skip


class _OfThread(threading.local):
    arena: Arena | None = None
    recorder: Recorder | None = None
    kept: Arena | None = None


_of_thread = _OfThread()


@contextmanager
def within(arena: Arena, recorder: Recorder | None = None) -> Iterator[None]:
    """Within, this thread's results are made in an arena, and its calls are told to a recorder.

    With a recorder all results, or `ArenaFull` is raised; else large ones for which there is room.
    """
    before = _of_thread.arena, _of_thread.recorder
    _of_thread.arena, _of_thread.recorder = arena, recorder
    try:
        yield
    finally:
        _of_thread.arena, _of_thread.recorder = before


def reuse_memory() -> AbstractContextManager[None]:
    """Within, this thread's large results are made in memory that it keeps for the next time."""
    if _of_thread.kept is None:
        try:
            _of_thread.kept = Arena(KEPT_BYTES)
        except MemoryError:  # where addresses are limited, or counted as memory
            return nullcontext()
    return within(_of_thread.kept)


def keep_little() -> None:
    """Of the memory that this thread keeps give back what a pass of many tokens left.

    A pass of 1,024 tokens of the 8B shape takes 40 MB: to have again what went back takes the next
    one a few milliseconds of several seconds.
    """
    if _of_thread.kept is not None:
        _of_thread.kept.return_free(but=FEW_BYTES)


def run(name: str, call: ctypes.Structure, isa: int) -> None:
    """Call a function of the library, which must be there.

    Args:
        name: of the function.
        call: its arguments.
        isa: the instructions, an index into ISAS.

    Raises:
        ValueError: this machine does not have these instructions.
    """
    if _function(name)(ctypes.byref(call), isa):
        raise ValueError(f"this machine does not run {ISAS[isa]}")
    if _of_thread.recorder is not None:
        address = ctypes.cast(_function(name), ctypes.c_void_p).value
        assert address is not None
        _of_thread.recorder(address, call, isa)


def size(name: str, call: ctypes.Structure, isa: int) -> int:
    """What a function of the library says that a call takes; arguments as in `run`."""
    function = _function(name)
    function.restype = ctypes.c_int64
    return int(function(ctypes.byref(call), isa))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Memory for what a call writes, whatever it holds; the device is a CPU in any case."""
    arena, must = _of_thread.arena, _of_thread.recorder is not None
    if arena is not None and (must or prod(shape) * dtype.itemsize >= LARGE_BYTES):
        try:
            return arena.empty(shape, dtype)
        except ArenaFull:
            if must:
                raise
    return torch.empty(shape, dtype=dtype)


@cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    """Looked up once: a token's layer calls ten, and a lookup takes as long as a call."""
    library = load()
    assert library is not None
    return library[name]


def replay(calls: ctypes.Array[Any]) -> None:
    """Make recorded calls again, `RecordedCall`s of native/replay.cpp."""
    library = load()
    assert library is not None
    if library.octavo_replay(calls, ctypes.c_int64(len(calls))):
        raise ValueError("a recorded call did not run")


@cache
def widest() -> int:
    """The widest instructions that this machine has, an index into ISAS; the library is there."""
    library = load()
    assert library is not None
    return int(library.octavo_best_isa())


def runs(isa: int) -> bool:
    """Whether the library is there and this machine has these instructions, an index into ISAS."""
    library = load()
    return library is not None and bool(library.octavo_runs(isa))


def pointers(tensors: Iterable[Tensor | None]) -> list[int | None]:
    """Where their memory begins; None for none."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _offer_openmp() -> None:
    """Make PyTorch's OpenMP, or else the system's, the one that unresolved names are found in.

    Only on Linux is the library built for it.
    """
    if sys.platform != "linux":
        return
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    ctypes.CDLL(str(found[0]) if found else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
