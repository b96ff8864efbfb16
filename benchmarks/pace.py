"""Two programs on a machine that others share, whose memory has more than one pace.

Two cores of a Zen 5 machine read 45 to 52 GB/s for minutes, and 70 to 80 in others. A program that
had luck is not faster than one that had none: so speeds that hang on memory are compared between
rounds in which it was as fast.
"""

from __future__ import annotations

from collections.abc import Iterable

NEAR = 0.15  # of a pace, within which another is the same


def same(a: float, b: float) -> bool:
    """Whether two paces are one."""
    return abs(a - b) <= NEAR * max(a, b)


def between(before: float, after: float) -> float:
    """The pace of what ran between two measurements; 0 if it changed meanwhile."""
    return (before + after) / 2 if same(before, after) else 0.0


def fastest_at_one_pace(
    own: Iterable[tuple[float, float]], other: Iterable[tuple[float, float]]
) -> tuple[float, float] | None:
    """The fastest rounds of two programs at the quickest pace that both have had.

    Args:
        own, other: of each round the pace of memory, bytes a second or 0 where it is not known, and
            the seconds that something took.

    Returns:
        The seconds of each; None if they never had the same pace.
    """
    rounds = [[each for each in of_one if each[0] > 0] for of_one in (own, other)]
    shared = [pace for pace, _ in rounds[0] if any(same(pace, each) for each, _ in rounds[1])]
    if not shared:
        return None
    own_s, other_s = (
        min(seconds for pace, seconds in of_one if same(pace, max(shared))) for of_one in rounds
    )
    return own_s, other_s
