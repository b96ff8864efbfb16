"""The quantisation schemes, under the names and definitions of compressed-tensors' presets.

A scheme says how a linear's weights and inputs are stored in few bits. All are symmetric: a value
is its scale times a number of the grid, and zero is a number of every grid.

| scheme | weights | a scale for each | inputs | a scale for each |
| --- | --- | --- | --- | --- |
| W8A8 | int8 | output channel | int8 | token, when it runs |
| W4A16 | int4, packed | 128 inputs of an output channel | as they are | |
| W4A8 | int4, a byte each | 128 inputs of an output channel | int8 | token, when it runs |
| FP8 | float8 e4m3 | tensor | float8 e4m3 | tensor, from calibration |
| FP8_DYNAMIC | float8 e4m3 | output channel | float8 e4m3 | token, when it runs |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.errors import ConfigError

FP8_MAX = 448.0  # of e4m3
PACK_FACTOR = 8  # int4 weights in an int32


@dataclass(frozen=True)
class Scheme:
    """How a linear's weights and inputs are stored.

    Attributes:
        name: compressed-tensors' preset.
        format: compressed-tensors' format on disk.
        weight_type, weight_bits: the grid of the weights.
        weight_strategy: what shares a scale: `tensor`, `channel` (a row), or `group` (a run of
            `group_size` inputs of a row).
        group_size: inputs, for `group`.
        input_type: the grid of the inputs (8 bits), or None where they stay as they are.
        input_strategy: `token` scales are taken when it runs, a `tensor` scale from calibration.
    """

    name: str
    format: Literal["int-quantized", "pack-quantized", "float-quantized"]
    weight_type: Literal["int", "float"]
    weight_bits: int
    weight_strategy: Literal["tensor", "channel", "group"]
    group_size: int | None = None
    input_type: Literal["int", "float"] | None = None
    input_strategy: Literal["tensor", "token"] | None = None

    @property
    def packed(self) -> bool:
        """Whether eight int4 weights share an int32 on disk and in memory."""
        return self.format == "pack-quantized"

    @property
    def static_input(self) -> bool:
        """Whether the inputs' scale comes from calibration."""
        return self.input_strategy == "tensor"

    @property
    def weight_range(self) -> tuple[float, float]:
        """The least and the greatest number of the weights' grid.

        int8 leaves -128 out, so that the grid is symmetric; int4 has too few numbers for that.
        """
        if self.weight_type == "float":
            return -FP8_MAX, FP8_MAX
        return (-127, 127) if self.weight_bits == 8 else (-8, 7)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of `weight_scale` on disk."""
        if self.weight_strategy == "tensor":
            return (1,)
        return out_features, self.n_groups(in_features)

    def n_groups(self, in_features: int) -> int:
        """Scales of one row. Raises ConfigError where its inputs do not divide into groups."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ConfigError(
                f"{self.name} shares a scale among {self.group_size} inputs, which does not divide "
                f"a linear with {in_features}; take another scheme, such as W8A8"
            )
        return in_features // self.group_size

    def weight_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of one linear as it runs: weights on their grid, scales in fp32."""
        n_scales = 1
        for size in self.scale_shape(out_features, in_features):
            n_scales *= size
        bits = self.weight_bits if self.packed else 8
        return out_features * in_features * bits // 8 + 4 * n_scales + 4 * self.static_input


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("W8A8", "int-quantized", "int", 8, "channel", None, "int", "token"),
        Scheme("W4A16", "pack-quantized", "int", 4, "group", 128),
        Scheme("W4A8", "int-quantized", "int", 4, "group", 128, "int", "token"),
        Scheme("FP8", "float-quantized", "float", 8, "tensor", None, "float", "tensor"),
        Scheme("FP8_DYNAMIC", "float-quantized", "float", 8, "channel", None, "float", "token"),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme with this name, in any case. Raises ConfigError for any other."""
    try:
        return SCHEMES[name.upper()]
    except KeyError:
        raise ConfigError(f"scheme: {name!r} is not one of {', '.join(SCHEMES)}") from None
