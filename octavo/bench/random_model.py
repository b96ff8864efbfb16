"""A model of random weights, made as fast as memory is written.

Speed and memory do not depend on the weights' values, as long as nothing overflows. So one block of
random numbers is made and written all over the tensors, each from another place of it on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from octavo.config import ModelConfig
from octavo.model import Transformer

DTYPE = torch.bfloat16  # of what is not quantised, and of the computation
BLOCK_ELEMENTS = 2**22 + 257  # odd, so that equal numbers are not below each other in a matrix
INT8_MAX = 127
_INT8_STD = math.sqrt(INT8_MAX * (INT8_MAX + 1) / 3)  # of whole numbers from -127 to 127


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose weights are random, bf16 or quantised as the config says.

    Args:
        config: with `quantization` None or W8A8.
        seed: the same seed gives the same weights.
    """
    with torch.device("meta"):
        model = Transformer(config)
    # Handed over, so that whoever packs the weights may let go of one after the other.
    return model.with_weights(random_state(config, seed)).pack()


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """The weights of `random_model`, by their names in `octavo.model`.

    Norms are 1, and all else is such that activations keep their size.
    """
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    blocks = RandomBlocks(seed)
    state: dict[str, Tensor] = {}
    for name, like in tensors.items():
        shape = tuple(like.shape)
        if name == "output.weight" and config.tied_embeddings:
            continue
        if name.endswith("norm.weight"):
            state[name] = torch.ones(shape, dtype=DTYPE)
        elif name.endswith("weight_scale"):
            in_features = config.linear_shape(name.rsplit(".", 1)[0])[1]
            state[name] = torch.full(shape, 1 / (_INT8_STD * math.sqrt(in_features)))
        elif like.dtype == torch.int8:
            state[name] = blocks.integers(torch.empty(shape, dtype=like.dtype))
        else:
            out = torch.empty(shape, dtype=DTYPE)
            state[name] = blocks.normal(out, 1 / math.sqrt(shape[-1]))
    return state


class RandomBlocks:
    """Random numbers by the gigabyte, written into contiguous tensors.

    Args:
        seed: the same seed gives the same numbers.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks: dict[tuple[torch.dtype, float], Tensor] = {}
        self._at = 0

    def integers(self, out: Tensor) -> Tensor:
        """Whole numbers from -127 to 127, evenly spread, into an int8 tensor; gives it back."""
        if (out.dtype, 0) not in self._blocks:
            block = torch.empty(BLOCK_ELEMENTS, dtype=out.dtype)
            block.random_(-INT8_MAX, INT8_MAX + 1, generator=self._generator)
            self._blocks[out.dtype, 0] = block
        return self._fill(out, self._blocks[out.dtype, 0])

    def normal(self, out: Tensor, std: float = 1.0) -> Tensor:
        """Normal numbers around 0 into a floating-point tensor; gives it back."""
        if (out.dtype, std) not in self._blocks:
            numbers = torch.randn(BLOCK_ELEMENTS, generator=self._generator)
            self._blocks[out.dtype, std] = numbers.mul_(std).to(out.dtype)
        return self._fill(out, self._blocks[out.dtype, std])

    def _fill(self, out: Tensor, block: Tensor) -> Tensor:
        flat = out.view(-1)
        at = 0
        while at < len(flat):
            n = min(len(flat) - at, BLOCK_ELEMENTS - self._at)
            flat[at : at + n] = block[self._at : self._at + n]
            at += n
            self._at = (self._at + n) % BLOCK_ELEMENTS
        return out
