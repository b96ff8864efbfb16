"""Which of several ways to compute the same is the fastest on this device: timed, once a key."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from octavo.kernels.cuda.launch import INTERPRETED

Way = Callable[[], Tensor]
_ROUNDS = 5  # of which the best counts
_CALLS = 10  # a round: enough that the device, not the host, is what is timed


def may_time() -> bool:
    """Whether the device can be waited for: not while a graph is captured, nor by interpreter."""
    return not INTERPRETED and not torch.cuda.is_current_stream_capturing()


def device_seconds(way: Way) -> float:
    """How long a call takes, one after another; the first, which may compile, is not counted."""
    way()
    best = float("inf")
    for _ in range(_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_CALLS):
            way()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / _CALLS)
    return best


class Fastest:
    """The ways that were found fastest, by key.

    Args:
        seconds: the time that a way takes.
        may_time: whether one may be timed now. Where not, the first way runs and nothing is kept.
    """

    def __init__(
        self,
        seconds: Callable[[Way], float] = device_seconds,
        may_time: Callable[[], bool] = may_time,
    ) -> None:
        self._seconds = seconds
        self._may_time = may_time
        self._chosen: dict[Hashable, int] = {}

    def run(self, key: Hashable, ways: Sequence[Way]) -> Tensor:
        """What the fastest way computes.

        Args:
            key: what the ways' times depend on.
            ways: the same ones, in the same order, for each key.
        """
        if len(ways) > 1 and key not in self._chosen and self._may_time():
            times = [self._seconds(way) for way in ways]
            self._chosen[key] = times.index(min(times))
        return ways[self._chosen.get(key, 0)]()
