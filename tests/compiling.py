"""Triton's kernels compiled for a GPU that need not be there.

Its interpreter runs some kernels that its compiler does not take. As the interpreter takes the
compiler's place in a process, this is one of its own:

python -m tests.compiling cuda 90 32 232448 132

For each kernel that was compiled it prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo.bench.shapes import MINISTRAL_8B
from octavo.cache.layout import tokens_of_page
from octavo.kernels.cuda import (
    append,
    attention,
    decode,
    dequantize,
    early_launch,
    prefill,
    quantize,
    tiling,
    top_p,
    w8a8,
)
from octavo.kernels.cuda.call import AttentionCall
from octavo.kernels.kv_pages import SCALE_DTYPE, KVPages
from octavo.kernels.lens import Lens
from octavo.kernels.quantized import QuantizedTokens
from tests.machine_code import machine_code


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
    setattr(decode, "_multiprocessors", lambda _: device.number)  # noqa: B010
    for module in (w8a8, prefill, decode, dequantize):
        setattr(module, "processors", lambda: device)  # noqa: B010
    setattr(early_launch, "_is_right", lambda: True)  # noqa: B010
    run = JITFunction.run
    known = set()

    def compiled(kernel: JITFunction, *arguments: object, **options: object) -> None:
        made = run(kernel, *arguments, **(options | {"warmup": True}))
        if made.hash in known:
            return
        known.add(made.hash)
        dtypes = {str(each.dtype) for each in flat(arguments) if isinstance(each, torch.Tensor)}
        line = {"kernel": kernel.fn.__name__, "dtypes": sorted(dtypes)}
        line["aligned"] = options.get("WHOLE", True)
        assert made.metadata.shared <= device.shared_memory, (line, made.metadata)
        if target.backend == "cuda":
            line["early"] = made.metadata.launch_pdl
            line |= machine_code(made.asm["cubin"], made.asm["ptx"])._asdict()
        print(json.dumps(line))

    JITFunction.__getitem__ = lambda kernel, grid: partial(compiled, kernel, grid=grid)
    compile_rows()
    top_p._keep(torch.ones(2, MINISTRAL_8B.vocab_size), torch.ones(2, 1))
    compile_linears()
    compile_append()
    compile_attention()


def flat(arguments: Iterable[object]) -> Iterator[object]:
    """Arguments, and what those of them hold that are tuples."""
    for each in arguments:
        yield from flat(each) if isinstance(each, tuple) else (each,)


def compile_rows() -> None:
    for n_columns in (MINISTRAL_8B.dim, MINISTRAL_8B.hidden_dim):
        x = torch.ones(2, n_columns, dtype=torch.bfloat16)
        quantize._rms_norm(x, x[0], 1e-5)
        quantize._rms_norm(x, x[0], 1e-5, x)
        quantize._silu_mul(x, x)
        quantize._rms_norm_quantize(x, x[0], 1e-5)
        quantize._rms_norm_quantize(x, x[0], 1e-5, x)
        quantize._silu_mul_quantize(x, x)
        quantize._quantize(x)


def compile_linears() -> None:
    """In the tiles that batches and chunks are cut into; and of inputs that no block divides."""
    names = MINISTRAL_8B.linear_names()[:-1]
    shapes = sorted({MINISTRAL_8B.linear_shape(name) for name in names})
    for n_tokens in (1, 16, 32, 64, 512, 8192):
        for n_outputs, n_inputs in shapes:
            compile_linear(n_tokens, n_outputs, n_inputs, None)
        if n_tokens <= tiling.FEW_TOKENS:
            compile_several(n_tokens, "attention.wq", "attention.wk", "attention.wv")
            compile_several(n_tokens, "feed_forward.w1", "feed_forward.w3")
    compile_linear(2, 48, 37, torch.ones(48))


def compile_linear(n_tokens: int, n_outputs: int, n_inputs: int, bias: Tensor | None) -> None:
    q, weight = (torch.empty(n, n_inputs, dtype=torch.int8) for n in (n_tokens, n_outputs))
    tokens = QuantizedTokens(q, torch.empty(n_tokens, 1), torch.bfloat16)
    w8a8._by_tiles(tokens, weight, torch.empty(n_outputs), bias)


def compile_several(n_tokens: int, *names: str) -> None:
    """Linears of the first layer in one launch."""
    shapes = [MINISTRAL_8B.linear_shape(f"layers.0.{name}") for name in names]
    weights = [torch.empty(shape, dtype=torch.int8) for shape in shapes]
    q = torch.empty(n_tokens, shapes[0][1], dtype=torch.int8)
    tokens = QuantizedTokens(q, torch.empty(n_tokens, 1), torch.bfloat16)
    scales = [torch.empty(shape[0]) for shape in shapes]
    n_outputs = sum(map(len, weights))
    cut = tiling.tiling(n_tokens, n_outputs, q.shape[1], w8a8.processors())
    w8a8._several(tokens, weights, scales, cut._replace(n_parts=1))


def compile_append() -> None:
    q, k = torch.ones(2, 32, 128, dtype=torch.bfloat16), torch.ones(2, 8, 128, dtype=torch.bfloat16)
    angles, slots = torch.ones(2, 64), torch.tensor([3, 9])
    for kept in (pages_in(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)):
        append._append(q, k, k, angles, angles, kept, slots)


def compile_attention() -> None:
    """A chunk, a single token and a batch of them, in full and in a window, of an 8B model.

    And the most rows that a program has: guesses of 16 tokens by heads in groups of eight.
    """
    table = torch.zeros(2, 300, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.int8):
        q = torch.zeros(101, 32, 128, dtype=torch.bfloat16)
        chunk = q.new_zeros(300, 32, 128)
        lens = Lens([len(chunk)]), Lens([4000])
        call = AttentionCall(chunk, chunk, pages_in(dtype), table[:1], *lens, None)
        if dequantize.pays(call):
            dequantize.dequantized(call)
        attention._attend(q[:16, :8], pages_in(dtype, 1), table[:1], [16], [4000], None)
        for window in (None, 1000):
            attention._attend(q, pages_in(dtype), table, [100, 1], [4000, 4000], window)
            many = table[:1].expand(64, -1)
            attention._attend(q[:64], pages_in(dtype), many, [1] * 64, [4000] * 64, window)


def pages_in(dtype: torch.dtype, n_heads: int = 8) -> KVPages:
    pages = torch.zeros(3, n_heads, tokens_of_page(dtype), 128, dtype=dtype)
    if dtype != torch.int8:
        return KVPages(pages, pages)
    scales = torch.zeros(pages.shape[:3], dtype=SCALE_DTYPE)
    return KVPages(pages, pages, scales, scales)


if __name__ == "__main__":
    name, architecture, *numbers = sys.argv[1:]
    arch = int(architecture) if name == "cuda" else architecture
    warp_size, shared_memory, number = map(int, numbers)
    compile_for(GPUTarget(name, arch, warp_size), tiling.Processors(number, shared_memory))
