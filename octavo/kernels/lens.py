"""Lengths of a pass's sequences, on the host and on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from octavo.device import to_device


class Lens(list[int]):
    """A list of lengths that kernels can read as well; copied to where they run once.

    A pass has many layers, and each copy from the host would hold a device up.

    Args:
        lengths: [B].
        on_device: [B] int32, if the device has them already. A captured graph reads this tensor
            anew at each replay.
        on_host: [B] int64, which a recording reads anew in the same way.
        are_bounds: whether the list holds no lengths, but the most that the device's may be.
    """

    def __init__(
        self,
        lengths: Iterable[int],
        on_device: Tensor | None = None,
        on_host: Tensor | None = None,
        are_bounds: bool = False,
    ) -> None:
        super().__init__(lengths)
        self.are_bounds = are_bounds
        self._on_host = on_host
        self._on_device = on_device
        self._starts: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lens:
        """The same, if they are some already."""
        return lengths if isinstance(lengths, cls) else cls(lengths)

    def on_host(self) -> Tensor:
        """[B] int64 on the CPU, as the list has them."""
        if self._on_host is None:
            self._on_host = torch.tensor(self, dtype=torch.int64)
        return self._on_host

    def on(self, device: torch.device) -> Tensor:
        """[B] int32 there."""
        if self._on_device is None or self._on_device.device != device:
            self._on_device = to_device(torch.tensor(self, dtype=torch.int32), device)
        return self._on_device

    def starts(self, device: torch.device) -> Tensor:
        """[B + 1] int32 there: how many come before each, and all of them."""
        if self._starts is None or self._starts.device != device:
            lengths = self.on(device)
            self._starts = torch.zeros(len(self) + 1, dtype=torch.int32, device=device)
            torch.cumsum(lengths, 0, dtype=torch.int32, out=self._starts[1:])
        return self._starts
