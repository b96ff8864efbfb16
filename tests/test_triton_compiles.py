"""Triton's kernels are compiled for GPUs that are not here; none is run.

A compiler refuses some of what the interpreter takes. Each has a process of its own, since in this
one Triton may be the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Launches compile their kernel for the target and stop.
COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

backend, arch, lanes, dtype, shared = sys.argv[1:]

class Elsewhere:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self):
        return GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))

driver.set_active(Elsewhere())
run = JITFunction.run

def compiled(self, *args, grid, warmup, **settings):
    kernel = run(self, *args, grid=grid, warmup=True, **settings)
    print(self.fn.__name__)
    assert kernel.metadata.shared <= int(shared), kernel.metadata.shared

JITFunction.run = compiled

from octavo.kernels.cuda import attention, decode
from octavo.kernels.kv_pages import KVPages

decode._multiprocessors = lambda device: 100
dtype = getattr(torch, dtype)
keys = torch.zeros(20, 8, 16, 128, dtype=dtype)
scales = (torch.zeros(20, 8, 16, dtype=torch.bfloat16),) * 2 if dtype == torch.int8 else ()
q = torch.zeros(101, 32, 128, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)
page_table = torch.zeros(2, 300, dtype=torch.int64)
for window in (None, 1000):
    pages = KVPages(keys, keys, *scales)
    attention._attend(q, pages, page_table, [100, 1], [4000, 4000], window)
"""
# Backend, architecture, lanes, and bytes of shared memory that a program may have there.
TARGETS = {
    "H100": ("cuda", "90", "32", "232448"),
    "Ada": ("cuda", "89", "32", "101376"),
    "MI300": ("hip", "gfx942", "64", "65536"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_attention_of_an_8b_model_compiles(
    target: tuple[str, ...], dtype: str, tmp_path: Path
) -> None:
    backend, arch, lanes, shared = target
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, backend, arch, lanes, dtype, shared],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"_prefill", "_decode", "_merge"}
