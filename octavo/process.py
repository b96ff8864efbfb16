"""What the operating system knows of this process: its age, and its memory, which may go back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from pathlib import Path

import psutil

_PROC = Path("/proc/self")


def seconds_since_start() -> float:
    """How long ago this process was started, to a hundredth of a second on Linux."""
    try:
        # After the name in brackets, which may hold anything; field 22 counts ticks from boot.
        fields = (_PROC / "stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except OSError:
        return time.time() - psutil.Process().create_time()


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    try:
        for line in (_PROC / "status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # On Linux this is also that of whoever started the process, if theirs was more.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_free_memory() -> None:
    """Give what was freed within the heap back to the system, where the C library does (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
