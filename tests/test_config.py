"""Attention patterns, the parameter count, and the bytes that weights and KV cache need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.config import AttentionPattern, Quantization, format_size, parse_size
from octavo.errors import ConfigError
from octavo.model import Transformer
from octavo.schemes import SCHEMES
from tests.checkpoints import small_config


def test_ministral_8b_has_exactly_the_parameters_that_its_card_states() -> None:
    assert MINISTRAL_8B.n_parameters() == 8_019_808_256


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_is_that_of_the_model_built(tied: bool) -> None:
    config = small_config(tied_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == config.n_parameters()


def test_weight_bytes_are_those_of_the_tensors() -> None:
    linears = frozenset(n for n in small_config().linear_names() if n != "output")
    config = small_config(quantization=Quantization(SCHEMES["W8A8"], linears))
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    # .to() has turned the scales to bf16; they are kept in fp32.
    tensors = model.state_dict().items()
    n_bytes = sum(t.numel() * (4 if "scale" in n else t.element_size()) for n, t in tensors)
    assert config.weight_bytes(2) == n_bytes


def test_kv_bytes_of_ministral_at_128k_are_worked_out_by_hand() -> None:
    # 2 (k, v) * 8 heads * 128 * 2 bytes = 4,096 bytes a token and layer.
    full, windowed = MINISTRAL_8B.kv_bytes(131_072)
    assert full == 9 * 131_072 * 4096
    assert windowed == 27 * 32_768 * 4096


def test_pattern_repeats_over_the_layers() -> None:
    pattern = AttentionPattern.parse("128k,32k,32k,32k", 131_072)
    assert pattern.windows == (None, 32_768, 32_768, 32_768)
    assert pattern.per_layer(8) == (None, 32_768, 32_768, 32_768) * 2


def test_pattern_is_written_as_the_card_writes_it() -> None:
    assert MINISTRAL_8B.attention_pattern.describe(131_072) == "Ragged (128k,32k,32k,32k)"
    assert AttentionPattern((None,)).describe(131_072) == "Full"
    assert AttentionPattern((4096,)).describe(32_768) == "Sliding window (4k)"


def test_pattern_that_does_not_divide_the_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 entries do not divide the model's 4 layers"):
        AttentionPattern((None, 8, 8)).per_layer(4)


@pytest.mark.parametrize("windows", [(), (0,), (-4,), ("8",), (8.0,), (True,)])
def test_pattern_of_anything_but_positive_integers_is_refused(windows: tuple) -> None:
    with pytest.raises(ConfigError, match="attention pattern"):
        AttentionPattern(windows)


@pytest.mark.parametrize("text", ["", "k", "32x", "-1", "0", "32k,", "1.5k"])
def test_pattern_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--attention-pattern"):
        AttentionPattern.parse(text, 131_072)


def test_shortest_repeating_group_is_found() -> None:
    assert AttentionPattern.of_layers((None, 8, None, 8)).windows == (None, 8)
    assert AttentionPattern.of_layers((8, 8, 8)).windows == (8,)
    assert AttentionPattern.of_layers((None, 8, 8)).windows == (None, 8, 8)


def test_sizes_read_and_write() -> None:
    assert parse_size("32k", "x") == 32_768
    assert parse_size("1M", "x") == 1_048_576
    assert parse_size(" 100 ", "x") == 100
    assert format_size(131_072) == "128k"
    assert format_size(1000) == "1,000"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_heads", 3, "n_heads 3 is not a multiple of n_kv_heads 2"),
        ("head_dim", 25, "head_dim 25 is odd"),
        ("dim", 0, "dim must be a positive integer"),
        ("vocab_size", 2.5, "vocab_size must be a positive integer"),
        ("norm_eps", 0.0, "norm_eps must be positive"),
    ],
)
def test_impossible_shape_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(small_config(), **{field: value})  # type: ignore[arg-type]
