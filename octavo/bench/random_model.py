"""A model of random weights, made as fast as memory is written.

Speed and memory do not depend on the weights' values, as long as nothing overflows. So one block of
random numbers is made and written all over the tensors, each from another place of it on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from octavo import kernels
from octavo.config import ModelConfig
from octavo.device import CPU
from octavo.model import Transformer
from octavo.model.linear import LinearW8A8
from octavo.process import return_free_memory, return_unused_memory

DTYPE = torch.bfloat16  # of what is not quantised, and of the computation
BLOCK_ELEMENTS = 2**22 + 257  # odd, so that equal numbers are not below each other in a matrix
INT8_MAX = 127
_INT8_STD = math.sqrt(INT8_MAX * (INT8_MAX + 1) / 3)  # of whole numbers from -127 to 127


def random_model(config: ModelConfig, seed: int = 0, device: torch.device = CPU) -> Transformer:
    """A model whose weights are random, bf16 or quantised as the config says, and packed.

    Args:
        config: with `quantization` None or W8A8.
        seed: the same seed gives the same weights on the same kind of device.
        device: where they are made, and stay.
    """
    kernels.check_kernels(device)
    return_unused_memory()
    with torch.device("meta"):
        model = Transformer(config)
    blocks = RandomBlocks(seed, device)
    # One module at a time, the largest first: while a weight is packed it is in memory twice.
    for name, module in sorted(model.named_modules(), key=lambda each: -_n_elements(each[1])):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if name == "output" and config.tied_embeddings:
            continue
        state = {key: random_tensor(config, f"{name}.{key}", like, blocks) for key, like in tensors}
        if state:
            module.load_state_dict(state, strict=True, assign=True)
        del state
        if isinstance(module, LinearW8A8):
            module.pack()
            return_free_memory()  # matrices under 32 MiB lie in the heap, and leave holes there
    if config.tied_embeddings:
        model.output.weight = model.tok_embeddings.weight
    del blocks
    return_unused_memory()
    return model.requires_grad_(False).eval()


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Such weights by their names in `octavo.model`, not packed."""
    with torch.device("meta"):
        tensors = Transformer(config).state_dict()
    if config.tied_embeddings:
        del tensors["output.weight"]
    blocks = RandomBlocks(seed)
    return {name: random_tensor(config, name, like, blocks) for name, like in tensors.items()}


def random_tensor(config: ModelConfig, name: str, like: Tensor, blocks: RandomBlocks) -> Tensor:
    """Of a weight's name, shape and type: with it, activations keep their size. Norms are 1.

    It is on the blocks' device.
    """
    device = blocks.device
    if name.endswith("norm.weight"):
        return torch.ones(like.shape, dtype=DTYPE, device=device)
    if name.endswith("weight_scale"):
        in_features = config.linear_shape(name.rsplit(".", 1)[0])[1]
        return torch.full(like.shape, 1 / (_INT8_STD * math.sqrt(in_features)), device=device)
    if like.dtype == torch.int8:
        return blocks.integers(torch.empty(like.shape, dtype=like.dtype, device=device))
    out = torch.empty(like.shape, dtype=DTYPE, device=device)
    return blocks.normal(out, 1 / math.sqrt(like.shape[-1]))


def _n_elements(module: nn.Module) -> int:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return sum(tensor.numel() for tensor in own)


class RandomBlocks:
    """Random numbers by the gigabyte, written into contiguous tensors.

    Args:
        seed: the same seed gives the same numbers.
        device: where these tensors are.
    """

    def __init__(self, seed: int, device: torch.device = CPU) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._blocks: dict[tuple[torch.dtype, float], Tensor] = {}
        self._at = 0

    def integers(self, out: Tensor) -> Tensor:
        """Whole numbers from -127 to 127, evenly spread, into an int8 tensor; gives it back."""
        if (out.dtype, 0) not in self._blocks:
            block = torch.empty(BLOCK_ELEMENTS, dtype=out.dtype, device=self.device)
            block.random_(-INT8_MAX, INT8_MAX + 1, generator=self._generator)
            self._blocks[out.dtype, 0] = block
        return self._fill(out, self._blocks[out.dtype, 0])

    def normal(self, out: Tensor, std: float = 1.0) -> Tensor:
        """Normal numbers around 0 into a floating-point tensor; gives it back."""
        if (out.dtype, std) not in self._blocks:
            shape = (BLOCK_ELEMENTS,)
            numbers = torch.randn(shape, generator=self._generator, device=self.device)
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
