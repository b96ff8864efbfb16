"""Which instructions of the C++ library are taken."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from octavo.kernels.cpu import append, attention, library, linear, rows

KERNELS: tuple[tuple[Any, str], ...] = (
    (append, "storing keys and values"),
    (attention, "attention"),
    (linear, "a linear"),
    (rows, "a row's operation"),
)


def test_of_the_instructions_there_are_the_widest_that_compute_right_are_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if library.load() is None or library.widest() == 0:
        pytest.skip("no more than one to choose from here")
    best = library.widest()
    narrower = max(isa for isa in range(best) if library.runs(isa))
    for kernel, what in KERNELS:
        right = kernel._is_right
        monkeypatch.setattr(kernel, "_is_right", lambda isa, right=right: isa < best and right(isa))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "octavo"):
            assert kernel.best_isa.__wrapped__() == narrower
        assert f"{what} by {library.ISAS[best]}" in caplog.text
        assert f"that by {library.ISAS[narrower]} runs" in caplog.text


@pytest.mark.skipif(library.load() is None, reason="no C++ library")
def test_where_all_compute_wrong_pytorch_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for kernel, what in KERNELS:
        monkeypatch.setattr(kernel, "_is_right", lambda isa: False)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "octavo"):
            assert kernel.best_isa.__wrapped__() is None
        assert f"{what} by {library.ISAS[library.widest()]}" in caplog.text
        assert "PyTorch's runs" in caplog.text
