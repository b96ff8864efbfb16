"""The W8A8 linear by PyTorch's oneDNN operators: where there is no library.

The product itself is near the limit of CPUs with VNNI. But a scale for each token has to be
multiplied in afterwards: with that, on two cores of an AMD EPYC with AVX-512 VNNI, a weight of
12,288 x 4,096 takes 2.5 ms for one token and 83 ms for 512, and by octavo's own product
(`native/w8a8_kernel.h`) 1.5 and 65 ms, which is exact in bf16 besides. On two cores of an Intel
Xeon with AMX it is 2 and 30 ms, and by octavo's own (`native/w8a8_amx.h`) 1.2 and 12.

They are PyTorch's own and not public, so they are tried before they are trusted. Where the CPU has
no VNNI they compute wrong: sums of two products saturate at 32,767. With int8 instead of uint8
activations they run a reference kernel that is hundreds of times slower, and without the shape of
the input at packing few tokens take twice as long.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from octavo.kernels.quantized import QuantizedTokens, linear_w8a8

_ZERO_POINT = 128  # int8 plus this is uint8


class OneDNNWeight:
    """An int8 weight as oneDNN packs it.

    Attributes:
        shape: (out_features, in_features).
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape = tuple(weight.shape)
        self._packed = torch.ops.onednn.qlinear_prepack(weight, [1, weight.shape[1]])
        self._zero_points = torch.zeros(weight.shape[0], dtype=torch.int64)

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether a weight [N, K] can be packed so."""
        return weight.device.type == "cpu"

    def multiply(self, x: QuantizedTokens, weight_scale: Tensor) -> Tensor:
        """As `octavo.kernels.linear_w8a8`; bf16 results are rounded once more, between scales."""
        shifted = x.q.view(torch.uint8).bitwise_xor(_ZERO_POINT)  # the same as adding it
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, _ZERO_POINT, self._packed, weight_scale, self._zero_points, None,
            1.0, 0, dtype, "none", [], "",
        )  # fmt: skip
        return out.mul_(x.scale).to(x.dtype)


@cache
def usable() -> bool:
    """Whether the operators are there and exact on this machine, which is tried once."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    q = torch.full((3, 64), 127, dtype=torch.int8)
    q[1] = -127
    weight[1], q[2, ::2] = -127, 0
    x = QuantizedTokens(q, torch.full((3, 1), 0.5), torch.float32)
    weight_scale = torch.linspace(0.1, 1, 32)
    try:
        found = OneDNNWeight(weight).multiply(x, weight_scale)
    except (AttributeError, RuntimeError, TypeError):  # another release's operators
        return False
    return torch.allclose(found, linear_w8a8(x, weight, weight_scale), rtol=1e-5)
