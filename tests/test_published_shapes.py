"""What published checkpoints say of themselves, and the attention pattern that runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import read_config
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.errors import ConfigError
from tests.checkpoints import quantization_config, small_config, write_hugging_face, write_mistral

# The model card's own repository, as its config.json says it.
CARD: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
    "quantization_config": quantization_config(),
}


def config_json(folder: Path, **fields: Any) -> Path:
    values = {k: v for k, v in (CARD | fields).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_cards_repository_runs_its_true_pattern_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = read_config(config_json(tmp_path))
    assert config.windows == (None, 32_768, 32_768, 32_768) * 9
    assert config.max_seq_len == 131_072
    assert config.n_parameters() == 8_019_808_256
    assert config.quantization is not None
    assert "output" not in config.quantization.linears and len(config.quantization.linears) == 252
    assert len(caplog.messages) == 1 and "Ragged (128k,32k,32k,32k)" in caplog.messages[0]


def test_pattern_set_by_hand_wins_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(config_json(tmp_path), attention_pattern="128k,16k")
    assert config.windows == (None, 16_384) * 18
    assert config.max_seq_len == 131_072 and not caplog.messages


def test_a_smaller_mistral_is_taken_at_its_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = read_config(config_json(tmp_path, num_hidden_layers=32))
    assert config.windows == (None,) * 32 and config.max_seq_len == 32_768
    assert not caplog.messages


def test_pattern_by_hand_is_cut_at_the_models_context(tmp_path: Path) -> None:
    config = read_config(config_json(tmp_path, num_hidden_layers=32), attention_pattern="128k,4k")
    assert config.windows == (None, 4096) * 16


def test_7b_v03_and_nemo(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 32, "intermediate_size": 14336, "quantization_config": ...}
    mistral_7b = {"vocab_size": 32768, "sliding_window": None, "head_dim": ...}
    config = read_config(config_json(tmp_path, rope_theta=1e6, **shape, **mistral_7b))
    assert config.n_parameters() == 7_248_023_552 and config.windows == (None,) * 32
    nemo = {
        "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 14336, "head_dim": 128,
        "sliding_window": None, "max_position_embeddings": 131072, "quantization_config": ...,
    }  # fmt: skip
    config = read_config(config_json(tmp_path, **nemo))
    assert config.n_parameters() == 12_247_782_400
    assert config.head_dim * config.n_heads == 4096 != config.dim


def test_fields_that_are_missing_have_transformers_defaults(tmp_path: Path) -> None:
    fields = {name: ... for name in ("sliding_window", "num_key_value_heads", "rope_theta")}
    config = read_config(config_json(tmp_path, num_hidden_layers=32, **fields))
    assert config.windows == (4096,) * 32
    assert config.n_kv_heads == 8 and config.rope_theta == 10_000.0
    assert read_config(config_json(tmp_path, num_key_value_heads=None)).n_kv_heads == 32


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    fields = {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert read_config(config_json(tmp_path, **fields)).rope_theta == 5e5


@pytest.mark.parametrize("name", ["sliding_window", "_sliding_window"])
@pytest.mark.parametrize(
    ("value", "windows"),
    [
        (16, (16,) * 4),
        ([None, 8], (None, 8) * 2),
        ([256, 8, 8, 8], (None, 8, 8, 8)),
        (None, (None,) * 4),
        (..., (None,) * 4),
    ],
)
def test_sliding_window_of_params(tmp_path: Path, name: str, value: Any, windows: tuple) -> None:
    given = {"sliding_window": ..., "_sliding_window": ...} | {name: value}
    write_mistral(tmp_path, small_config(), **given)
    assert read_config(tmp_path).windows == windows


def test_params_without_a_length_take_128k(tmp_path: Path) -> None:
    write_mistral(tmp_path, small_config(), max_seq_len=...)
    assert read_config(tmp_path).max_seq_len == 131_072


def test_params_beside_hugging_faces_weights_bring_the_pattern(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, small_config((None,)), model_type="mistral")
    assert read_config(tmp_path).windows == (None,) * 4
    write_mistral(tmp_path / "other", small_config((None, 8)), max_seq_len=512)
    (tmp_path / "other" / "params.json").rename(tmp_path / "params.json")
    config = read_config(tmp_path)
    assert config.windows == (None, 8, None, 8) and config.max_seq_len == 512


def test_repository_with_both_layouts_is_read_as_mistrals(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, small_config((16,)), model_type="mistral")
    write_mistral(tmp_path, small_config((None, 8)))
    assert read_config(tmp_path).windows == (None, 8, None, 8)
    assert read_config(tmp_path, config_format="hf", load_format="hf").max_seq_len == 256


def test_ministral_in_mistrals_format_is_not_touched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_mistral(tmp_path, small_config())
    fields = dict(
        dim=4096, n_layers=36, head_dim=128, hidden_dim=12288, n_heads=32, n_kv_heads=8,
        vocab_size=131072, norm_eps=1e-5, rope_theta=1e8, max_seq_len=131072,
        sliding_window=[131072, 32768, 32768, 32768],
    )  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(fields))
    assert read_config(tmp_path) == MINISTRAL_8B and not caplog.messages


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    write_mistral(tmp_path, small_config())
    with pytest.raises(ConfigError, match="load_format: 'gguf' is not one of auto, mistral, hf"):
        read_config(tmp_path, load_format="gguf")
