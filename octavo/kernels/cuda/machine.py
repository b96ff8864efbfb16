"""A GPU's own rates, by PyTorch's largest operators: what kernels are held to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.kernels.timing import best_seconds

COPY_BYTES = 2**30  # far more than any cache
SIZE = 8192  # rows and columns of the matrices that are multiplied


def read_bytes_per_second(device: torch.device, n_bytes: int = COPY_BYTES) -> float:
    """The rate at which the device's memory gives bytes while it does nothing else.

    The better of two ways: a sum, which reads every byte once, and a copy, whose bytes count twice,
    since memory carries them once as they are read and once as they are written.

    Args:
        device: which.
        n_bytes: of memory that is read, a multiple of 8; a copy takes as much again.
    """
    source = torch.ones(n_bytes // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    copied = 2 * n_bytes / _best_seconds(lambda: target.copy_(source), device)
    return max(copied, n_bytes / _best_seconds(source.sum, device))


def int8_operations_per_second(device: torch.device, size: int = SIZE) -> float:
    """The int8 multiplications and additions of one large product; a multiply-add is two."""
    a, b = (_integers(size, device) for _ in range(2))
    return _operations(size) / _best_seconds(lambda: torch._int_mm(a, b.t()), device)


def bf16_operations_per_second(device: torch.device, size: int = SIZE) -> float:
    """The same in bf16."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return _operations(size) / _best_seconds(lambda: a @ b.t(), device)


def _integers(size: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)


def _operations(size: int) -> int:
    return 2 * size**3


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.get_device_module(device).synchronize

    def run_to_the_end() -> None:
        run()
        wait()

    return best_seconds(run_to_the_end)
