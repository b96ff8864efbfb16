"""The C++ library on arm64, built by a cross compiler and run by an emulator, where both are there.

Debian and Ubuntu have them as g++-aarch64-linux-gnu and qemu-user-static.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="no cross compiler"
    ),
]


def test_kernels_compute_their_definitions(tmp_path: Path) -> None:
    def run(*command: str) -> None:
        subprocess.run(command, check=True)

    def compiled(source: Path) -> str:
        target = tmp_path / f"{source.stem}.o"
        level = "-O3" if source.parent == NATIVE else "-O1"  # GCC 12 breaks down at the definitions
        run(COMPILER, *FLAGS, level, f"-I{NATIVE}", "-c", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*NATIVE.glob("*.cpp"), ROOT / "tests" / "arm64.cpp"]))
    program = str(tmp_path / "arm64")
    run(COMPILER, "-static", "-fopenmp", *objects, "-o", program)
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("attention") == 36  # by two sets of instructions
