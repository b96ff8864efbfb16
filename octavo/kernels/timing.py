"""How fast a machine can be: the best of repeated runs."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 0.5  # of runs of which the best counts: whatever else runs can only take from it


def best_seconds(run: Callable[[], object]) -> float:
    """The time of the fastest run, which ends when the call returns; the first is not counted."""
    run()
    best, begun = float("inf"), time.perf_counter()
    while (started := time.perf_counter()) < begun + SECONDS:
        run()
        best = min(best, time.perf_counter() - started)
    return best
