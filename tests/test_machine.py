"""What is asked of the machine itself: its rates, its clock for a process, its memory's peak."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time

import pytest
import torch

import octavo.process
from octavo.kernels.cpu import library, machine
from octavo.process import peak_rss_bytes, seconds_since_start


@pytest.fixture
def native() -> ctypes.CDLL:
    loaded = library.load()
    if loaded is None:
        pytest.skip("built without a C++ compiler")
    return loaded


@pytest.mark.parametrize("streams", machine.STREAMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_word_is_read_once(native: ctypes.CDLL, threads: int, streams: int) -> None:
    words = torch.arange(16 * 6 * 6 * 100, dtype=torch.int64)
    read = native.octavo_machine_read
    read.restype = ctypes.c_uint64
    sizes = (ctypes.c_int64(n) for n in (words.nbytes, threads, streams))
    assert read(ctypes.c_void_p(words.data_ptr()), *sizes) == int(words.sum())


def test_arithmetic_is_counted_for_every_round_and_thread(native: ctypes.CDLL) -> None:
    count = native.octavo_machine_int8
    count.restype = ctypes.c_int64

    def multiply_adds(rounds: int, threads: int) -> int:
        return int(count(ctypes.c_int64(rounds), ctypes.c_int64(threads)))

    once = multiply_adds(1, 1)
    assert once > 0 and multiply_adds(1000, 1) == 1000 * once
    assert multiply_adds(1000, 3) == 3000 * once


def test_without_the_library_there_is_a_rate_of_reading_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.native, "load", lambda: None)
    monkeypatch.setattr(machine, "SECONDS", 0.02)
    assert machine.read_bytes_per_second(2**20) > 0
    assert machine.int8_operations_per_second() is None


def test_a_process_knows_its_age() -> None:
    started = time.monotonic()
    age = float(_child("import time; time.sleep(0.3); print(known['seconds_since_start']())"))
    assert 0.28 <= age <= time.monotonic() - started + 0.05
    assert seconds_since_start() > age


def test_the_peak_is_a_process_own_and_not_its_parents() -> None:
    ballast = torch.ones(100 * 2**20, dtype=torch.int32)
    child = int(_child("print(known['peak_rss_bytes']())"))
    assert 2**20 < child < ballast.nbytes < peak_rss_bytes()


def _child(code: str) -> str:
    """What a new process prints; `known` are the names of octavo.process."""
    file = octavo.process.__file__  # by its path: the package would bring PyTorch
    code = f"import runpy, sys; known = runpy.run_path(sys.argv[1]); {code}"
    command = [sys.executable, "-c", code, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
