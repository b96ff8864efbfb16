"""Every damaged or unsuitable checkpoint is refused in one line that names the file and field."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo import LLM, Transformer
from octavo.errors import CheckpointError, ConfigError, OctavoError, TokenizerError
from tests.checkpoints import (
    quantized_config,
    small_config,
    write_hugging_face,
    write_mistral,
    write_quantized,
    write_w8a8,
)


def edit_json(path: Path, **fields: Any) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def refusal(folder: Path, **options: Any) -> str:
    """The error's text; it must be one line."""
    with pytest.raises(OctavoError) as caught:
        Transformer.from_folder(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    return write_mistral(tmp_path / "mistral", small_config())


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hugging_face(tmp_path / "hf", small_config())


@pytest.fixture
def w8a8(tmp_path: Path) -> Path:
    return write_w8a8(tmp_path / "w8a8", small_config())


def test_missing_tensor(mistral: Path, hf: Path) -> None:
    edit_tensors(mistral / "consolidated.safetensors", lambda t: t.pop("layers.2.ffn_norm.weight"))
    assert refusal(mistral) == f"{mistral}: the tensor layers.2.ffn_norm.weight is missing"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(hf / "model.safetensors", lambda t: t.pop(name))
    assert refusal(hf) == f"{hf}: the tensor {name} is missing"


def test_extra_tensor(hf: Path) -> None:
    edit_tensors(hf / "model.safetensors", lambda t: t.update({"model.extra": torch.ones(1)}))
    assert "model.safetensors: the tensor model.extra is not part of this model" in refusal(hf)


def test_harmless_buffers_of_old_exporters_are_passed_over(hf: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(hf / "model.safetensors", lambda t: t.update({name: torch.ones(12)}))
    Transformer.from_folder(hf)


def test_wrong_shape(mistral: Path) -> None:
    name = "layers.0.attention.wk.weight"
    edit_tensors(
        mistral / "consolidated.safetensors", lambda t: t.update({name: torch.ones(7, 64)})
    )
    assert f"the tensor {name} has shape [7, 64], the config asks for [48, 64]" in refusal(mistral)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn])
def test_wrong_dtype(mistral: Path, dtype: torch.dtype) -> None:
    name = "layers.0.attention.wk.weight"
    edit_tensors(
        mistral / "consolidated.safetensors",
        lambda t: t.update({name: torch.ones(48, 64).to(dtype)}),
    )
    assert f"consolidated.safetensors: the tensor {name} has dtype" in refusal(mistral)


def test_truncated_file_at_any_byte(mistral: Path) -> None:
    path = mistral / "consolidated.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "consolidated.safetensors: truncated" in refusal(mistral)


def test_corrupt_header(mistral: Path) -> None:
    path = mistral / "consolidated.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + b"#" * 64 + whole[72:])
    assert "consolidated.safetensors: corrupt" in refusal(mistral)


@pytest.mark.parametrize(
    "values",
    [
        [],
        3,
        {"a": ["F32", [1], [0, 4]]},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},  # outside of the data
    ],
)
def test_header_that_safetensors_does_not_write(mistral: Path, values: Any) -> None:
    header = json.dumps(values).encode()
    path = mistral / "consolidated.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "consolidated.safetensors: corrupt" in refusal(mistral)


def test_truncated_shard_of_an_unfinished_quantisation(hf: Path) -> None:
    folder = hf.rename(hf.with_name("hf.unfinished"))
    (folder / "progress.json").write_text("{}")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"; remove {folder} and start again" in refusal(folder)


def test_git_lfs_pointer(mistral: Path) -> None:
    path = mistral / "consolidated.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a Git LFS pointer and not the weights; run `git lfs pull`" in refusal(mistral)


def test_pickled_weights_are_never_opened(mistral: Path) -> None:
    (mistral / "consolidated.safetensors").unlink()
    (mistral / "consolidated.00.pth").write_bytes(b"not even a pickle")
    assert "octavo never unpickles" in refusal(mistral)


