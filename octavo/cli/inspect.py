"""`octavo inspect MODEL`: what a checkpoint is, and the memory it needs. Reads no weights."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from octavo.checkpoint import has_weights, open_checkpoint, read_config, resolve_model
from octavo.cli import options
from octavo.config import ModelConfig, format_size, parse_size
from octavo.errors import ConfigError
from octavo.kernels.kv_pages import SCALE_DTYPE

BF16_BYTES = 2  # what published weights, and the KV cache, are in


def inspect(
    model: options.Model,
    max_model_len: options.MaxModelLen = None,
    config_format: options.ConfigFormat = "auto",
    load_format: options.LoadFormat = "auto",
    attention_pattern: options.Pattern = None,
) -> None:
    """Print a model's architecture, parameters, and bytes of weights and KV cache."""
    folder = resolve_model(model)
    weights_are_here = has_weights(folder)
    if weights_are_here:  # checks every tensor's name, shape and dtype
        checkpoint = open_checkpoint(
            folder,
            config_format=config_format,
            load_format=load_format,
            attention_pattern=attention_pattern,
        )
        config, element_size = checkpoint.config, checkpoint.dtype.itemsize
    else:
        config = read_config(
            folder,
            config_format=config_format,
            load_format=load_format,
            attention_pattern=attention_pattern,
        )
        element_size = BF16_BYTES
    length = config.max_seq_len
    if max_model_len is not None:
        length = parse_size(max_model_len, "--max-model-len")
    if length > config.max_seq_len:
        raise ConfigError(
            f"--max-model-len {length} is more than the model's context of {config.max_seq_len}"
        )
    console = Console(highlight=False)
    console.print(_architecture(config))
    console.print(_memory(config, length, element_size))
    if not weights_are_here:
        console.print("No weights in this folder: sizes are worked out from the config, in bf16.")


def _architecture(config: ModelConfig) -> Table:
    """The model card's table."""
    table = Table("Feature", "Value")
    rows = {
        "Architecture": "Dense Transformer",
        "Parameters": f"{config.n_parameters():,}",
        "Layers": f"{config.n_layers}",
        "Heads": f"{config.n_heads}",
        "Dim": f"{config.dim}",
        "KV Heads (GQA)": f"{config.n_kv_heads}",
        "Hidden Dim": f"{config.hidden_dim}",
        "Head Dim": f"{config.head_dim}",
        "Vocab Size": f"{config.vocab_size:,}",
        "Context Length": format_size(config.max_seq_len),
        "Attention Pattern": config.attention_pattern.describe(config.max_seq_len),
    }
    if config.quantization is not None:
        total = len(config.linear_names())
        n_quantized = len(config.quantization.linears)
        scheme = config.quantization.scheme.name
        rows["Quantisation"] = f"{scheme}, {n_quantized} of {total} linears"
    for feature, value in rows.items():
        table.add_row(feature, value)
    return table


def _memory(config: ModelConfig, length: int, element_size: int) -> Table:
    """Bytes of weights, and of one sequence's keys and values at `length` tokens."""
    full, windowed = config.kv_bytes(length, BF16_BYTES)
    in_int8 = sum(config.kv_bytes(length, torch.int8.itemsize, SCALE_DTYPE.itemsize))
    weights = config.weight_bytes(element_size)
    n_full = sum(window is None for window in config.windows)
    table = Table("Memory", "Bytes", "")
    table.columns[1].justify = table.columns[2].justify = "right"
    name = f"KV cache at {length:,} tokens"
    rows = {
        "Weights": weights,
        f"{name}, {n_full} full layers": full,
        f"{name}, {config.n_layers - n_full} windowed layers": windowed,
        "Together": weights + full + windowed,
        f"{name}, in int8": in_int8,
    }
    for what, n_bytes in rows.items():
        table.add_row(what, f"{n_bytes:,}", decimal(n_bytes))
    return table
