"""What the benchmarks start has ended when they have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.processes import run
from tests.serving import eventually

# Starts a process that would outlive it and Ctrl-C, says which, and goes on as its argument says.
PARENT = """
import os, pathlib, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGINT, lambda *_: os._exit(1))
pathlib.Path(sys.argv[1]).write_text(f"{child.pid}.")
exec(sys.argv[2])
"""
BENCHMARK = "import sys; from benchmarks.processes import run; run(sys.argv[1:], {}, 600)"


def command(file: Path, then: str) -> list[str]:
    return [sys.executable, "-c", PARENT, str(file), then]


def has_ended(file: Path) -> bool:
    """Whether the process that was started is no more."""
    try:
        return psutil.Process(int(file.read_text()[:-1])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_nothing_is_left_of_a_program_that_ended_well(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert run(command(file, "print('done')"), {}, 60).stdout == "done\n"
    assert eventually(lambda: has_ended(file))


def test_nothing_is_left_of_a_program_that_failed(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    with pytest.raises(SystemExit, match=r"(?s)^lost\n.*exit code 1$"):
        run(command(file, "print('lost'); sys.exit(1)"), {}, 60)
    assert eventually(lambda: has_ended(file))


def test_nothing_is_left_of_a_program_after_ctrl_c(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    benchmark = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK, *command(file, "child.wait()")],
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert eventually(lambda: file.exists() and file.read_text().endswith("."), seconds=60)
    os.killpg(benchmark.pid, signal.SIGINT)  # as a terminal does, to all of its group
    assert benchmark.wait(60) != 0
    assert eventually(lambda: has_ended(file))