def test_no_weights_at_all(mistral: Path) -> None:
    (mistral / "consolidated.safetensors").unlink()
    assert "no weights, neither consolidated.safetensors nor its shards" in refusal(mistral)


def test_missing_shard(tmp_path: Path) -> None:
    hf = write_hugging_face(tmp_path / "hf", small_config(), shards=3)
    (hf / "model-00002-of-00003.safetensors").unlink()
    assert refusal(hf) == f"{hf}: the shard model-00002-of-00003.safetensors is missing"
    mistral = write_mistral(tmp_path / "mistral", small_config(), shards=3)
    (mistral / "consolidated-00002-of-00003.safetensors").unlink()
    assert "shard 2 of consolidated-00001-of-00003.safetensors is missing" in refusal(mistral)


def test_index_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    hf = write_hugging_face(tmp_path / "hf", small_config(), shards=2)
    edit_json(hf / "model.safetensors.index.json", weight_map={"x": "../../etc/passwd"})
    assert "lies outside the folder" in refusal(hf)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path, small_config(), shards=2)
    second = folder / "consolidated-00002-of-00002.safetensors"
    twice = next(iter(load_file(folder / "consolidated-00001-of-00002.safetensors").items()))
    edit_tensors(second, lambda t: t.update([twice]))
    assert f"the tensor {twice[0]} is also in" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON, line 1 column 2"),
        ("[1]", "holds a list, not a JSON object"),
        ("", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"dim": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_config_that_is_no_json_object(mistral: Path, hf: Path, text: str, problem: str) -> None:
    for path in (mistral / "params.json", hf / "config.json"):
        path.write_text(text)
        assert f"{path.name}: " in refusal(path.parent)
        assert problem in refusal(path.parent)


def test_config_that_is_not_text(mistral: Path) -> None:
    (mistral / "params.json").write_bytes(b"\xff\xfe\x00")
    assert "params.json: not UTF-8 text" in refusal(mistral)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("dim", ..., "the field dim is missing"),
        ("n_layers", -1, "n_layers must be a positive integer, not -1"),
        ("n_layers", 10**12, "n_layers 1000000000000 is more than the 1000"),
        ("n_layers", "four", "n_layers must be a positive integer, not 'four'"),
        ("norm_eps", float("nan"), "norm_eps must be a positive number"),
        ("n_kv_heads", 3, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ("sliding_window", [None, 8, 8], "3 entries do not divide the model's 4 layers"),
        ("sliding_window", [None, "8"], "window '8' is neither"),
        ("sliding_window", [], "attention pattern: empty"),
        ("sliding_window", {"a": 1}, "is neither a positive integer nor null"),
        ("moe", {"num_experts": 8}, "the field moe asks for what this build cannot run"),
        ("quantization", {"qformat_weight": "fp8_e4m3"}, "the field quantization asks for"),
    ],
)
def test_bad_field_in_params(mistral: Path, field: str, value: Any, problem: str) -> None:
    edit_json(mistral / "params.json", **{field: value})
    text = refusal(mistral)
    assert text.startswith(f"{mistral / 'params.json'}: ") and problem in text


def test_two_sliding_windows_that_disagree(mistral: Path) -> None:
    edit_json(mistral / "params.json", _sliding_window=16)
    assert "sliding_window [None, 8, 8, 8] and _sliding_window 16 disagree" in refusal(mistral)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("model_type", "llama", "model_type 'llama' is not one of mistral, ministral"),
        ("hidden_size", ..., "the field hidden_size is missing"),
        ("hidden_act", "gelu", "hidden_act 'gelu'; only silu"),
        ("layer_types", ["full_attention"], "layer_types must list 4 layers"),
        ("layer_types", ["linear"] * 4, "layer_types[0] is 'linear'"),
        ("sliding_window", None, "layer_types has windows but sliding_window is null"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_type 'yarn'; only default"),
        ("rope_theta", "big", "rope_theta must be a positive number"),
        ("rope_theta", True, "rope_theta must be a positive number"),
    ],
)
def test_bad_field_in_hugging_faces_config(hf: Path, field: str, value: Any, problem: str) -> None:
    edit_json(hf / "config.json", **{field: value})
    text = refusal(hf)
    assert text.startswith(f"{hf / 'config.json'}: ") and problem in text


