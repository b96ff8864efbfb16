"""Hugging Face's format: `config.json` and `model.safetensors`, whole or in shards.

The rows of q_proj and k_proj are in the model's own half-split rotary order.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from octavo.checkpoint import mistral
from octavo.checkpoint.json_file import JsonObject
from octavo.config import AttentionPattern, ModelConfig
from octavo.errors import ConfigError

CONFIG = "config.json"
WEIGHTS = "model"
MODEL_TYPES = ("mistral", "ministral")
DEFAULT_WINDOW = 4096  # what transformers takes where the field is missing
DEFAULT_KV_HEADS = 8
DEFAULT_NORM_EPS = 1e-6
DEFAULT_ROPE_THETA = 10_000.0

_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
    "tok_embeddings": "model.embed_tokens",
}


def module_name(name: str) -> str:
    """Hugging Face's name: `layers.3.attention.wq` is `model.layers.3.self_attn.q_proj`."""
    layer = re.match(r"layers\.(\d+)\.(.+)", name)
    if layer is None:
        return _MODULES[name]
    return f"model.layers.{layer[1]}.{_MODULES[layer[2]]}"


def read_config(folder: Path) -> ModelConfig:
    """The architecture in `config.json`. Raises ConfigError naming the field at fault."""
    config = JsonObject(folder / CONFIG)
    _refuse_unsupported(config)
    n_layers = config.integer("num_hidden_layers")
    n_heads = config.integer("num_attention_heads")
    dim = config.integer("hidden_size")
    max_seq_len = config.integer("max_position_embeddings")
    pattern = _read_pattern(config, n_layers, max_seq_len)
    if pattern is None:  # nothing layer by layer: what lies beside it may know more
        pattern = AttentionPattern((_window(config, max_seq_len),))
        if (folder / mistral.PARAMS).is_file():
            beside = mistral.read_config(folder)
            pattern, max_seq_len = beside.attention_pattern, beside.max_seq_len
    try:
        return ModelConfig(
            dim=dim,
            n_layers=n_layers,
            head_dim=config.integer("head_dim", dim // n_heads),
            hidden_dim=config.integer("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=_n_kv_heads(config, n_heads),
            vocab_size=config.integer("vocab_size"),
            norm_eps=config.number("rms_norm_eps", DEFAULT_NORM_EPS),
            rope_theta=_rope_theta(config),
            max_seq_len=max_seq_len,
            windows=pattern.per_layer(n_layers),
            tied_embeddings=bool(config.values.get("tie_word_embeddings", False)),
        )
    except ConfigError as error:
        raise config.blame(error) from None


def _refuse_unsupported(config: JsonObject) -> None:
    model_type = config.values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{config.path}: model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}"
        )
    activation = config.values.get("hidden_act", "silu")
    if activation != "silu":
        raise ConfigError(f"{config.path}: hidden_act {activation!r}; only silu is supported")


def _read_pattern(config: JsonObject, n_layers: int, max_seq_len: int) -> AttentionPattern | None:
    """The pattern that `layer_types` spells out, or None where the field is absent."""
    layer_types: Any = config.values.get("layer_types")
    if layer_types is None:
        return None
    if not isinstance(layer_types, list) or len(layer_types) != n_layers:
        raise ConfigError(
            f"{config.path}: layer_types must list {n_layers} layers (num_hidden_layers)"
        )
    window = _window(config, max_seq_len)
    windows: list[int | None] = []
    for i, kind in enumerate(layer_types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"{config.path}: layer_types[{i}] is {kind!r}, "
                "neither full_attention nor sliding_attention"
            )
        windows.append(window if kind == "sliding_attention" else None)
    if "sliding_attention" in layer_types and config.values.get("sliding_window", 0) is None:
        raise ConfigError(f"{config.path}: layer_types has windows but sliding_window is null")
    return AttentionPattern(tuple(windows))


def _window(config: JsonObject, max_seq_len: int) -> int | None:
    """`sliding_window`: null is full attention, a missing field transformers' default."""
    if config.values.get("sliding_window", DEFAULT_WINDOW) is None:
        return None
    window = config.integer("sliding_window", DEFAULT_WINDOW)
    return None if window >= max_seq_len else window


def _n_kv_heads(config: JsonObject, n_heads: int) -> int:
    """`num_key_value_heads`: null is one a query head, a missing field transformers' default."""
    missing = "num_key_value_heads" not in config.values
    return config.integer("num_key_value_heads", DEFAULT_KV_HEADS if missing else n_heads)


def _rope_theta(config: JsonObject) -> float:
    """`rope_theta`, at the top level or, since transformers 5, inside `rope_parameters`."""
    parameters = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{config.path}: rope_parameters must be an object")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{config.path}: rope_type {kind!r}; only default is supported")
    theta = config.values.get("rope_theta", parameters.get("rope_theta", DEFAULT_ROPE_THETA))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
        raise ConfigError(f"{config.path}: rope_theta must be a positive number, not {theta!r}")
    return float(theta)
