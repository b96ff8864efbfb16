"""What is asked of the machine itself: its rates, its clock for a process, its memory's peak."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

import octavo.process
from octavo.kernels import timing
from octavo.kernels.cpu import library, machine
from octavo.kernels.cuda import machine as gpu
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


def test_a_buffer_is_read_in_each_way_and_the_fastest_median_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[tuple[int, int]] = []
    clock = iter([0.0, 1.0, 0.0, 4.0, 0.0, 7.0, 0.0, 9.0, 0.0, 3.0, 0.0, 8.0])
    monkeypatch.setattr(machine, "_read", lambda buffer, n: read.append((buffer.nbytes, n)))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    reads = machine.Reads(torch.zeros(7, 3, dtype=torch.bfloat16))  # 42 bytes, in whole words
    reads.read()
    reads.read()
    assert read == [(40, n) for n in machine.STREAMS] * 2
    assert reads.bytes_per_second() == 40 / 3.5  # medians of 5, 3.5 and 7.5


@pytest.mark.parametrize("loaded", [True, False])
def test_a_buffer_is_read_with_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    if not loaded:
        monkeypatch.setattr(machine.native, "load", lambda: None)
    reads = machine.Reads(torch.ones(1000, 100))
    reads.read()
    assert 0 < reads.bytes_per_second() < 1e13


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
    monkeypatch.setattr(timing, "SECONDS", 0.02)
    assert machine.read_bytes_per_second(2**20) > 0
    assert machine.int8_operations_per_second() is None


CPU = torch.device("cpu")


def test_a_gpus_rates_are_of_all_that_is_moved_and_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[torch.Tensor] = []

    def half_a_second(run: Callable[[], torch.Tensor], device: torch.device) -> float:
        done.append(run())
        return 0.5

    monkeypatch.setattr(gpu, "_best_seconds", half_a_second)
    assert gpu.read_bytes_per_second(CPU, 2**20) == 2 * 2 * 2**20  # read, and written
    assert bool((done[0] == 1).all()) and int(done[1]) == done[0].numel() == 2**17
    assert gpu.int8_operations_per_second(CPU, 64) == 2 * 2 * 64**3
    assert gpu.bf16_operations_per_second(CPU, 32) == 2 * 2 * 32**3
    assert [(t.shape, t.dtype) for t in done[2:]] == [
        ((64, 64), torch.int32), ((32, 32), torch.bfloat16),
    ]  # fmt: skip


def test_a_device_is_waited_for_in_every_run_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda *device: events.append("wait"))
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    assert 0 < gpu._best_seconds(lambda: events.append("run"), CPU) < 1
    assert len(events) >= 4 and events == ["run", "wait"] * (len(events) // 2)


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
