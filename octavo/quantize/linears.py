"""Linears that share their inputs, quantised together: observe, smooth, round, measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.checkpoint import compressed
from octavo.checkpoint.huggingface import module_name
from octavo.config import ModelConfig
from octavo.errors import CheckpointError
from octavo.model.linear import AnyLinear, Linear, make_linear
from octavo.model.transformer import RMSNorm
from octavo.quantize.activations import Chunk, Derived
from octavo.quantize.gptq import Factorization, factorize, gptq, keep_better_rows
from octavo.quantize.grid import WeightGrid
from octavo.quantize.recipe import Recipe
from octavo.quantize.smoothing import NormSmoother, RowSmoother
from octavo.quantize.statistics import InputStatistics
from octavo.schemes import FP8_MAX

PROBE_TOKENS = 1024  # held-out rows on which each linear's error is measured

Rows = Callable[[Chunk], Tensor]


@dataclass(frozen=True)
class LinearReport:
    """What rounding did to one linear: ‖y - ŷ‖ / ‖y‖ over held-out rows, y in floating point.

    Attributes:
        linear: its Hugging Face name.
        nearest: with its weights and inputs plainly rounded to the nearest, nothing smoothed.
        quantized: as it was written.
        dampening_frac: that GPTQ used; None where it was not asked.
    """

    linear: str
    nearest: float
    quantized: float
    dampening_frac: float | None


class LinearQuantizer:
    """Quantises groups of linears and keeps what is to be written.

    Args:
        config: the architecture, with the quantisation to be made.
        recipe: how.
        dtype: of the floating-point tensors on disk.
        calibration: chunks to calibrate on.
        held_out: chunks to measure on.
        tick: called with the number of tokens whenever a chunk was observed.

    Attributes:
        tensors: what goes to disk, by the module's name in `octavo.model`.
        reports: one for each linear that was quantised.
    """

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        dtype: torch.dtype,
        calibration: Sequence[Chunk],
        held_out: Sequence[Chunk],
        tick: Callable[[int], None],
    ) -> None:
        self.config = config
        self.recipe = recipe
        self.dtype = dtype
        self.grid = WeightGrid(recipe.scheme, dtype)
        self.calibration = calibration
        self.held_out = held_out
        self.tick = tick
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.reports: list[LinearReport] = []

    def quantize(
        self,
        owner: nn.Module,
        attributes: Sequence[str],
        prefix: str,
        inputs: Rows,
        smoother: NormSmoother | RowSmoother | None = None,
    ) -> None:
        """Quantise linears with the same inputs, in place.

        Args:
            owner: the module that has them, in floating point. Those that the recipe ignores stay
                so.
            attributes: under which it has them.
            prefix: of their names in `octavo.model`: `layers.3.attention.`.
            inputs: the rows that they are given.
            smoother: divides these rows, if outliers may be moved from them into the weights.

        Raises:
            CheckpointError: inputs that are not finite.
        """
        names = [f"{prefix}{attribute}" for attribute in attributes]
        linears: list[Linear] = [getattr(owner, attribute) for attribute in attributes]
        chosen = [self._is_quantized(name) for name in names]
        statistics = self._observe(names[0], inputs, linears[0], any(chosen))
        probe = self._probe(inputs)
        weights = [linear.weight.to(torch.float32, copy=True) for linear in linears]
        outputs = [probe.float() @ weight.t() for weight in weights]
        nearest = [
            self._error_of_nearest(name, weight, probe, output, statistics)
            for name, weight, output in zip(names, weights, outputs, strict=True)
        ]
        if smoother is not None:
            scales = self._smooth(smoother, names, weights, statistics)
            probe = (probe.float() / scales).to(probe.dtype)
        factorization = self._factorize(statistics) if any(chosen) else None
        for i, name in enumerate(names):
            if not chosen[i]:
                setattr(owner, attributes[i], self._keep(name, weights[i], linears[i]))
                continue
            tensors = self._round(weights[i], statistics, factorization)
            self.tensors[name] = tensors
            linear = self._module(name, tensors)
            setattr(owner, attributes[i], linear)
            error = relative_error(linear(probe), outputs[i])
            used = factorization.dampening_frac if factorization else None
            self.reports.append(LinearReport(module_name(name), nearest[i], error, used))

    def to_disk(self) -> dict[str, Tensor]:
        """All tensors by their whole names."""
        return {
            f"{name}.{kind}": tensor
            for name, tensors in self.tensors.items()
            for kind, tensor in tensors.items()
        }

    def norm_smoother(self, norm: RMSNorm) -> NormSmoother | None:
        """What moves a norm's outliers, if the recipe wants that."""
        strength = self.recipe.smoothing_strength
        return None if strength is None else NormSmoother(norm, strength, self.dtype)

    def row_smoother(
        self, linear: AnyLinear, name: str, derived: Derived, shared: int = 1, run: int = 1
    ) -> RowSmoother | None:
        """What moves a linear's outliers into the next one, if that helps the scheme.

        Only int8 inputs, all on one scale, suffer from outliers; a float grid is as fine for the
        small as for the large.
        """
        wanted = self.recipe.inner_smoothing and self.recipe.smoothing_strength is not None
        tensors = self.tensors[name]
        if not wanted or self.recipe.scheme.input_type != "int" or isinstance(linear, Linear):
            return None
        return RowSmoother(linear, tensors, derived, shared, run)

    def _is_quantized(self, name: str) -> bool:
        quantization = self.config.quantization
        return quantization is not None and name in quantization.linears

    def _observe(self, name: str, inputs: Rows, linear: Linear, quantized: bool) -> InputStatistics:
        weight = linear.weight
        with_hessian = quantized and (self.recipe.rounding == "gptq" or self.recipe.clipping)
        n_tokens = sum(chunk.n_tokens for chunk in self.calibration)
        statistics = InputStatistics(weight.shape[1], n_tokens, weight.device, with_hessian)
        for chunk in self.calibration:
            statistics.add(inputs(chunk))
            self.tick(chunk.n_tokens)
        if not bool(statistics.largest.isfinite().all()):
            raise CheckpointError(
                f"{module_name(name)}: its inputs are not finite; the model's weights are damaged, "
                "or need a wider --dtype"
            )
        statistics.mirror()
        return statistics

    def _probe(self, inputs: Rows) -> Tensor:
        """At most about PROBE_TOKENS held-out rows, spread evenly over all of them."""
        stride = -(-sum(chunk.n_tokens for chunk in self.held_out) // PROBE_TOKENS)
        # Copies: a view would keep the whole chunk until all are there.
        return torch.cat([inputs(chunk)[::stride].clone() for chunk in self.held_out])

    def _smooth(
        self,
        smoother: NormSmoother | RowSmoother,
        names: Sequence[str],
        weights: Sequence[Tensor],
        statistics: InputStatistics,
    ) -> Tensor:
        """Move outliers into the weights, which are changed; gives the scales [K]."""
        if isinstance(smoother, NormSmoother):
            scales = smoother.smooth(statistics.largest, weights)
        else:
            [name], [weight] = names, weights
            sample = statistics.sample(PROBE_TOKENS)
            output = sample.float() @ weight.t()

            def error(scales: Tensor) -> float:
                divided = (sample.float() / scales).to(sample.dtype)
                return self._error_of_nearest(name, weight * scales, divided, output, statistics)

            scales = smoother.smooth(statistics.sample(), weight, error)
        for weight in weights:
            weight *= scales
        statistics.divide(scales)
        return scales

    def _factorize(self, statistics: InputStatistics) -> Factorization | None:
        if self.recipe.rounding == "nearest":
            return None
        return factorize(statistics.hessian, self.recipe.dampening_frac)

    def _round(
        self, weight: Tensor, statistics: InputStatistics, factorization: Factorization | None
    ) -> dict[str, Tensor]:
        """The tensors that a linear's [N, K] weight becomes on disk."""
        importance = statistics.hessian.diagonal() if self.recipe.clipping else None
        scale = self.grid.find_scales(weight, importance)
        if factorization is None:
            rounded = self.grid.round_matrix(weight, scale)
        else:
            rounded = gptq(weight, scale, factorization, self.grid)
            keep_better_rows(weight, rounded, scale, statistics.hessian, self.grid)
        return self.grid.stored(rounded, scale) | self._input_scale(statistics)

    def _error_of_nearest(
        self, name: str, weight: Tensor, probe: Tensor, output: Tensor, statistics: InputStatistics
    ) -> float:
        """The error that plain rounding would make; 0 for a linear that is not quantised."""
        if not self._is_quantized(name):
            return 0.0
        scale = self.grid.find_scales(weight)
        tensors = self.grid.stored(self.grid.round_matrix(weight, scale), scale)
        return relative_error(
            self._module(name, tensors | self._input_scale(statistics))(probe), output
        )

    def _input_scale(self, statistics: InputStatistics) -> dict[str, Tensor]:
        """The scale of all inputs, where the scheme wants one."""
        if not self.recipe.scheme.static_input:
            return {}
        scale = statistics.largest.max() / FP8_MAX
        return {"input_scale": torch.where(scale > 0, scale, 1.0).reshape(1).to(self.dtype)}

    def _keep(self, name: str, weight: Tensor, linear: Linear) -> Linear:
        """A linear that the recipe ignores, with its weight as it goes to disk."""
        weight = weight.to(self.dtype)
        self.tensors[name] = {"weight": weight}
        return Linear.of(weight.to(linear.weight.dtype))

    def _module(self, name: str, tensors: dict[str, Tensor]) -> nn.Module:
        """The linear that will run from these tensors."""
        with torch.device("meta"):
            module = make_linear(self.config, name)
        state = compressed.as_run(tensors, self.recipe.scheme)
        module.load_state_dict(state, strict=True, assign=True)
        return module


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖; 0 where both are 0."""
    size = float(exact.norm())
    return float((found.float() - exact).norm()) / size if size else 0.0
