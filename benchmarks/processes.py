"""Running a program under measurement: what it printed, when it began, its memory's peak."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import read_figures

SAMPLE_SECONDS = 1.0  # between looks at the memory; each costs milliseconds of a core
TAIL = 4000  # characters of what a failed program printed that are shown


@dataclass(frozen=True)
class Finished:
    """A program that ended well.

    Attributes:
        stdout, stderr: what it printed.
        started: Unix time.
        peak_rss_bytes: the most memory that it and all that it started had together.
    """

    stdout: str
    stderr: str
    started: float
    peak_rss_bytes: int


def run(command: Sequence[str], env: Mapping[str, str], timeout: float) -> Finished:
    """Run a program to its end, and end what it has started and left.

    Args:
        command: what to run.
        env: added to the environment.
        timeout: seconds until it is killed.

    Raises:
        SystemExit: it failed or took too long; with the end of what it printed.
    """
    print(shlex.join(command), file=sys.stderr, flush=True)
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.time()
        # A session of its own, so that one signal reaches all processes that it starts, and Ctrl-C
        # comes here and does not end it before what it started.
        process = psutil.Popen(
            command, stdout=stdout, stderr=stderr, env=os.environ | dict(env),
            start_new_session=True,
        )  # fmt: skip
        memory = PeakMemory(process)
        try:
            problem = f"exit code {code}" if (code := process.wait(timeout)) else ""
        except psutil.TimeoutExpired:
            problem = f"killed after {timeout:.0f} s"
        finally:
            memory.stop()
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed = [_read(stdout), _read(stderr)]
        if problem:
            sys.exit("\n".join([*(text[-TAIL:] for text in printed), shlex.join(command), problem]))
        return Finished(printed[0], printed[1], started, memory.n_bytes)


def run_to_file(command: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Run `command --out FILE`, as `run` does, and read the JSON object that it writes there.

    Returns:
        The object, with `peak_rss_bytes`, and in place of `first_token_at` (Unix time)
        `first_token_s`, from the process's start.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        finished = run([*command, "--out", str(out)], env, timeout)
        result = read_figures(out)
    result["peak_rss_bytes"] = finished.peak_rss_bytes
    if "first_token_at" in result:
        result["first_token_s"] = result.pop("first_token_at") - finished.started
    return result


class PeakMemory:
    """The most memory that a process and its descendants had together, looked at now and then."""

    def __init__(self, process: psutil.Popen) -> None:
        self.n_bytes = 0
        self._process = process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            self.n_bytes = max(self.n_bytes, total)


def _read(file: Any) -> str:
    file.seek(0)
    printed: bytes = file.read()
    return printed.decode(errors="replace")