def quantization(folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "config.json").read_text())[
        "quantization_config"
    ]
    return section


@pytest.mark.parametrize(
    ("scheme", "part", "field", "value", "possible"),
    [
        ("W8A8", "weights", "num_bits", 3, "8 (W8A8) or 4 (W4A8)"),
        ("W8A8", "weights", "type", "float", "'int' (W8A8, W4A8)"),
        ("W8A8", "weights", "strategy", "group", "'channel' (W8A8)"),
        ("W8A8", "weights", "symmetric", False, "True (W8A8)"),
        ("W8A8", "weights", "dynamic", True, "False (W8A8)"),
        ("W8A8", "weights", "actorder", "group", "'static' or None"),
        ("W8A8", "input_activations", "dynamic", False, "True (W8A8)"),
        ("W8A8", "input_activations", "strategy", "tensor", "'token' (W8A8)"),
        ("W8A8", "input_activations", "num_bits", 4, "8 (W8A8)"),
        ("W4A16", "weights", "group_size", 64, "128 (W4A16)"),
        ("W4A16", "weights", "num_bits", 8, "4 (W4A16)"),
        ("W4A16", "weights", "symmetric", False, "True (W4A16)"),
        ("W4A16", "weights", "actorder", "dynamic", "'static' or None"),
        ("W4A8", "weights", "group_size", None, "128 (W4A8)"),
        ("W4A8", "input_activations", "num_bits", 4, "8 (W4A8)"),
        ("FP8", "weights", "strategy", "block", "'tensor' (FP8) or 'channel' (FP8_DYNAMIC)"),
        ("FP8", "input_activations", "strategy", "token", "'tensor' (FP8)"),
        ("FP8", "input_activations", "dynamic", True, "False (FP8)"),
        ("FP8_DYNAMIC", "input_activations", "dynamic", "local", "True (FP8_DYNAMIC)"),
        ("FP8_DYNAMIC", "weights", "num_bits", 4, "8 (FP8, FP8_DYNAMIC)"),
    ],
)
def test_quantisation_that_is_no_scheme(
    tmp_path: Path, scheme: str, part: str, field: str, value: Any, possible: str
) -> None:
    folder = write_quantized(tmp_path, quantized_config(), scheme)
    section = quantization(folder)
    section["config_groups"]["group_0"][part][field] = value
    edit_json(folder / "config.json", quantization_config=section)
    assert refusal(folder) == (
        f"{folder / 'config.json'}: quantization_config.config_groups.group_0.{part}.{field} is "
        f"{value!r}, which this build cannot run; it runs {possible}"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "awq"),
        ("format", "marlin-24"),
        ("format", None),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("transform_config", {"config_groups": {"R1": {"type": "hadamard"}}}),
        ("sparsity_config", {"format": "sparse-24-bitmask"}),
        ("sparsity_config", [1]),
        ("config_groups", {}),
        ("ignore", "lm_head"),
        ("ignore", ["re:("]),
    ],
)
def test_other_quantisation_formats(w8a8: Path, field: str, value: Any) -> None:
    edit_json(w8a8 / "config.json", quantization_config=quantization(w8a8) | {field: value})
    assert f"quantization_config.{field}" in refusal(w8a8)


def test_format_of_a_group_that_is_not_the_checkpoints(w8a8: Path) -> None:
    section = quantization(w8a8) | {"format": "pack-quantized"}
    edit_json(w8a8 / "config.json", quantization_config=section)
    text = refusal(w8a8)
    assert "config_groups.group_0.format is 'int-quantized'" in text
    assert "it runs 'pack-quantized' (W4A16)" in text


