"""What the operating system holds of a process: what it does not need goes back."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.process import _unchanged_code

SMAPS = """\
7f0000000000-7f0000010000 r-xp 00001000 08:01 42                         /usr/lib/one.so
Rss:                  64 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000010000-7f0000020000 r-xp 00001000 08:01 43                         /usr/lib/patched.so
Rss:                  64 kB
Anonymous:             4 kB
7f0000020000-7f0000030000 rw-p 00001000 08:01 42                         /usr/lib/one.so
Anonymous:             0 kB
7f0000030000-7f0000040000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
7f0000040000-7f0000050000 rwxp 00000000 00:00 0
Anonymous:             0 kB
"""

# After it, code that ran before must run again.
GIVE_BACK = """
import torch
from octavo.process import return_unused_memory

def code_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) * 1024

product = torch.ones(64, 64) @ torch.ones(64, 64)
before = code_bytes()
return_unused_memory()
after = code_bytes()
assert torch.equal(torch.ones(64, 64) @ torch.ones(64, 64), product)
print(before, after)
"""


def test_only_unchanged_code_of_files_is_found() -> None:
    assert list(_unchanged_code(SMAPS)) == [(0x7F0000000000, 0x7F0000010000)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no such account")
def test_code_that_importing_ran_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert after < before / 2
