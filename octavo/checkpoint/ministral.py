"""Ministral-8B as published: recognised by its shape where a config hides its attention pattern.

Its Hugging Face config, and every quantisation made from it, says `sliding_window` 32768 and 32768
positions for all layers. The model was trained with every fourth layer full over 131,072.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from octavo.config import AttentionPattern, ModelConfig

CONTEXT = 131_072
PATTERN = AttentionPattern((None, 32_768, 32_768, 32_768))
MINISTRAL_8B = ModelConfig(
    dim=4096,
    n_layers=36,
    head_dim=128,
    hidden_dim=12_288,
    n_heads=32,
    n_kv_heads=8,
    vocab_size=131_072,
    norm_eps=1e-5,
    rope_theta=1e8,
    max_seq_len=CONTEXT,
    windows=PATTERN.per_layer(36),
)

logger = logging.getLogger("octavo")


def is_ministral_8b(config: ModelConfig) -> bool:
    """Whether every size is Ministral-8B's, whatever its pattern, context or quantisation."""
    if config.n_layers != MINISTRAL_8B.n_layers:
        return False
    shape = replace(config, windows=MINISTRAL_8B.windows, max_seq_len=CONTEXT, quantization=None)
    return shape == MINISTRAL_8B


def with_true_pattern(config: ModelConfig) -> ModelConfig:
    """The config as trained, if it is a Ministral-8B whose file says 32k for all layers.

    Says so in one line. Any other config comes back as it is.
    """
    if not is_ministral_8b(config) or config.windows == MINISTRAL_8B.windows:
        return config
    if len(set(config.windows)) > 1:
        return config  # somebody wrote a pattern of their own, layer by layer
    logger.warning(
        "octavo: this is Ministral-8B, whose config hides its attention pattern; running "
        "%s with a context of %d tokens (--attention-pattern overrides)",
        PATTERN.describe(CONTEXT),
        CONTEXT,
    )
    return replace(config, windows=MINISTRAL_8B.windows, max_seq_len=CONTEXT)