@pytest.mark.parametrize("part", ["weights", "input_activations"])
@pytest.mark.parametrize("value", [None, {}, 3, [8]])
def test_part_of_a_scheme_that_is_missing(w8a8: Path, part: str, value: Any) -> None:
    section = quantization(w8a8)
    section["config_groups"]["group_0"][part] = value
    edit_json(w8a8 / "config.json", quantization_config=section)
    assert f"config_groups.group_0.{part}" in refusal(w8a8)


def test_int4_weights_packed_for_inputs_in_int8(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, quantized_config(), "W4A16")
    section = quantization(folder)
    section["config_groups"]["group_0"]["input_activations"] = {"type": "int", "num_bits": 8}
    edit_json(folder / "config.json", quantization_config=section)
    text = refusal(folder)
    assert "input_activations.type is 'int', which this build cannot run; it runs None" in text


def test_two_schemes_in_one_checkpoint(w8a8: Path) -> None:
    section = quantization(w8a8)
    groups = section["config_groups"]
    groups["group_1"] = json.loads(json.dumps(groups["group_0"]))
    groups["group_1"]["weights"] |= {"num_bits": 4, "strategy": "group", "group_size": 128}
    edit_json(w8a8 / "config.json", quantization_config=section)
    assert "config_groups is ['W8A8', 'W4A8'], which this build cannot run" in refusal(w8a8)


def test_groups_that_do_not_divide_a_linears_inputs(tmp_path: Path) -> None:
    folder = write_w8a8(tmp_path, small_config())
    section = quantization(folder)
    weights = section["config_groups"]["group_0"]["weights"]
    weights |= {"num_bits": 4, "strategy": "group", "group_size": 128}
    edit_json(folder / "config.json", quantization_config=section)
    text = refusal(folder)
    assert text.startswith(f"{folder / 'config.json'}: quantises model.layers.0.self_attn.q_proj: ")
    assert "128 inputs, which does not divide a linear with 64" in text


@pytest.mark.parametrize(
    ("scheme", "kind", "tensor", "problem"),
    [
        ("W4A16", "weight_packed", torch.zeros(128, 32), "has dtype F32, expected I32"),
        ("W4A16", "weight_packed", torch.zeros(128, 64).int(), "has shape [128, 64], the config"),
        ("W4A16", "weight_scale", torch.ones(128, 1), "has shape [128, 1], the config asks for"),
        ("W4A16", "weight_scale", torch.ones(128, 2).int(), "has dtype I32, expected BF16 or F16"),
        ("W4A16", "weight_shape", torch.tensor([128, 255]), "holds [128, 255], the config asks"),
        ("W4A16", "weight_shape", torch.ones(2), "has dtype F32, expected I64"),
        ("W4A16", "weight_shape", torch.tensor([128, 256, 1]), "has shape [3], the config asks"),
        ("W4A8", "weight", torch.zeros(128, 256), "has dtype F32, expected I8"),
        ("W4A8", "weight_scale", torch.ones(128), "has shape [128], the config asks for [128, 2]"),
        ("FP8", "weight", torch.zeros(128, 256).char(), "has dtype I8, expected F8_E4M3"),
        ("FP8", "weight_scale", torch.ones(128, 1), "has shape [128, 1], the config asks for [1]"),
        ("FP8", "input_scale", torch.ones(256), "has shape [256], the config asks for [1]"),
        ("FP8_DYNAMIC", "weight_scale", torch.ones(1), "has shape [1], the config asks for [128, "),
    ],
)
def test_wrong_tensor_of_a_quantised_linear(
    tmp_path: Path, scheme: str, kind: str, tensor: torch.Tensor, problem: str
) -> None:
    folder = write_quantized(tmp_path, quantized_config(), scheme)
    name = f"model.layers.1.mlp.down_proj.{kind}"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: tensor}))
    assert f"model.safetensors: the tensor {name} {problem}" in refusal(folder)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("W4A16", "weight_packed"),
        ("W4A16", "weight_shape"),
        ("W4A8", "weight_scale"),
        ("FP8", "input_scale"),
        ("FP8_DYNAMIC", "weight_scale"),
    ],
)
def test_missing_tensor_of_a_quantised_linear(tmp_path: Path, scheme: str, kind: str) -> None:
    folder = write_quantized(tmp_path, quantized_config(), scheme)
    name = f"model.layers.1.mlp.down_proj.{kind}"
    edit_tensors(folder / "model.safetensors", lambda t: t.pop(name))
    assert refusal(folder) == f"{folder}: the tensor {name} is missing"


