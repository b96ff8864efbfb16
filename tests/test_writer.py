"""The writer of checkpoints: whole files or none, and configs that others read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from octavo.checkpoint import DEMO, writer
from octavo.checkpoint.checkpoint import read_config
from octavo.config import ModelConfig, Quantization
from octavo.errors import ConfigError
from octavo.schemes import SCHEMES
from tests.checkpoints import quantization_config, small_config

IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "ragged": small_config((None, 8, 8, 8)),
    "full": small_config((None,)),
    "windowed": small_config((8,)),
    "tied": small_config((8, None), tied_embeddings=True),
}


def write(folder: Path, config: ModelConfig) -> None:
    writer.write_config(folder, config, torch.bfloat16, ["lm_head"], IDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_both_configs_say_the_same(tmp_path: Path, name: str) -> None:
    write(tmp_path, CONFIGS[name])
    for config_format in ("hf", "mistral"):
        assert read_config(tmp_path, config_format=config_format) == CONFIGS[name]
    (tmp_path / "params.json").unlink()
    assert read_config(tmp_path) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_config(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]
    write(tmp_path, config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == ("mistral" if name in ("full", "windowed") else "ministral")
    assert theirs.sliding_window == (None if name == "full" else 8)
    assert theirs.head_dim == config.head_dim and theirs.rms_norm_eps == config.norm_eps
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.tie_word_embeddings == config.tied_embeddings
    assert theirs.dtype == torch.bfloat16 and theirs.eos_token_id == 2
    if theirs.model_type == "ministral":
        windows = [None if t == "full_attention" else 8 for t in theirs.layer_types]
        assert tuple(windows) == config.windows


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantization_config_is_llm_compressors(tmp_path: Path, scheme: str) -> None:
    config = small_config(quantization=Quantization(SCHEMES[scheme], frozenset({"output"})))
    write(tmp_path, config)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    expected = quantization_config(scheme=scheme)
    assert section.pop("version") and expected.pop("version")
    assert section == expected


def test_two_sizes_of_window_are_refused() -> None:
    writer.require_expressible(small_config((None, 8)))
    with pytest.raises(ConfigError, match="has windows of 2 sizes, and Hugging Face's"):
        writer.require_expressible(small_config((8, 16)))


def test_a_shard_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / writer.shard_name(2, 38)
    assert path.name == "model-00002-of-00038.safetensors"
    tensors = {"layers.0.attention.wq.weight": torch.randn(4, 6).t(), "norm.weight": torch.ones(3)}
    writer.write_shard(path, tensors)
    stored = load_file(path)
    assert stored.keys() == {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.weight"], tensors["layers.0.attention.wq.weight"]
    )
    kept = path.read_bytes()

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)
    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(path, {"norm.weight": torch.zeros(3)})
    assert path.read_bytes() == kept
    values = tmp_path / "values.json"
    with pytest.raises(KeyboardInterrupt):
        writer.write_json(values, {"a": 1})
    assert not values.exists()


def test_the_index_names_the_shard_of_every_tensor(tmp_path: Path) -> None:
    writer.write_shard(tmp_path / writer.shard_name(1, 2), {"norm.weight": torch.ones(3)})
    head = {"output.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    writer.write_shard(tmp_path / writer.shard_name(2, 2), head)
    assert writer.write_index(tmp_path) == 3 * 4 + 6 * 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {
            "lm_head.weight": "model-00002-of-00002.safetensors",
            "model.norm.weight": "model-00001-of-00002.safetensors",
        },
    }


def test_tokenizer_files_are_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    names = {"tekken.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3"}
    for name in {*names, "model.safetensors", "config.json", "README.md"}:
        (source / name).write_text(name)
    writer.copy_tokenizer(source, folder, source / "tekken.json")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {n: n for n in names}


def test_the_tokenizer_in_use_is_the_one_that_is_kept(tmp_path: Path) -> None:
    """Wherever it lies, and though the source may have another of that name."""
    source, folder, elsewhere = (tmp_path / name for name in ("source", "folder", "elsewhere"))
    for each in (source, folder, elsewhere):
        each.mkdir()
    (elsewhere / "tekken.json").write_text("in use")
    (elsewhere / "tekken_240911.json").write_text("mistral-common's own")
    writer.copy_tokenizer(source, folder, elsewhere / "tekken_240911.json")
    assert (folder / "tekken.json").read_text() == "mistral-common's own"
    (source / "tekken.json").write_text("not in use")
    writer.copy_tokenizer(source, folder, elsewhere / "tekken.json")
    assert (folder / "tekken.json").read_text() == "in use"


def test_the_bundled_model_says_of_itself_what_its_params_say() -> None:
    params = json.loads((DEMO / "params.json").read_text())
    assert writer.mistral_params(read_config(DEMO)) == params
