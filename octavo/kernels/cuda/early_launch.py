"""Kernels take their places on a GPU while the one before them ends.

Between two kernels a GPU idles for a microsecond, and a decode step has hundreds. From Hopper on, a
kernel may be placed as soon as all programs of the one before have begun (programmatic dependent
launch, CUDA programming guide; `griddepcontrol`, PTX ISA 7.8), if it waits by itself for what it
reads. All of octavo's wait first thing, until the one before has ended and what it wrote is there:
it had waited for the one before it, so all that was ever written is. PyTorch's kernels are not
placed early, and find what they read as ever.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.device import capturing
from octavo.kernels.cuda.launch import DEVICE, INTERPRETED, why_not

logger = logging.getLogger("octavo")

_INTERPRETED = tl.constexpr(INTERPRETED)
_HOPPER = tl.constexpr(9)  # the major compute capability
_TRIED_NUMBERS, _TRIED_BLOCK, _TRIED_PAIRS = 2**20, 1024, 32


@triton.jit
def wait_for_previous() -> None:
    """Wait for the kernel before this one, and let the next one be placed.

    Every kernel calls it in every program, before it reads what others write or writes itself: one
    that went without would let the next kernel begin before the one before it has ended.
    """
    if not _INTERPRETED and tl.target_info.cuda_capability_geq(_HOPPER):
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(lines: tl.tensor) -> None:
    """Ask for what lies there, so that it is in the L2 cache when it is read: a hint, no result.

    While a kernel waits for the one before, memory may be idle: it may ask for what nobody writes.

    Args:
        lines: pointers, one to each 128 bytes.
    """
    if not _INTERPRETED and tl.target_info.cuda_capability_geq(_HOPPER):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [lines], tl.int32, is_pure=False, pack=1
        )


@cache
def early_launch() -> dict[str, bool]:
    """Triton's option for a launch, where the device can; tried once, in a graph as steps are.

    Drivers from before CUDA 12.3 do not capture it.
    """
    if INTERPRETED or not tl.target_info.cuda_capability_geq(9):
        return {}
    if reason := why_not(_is_right):
        logger.warning("octavo: kernels start after one another here, not early (%s)", reason)
        return {}
    return {"launch_pdl": True}


def _is_right() -> bool:
    """Whether kernels that read what the one before has written find all of it."""
    first, second = torch.zeros(2, _TRIED_NUMBERS, dtype=torch.int32, device=DEVICE)
    grid = (_TRIED_NUMBERS // _TRIED_BLOCK,)

    def chain() -> None:
        for _ in range(_TRIED_PAIRS):
            _increment[grid](first, second, BLOCK=_TRIED_BLOCK, launch_pdl=True)
            _increment[grid](second, first, BLOCK=_TRIED_BLOCK, launch_pdl=True)

    chain()  # compiles, which a capture cannot take
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with capturing(graph, stream):
        chain()
    graph.replay()
    return bool((first == 4 * _TRIED_PAIRS).all())


@triton.jit
def _increment(source: tl.tensor, target: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Numbers and one more each, in reverse: a program reads what another has written."""
    wait_for_previous()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    last = tl.num_programs(0) * BLOCK - 1
    tl.store(target + place, tl.load(source + last - place) + 1)
