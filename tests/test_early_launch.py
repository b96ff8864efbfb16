"""Kernels are launched early only where a chain of them was seen to compute right.

That they wait for one another is read off their machine code, in test_cuda_compile.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import triton.language as tl

from octavo.kernels.cuda import early_launch, quantize
from tests.test_decode_graph import stand_in_for_cuda

EARLY = {"launch_pdl": True}


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not in the interpreter, as far as launches know, and not asked yet."""
    early_launch.early_launch.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(early_launch, "INTERPRETED", False)
        yield
    early_launch.early_launch.cache_clear()


def has_capability(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    monkeypatch.setattr(tl.target_info, "cuda_capability_geq", lambda major: capability >= major)


def is_wrong() -> bool:
    return False


def fails() -> bool:
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.usefixtures("on_a_device")
def test_launches_are_early_from_hopper_on(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def is_right() -> bool:
        tried.append(1)
        return True

    monkeypatch.setattr(early_launch, "_is_right", is_right)
    has_capability(monkeypatch, 8)
    assert early_launch.early_launch() == {} and not tried
    early_launch.early_launch.cache_clear()
    has_capability(monkeypatch, 9)
    options = [quantize._options(torch.ones(2, 512)) for _ in range(2)]
    assert all(EARLY.items() <= each.items() for each in options)
    assert len(tried) == 1


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize(("check", "why"), [(is_wrong, "wrong"), (fails, "capturing … more of it")])
def test_a_chain_that_is_wrong_or_cannot_be_captured_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    check: Callable[[], bool],
    why: str,
) -> None:
    monkeypatch.setattr(early_launch, "_is_right", check)
    has_capability(monkeypatch, 9)
    with caplog.at_level(logging.WARNING, "octavo"):
        assert early_launch.early_launch() == early_launch.early_launch() == {}
    [line] = caplog.messages
    assert line.startswith("octavo: kernels start") and why in line and "\n" not in line


@pytest.mark.skipif(not early_launch.INTERPRETED, reason="a GPU tries the chain itself")
@pytest.mark.parametrize("lost", [None, 0, 7])
def test_a_chain_that_lost_what_a_launch_wrote_is_wrong(
    monkeypatch: pytest.MonkeyPatch, lost: int | None
) -> None:
    """By a stand-in for a graph, which computes while it is captured instead of replayed."""
    launches = count()
    increment: Any = early_launch._increment

    class Lossy:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return increment[grid] if next(launches) != lost else lambda *_, **__: None

    monkeypatch.setattr(early_launch, "_increment", Lossy())
    monkeypatch.setattr(early_launch, "_TRIED_NUMBERS", 2 * early_launch._TRIED_BLOCK)
    monkeypatch.setattr(early_launch, "_TRIED_PAIRS", 2)
    stand_in_for_cuda(monkeypatch, Mock, lambda *_, **__: nullcontext())
    assert early_launch._is_right() == (lost is None)
    assert next(launches) == 8
