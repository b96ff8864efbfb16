"""int8 keys and values that long chunks read in 16 bits: the same attention, in bounded memory.

Without a GPU this runs in Triton's interpreter, on a device said to be as Hopper is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from octavo.kernels import paged, plain
from octavo.kernels.cuda import attention, dequantize, prefill
from octavo.kernels.cuda.call import AttentionCall
from octavo.kernels.cuda.launch import DEVICE
from octavo.kernels.cuda.tiling import Processors
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens
from tests.paging import Batch, by_triton, poison_all_but, quantised
from tests.test_cuda_linears import H100, L4

MANY = 30
Launches = list[tuple[torch.dtype, int, int]]


@pytest.fixture(autouse=True)
def _short_chunks_are_long(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on(H100, monkeypatch)
    monkeypatch.setattr(dequantize, "MANY_QUERIES", MANY)
    dequantize.usable.cache_clear()
    yield
    dequantize.usable.cache_clear()


def on(device: Processors, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dequantize, attention):
        monkeypatch.setattr(module, "processors", lambda: device)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What chunks read, and the bounds of their lengths."""
    done: Launches = []
    launch = prefill.launch

    def watched(call: AttentionCall, more_than: int, at_most: int) -> None:
        done.append((call.pages.keys.dtype, more_than, at_most))
        launch(call, more_than, at_most)

    monkeypatch.setattr(prefill, "launch", watched)
    return done


def batch_of(query_lens: list[int], dtype: torch.dtype = torch.bfloat16) -> Batch:
    """Each with a past of some blocks, in pages of 8."""
    generator = torch.Generator().manual_seed(sum(query_lens))
    kv_lens = [n + 13 * (i % 4) for i, n in enumerate(query_lens)]
    n_blocks = -(-max(kv_lens) // 8)
    order = torch.randperm(len(kv_lens) * n_blocks + 3, generator=generator)
    pages = KVPages(*(torch.randn(len(order), 2, 8, 32, generator=generator) for _ in range(2)))
    q = torch.randn(sum(query_lens), 4, 32, generator=generator).to(dtype)
    table = order[: len(kv_lens) * n_blocks].view(len(kv_lens), n_blocks)
    return q, quantised(pages), table, query_lens, kv_lens


def call_of(batch: Batch, window: int | None = None, are_bounds: bool = False) -> AttentionCall:
    q, pages, table, *lens = batch
    moved: Any = (None if each is None else each.to(DEVICE) for each in pages)
    query_lens, kv_lens = (Lens(each, are_bounds=are_bounds) for each in lens)
    q, table = q.to(DEVICE), table.to(DEVICE)
    return AttentionCall(q, q, KVPages(*moved), table, query_lens, kv_lens, window)


@pytest.mark.parametrize("window", [None, 1, 8, 20, 45])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_lens", [[1, 40, 6, 29, 30, 17, 77], [64], [30, 1]])
def test_long_chunks_read_16_bits_and_all_others_int8(
    query_lens: list[int], dtype: torch.dtype, window: int | None, launches: Launches
) -> None:
    """Slots that none sees hold NaN and the greatest numbers."""
    batch = batch_of(query_lens, dtype)
    expected = paged.attention_reference(*batch, window).float()
    poison_all_but(batch, window, float("nan"))
    dequantize.usable(), attention._is_trusted(dtype, dtype, 32)
    launches.clear()
    found = by_triton(*batch, window).float()
    assert (found - expected).norm() < 0.01 * expected.norm()
    most = max(query_lens)
    short = [n for n in query_lens if 16 < n < MANY]
    wanted = [(dtype, MANY - 1, most)]
    if short:
        wanted.append((torch.int8, max(n for n in query_lens if n <= 16), max(short)))
    assert launches == wanted


def test_nothing_is_written_out_but_what_the_chunks_see() -> None:
    _, pages, table, *_ = batch = batch_of([40, 5, 33])
    written = dequantize.dequantized(call_of(batch, window=10))
    # 40 tokens, all; of 33 + 26 those from the tenth before the first new one on, 17…58.
    seen = [(0, 0, 5), (2, 2, 8)]
    assert len(written.pages.keys) == sum(stop - first for _, first, stop in seen)
    for sequence, first, stop in seen:
        place = written.page_table[sequence, first:stop]
        expected = pages.gather(table[sequence, first:stop])
        for found, wanted in zip(written.pages.gather(place), expected, strict=True):
            assert torch.equal(found.cpu(), wanted.bfloat16())


@pytest.mark.parametrize(
    ("query_lens", "dtype", "options", "pays"),
    [
        ([30], torch.bfloat16, {}, True),
        ([29, 29], torch.bfloat16, {}, False),
        ([30], torch.float32, {}, False),  # whose products have no tensor cores
        ([30], torch.bfloat16, {"are_bounds": True}, False),
    ],
)
def test_it_pays_for_long_chunks_in_16_bits(
    query_lens: list[int], dtype: torch.dtype, options: dict[str, bool], pays: bool
) -> None:
    assert dequantize.pays(call_of(batch_of(query_lens, dtype), **options)) == pays


def test_it_pays_on_hopper_for_int8_and_as_far_as_memory_was_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, pages, table, query_lens, kv_lens = batch = batch_of([30, 50])
    floats = KVPages(pages.keys.bfloat16(), pages.values.bfloat16())
    assert not dequantize.pays(call_of((q, floats, table, query_lens, kv_lens)))
    n_blocks = -(-30 // 8) + -(-(50 + 13) // 8)
    monkeypatch.setattr(dequantize, "MOST_BYTES", n_blocks * 2 * 2 * 8 * 32 * 2)
    assert dequantize.pays(call_of(batch))
    monkeypatch.setattr(dequantize, "MOST_BYTES", dequantize.MOST_BYTES - 1)
    assert not dequantize.pays(call_of(batch))
    assert dequantize.pays(call_of(batch, window=5))  # which sees fewer blocks
    on(L4, monkeypatch)
    assert not dequantize.pays(call_of(batch, window=5))


def test_the_planner_sets_its_memory_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = plain.attention_bytes(torch.int8)
    assert attention.attention_bytes(torch.int8) == usual + dequantize.MOST_BYTES
    assert attention.attention_bytes(torch.bfloat16) == usual
    on(L4, monkeypatch)
    assert attention.attention_bytes(torch.int8) == usual


def test_a_kernel_that_computes_wrong_is_said_and_int8_is_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, launches: Launches
) -> None:
    monkeypatch.setattr(dequantize, "_is_right", lambda: False)
    batch = batch_of([64])
    with caplog.at_level(logging.WARNING, "octavo"):
        for _ in range(2):
            found = by_triton(*batch, None).float()
    expected = paged.attention_reference(*batch, None).float()
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert launches == [(torch.int8, 0, 64)] * 2
    [line] = caplog.messages
    assert "int8 keys and values" in line and "PyTorch" not in line
