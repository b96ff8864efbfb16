"""Two programs on a machine that others share, whose memory has more than one pace.

Two cores of a Zen 5 machine read 45 to 52 GB/s for minutes, and 70 to 80 in others. A program that
had luck is not faster than one that had none: so speeds that hang on memory are compared between
rounds in which it was as fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NEAR = 0.15  # of a pace, within which another is the same
Peer = tuple[Sequence[float], float]


def same(a: float, b: float) -> bool:
    """Whether two paces are one."""
    return abs(a - b) <= NEAR * max(a, b)


def fastest_at_one_pace(
    own: Iterable[tuple[float, float]], peer: Iterable[Peer]
) -> tuple[float, float] | None:
    """The fastest rounds of a program and its peer at the quickest pace that both have had.

    A peer's pace is known before and after it, and may have changed in between: its rounds count
    as well if they were slower by those.

    Args:
        own: of each round the pace of memory meanwhile, and the seconds that something took.
        peer: of each round the paces around it, and the seconds.

    Returns:
        The seconds of each; None if they never had the same pace.
    """
    own, peer = list(own), list(peer)
    shared = [
        pace
        for pace, _ in own
        if any(paces and all(same(pace, each) for each in paces) for paces, _ in peer)
    ]
    if not shared:
        return None
    quickest = max(shared)
    own_s = min(seconds for pace, seconds in own if same(pace, quickest))
    return own_s, min(
        seconds
        for paces, seconds in peer
        if all(each < quickest or same(each, quickest) for each in paces)
    )
