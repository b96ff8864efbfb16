"""Architectures by name: the family's published sizes, or those of a folder's config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from octavo.checkpoint import read_config, resolve_model
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.config import MAX_LAYERS, ModelConfig, Quantization
from octavo.errors import ConfigError
from octavo.schemes import find_scheme

SHAPES = {
    "ministral-8b": MINISTRAL_8B,
    "mistral-7b": replace(  # Instruct v0.3
        MINISTRAL_8B,
        n_layers=32,
        hidden_dim=14_336,
        vocab_size=32_768,
        rope_theta=1e6,
        max_seq_len=32_768,
        windows=(None,) * 32,
    ),
    "mistral-nemo": replace(
        MINISTRAL_8B,
        dim=5120,
        n_layers=40,
        hidden_dim=14_336,
        rope_theta=1e6,
        max_seq_len=131_072,
        windows=(None,) * 40,
    ),
}
SCHEMES = ("bf16", "w8a8")
HEADS = ("bf16", "int8")


def find_shape(name: str, n_layers: int | None = None) -> ModelConfig:
    """An architecture without its quantisation.

    Args:
        name: one of SHAPES, `demo`, or a folder with a config; weights are not looked at.
        n_layers: of its layers, counted from the first; more than it has go on with its attention
            pattern. None takes its own number.

    Raises:
        ConfigError: an unknown name, or a number of layers that no model has.
    """
    config = SHAPES.get(name.lower())
    if config is None:
        if name != "demo" and not Path(name).is_dir():
            raise ConfigError(
                f"--shape: {name!r} is not one of {', '.join(SHAPES)}, nor `demo` or a folder with "
                "a model's config"
            )
        config = replace(read_config(resolve_model(name)), quantization=None)
    if n_layers is None:
        return config
    if not 0 < n_layers <= MAX_LAYERS:
        raise ConfigError(f"--layers: {n_layers} is not between 1 and {MAX_LAYERS}")
    pattern = config.attention_pattern.windows
    windows = (pattern * -(-n_layers // len(pattern)))[:n_layers]
    return replace(config, n_layers=n_layers, windows=windows)


def quantised(config: ModelConfig, scheme: str, head: str) -> ModelConfig:
    """The same with its linears as `scheme` says and its head as `head` does.

    Args:
        config: not quantised.
        scheme: of all linears but the head: one of SCHEMES.
        head: one of HEADS.

    Raises:
        ConfigError: another name, or an int8 head where the head is the embedding.
    """
    for flag, value, known in (("--scheme", scheme, SCHEMES), ("--head", head, HEADS)):
        if value not in known:
            raise ConfigError(f"{flag}: {value!r} is not one of {', '.join(known)}")
    if head == "int8" and config.tied_embeddings:
        raise ConfigError(
            "--head int8: this shape's head is its embedding, which is not quantised; leave it bf16"
        )
    *body, output = config.linear_names()
    linears = (body if scheme == "w8a8" else []) + ([output] if head == "int8" else [])
    if not linears:
        return config
    return replace(config, quantization=Quantization(find_scheme("W8A8"), frozenset(linears)))
