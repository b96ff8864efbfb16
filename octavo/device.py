"""Where a model runs: the device by its name, and how the host hands it things without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from octavo.errors import ConfigError

CPU = torch.device("cpu")


def choose_device(name: str | torch.device) -> torch.device:
    """The device of this name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: no such device, or none that can be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if str(name).split(":")[0] not in ("cpu", "cuda"):  # of others PyTorch says far too much
        raise ConfigError(f"device: {str(name)!r} is none of auto, cpu, cuda, cuda:1 and so on")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {str(name)!r} cannot be used ({reason}); try cpu") from None
    return found


def current(device: torch.device) -> AbstractContextManager[object]:
    """While it lasts, kernels that this thread starts go to this GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def capturing(
    graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None, memory: Any = None
) -> Iterator[None]:
    """While it lasts, kernels that this thread starts are captured in a graph.

    `torch.cuda.graph` alone would leave this thread on its stream where a capture fails. Other
    threads may go on using the GPU.

    Args:
        graph: still empty.
        stream: on which they are captured.
        memory: the handle of a pool that the graph shares with others, if any.
    """
    with (
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, memory, stream, capture_error_mode="thread_local"),
    ):
        yield


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor there. From the host to a GPU it is copied in the GPU's own time.

    The copy is from pinned memory and takes its place in the GPU's queue; from other memory the
    host would wait until the GPU has done all that it was given before.
    """
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
