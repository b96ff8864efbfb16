"""How a product of int8 matrices is cut into tiles, by its shape and by what the device has."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from octavo.kernels.cuda.launch import INTERPRETED


class Tiling(NamedTuple):
    """A program computes `m` tokens by `n` outputs, `k` inputs at a time.

    Attributes:
        m, n, k: powers of two; Triton's products of int8 want at least 16, 16 and 32.
        n_warps: that share a tile.
        n_parts: programs that share a tile's inputs, each summing up a run of them.
        n_stages: blocks of inputs and weights that are under way at once.
    """

    m: int
    n: int
    k: int
    n_warps: int
    n_parts: int = 1
    n_stages: int = 4


class Processors(NamedTuple):
    """What of a device decides how work is cut.

    Attributes:
        number: streaming multiprocessors, or compute units.
        shared_memory: bytes that a program may use.
    """

    number: int
    shared_memory: int

    @property
    def multiply_in_shared_memory(self) -> bool:
        """Whether products read what they multiply there, as on Hopper and after: not registers."""
        return self.shared_memory >= _HOPPER_SHARED_MEMORY


_HOPPER_SHARED_MEMORY = 227 * 2**10
# Few tokens wait for the weight: long runs of its rows, and tiles narrow enough that all
# processors have some. Many tokens wait for arithmetic: tiles as large as registers hold, so that
# what is read is used often. The largest needs 192 KiB for its stages, as Hopper has: there,
# products read shared memory, and elsewhere its registers would spill.
FEW_TOKENS = 64
_FEW = (Tiling(16, 32, 256, 4), Tiling(32, 32, 256, 4), Tiling(FEW_TOKENS, 64, 128, 4))
_MANY = (Tiling(128, 256, 128, 8), Tiling(128, 128, 64, 8), Tiling(64, 128, 64, 4))
# Memory gives 4.8 TB/s on an H200, and a read takes 0.8 us: a multiprocessor has to have asked for
# 29 KB at any time. Where it has one tile, the 24 KB of four stages are too few.
DEEP = 6
_LEAST_STEPS = 4  # blocks of inputs that a part is worth


@cache
def processors() -> Processors:
    """This device's; for the interpreter, which runs programs one after another, a small one's."""
    if INTERPRETED:
        return Processors(1, 48 * 2**10)
    of_driver = driver.active.utils.get_device_properties(torch.cuda.current_device())
    return Processors(of_driver["multiprocessor_count"], of_driver["max_shared_mem"])


def tiles(device: Processors) -> list[Tiling]:
    """All that `tiling` may choose from on a device, in one part."""
    return [each for each in (*_few(device), *_MANY) if _fits(each, device)]


def tiling(n_tokens: int, n_outputs: int, n_inputs: int, device: Processors) -> Tiling:
    """The tiling of a product [n_tokens, n_inputs] by [n_outputs, n_inputs] on a device."""
    chosen = _tile(n_tokens, n_outputs, device)
    n_tiles, n_steps = _n_tiles(chosen, n_tokens, n_outputs), -(-n_inputs // chosen.k)
    n_parts = 1
    while n_tiles * n_parts * 2 <= device.number and n_steps >= 2 * n_parts * _LEAST_STEPS:
        n_parts *= 2
    return chosen._replace(n_parts=n_parts)


def _tile(n_tokens: int, n_outputs: int, device: Processors) -> Tiling:
    """For few tokens the first that holds them all; else the first that gives all some work."""
    for each in _few(device):
        if n_tokens <= each.m:
            return each
    for each in _MANY:
        if _fits(each, device) and _n_tiles(each, n_tokens, n_outputs) >= device.number:
            return each
    return _MANY[-1]


def _few(device: Processors) -> list[Tiling]:
    """The tiles of few tokens."""
    n_stages = DEEP if device.multiply_in_shared_memory else _FEW[0].n_stages
    return [each._replace(n_stages=n_stages) for each in _FEW]


def _n_tiles(tile: Tiling, n_tokens: int, n_outputs: int) -> int:
    return -(-n_tokens // tile.m) * -(-n_outputs // tile.n)


def _fits(tile: Tiling, device: Processors) -> bool:
    return tile.n_stages * (tile.m + tile.n) * tile.k <= device.shared_memory
