"""What the operating system knows of this process: its age, and its memory, which may go back."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_PROC = Path("/proc/self")
# A part of the address space that is a file's code: where it is, in hexadecimal.
_CODE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp .* /")
_MADV_DONTNEED = 4  # of Linux


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


def return_unused_memory() -> None:
    """Give back what is free, and code; for when much was done that is not done again.

    To import PyTorch is to run 70 MB of code, most of it once. The system holds what it has read of
    a file for as long as it has room: code that runs again is mapped again within a microsecond.
    """
    return_free_memory()
    try:
        code = list(_unchanged_code((_PROC / "smaps").read_text()))
    except OSError:  # not Linux
        return
    for start, stop in code:
        return_pages(start, stop)


def return_pages(start: int, stop: int) -> None:
    """Give pages of memory back to the system, which stay where it refuses (and elsewhere than on
    Linux). They come anew when they are used: as their file has them, or as zeros.

    Args:
        start, stop: addresses, multiples of a page's bytes.
    """
    if sys.platform == "linux":
        length = ctypes.c_size_t(stop - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, _MADV_DONTNEED)


def _unchanged_code(smaps: str) -> Iterator[tuple[int, int]]:
    """Start and stop of code that is as its file has it, and not patched by a debugger or such.

    Args:
        smaps: as `/proc/self/smaps` is.
    """
    code = None
    for line in smaps.splitlines():
        if "-" in line.partition(" ")[0]:
            code = _CODE.match(line)
        elif code and line.startswith("Anonymous:") and int(line.split()[1]) == 0:
            yield int(code[1], 16), int(code[2], 16)
