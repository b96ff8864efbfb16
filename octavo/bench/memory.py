"""The bytes of a measurement: what it takes, and what one step of it reads."""

from __future__ import annotations

import torch

from octavo.bench.random_model import DTYPE
from octavo.bench.settings import BenchSettings
from octavo.cache import CacheLayout
from octavo.cache.planner import free_bytes, working_bytes
from octavo.config import ModelConfig
from octavo.errors import ConfigError


def require_memory(
    config: ModelConfig, layout: CacheLayout, settings: BenchSettings, device: torch.device
) -> None:
    """Refuse what does not fit in the device's memory that is free.

    Raises:
        ConfigError: with the planner's figures.
    """
    weights = config.weight_bytes(DTYPE.itemsize)
    cache = n_pages(layout, settings) * layout.page_bytes
    working = working_bytes(config, settings.batch, settings.chunk, device, layout.dtype)
    needed, free = weights + cache + working, free_bytes(device)
    if needed > free:
        raise ConfigError(
            f"memory: weights take {_gb(weights)}, the KV cache {_gb(cache)} and a pass "
            f"{_gb(working)}, together {_gb(needed)}; {_gb(free)} are free: take fewer --layers, "
            "a smaller --batch, or less --context"
        )


def n_pages(layout: CacheLayout, settings: BenchSettings) -> int:
    """Pages of all sequences; with a context, also of those without that `Run` compares with."""
    pages = layout.pages_needed(settings.length, min(settings.chunk, settings.length))
    if settings.context:
        pages += layout.pages_needed(settings.decode, 1)
    return settings.batch * pages


def step_bytes(config: ModelConfig, layout: CacheLayout, kv_lens: list[int]) -> int:
    """What a step with one new token a sequence cannot do without reading.

    That is every linear with the head, a row of the embedding for each sequence, and the keys and
    values that the new tokens see. Norms and activations do not count.

    Args:
        config: the model's.
        layout: the cache's.
        kv_lens: [B], tokens of each sequence, the new one included.
    """
    total = len(kv_lens) * config.dim * DTYPE.itemsize
    for name in config.linear_names():
        total += config.linear_bytes(name, DTYPE.itemsize)
    token = layout.page_bytes // (layout.layers_per_page * layout.page_size)  # in one layer
    for window in config.windows:
        total += sum(token * min(n, window or n) for n in kv_lens)
    return total


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
