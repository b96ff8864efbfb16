"""Writing a checkpoint in Hugging Face's layout, a shard at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.checkpoint import compressed, huggingface, mistral
from octavo.checkpoint.tensors import find_files, list_tensors
from octavo.config import ModelConfig
from octavo.errors import ConfigError

# What a source may hold beside its weights and is as true of the quantised model.
_COPIED = (
    "tekken.json",
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def shard_name(number: int, total: int) -> str:
    """File name of a shard; the first is 1."""
    return f"{huggingface.WEIGHTS}-{number:05}-of-{total:05}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, given by their names in `octavo.model`; the file is whole or not there."""
    stored = {}
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        stored[f"{huggingface.module_name(module)}.{kind}"] = tensor.cpu().contiguous()
    part = path.with_name(f"{path.name}.part")
    part.touch()
    mode = part.stat().st_mode
    save_file(stored, part, metadata={"format": "pt"})
    part.chmod(mode)  # safetensors lets only the owner read, where the user's umask may not mean to
    _put_in_place(part, path)


def write_index(folder: Path) -> int:
    """Write the index of all shards in a folder, and give the bytes of their tensors."""
    tensors = list_tensors(find_files(folder, huggingface.WEIGHTS))
    total = sum(info.n_bytes for info in tensors.values())
    weight_map = {name: info.file.name for name, info in sorted(tensors.items())}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{huggingface.WEIGHTS}.safetensors.index.json", index)
    return total


def write_config(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    ignore: Iterable[str],
    special_ids: dict[str, int],
) -> None:
    """Write `config.json`, which makes the folder a model for others, and `params.json`.

    Args:
        folder: the checkpoint's.
        config: the architecture and the quantisation.
        dtype: of the floating-point tensors.
        ignore: as the recipe has it: linears that are not quantised.
        special_ids: `bos_token_id` and `eos_token_id`.
    """
    fields = hugging_face_config(config) | special_ids
    fields["torch_dtype"] = str(dtype).removeprefix("torch.")
    if config.quantization is not None:
        fields["quantization_config"] = compressed.quantization_config(
            config.quantization.scheme, list(ignore)
        )
    write_json(folder / mistral.PARAMS, mistral_params(config))
    write_json(folder / huggingface.CONFIG, fields)


def require_expressible(config: ModelConfig) -> None:
    """Raise ConfigError for a pattern that Hugging Face's config cannot say."""
    sizes = {window for window in config.windows if window is not None}
    if len(sizes) > 1:
        raise ConfigError(
            f"attention pattern: has windows of {len(sizes)} sizes, and Hugging Face's config.json "
            "holds one"
        )


def hugging_face_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of an architecture, without what depends on its weights or tokenizer."""
    windows = set(config.windows)
    ragged = len(windows) > 1
    fields: dict[str, Any] = {
        "architectures": ["MinistralForCausalLM" if ragged else "MistralForCausalLM"],
        "model_type": "ministral" if ragged else "mistral",
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the second form, everything older the first.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_seq_len,
        "sliding_window": max((window for window in windows if window), default=None),
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
    }
    if ragged:
        fields["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ]
    return fields


def mistral_params(config: ModelConfig) -> dict[str, Any]:
    """`params.json` of an architecture."""
    fields: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps",
            "vocab_size", "rope_theta", "max_seq_len",
        )
    }  # fmt: skip
    if config.tied_embeddings:
        fields["tied_embeddings"] = True
    if any(config.windows):
        fields["sliding_window"] = list(config.attention_pattern.windows)
    return fields


def copy_tokenizer(source: Path, folder: Path, tokenizer: Path) -> None:
    """Copy all tokenizer files of a model, and the one in use where it lies elsewhere."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if tokenizer.parent != source:
        # mistral-common's own copy of V3-Tekken carries a date in its name.
        name = "tekken.json" if tokenizer.suffix == ".json" else tokenizer.name
        shutil.copyfile(tokenizer, folder / name)


def write_json(path: Path, values: Any) -> None:
    """Write JSON; the file is whole or as it was before."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _put_in_place(part, path)


def _put_in_place(part: Path, path: Path) -> None:
    """Give a file its name; after a power cut it is whole, or as it was before."""
    _sync(part)
    part.replace(path)
    _sync(path.parent)  # the name as well, before anything builds on it


def _sync(path: Path) -> None:
    """Bring a file's contents, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
