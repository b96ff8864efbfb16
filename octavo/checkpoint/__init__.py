"""Checkpoints on disk: what they say of themselves, and their weights, memory-mapped."""

from octavo.checkpoint.checkpoint import (
    Checkpoint,
    has_weights,
    open_checkpoint,
    read_config,
)
from octavo.checkpoint.hub import DEMO, download, resolve_model

__all__ = [
    "DEMO",
    "Checkpoint",
    "download",
    "has_weights",
    "open_checkpoint",
    "read_config",
    "resolve_model",
]
