"""Triton's kernels compiled for a GPU that need not be there.

Its interpreter runs some kernels that its compiler does not take. As the interpreter takes the
compiler's place in a process, this is one of its own:

python -m tests.compiling cuda 90 32 232448
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.kernels.cuda import append, attention, decode, quantize, tiling, w8a8
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages


class AbsentGPU:
    """What Triton asks of a driver while it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(target: GPUTarget, device: tiling.Processors) -> None:
    """Every kernel, by the calls that launch them; nothing is computed."""
    driver.set_active(AbsentGPU(target))
    run = JITFunction.run

    def compiled(kernel: JITFunction, *arguments: object, **options: object) -> None:
        made = run(kernel, *arguments, **(options | {"warmup": True}))
        print(kernel.fn.__name__)
        assert made.metadata.shared <= device.shared_memory, (kernel.fn.__name__, made.metadata)

    JITFunction.__getitem__ = lambda kernel, grid: partial(compiled, kernel, grid=grid)
    compile_linears(device)
    compile_append()
    compile_attention()


def compile_linears(device: tiling.Processors) -> None:
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    quantize._rms_norm(x, x[0], 1e-5)
    quantize._silu_mul(x, x)
    quantize._rms_norm_quantize(x, x[0], 1e-5)
    quantize._silu_mul_quantize(x, x)
    tiles = sorted(tiling.tiles(device), key=lambda tile: tile.m * tile.n)
    weight_scale = torch.ones(48)
    for n_inputs, cut, n_parts, bias in (
        (4096, tiles[0], 1, None),
        (4096, tiles[-1], 2, None),
        (37, tiles[0], 1, weight_scale),
    ):
        tokens = quantize._quantize(x[:, :n_inputs])
        weight = torch.ones(48, n_inputs, dtype=torch.int8)
        w8a8._by_tiles(tokens, weight, weight_scale, bias, cut._replace(n_parts=n_parts))


def compile_append() -> None:
    q, k = torch.ones(2, 32, 128, dtype=torch.bfloat16), torch.ones(2, 8, 128, dtype=torch.bfloat16)
    angles, slots = torch.ones(2, 64), torch.tensor([3, 9])
    for kept in (pages_in(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)):
        append._append(q, k, k, angles, angles, kept, slots)


def compile_attention() -> None:
    """A chunk and a single token, in full and in a window, over what an 8B model keeps."""
    setattr(decode, "_multiprocessors", lambda device: 100)  # noqa: B010
    table = torch.zeros(2, 300, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.int8):
        q = torch.zeros(101, 32, 128, dtype=torch.bfloat16)
        for window in (None, 1000):
            attention._attend(q, pages_in(dtype), table, [100, 1], [4000, 4000], window)


def pages_in(dtype: torch.dtype) -> KVPages:
    pages = torch.zeros(3, 8, 16, 128, dtype=dtype)
    if dtype != torch.int8:
        return KVPages(pages, pages)
    scales = torch.zeros(3, 8, 16, dtype=SCALE_DTYPE)
    return KVPages(pages, pages, scales, scales)


if __name__ == "__main__":
    name, architecture, warp_size, shared_memory = sys.argv[1:]
    arch = int(architecture) if name == "cuda" else architecture
    compile_for(GPUTarget(name, arch, int(warp_size)), tiling.Processors(1, int(shared_memory)))
