"""The package is installed without its C++ kernels where they cannot be built, and that is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere clang is the compiler")
@pytest.mark.parametrize("case", ["missing", "clang"])
def test_without_gcc_the_kernels_are_left_out(case: str, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    if case == "clang":
        compiler.write_text("#!/bin/sh\necho clang version 14.0.6\n")
        compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(
        [*command, "--build-temp", str(tmp_path / "temp")],
        env=os.environ | {"CC": str(compiler), "CXX": str(compiler)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "does not run" if case == "missing" else "is clang; on Linux the kernels need g++"
    assert f"{compiler} {said}" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))
