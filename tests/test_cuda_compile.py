"""Triton's kernels compile for GPUs, also where there is none, and become what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Architecture, threads a warp, bytes of shared memory, multiprocessors.
HOPPER = ("cuda", 90, 32, 227 * 2**10, 132)
ADA = ("cuda", 89, 32, 99 * 2**10, 142)
BLACKWELL = ("cuda", 120, 32, 99 * 2**10, 70)  # RTX 50
MI300 = ("hip", "gfx942", 64, 64 * 2**10, 304)
GPUS = [HOPPER, *(pytest.param(gpu, marks=pytest.mark.slow) for gpu in (ADA, BLACKWELL, MI300))]

PRODUCTS = {"_whole_kernel", "_several_kernel", "_part_kernel", "_prefill", "_decode"}
ROWS = {"_rms_norm", "_silu_mul", "_rms_norm_quantize", "_silu_mul_quantize", "_quantize"}
OTHERS = {
    "_append_kernel",
    "_keep_kernel",
    "_finish_kernel",
    "_merge",
    *(f"{name}_kernel" for name in ROWS),
}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu[1]))
def test_all_kernels_compile_and_products_are_the_tensor_cores(
    gpu: tuple[str | int, ...], tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", *map(str, gpu)],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Triton warns where it is left to its default whether two roundings may become one.
    assert "FP_FUSION" not in done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {each["kernel"] for each in kernels}
    assert names >= PRODUCTS | OTHERS
    assert ("_dequantize_kernel" in names) == (gpu == HOPPER)
    if gpu[0] == "cuda":
        for each in kernels:
            check(each)
            # For RTX 50 four registers are spilled before a loop over keys, and read after it.
            assert each["stack_bytes"] == 0 or gpu == BLACKWELL, each
            check_turns(each, can_wait=gpu in (HOPPER, BLACKWELL))


def check_turns(kernel: dict[str, Any], can_wait: bool) -> None:
    """It is launched before the kernel in front of it has ended only if it waits for that."""
    assert kernel["early"] == can_wait, kernel
    assert (kernel["early_accesses"] == 0) == can_wait, kernel
    if kernel["kernel"] == "_several_kernel":  # of few tokens
        assert (kernel["fetches"] > 0) == can_wait, kernel


def check(kernel: dict[str, Any]) -> None:
    """Nothing spills, products are of the dtypes that are kept, and no loop waits for a load."""
    name = kernel["kernel"]
    products = set()
    if name in ("_whole_kernel", "_several_kernel", "_part_kernel"):
        products = {"s8"}
    elif name in PRODUCTS:  # weights by values are of bf16 in any case
        products = {"s8", "bf16"} if "torch.int8" in kernel["dtypes"] else {"bf16"}
    assert set(kernel["products"]) == products, kernel
    assert kernel["loop_spills"] == 0, kernel
    # Rows that do not begin at whole words cannot be copied to shared memory in the background.
    assert kernel["waiting_loads"] == 0 or not kernel["aligned"], kernel
