"""Mistral's own format: `params.json` and `consolidated.safetensors`.

Its tensors carry the model's own names. The rows of wq and wk are in interleaved rotary order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.checkpoint.json_file import JsonObject
from octavo.config import AttentionPattern, ModelConfig
from octavo.errors import ConfigError

PARAMS = "params.json"
WEIGHTS = "consolidated"
DEFAULT_MAX_SEQ_LEN = 131_072  # what files that name no length were trained for
_NOT_SUPPORTED = ("moe", "vision_encoder", "multimodal", "quantization", "yarn", "llama_4_scaling")


def read_config(folder: Path) -> ModelConfig:
    """The architecture in `params.json`. Raises ConfigError naming the field at fault."""
    params = JsonObject(folder / PARAMS)
    for name in _NOT_SUPPORTED:
        if params.values.get(name):
            raise ConfigError(
                f"{params.path}: the field {name} asks for what this build cannot run; "
                "it runs dense text models of the Mistral family in bf16, fp16, fp32 or W8A8"
            )
    length_field = "max_seq_len" if "max_seq_len" in params.values else "max_position_embeddings"
    max_seq_len = params.integer(length_field, DEFAULT_MAX_SEQ_LEN)
    n_layers = params.integer("n_layers")
    pattern = read_sliding_window(params, max_seq_len)
    try:
        return ModelConfig(
            dim=params.integer("dim"),
            n_layers=n_layers,
            head_dim=params.integer("head_dim"),
            hidden_dim=params.integer("hidden_dim"),
            n_heads=params.integer("n_heads"),
            n_kv_heads=params.integer("n_kv_heads"),
            vocab_size=params.integer("vocab_size"),
            norm_eps=params.number("norm_eps"),
            rope_theta=params.number("rope_theta", 10_000.0),
            max_seq_len=max_seq_len,
            windows=pattern.per_layer(n_layers),
            tied_embeddings=bool(params.values.get("tied_embeddings", False)),
        )
    except ConfigError as error:
        raise params.blame(error) from None


def read_sliding_window(params: JsonObject, max_seq_len: int) -> AttentionPattern:
    """`sliding_window` or `_sliding_window`: a number, a repeating list (null is full), or absent.

    Both names are in use; a file may give both only if they agree.
    """
    given = {
        name: params.values[name]
        for name in ("sliding_window", "_sliding_window")
        if params.values.get(name) is not None
    }
    values = list(given.values())
    if len(values) == 2 and values[0] != values[1]:
        raise ConfigError(
            f"{params.path}: sliding_window {values[0]!r} and _sliding_window {values[1]!r} "
            "disagree; keep one"
        )
    if not values:
        return AttentionPattern()
    entries: list[Any] = values[0] if isinstance(values[0], list) else [values[0]]
    try:
        pattern = AttentionPattern(tuple(entries))
    except ConfigError as error:
        raise params.blame(error) from None
    # A window as long as the context hides nothing: the same as full attention.
    return AttentionPattern(
        tuple(None if w is None or w >= max_seq_len else w for w in pattern.windows)
    )


def half_split_from_interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of wq or wk from this format's rotary order to the model's.

    The files keep the two halves of a rotated pair as neighbours (0, 1), (2, 3), …; the model
    (and Hugging Face) turns row i with row i + head_dim/2.

    Args:
        rows: [heads * head_dim, …], any dtype: a weight, or its per-row scales.
        head_dim: rows a head.
    """
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
