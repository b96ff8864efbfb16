"""compressed-tensors: which linears `quantization_config` quantises, how, and their tensors.

octavo runs the schemes of `octavo.schemes`. Anything else is refused by name.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.checkpoint.huggingface import CONFIG, module_name
from octavo.checkpoint.json_file import JsonObject
from octavo.config import ModelConfig, Quantization
from octavo.errors import CheckpointError, ConfigError
from octavo.schemes import PACK_FACTOR, SCHEMES, Scheme

VERSION = "0.20.0"  # of compressed-tensors, whose fields `quantization_config` writes
FLOATS = frozenset({"BF16", "F16", "F32"})
# GPTQ's orders that leave the columns where they are; the others need an index at run time.
_ACTORDERS = (None, False, "static", "weight")
# What tells schemes from one another, of the arguments of weights and of activations.
_COMPARED = ("type", "num_bits", "strategy", "group_size", "symmetric", "dynamic")


@dataclass(frozen=True)
class ExpectedTensor:
    """What a checkpoint's tensor must be: one of the shapes, and of safetensors' dtypes."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: frozenset[str]


def expected_tensors(
    scheme: Scheme, out_features: int, in_features: int
) -> dict[str, ExpectedTensor]:
    """The tensors of one quantised linear on disk, by the last part of their names."""
    tensors: dict[str, ExpectedTensor] = {}
    if scheme.packed:
        packed = (out_features, in_features // PACK_FACTOR)
        tensors["weight_packed"] = ExpectedTensor((packed,), frozenset({"I32"}))
        tensors["weight_shape"] = ExpectedTensor(((2,),), frozenset({"I64"}))
    else:
        dtype = "I8" if scheme.weight_type == "int" else "F8_E4M3"
        tensors["weight"] = ExpectedTensor(((out_features, in_features),), frozenset({dtype}))
    shape = scheme.scale_shape(out_features, in_features)
    # Some exporters leave out the size of one: [N] a channel, [] a tensor.
    shapes = (shape,) if scheme.weight_strategy == "group" else (shape, shape[:-1])
    tensors["weight_scale"] = ExpectedTensor(shapes, FLOATS)
    if scheme.static_input:
        tensors["input_scale"] = ExpectedTensor(((1,), ()), FLOATS)
    return tensors


def as_run(tensors: dict[str, Tensor], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of one quantised linear, as they are on disk, as `octavo.model.linear` has them.

    Weights stay as they are; `weight_shape` says nothing new and is left out.
    """
    return {
        kind: scale_as_run(tensor, scheme) if kind.endswith("_scale") else tensor
        for kind, tensor in tensors.items()
        if kind != "weight_shape"
    }


def scale_as_run(scale: Tensor, scheme: Scheme) -> Tensor:
    """A scale in fp32: [N, G] for groups; else flat, [N] a channel and [1] a tensor."""
    return scale.float() if scheme.weight_strategy == "group" else scale.float().flatten()


def read_quantization(folder: Path, config: ModelConfig) -> Quantization | None:
    """The quantisation in `config.json`, or None for a checkpoint in floating point.

    Raises:
        CheckpointError: naming the field that asks for what this build cannot run.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    values = JsonObject(path).values
    section: Any = values.get("quantization_config") or values.get("compression_config")
    if section is None:
        return None
    if not isinstance(section, dict):
        raise CheckpointError(f"{path}: quantization_config must be an object")
    method = section.get("quant_method")
    if method != "compressed-tensors":
        raise _refused(path, "quant_method", method, "'compressed-tensors'")
    for field in ("kv_cache_scheme", "transform_config"):  # rotations at run time, in the latter
        if section.get(field):
            raise _refused(path, field, section[field], "None")
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _refused(path, "sparsity_config", sparsity, "dense weights")
    scheme, targets = _read_groups(path, section)
    ignore = _patterns(path, "ignore", section.get("ignore"))
    linears = [
        linear
        for linear in config.linear_names()
        if matches(module_name(linear), targets) and not matches(module_name(linear), ignore)
    ]
    if config.tied_embeddings and "output" in linears:
        raise CheckpointError(f"{path}: quantises lm_head, which is tied to the embedding")
    for linear in linears:
        try:
            scheme.n_groups(config.linear_shape(linear)[1])
        except ConfigError as error:
            raise CheckpointError(f"{path}: quantises {module_name(linear)}: {error}") from None
    return Quantization(scheme, frozenset(linears))


def _read_groups(path: Path, section: dict[str, Any]) -> tuple[Scheme, list[str]]:
    """The scheme that all groups share, and the linears they ask for."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: quantization_config.config_groups is missing or empty")
    schemes: list[Scheme] = []
    targets: list[str] = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise CheckpointError(f"{path}: quantization_config.{where} must be an object")
        schemes.append(_recognise(path, where, group, section.get("format")))
        targets += _patterns(path, f"{where}.targets", group.get("targets"))
    if len(set(schemes)) > 1:
        names = [scheme.name for scheme in schemes]
        raise _refused(path, "config_groups", names, "one scheme for all groups")
    return schemes[0], targets


def _recognise(path: Path, where: str, group: dict[str, Any], format: Any) -> Scheme:
    """The scheme of a group: field by field, those that differ are left out."""
    possible = _narrow(path, "format", format, {s: s.format for s in SCHEMES.values()})
    if group.get("format") is not None:
        formats = {s: s.format for s in possible}
        possible = _narrow(path, f"{where}.format", group["format"], formats)
    for part in ("weights", "input_activations"):
        found = group.get(part) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: quantization_config.{where}.{part} must be an object")
        for field in _COMPARED:
            wanted = {s: (_arguments(s, part) or {}).get(field) for s in possible}
            value = _normalised(field, found.get(field)) if found else None
            possible = _narrow(path, f"{where}.{part}.{field}", value, wanted)
        if found.get("actorder") not in _ACTORDERS:
            raise _refused(path, f"{where}.{part}.actorder", found["actorder"], "'static' or None")
    if group.get("output_activations"):
        raise _refused(path, f"{where}.output_activations", group["output_activations"], "None")
    return possible[0]


def _normalised(field: str, value: Any) -> Any:
    """compressed-tensors' other ways to say a channel, and weights that stay as they are."""
    if field == "group_size" and value == -1:
        return None
    return bool(value) if field == "dynamic" and value is None else value


def _narrow(path: Path, field: str, found: Any, wanted: dict[Scheme, Any]) -> list[Scheme]:
    """The schemes that want what was found; none is an error."""
    possible = [scheme for scheme, value in wanted.items() if value == found]
    if not possible:
        runs: dict[Any, list[str]] = {}
        for scheme, value in wanted.items():
            runs.setdefault(value, []).append(scheme.name)
        text = " or ".join(f"{value!r} ({', '.join(names)})" for value, names in runs.items())
        raise _refused(path, field, found, text)
    return possible


def _arguments(scheme: Scheme, part: str) -> dict[str, Any] | None:
    """compressed-tensors' `QuantizationArgs` of the weights or of the input activations."""
    arguments: dict[str, Any] = {
        "block_structure": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "symmetric": True,
        "zp_dtype": None,
    }
    if part == "weights":
        return arguments | {
            "type": scheme.weight_type,
            "num_bits": scheme.weight_bits,
            "strategy": scheme.weight_strategy,
            "group_size": scheme.group_size,
            "dynamic": False,
            "actorder": "static",
            "observer": "memoryless_minmax",
        }
    if scheme.input_type is None:
        return None
    return arguments | {
        "type": scheme.input_type,
        "num_bits": 8,
        "strategy": scheme.input_strategy,
        "group_size": None,
        "dynamic": not scheme.static_input,
        "actorder": None,
        "observer": "static_minmax" if scheme.static_input else None,
    }


def quantization_config(scheme: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """The section of `config.json` that says so, as llm-compressor 0.14 writes it.

    Args:
        scheme: of every linear that is not ignored.
        ignore: what stays in floating point: Hugging Face's module names, or `re:` patterns.
    """
    group = {
        "format": scheme.format,
        "input_activations": _arguments(scheme, "input_activations"),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _arguments(scheme, "weights"),
    }
    return {
        "config_groups": {"group_0": group},
        "format": scheme.format,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def matches(module: str, patterns: Iterable[str]) -> bool:
    """compressed-tensors' rule: a class, a module's name, or `re:` and a regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif pattern in ("Linear", module):
            return True
    return False


def _patterns(path: Path, field: str, patterns: Any) -> list[str]:
    """A list of names and patterns that `matches` can read; null is an empty one."""
    if patterns is None:
        return []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise CheckpointError(f"{path}: quantization_config.{field} must be a list of strings")
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: quantization_config.{field}: {pattern!r} is not a regular expression: "
                f"{error}"
            ) from None
    return patterns


def _refused(path: Path, field: str, found: Any, possible: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantization_config.{field} is {reprlib.repr(found)}, which this build cannot "
        f"run; it runs {possible}"
    )
