"""The linear layers: floating point, and one for each way to store weights in few bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from octavo import kernels
from octavo.config import ModelConfig
from octavo.kernels.quantized import FP8_DTYPE
from octavo.schemes import PACK_FACTOR, Scheme

# What a linear is given: several that are W8A8 share inputs that were quantised once.
LinearInput = Tensor | kernels.QuantizedTokens


class Linear(nn.Module):
    """y = x weightᵀ in the weight's own dtype; no Mistral model has a bias.

    Attributes:
        weight: [out_features, in_features], bf16, fp16 or fp32.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @classmethod
    def of(cls, weight: Tensor) -> Linear:
        """The linear with this weight, [out_features, in_features], which is not trained."""
        out_features, in_features = weight.shape
        with torch.device("meta"):  # no memory for a weight that is replaced at once
            linear = cls(in_features, out_features)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        return kernels.linear(x, self.weight)


class LinearW8A8(nn.Module):
    """int8 weights with a scale per output channel, int8 activations with one per token.

    Attributes:
        weight: [out_features, in_features] int8; None once it is packed.
        weight_scale: [out_features] fp32.
        packed: the weight as this machine's product reads it, or None.
    """

    weight: Tensor | None
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features))
        self.packed: kernels.PackedWeight | None = None

    def pack(self) -> None:
        """Hold the weight in the form that is fast here, in place of the checkpoint's own."""
        if self.weight is not None and (packed := kernels.pack_w8a8(self.weight)) is not None:
            self.packed, self.weight = packed, None

    @property
    def stored(self) -> Tensor | kernels.PackedWeight:
        """The weight, packed or not."""
        stored = self.weight if self.packed is None else self.packed
        assert stored is not None
        return stored

    def forward(self, x: LinearInput) -> Tensor:
        """[T, in_features] to [T, out_features], in x's dtype."""
        return kernels.linear_w8a8(x, self.stored, self.weight_scale)


class LinearW4A8(nn.Module):
    """int4 weights, a byte each, with a scale per group of inputs; int8 activations as in W8A8.

    Attributes:
        weight: [out_features, in_features] int8 in -8…7.
        weight_scale: [out_features, n_groups] fp32.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        n_groups = scheme.n_groups(in_features)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, n_groups))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features], in x's dtype."""
        return kernels.linear_w4a8(x, self.weight, self.weight_scale)


class LinearW4A16(nn.Module):
    """int4 weights, eight in an int32, with a scale per group of inputs; activations as they are.

    Attributes:
        weight_packed: [out_features, in_features / 8] int32, as `kernels.pack_int4` packs it.
        weight_scale: [out_features, n_groups] fp32.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        n_groups = scheme.n_groups(in_features)
        packed = torch.empty(out_features, in_features // PACK_FACTOR, dtype=torch.int32)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.empty(out_features, n_groups))

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features], in x's dtype."""
        return kernels.linear_w4a16(x, self.weight_packed, self.weight_scale)


class LinearFP8(nn.Module):
    """float8 weights and activations, scaled as a whole (FP8) or a row and token (FP8_DYNAMIC).

    Attributes:
        weight: [out_features, in_features] float8_e4m3fn.
        weight_scale: fp32, [1] or [out_features].
        input_scale: [1] fp32 from calibration, or None: one a token, taken when it runs.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Scheme) -> None:
        super().__init__()
        n_scales = 1 if scheme.weight_strategy == "tensor" else out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=FP8_DTYPE))
        self.register_buffer("weight_scale", torch.empty(n_scales))
        self.register_buffer("input_scale", torch.empty(1) if scheme.static_input else None)

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features], in x's dtype."""
        return kernels.linear_fp8(x, self.weight, self.weight_scale, self.input_scale)


QuantizedLinear = LinearW8A8 | LinearW4A8 | LinearW4A16 | LinearFP8
AnyLinear = Linear | QuantizedLinear
_QUANTIZED: dict[str, type[QuantizedLinear]] = {
    "W8A8": LinearW8A8,
    "W4A16": LinearW4A16,
    "W4A8": LinearW4A8,
    "FP8": LinearFP8,
    "FP8_DYNAMIC": LinearFP8,
}


def make_linear(config: ModelConfig, name: str) -> AnyLinear:
    """The linear with this name: quantised where the checkpoint says so, else floating point."""
    out_features, in_features = config.linear_shape(name)
    if config.quantization is not None and name in config.quantization.linears:
        scheme = config.quantization.scheme
        return _QUANTIZED[scheme.name](in_features, out_features, scheme)
    return Linear(in_features, out_features)


def run_linears(x: LinearInput, *linears: AnyLinear) -> list[Tensor]:
    """Each linear's output for the same input; of those in W8A8 in one call of the kernels.

    Where somebody listens to a linear by a hook, all are called by themselves, so that it is run.
    """
    w8a8 = [each for each in linears if isinstance(each, LinearW8A8) and not _has_hooks(each)]
    if len(w8a8) < len(linears):
        return [linear(x) for linear in linears]
    stored, scales = [each.stored for each in w8a8], [each.weight_scale for each in w8a8]
    return kernels.linears_w8a8(x, stored, scales)


def run_in_parts(f: Callable[[LinearInput], Tensor], x: LinearInput, most: int | None) -> Tensor:
    """f of x, both [T, dim] in x's dtype: of at most `most` tokens at a time, or None, of all."""
    q = x if isinstance(x, Tensor) else x.q
    n_parts = -(-len(q) // (most or len(q)))
    if n_parts == 1:
        return f(x)
    out = kernels.empty(q.shape, x.dtype, q.device)
    size = -(-len(q) // n_parts)  # all of about the same
    for start in range(0, len(q), size):
        out[start : start + size] = f(_tokens(x, start, start + size))
    return out


def _tokens(x: LinearInput, start: int, stop: int) -> LinearInput:
    if isinstance(x, Tensor):
        return x[start:stop]
    return x._replace(q=x.q[start:stop], scale=x.scale[start:stop])


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def pack_linears(module: nn.Module) -> None:
    """Bring all int8 weights of a module into the form that is fast here."""
    for each in module.modules():
        if isinstance(each, LinearW8A8):
            each.pack()
