"""Whether the C++ library is called, and by which instructions."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.cache import tokens_of_page
from octavo.checkpoint import open_checkpoint
from octavo.kernels.cpu import append, attention, library, linear, rows
from octavo.model import Transformer
from tests.checkpoints import small_config, write_mistral

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


def test_a_page_is_what_a_step_of_attention_takes_of_a_head() -> None:
    native = library.load()
    if native is None:
        pytest.skip("no C++ library")
    step = ctypes.c_int64.in_dll(native, "octavo_attention_direct_bytes").value
    assert tokens_of_page(torch.int8) == step and tokens_of_page(torch.bfloat16) == step // 2


def test_a_load_checks_all_kernels_before_it_takes_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mistral(tmp_path, small_config()))
    for kernel, _ in KERNELS:
        kernel.best_isa.cache_clear()
    Transformer.from_checkpoint(checkpoint, pack=False)
    assert all(kernel.best_isa.cache_info().currsize == 1 for kernel, _ in KERNELS)


class _LongerCall(ctypes.Structure):
    _fields_ = (*rows._Call._fields_, ("one_more", ctypes.c_int64))


@pytest.fixture
def _said_anew() -> Iterator[None]:
    library._say_outdated.cache_clear()
    yield
    library._say_outdated.cache_clear()


@pytest.mark.usefixtures("_said_anew")
@pytest.mark.skipif(library.load() is None, reason="no C++ library")
def test_a_library_of_other_sources_is_not_called_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def must_not_run(isa: int) -> bool:
        raise AssertionError

    with caplog.at_level(logging.WARNING, "octavo"):
        for name in ("octavo_rows", "octavo_that_is_not_there"):
            assert library.widest_right(must_not_run, "rows", {name: _LongerCall}) is None
    assert caplog.text.count("other sources") == 1
    assert library.widest_right(lambda isa: True, "rows", {"octavo_rows": rows._Call}) is not None