def test_index_of_reordered_columns_is_not_passed_over(tmp_path: Path) -> None:
    folder = write_quantized(tmp_path, quantized_config(), "W4A16")
    name = "model.layers.1.mlp.down_proj.weight_g_idx"
    edit_tensors(folder / "model.safetensors", lambda t: t.update({name: torch.zeros(256).int()}))
    assert f"the tensor {name} is not part of this model" in refusal(folder)


def test_unfinished_quantisation(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8.unfinished"
    folder.mkdir()
    assert "no model here" in refusal(folder)
    (folder / "progress.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert refusal(folder) == (
        f"{folder}: an unfinished quantisation; "
        "run the same `octavo quantize` command again, and it goes on"
    )


def test_missing_scale(w8a8: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    edit_tensors(w8a8 / "model.safetensors", lambda t: t.pop(name))
    assert f"the tensor {name} is missing" in refusal(w8a8)


def test_int8_weights_without_a_quantisation_config(w8a8: Path) -> None:
    edit_json(w8a8 / "config.json", quantization_config=...)
    assert "has dtype I8, expected BF16 or F16 or F32" in refusal(w8a8)


def test_pattern_option_that_does_not_divide_the_layers(mistral: Path) -> None:
    text = refusal(mistral, attention_pattern="full,8,8")
    assert text == "--attention-pattern: its 3 entries do not divide the model's 4 layers"


def test_unknown_dtype(mistral: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: 'int4' is not one of auto, bfloat16"):
        Transformer.from_folder(mistral, dtype="int4")


def test_folder_without_a_model(tmp_path: Path) -> None:
    assert "no model here, neither params.json nor config.json" in refusal(tmp_path)


def test_model_that_is_a_file_or_nothing(mistral: Path) -> None:
    assert "is a file" in refusal(mistral / "params.json")
    assert "no such folder" in refusal(mistral / "nothing" / "here")


def test_missing_tokenizer(mistral: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer .*copy the model's tekken\.json"):
        LLM(mistral)


def test_vocabulary_and_embedding_that_disagree(mistral: Path, text_model: Path) -> None:
    with pytest.raises(TokenizerError, match="2048 tokens, but the model's embedding has 96 rows"):
        LLM(mistral, tokenizer=text_model / "tekken.json")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"config": {"version": "v99"}}'])
def test_damaged_tokenizer(mistral: Path, text: str) -> None:
    (mistral / "tekken.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tekken\.json: not a tokenizer"):
        LLM(mistral)


def test_sharded_and_whole_checkpoints_load_the_same(tmp_path: Path) -> None:
    config = small_config()
    whole = Transformer.from_folder(write_mistral(tmp_path / "1", config)).state_dict()
    for folder in (
        write_mistral(tmp_path / "2", config, shards=3),
        write_hugging_face(tmp_path / "3", config),
        write_hugging_face(tmp_path / "4", config, shards=3),
    ):
        other = Transformer.from_folder(folder).state_dict()
        assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_error_of_a_missing_file_is_a_checkpoint_error(mistral: Path) -> None:
    (mistral / "consolidated.safetensors").unlink()
    with pytest.raises(CheckpointError):
        Transformer.from_folder(mistral)
