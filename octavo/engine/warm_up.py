"""What a GPU's first prompts would wait for: kernels are compiled and timed as they are met."""

from __future__ import annotations

import logging
import time

import torch

from octavo.cache import PagePool, RaggedCache
from octavo.engine import sampler
from octavo.engine.sampling_params import SamplingParams
from octavo.model import Transformer

# One that asks for all that sampling has kernels of.
_SAMPLED = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)

logger = logging.getLogger("octavo")


def warm_up_prompts(model: Transformer, pool: PagePool, most: int) -> None:
    """Read prompts of many lengths up to `most`, and draw a token after each; nothing is kept.

    Kernels are chosen and timed by powers of two, and compiled for sizes that 16 divides and for
    others.

    Args:
        model: that will read prompts.
        pool: with free pages for `most` tokens.
        most: tokens of a pass, at most.
    """
    started = time.perf_counter()
    for n_tokens in _lengths(most):
        cache = RaggedCache(pool)
        hidden = model.hidden(torch.zeros(n_tokens, dtype=torch.int64), [n_tokens], [cache], [1])
        cache.free()
        sampler.sample(model.logits(hidden), [_SAMPLED], [0.5])
    logger.info(
        "octavo: prompts of up to %s tokens were tried in %.1f s",
        f"{most:,}",
        time.perf_counter() - started,
    )


def _lengths(most: int) -> list[int]:
    """most, half of it and so on, and one less than each."""
    lengths = set()
    while most > 0:
        lengths |= {most, most - 1}
        most //= 2
    return sorted(lengths - {0}, reverse=True)
