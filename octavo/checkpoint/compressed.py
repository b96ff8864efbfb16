"""compressed-tensors: which linears `quantization_config` quantises, and how.

octavo runs W8A8 in the `int-quantized` format: int8 `weight`, `weight_scale` a row, int8
activations with a dynamic scale a token. Anything else is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from octavo.checkpoint.huggingface import CONFIG, module_name
from octavo.checkpoint.json_file import JsonObject
from octavo.config import ModelConfig, Quantization
from octavo.errors import CheckpointError

FORMAT = "int-quantized"
_WEIGHTS = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
_ACTIVATIONS = {"type": "int", "num_bits": 8, "strategy": "token", "symmetric": True}


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
        raise _refused(path, "quant_method", method, "compressed-tensors")
    if section.get("format") != FORMAT:
        raise _refused(path, "format", section.get("format"), FORMAT)
    for field in ("kv_cache_scheme", "transform_config"):  # rotations at run time, in the latter
        if section.get(field):
            raise _refused(path, field, section[field], None)
    if (section.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused(path, "sparsity_config", section["sparsity_config"]["format"], "dense")
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{path}: quantization_config.config_groups is missing or empty")
    targets: list[str] = []
    for name, group in groups.items():
        _require_w8a8(path, f"config_groups.{name}", group)
        targets += group.get("targets") or []
    ignore = section.get("ignore") or []
    linears = frozenset(
        linear
        for linear in config.linear_names()
        if _matches(module_name(linear), targets) and not _matches(module_name(linear), ignore)
    )
    if config.tied_embeddings and "output" in linears:
        raise CheckpointError(f"{path}: quantises lm_head, which is tied to the embedding")
    return Quantization("W8A8", linears)


def _require_w8a8(path: Path, where: str, group: Any) -> None:
    if not isinstance(group, dict):
        raise CheckpointError(f"{path}: quantization_config.{where} must be an object")
    for part, wanted in (("weights", _WEIGHTS), ("input_activations", _ACTIVATIONS)):
        scheme = group.get(part)
        if not isinstance(scheme, dict):
            raise _refused(path, f"{where}.{part}", scheme, "int8 (W8A8)")
        for key, value in wanted.items():
            if scheme.get(key) != value:
                raise _refused(path, f"{where}.{part}.{key}", scheme.get(key), value)
    if group["input_activations"].get("dynamic") is not True:
        found = group["input_activations"].get("dynamic")
        raise _refused(path, f"{where}.input_activations.dynamic", found, True)
    if group.get("output_activations"):
        raise _refused(path, f"{where}.output_activations", group["output_activations"], None)


def _matches(module: str, patterns: list[str]) -> bool:
    """compressed-tensors' rule: a class, a module's name, or `re:` and a regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif pattern in ("Linear", module):
            return True
    return False


def _refused(path: Path, field: str, found: Any, wanted: Any) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantization_config.{field} is {found!r}, which this build cannot run; "
        f"it runs W8A8 in compressed-tensors' {FORMAT} format ({field.split('.')[-1]}: {wanted!r})"
    )
