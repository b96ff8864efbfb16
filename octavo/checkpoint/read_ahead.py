"""Bring tensors from the disk into the system's file cache, before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Event

from octavo.checkpoint.tensors import TensorInfo

BLOCK_BYTES = 2**20  # read at a time


def read_ahead(tensors: Iterable[TensorInfo], stop: Event) -> None:
    """Read the tensors' bytes and forget them: mapped, they are then there without waiting.

    It is reading, and not advice that they will be needed: Linux cuts that off at one read-ahead
    of the device. Files that cannot be read are left to whoever uses the tensor.

    Args:
        tensors: which.
        stop: set from another thread, it ends the reading.
    """
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for info in tensors:
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.offset)
                left = info.n_bytes
                while left > 0 and not stop.is_set():
                    n_read = file.readinto(buffer[:left])
                    if not n_read:
                        return
                    left -= n_read
        except OSError:
            return
