"""Triton's kernels compile for GPUs, also where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER = ("cuda", "90", "32", str(227 * 2**10))
ADA = ("cuda", "89", "32", str(99 * 2**10))
MI300 = ("hip", "gfx942", "64", str(64 * 2**10))


@pytest.mark.parametrize(
    "gpu",
    [HOPPER, *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in (ADA, MI300))],
    ids=lambda gpu: gpu[1],
)
def test_all_kernels_compile(gpu: tuple[str, ...], tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", *gpu],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Triton warns where it is left to its default whether two roundings may become one.
    assert "FP_FUSION" not in done.stderr
    assert {"_prefill", "_decode", "_merge", "_append_kernel"} < set(done.stdout.split())
    suffix = "hsaco" if gpu[0] == "hip" else "cubin"
    assert len(list(tmp_path.rglob(f"*.{suffix}"))) >= 12
