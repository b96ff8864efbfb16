"""What all Triton kernels share: where they run, and how they are tried before they are trusted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from octavo.errors import in_one_line

logger = logging.getLogger("octavo")

# Triton's interpreter runs kernels on a CPU's tensors: slowly, and without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def runs_on(tensor: Tensor) -> bool:
    """Whether Triton's kernels take tensors of its device."""
    return tensor.device.type == DEVICE.type


def computes_right(
    is_right: Callable[[], bool], what: str, instead: str = "PyTorch's runs"
) -> bool:
    """Whether a kernel passes its self-check; that it fails, or cannot be built, is said.

    Args:
        is_right: the check, which raises where Triton cannot compile the kernel for this device.
        what: the operation, for the line that is printed.
        instead: what happens without it, for the same.
    """
    reason = why_not(is_right)
    if reason:
        logger.warning("octavo: %s by Triton is not used here (%s); %s", what, reason, instead)
    return not reason


def why_not(is_right: Callable[[], bool]) -> str:
    """Why a self-check fails, arguments as in `computes_right`; empty if it passes."""
    try:
        with torch.inference_mode():
            return "" if is_right() else "it computes wrong"
    except Exception as error:  # a compiler's and a driver's errors share no class
        return in_one_line(error)
