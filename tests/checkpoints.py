"""Small random checkpoints in every published form, written without octavo's own readers.

A state is a dict of tensors by their names in `octavo.model`, with wq and wk in the model's
half-split rotary order; the writers put it into each format's names, order and files:

    config = small_config((None, 8, 8, 8))
    write_mistral(folder, config)                        # params.json, consolidated.safetensors
    write_hugging_face(folder, config, model_type="mistral", shards=3)
    write_w8a8(folder, config, ignore=())                # compressed-tensors, int-quantized
    write_quantized(folder, config, "W4A16")             # compressed-tensors, any scheme

The same config and seed give the same weights in each, so that what they compute can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.config import ModelConfig

State = dict[str, Tensor]
Window = int | None

_HUGGING_FACE_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def small_config(windows: Sequence[Window] = (None, 8, 8, 8), **overrides: Any) -> ModelConfig:
    """Four tiny layers with grouped queries and, as in Nemo, head_dim other than dim / n_heads.

    `norm_eps` and `rope_theta` are far from every default, so that a reader that loses them fails.

    Args:
        windows: the pattern, repeated over the layers.
        overrides: any field of `ModelConfig` but `windows`.
    """
    fields: dict[str, Any] = dict(
        dim=64,
        n_layers=4,
        head_dim=24,
        hidden_dim=96,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=96,
        norm_eps=1e-2,
        rope_theta=1_000.0,
        max_seq_len=256,
    )
    fields |= overrides
    n_layers = fields["n_layers"]
    repeated = tuple(windows) * (n_layers // len(windows))
    return ModelConfig(windows=repeated, **fields)


def random_state(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32, gain: float = 1.0
) -> State:
    """Every tensor of a model, random; a tied model has no `output.weight`.

    Args:
        config: the architecture.
        seed: the same seed gives the same weights, in each dtype rounded from the same fp32.
        dtype: of every tensor.
        gain: multiplies wq and wk: above 1, attention has sharper favourites.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    state = {"tok_embeddings.weight": normal(config.vocab_size, config.dim)}
    for name in config.linear_names():
        out_features, in_features = config.linear_shape(name)
        scale = gain if name.endswith(("wq", "wk")) else 1.0
        weight = normal(out_features, in_features, scale=scale / math.sqrt(in_features))
        if not (name == "output" and config.tied_embeddings):
            state[f"{name}.weight"] = weight
    norms = [
        f"layers.{i}.{n}" for i in range(config.n_layers) for n in ("attention_norm", "ffn_norm")
    ]
    for name in [*norms, "norm"]:
        state[f"{name}.weight"] = 1.0 + normal(config.dim, scale=0.2)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write_mistral(
    folder: Path,
    config: ModelConfig,
    state: State | None = None,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    **params: Any,
) -> Path:
    """`params.json` and `consolidated.safetensors`; gives `folder` back.

    Args:
        folder: made if it is not there.
        config: the architecture. Its windows are written as the list `sliding_window`.
        state: the weights, in half-split order; None takes `random_state(config, seed, dtype)`.
        seed: for `random_state`.
        shards: above 1, `consolidated-00001-of-0000N.safetensors` and no index.
        dtype: for `random_state`.
        params: fields of `params.json` to add or replace; a value of `...` leaves the field out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = dict(
        dim=config.dim,
        n_layers=config.n_layers,
        head_dim=config.head_dim,
        hidden_dim=config.hidden_dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        max_seq_len=config.max_seq_len,
        sliding_window=list(config.attention_pattern.windows),
    )
    if config.tied_embeddings:
        fields["tied_embeddings"] = True
    _write_json(folder / "params.json", fields | params)
    state = random_state(config, seed, dtype) if state is None else state
    files = split_into_shards(interleaved(state, config), shards, "consolidated")
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    return folder


def write_hugging_face(
    folder: Path,
    config: ModelConfig,
    state: State | None = None,
    seed: int = 0,
    shards: int = 1,
    model_type: str = "ministral",
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """`config.json` and `model.safetensors`, with an index if in shards; gives `folder` back.

    Args:
        folder: made if it is not there.
        config: the architecture; this format holds one size of window only.
        state: the weights; None takes `random_state(config, seed, dtype)`. Tensors that are not
            the model's floating-point ones (`weight_scale`) are renamed and written all the same.
        seed: for `random_state`.
        shards: above 1, `model-00001-of-0000N.safetensors` and `model.safetensors.index.json`.
        model_type: `ministral`, whose windows are `layer_types`, or `mistral`: all layers alike.
        dtype: for `random_state`.
        fields: of `config.json`, to add or replace; a value of `...` leaves the field out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(config, seed, dtype) if state is None else state
    values = hugging_face_fields(config, model_type)
    values["torch_dtype"] = _DTYPE_NAMES[state["norm.weight"].dtype]
    _write_json(folder / "config.json", values | fields)
    files = split_into_shards(hugging_face_state(state), shards, "model")
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return folder


