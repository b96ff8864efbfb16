"""Running a program under measurement: its output's file, how long it took, its memory's peak."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 0.1  # between looks at the memory
TAIL = 4000  # characters of a failed program's output that are shown


def run_json(command: Sequence[str], env: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Run `command --out FILE` and read the JSON that it writes there.

    Args:
        command: without `--out`.
        env: added to the environment.
        timeout: seconds until it is killed.

    Returns:
        The object, with `peak_rss_bytes` of the process and all that it starts, and, if it has a
        `first_token_at` (Unix time), `first_token_s` from the process's start to then.

    Raises:
        SystemExit: it failed or took too long; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        out = Path(folder) / "out.json"
        command = [*command, "--out", str(out)]
        print(shlex.join(command), file=sys.stderr, flush=True)
        started = time.time()
        process = psutil.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(env)
        )
        peak = PeakMemory(process)
        try:
            code = process.wait(timeout)
        except psutil.TimeoutExpired:
            code = f"killed after {timeout:.0f} s"
        finally:
            peak.stop()
            _kill(process)
        if code != 0 or not out.is_file():
            log.seek(0)
            printed = log.read().decode(errors="replace")[-TAIL:]
            sys.exit(f"{printed}\n{shlex.join(command)}: {code}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    result["peak_rss_bytes"] = peak.n_bytes
    if "first_token_at" in result:
        result["first_token_s"] = result.pop("first_token_at") - started
    return result


class PeakMemory:
    """The most memory that a process and its descendants had together, looked at now and then."""

    def __init__(self, process: psutil.Process) -> None:
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


def _kill(process: psutil.Process) -> None:
    """End a process that may have ended, and whatever it left behind."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
