"""What is done to a model: the scheme, the linears it takes in, and how weights are found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from octavo.checkpoint import compressed, huggingface
from octavo.config import ModelConfig, Quantization
from octavo.errors import ConfigError
from octavo.schemes import Scheme


@dataclass(frozen=True)
class Recipe:
    """SmoothQuant, then GPTQ, with the options of llm-compressor's modifiers of those names.

    Attributes:
        scheme: of weights and inputs.
        ignore: linears that stay in floating point: Hugging Face module names, or `re:` and a
            regular expression, as in compressed-tensors.
        smoothing_strength: SmoothQuant's alpha, 0 to 1: how much of the inputs' outliers moves
            into the weights. None leaves smoothing out.
        dampening_frac: of the Hessian's mean diagonal, added to its diagonal.
        rounding: `gptq`, or `nearest`: each weight to the nearest number of its grid.
        clipping: whether a scale may cut off a row's largest weights where that lessens the
            squared error.
        inner_smoothing: whether the inputs of wo and w2 are smoothed too, where a scheme rounds
            them to integers.
    """

    scheme: Scheme
    ignore: tuple[str, ...] = ("lm_head",)
    smoothing_strength: float | None = 0.8
    dampening_frac: float = 0.1
    rounding: Literal["gptq", "nearest"] = "gptq"
    clipping: bool = True
    inner_smoothing: bool = True

    def __post_init__(self) -> None:
        strength = self.smoothing_strength
        if strength is not None and not 0 <= strength <= 1:
            raise ConfigError(f"smoothing_strength must be from 0 to 1, not {strength!r}")
        if not 0 <= self.dampening_frac < float("inf"):
            raise ConfigError(
                f"dampening_frac must be 0 or more and finite, not {self.dampening_frac!r}"
            )
        if self.rounding not in ("gptq", "nearest"):
            raise ConfigError(f"rounding: {self.rounding!r} is neither gptq nor nearest")

    def quantization(self, config: ModelConfig) -> Quantization:
        """The linears of a model that this recipe quantises.

        Raises:
            ConfigError: none is left, a name to ignore fits nothing, or the scheme does not fit.
        """
        _require_known(self.ignore, config)
        linears = frozenset(
            name
            for name in config.linear_names()
            if not compressed.matches(huggingface.module_name(name), self.ignore)
        )
        if not linears:
            raise ConfigError("ignore: leaves no linear to quantise")
        if config.tied_embeddings and "output" in linears:
            raise ConfigError(
                "ignore: must hold lm_head, since this model's head is its embedding, which stays "
                "in floating point"
            )
        for name in linears:
            self.scheme.n_groups(config.linear_shape(name)[1])
        return Quantization(self.scheme, linears)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the bytes, as JSON."""
        return {
            "scheme": self.scheme.name,
            "ignore": list(self.ignore),
            "smoothing_strength": self.smoothing_strength,
            "dampening_frac": self.dampening_frac,
            "rounding": self.rounding,
            "clipping": self.clipping,
            "inner_smoothing": self.inner_smoothing,
        }


def _require_known(ignore: Sequence[str], config: ModelConfig) -> None:
    """A misspelt name would quantise what its user wanted to keep."""
    modules = [huggingface.module_name(name) for name in config.linear_names()]
    for entry in ignore:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ConfigError(f"ignore: {entry!r} is no pattern: {error}") from None
        if not any(compressed.matches(module, [entry]) for module in modules):
            raise ConfigError(
                f"ignore: {entry!r} is no linear of this model; write lm_head, "
                f"{modules[0]} or a pattern such as re:.*down_proj"
            )