def write_w8a8(
    folder: Path,
    config: ModelConfig,
    state: State | None = None,
    seed: int = 0,
    shards: int = 1,
    model_type: str = "ministral",
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    flat_scales: bool = False,
    ignore: Sequence[str] = ("lm_head",),
    **fields: Any,
) -> Path:
    """A W8A8 checkpoint in compressed-tensors' `int-quantized` form; gives `folder` back.

    Weights are rounded to the nearest of 255 steps, a scale a row. Arguments as in
    `write_hugging_face`, and:

    Args:
        scale_dtype: of `weight_scale`; None is the other weights' dtype.
        flat_scales: scales [N] in place of [N, 1].
        ignore: the linears that stay in floating point, by their Hugging Face names; at most
            `lm_head` and whole names, no patterns.
    """
    state = random_state(config, seed, dtype) if state is None else state
    quantized = dict(state)
    for name in config.linear_names():
        if hugging_face_module(name) in ignore or f"{name}.weight" not in state:
            continue
        weight, scale = quantize_rows(state[f"{name}.weight"], scale_dtype)
        quantized[f"{name}.weight"] = weight
        quantized[f"{name}.weight_scale"] = scale.flatten() if flat_scales else scale
    section = quantization_config(ignore)
    fields = {"quantization_config": section} | fields
    return write_hugging_face(
        folder, config, quantized, shards=shards, model_type=model_type, **fields
    )


