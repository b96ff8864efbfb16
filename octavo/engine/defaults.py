"""How much an engine takes at once where nothing else is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # options are parsed without PyTorch
    import torch

MAX_NUM_BATCHED_TOKENS = 1024


def default_num_seqs(device: torch.device) -> int:
    """Answers in the making at once.

    A GPU still waits for its memory where a CPU's arithmetic has long become what takes the time.
    """
    return 64 if device.type == "cuda" else 16
