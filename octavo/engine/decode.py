"""Steps that bring few tokens: replayed, where the device can, instead of run anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from octavo.cache import CacheLayout, PagePool, RaggedCache
from octavo.engine.decode_graph import DecodeGraphs, graph_bytes
from octavo.engine.decode_record import RecordedDecode, recording_bytes
from octavo.engine.step_limits import StepLimits
from octavo.model import Transformer


class DecodeSteps(Protocol):
    """Runs decode steps of a model over a pool."""

    def takes(self, query_lens: Sequence[int]) -> bool:
        """Whether it runs steps of so many new tokens of each sequence, [B]."""

    def run(
        self,
        token_ids: Sequence[int],
        caches: Sequence[RaggedCache],
        query_lens: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """More tokens for each sequence; their caches are moved on.

        Args:
            token_ids: [T].
            caches: [B], with the pages that the tokens go to.
            query_lens: [B], tokens of each sequence; None is one of each.

        Returns:
            The last layer's normed output [T, dim] and logits [T, vocab_size] fp32, to be read
            before the next step overwrites them.
        """


def decode_steps(model: Transformer, pool: PagePool, limits: StepLimits) -> DecodeSteps | None:
    """As CUDA graphs on a GPU, as recordings on a CPU; None where steps run as any pass does.

    Args:
        model: its weights may not move from here on.
        pool: of all sequences' pages.
        limits: of all steps.
    """
    if model.device.type == "cuda":
        return DecodeGraphs(model, pool, limits)
    if model.device.type == "cpu":
        return RecordedDecode(model, pool, limits)
    return None


def decode_bytes(layout: CacheLayout, model: Transformer, limits: StepLimits) -> int:
    """Bytes of the device that they keep: arguments as in `decode_steps`; an estimate."""
    bytes_of = {"cuda": graph_bytes, "cpu": recording_bytes}.get(model.device.type)
    if bytes_of is None:
        return 0
    return bytes_of(layout, model, limits)