def quantize_rows(weight: Tensor, scale_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """[N, K] float to [N, K] int8 in -127…127 and [N, 1] scales; weight ≈ scale · int8."""
    scale = weight.float().abs().amax(1, keepdim=True) / 127.0
    scale = scale.to(scale_dtype or weight.dtype)
    rounded = torch.round(weight.float() / scale.float()).clamp(-127, 127)
    return rounded.to(torch.int8), scale


def quantized_config(windows: Sequence[Window] = (None, 8, 8, 8), **overrides: Any) -> ModelConfig:
    """`small_config` with inputs of every linear that groups of 128 divide."""
    sizes = dict(dim=128, hidden_dim=256, head_dim=32)
    return small_config(windows, **sizes | overrides)


def write_quantized(
    folder: Path,
    config: ModelConfig,
    scheme: str,
    state: State | None = None,
    seed: int = 0,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    ignore: Sequence[str] = ("lm_head",),
    input_scale: float = 0.05,
    **fields: Any,
) -> Path:
    """A checkpoint of one of compressed-tensors' presets, rounded to nearest; gives `folder` back.

    Arguments as in `write_w8a8`, and:

    Args:
        scheme: W8A8, W4A16, W4A8, FP8 or FP8_DYNAMIC.
        input_scale: of every linear's inputs, for FP8: they are cut at 448 times this.
    """
    state = random_state(config, seed, dtype) if state is None else state
    quantized = dict(state)
    for name in config.linear_names():
        if hugging_face_module(name) in ignore or f"{name}.weight" not in state:
            continue
        tensors = quantize_weight(quantized.pop(f"{name}.weight"), scheme)
        if scheme == "FP8":
            tensors["input_scale"] = torch.tensor([input_scale]).to(dtype)
        quantized |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    fields = {"quantization_config": quantization_config(ignore, scheme=scheme)} | fields
    return write_hugging_face(folder, config, quantized, shards=shards, **fields)


def quantize_weight(weight: Tensor, scheme: str) -> State:
    """The tensors that stand for a [N, K] weight in a checkpoint, scales in the weight's dtype."""
    if scheme == "W8A8":
        rounded, scale = quantize_rows(weight)
        return {"weight": rounded, "weight_scale": scale}
    if scheme.startswith("FP8"):
        largest = weight.float().abs().amax((0, 1) if scheme == "FP8" else (1,), keepdim=True)
        scale = (largest / 448).to(weight.dtype)
        rounded = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": rounded, "weight_scale": scale.reshape(1) if scheme == "FP8" else scale}
    groups = weight.float().unflatten(1, (-1, 128))
    scale = (groups.abs().amax(-1) / 7.5).to(weight.dtype)
    rounded = torch.round(groups / scale.float()[..., None]).clamp(-8, 7).flatten(1)
    if scheme == "W4A8":
        return {"weight": rounded.to(torch.int8), "weight_scale": scale}
    # Eight numbers plus 8 in an int32, the first in its lowest four bits.
    words = ((rounded.long() + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }


def quantization_config(
    ignore: Sequence[str] = ("lm_head",),
    targets: Sequence[str] = ("Linear",),
    scheme: str = "W8A8",
) -> dict[str, Any]:
    """`quantization_config` of a preset, field by field as llm-compressor 0.14 writes it."""
    common: dict[str, Any] = {
        "block_structure": None,
        "group_size": None,
        "num_bits": 8,
        "observer_kwargs": {},
        "scale_dtype": None,
        "symmetric": True,
        "type": "float" if scheme.startswith("FP8") else "int",
        "zp_dtype": None,
    }
    activations: Any = {"actorder": None, "dynamic": True, "observer": None, "strategy": "token"}
    weights: dict[str, Any] = {
        "actorder": "static",
        "dynamic": False,
        "observer": "memoryless_minmax",
        "strategy": "channel",
    }
    format = "float-quantized" if scheme.startswith("FP8") else "int-quantized"
    if scheme.startswith("W4"):
        weights |= {"num_bits": 4, "strategy": "group", "group_size": 128}
    if scheme == "W4A16":
        format = "pack-quantized"
    if scheme == "FP8":
        weights["strategy"] = "tensor"
        activations |= {"dynamic": False, "observer": "static_minmax", "strategy": "tensor"}
    return {
        "config_groups": {
            "group_0": {
                "format": format,
                "input_activations": None if scheme == "W4A16" else common | activations,
                "output_activations": None,
                "targets": list(targets),
                "weights": common | weights,
            }
        },
        "format": format,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def hugging_face_fields(config: ModelConfig, model_type: str = "ministral") -> dict[str, Any]:
    """The fields of `config.json`, as published checkpoints of before transformers 5 have them."""
    sizes = {w for w in config.windows if w is not None}
    if len(sizes) > 1:
        raise ValueError(f"config.json holds one size of window, not {sorted(sizes)}")
    values = dict(
        architectures=[f"{model_type.capitalize()}ForCausalLM"],
        model_type=model_type,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=config.tied_embeddings,
        hidden_act="silu",
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=sizes.pop() if sizes else None,
    )
    if model_type == "ministral":
        # transformers asks for a number here even where every layer is full.
        values["sliding_window"] = values["sliding_window"] or config.max_seq_len
        values["layer_types"] = [
            "full_attention" if w is None else "sliding_attention" for w in config.windows
        ]
    elif len(set(config.windows)) > 1:
        raise ValueError(f"model_type {model_type} has one window for all layers")
    return values


def hugging_face_module(name: str) -> str:
    """`layers.3.attention.wq` is `model.layers.3.self_attn.q_proj`."""
    whole = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    if name in whole:
        return whole[name]
    layers, number, inner = name.split(".", 2)
    return f"model.{layers}.{number}.{_HUGGING_FACE_MODULES[inner]}"


def hugging_face_state(state: State) -> State:
    """The state under Hugging Face's names."""
    renamed = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        renamed[f"{hugging_face_module(module)}.{kind}"] = tensor
    return renamed


def interleaved(state: State, config: ModelConfig) -> State:
    """The state with the rows of wq and wk in Mistral's rotary order.

    There, the two rows that are turned together are neighbours: rows 2j and 2j + 1 of a head are
    the half-split order's rows j and j + head_dim/2.
    """
    half = config.head_dim // 2
    within_head = [j + part * half for j in range(half) for part in (0, 1)]
    reordered = dict(state)
    for name, tensor in state.items():
        if name.endswith(("wq.weight", "wk.weight")):
            n_heads = tensor.shape[0] // config.head_dim
            rows = [head * config.head_dim + row for head in range(n_heads) for row in within_head]
            reordered[name] = tensor[rows].contiguous()
    return reordered


def split_into_shards(state: State, shards: int, stem: str) -> dict[str, State]:
    """Tensors by file name, dealt out in turn; one shard is `stem.safetensors`."""
    if shards == 1:
        return {f"{stem}.safetensors": state}
    names = list(state)
    return {
        f"{stem}-{i + 1:05}-of-{shards:05}.safetensors": {n: state[n] for n in names[i::shards]}
        for i in range(shards)
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    kept = {name: value for name, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept, indent=2), encoding="utf-8")
