"""Attention by Triton: what it does not share with the CPU's, and the CPU's tests in few shapes.

Without a GPU these run in Triton's interpreter.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.kernels import fused, paged, reference
from octavo.kernels.cuda import attention, decode, key_loop, prefill
from octavo.kernels.cuda.call import AttentionCall, Blocks
from octavo.kernels.cuda.launch import DEVICE, INTERPRETED
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens
from tests.paging import (
    Batch,
    by_triton,
    long_sequence,
    poison_all_but,
    quantised,
    random_batch,
)

NAN = float("nan")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norms; NaN where something is."""
    return float((found.float().cpu() - expected.float()).norm() / expected.float().norm())


def mixed_batch(generator: torch.Generator) -> Batch:
    """Single tokens, guesses after a token, and chunks."""
    query_lens, kv_lens = [1, 40, 6, 1, 17, 1], [70, 40, 9, 1, 66, 33]
    page_table = torch.randperm(120, generator=generator)[:108].view(6, 18)
    pages = KVPages(*(torch.randn(120, 2, 4, 32, generator=generator) for _ in range(2)))
    q = torch.randn(sum(query_lens), 6, 32, generator=generator)
    return q, pages, page_table, query_lens, kv_lens


def in_blocks_of(monkeypatch: pytest.MonkeyPatch, blocks: Blocks) -> None:
    """Both kernels go about it in blocks of this size."""
    monkeypatch.setattr(prefill, "block_sizes", lambda *_: blocks)
    monkeypatch.setattr(decode, "block_sizes", lambda *_: blocks)


@pytest.mark.parametrize("longest_chunk", [1, 40])
@pytest.mark.parametrize("group", range(1, 9))
def test_groups_of_any_size(group: int, longest_chunk: int) -> None:
    batch = random_batch(torch.Generator().manual_seed(group), longest_chunk, group)
    expected = paged.attention_reference(*batch, None)
    assert torch.allclose(by_triton(*batch, None), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.int8, 0.007)]
)
@pytest.mark.parametrize("window", [None, 1, 4, 5, 16, 17, 30])
def test_windows_on_and_off_the_edges_of_pages_and_blocks(
    window: int | None, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks_of(monkeypatch, Blocks(rows=32, keys=16, warps=4, stages=2))
    q, pages, *lists = mixed_batch(torch.Generator().manual_seed(1))
    rest: Any = (*lists, window)
    if dtype == torch.int8:
        pages = quantised(pages)
    else:
        q, pages = q.to(dtype), KVPages(pages.keys.to(dtype), pages.values.to(dtype))
    expected = paged.attention_reference(q, pages, *rest)
    assert relative_error(by_triton(q, pages, *rest), expected) < limit


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", [None, 150])
def test_blocks_longer_than_several_pages(
    window: int | None, in_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Hopper."""
    in_blocks_of(monkeypatch, Blocks(rows=128, keys=128, warps=8, stages=3))
    q, pages, *rest = long_sequence(torch.Generator().manual_seed(10), 70, 420, 1, 32)
    batch: Any = (q, quantised(pages) if in_int8 else pages, *rest, window)
    limit = 0.01 if in_int8 else 1e-5
    assert relative_error(by_triton(*batch), paged.attention_reference(*batch)) < limit


@pytest.mark.parametrize("splits", [1, 4])
def test_single_tokens_and_chunks_in_one_batch_read_and_write_their_own(
    splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours of q, and slots that none sees, are NaN; neighbours of the result stay."""
    monkeypatch.setattr(decode, "n_splits", lambda *_: splits)
    for window in (None, 7):
        batch = mixed_batch(torch.Generator().manual_seed(2))
        expected = paged.attention_reference(*batch, window)
        poison_all_but(batch, window, NAN)
        q, pages, page_table, query_lens, kv_lens = batch
        around = torch.full((len(q) + 20, *q.shape[1:]), NAN)
        around[10:-10] = q
        out = torch.full(around.shape, 77.0, device=DEVICE)
        pages = KVPages(pages.keys.to(DEVICE), pages.values.to(DEVICE))
        call = AttentionCall(
            around.to(DEVICE)[10:-10], out[10:-10], pages, page_table.to(DEVICE),
            Lens(query_lens), Lens(kv_lens), window,
        )  # fmt: skip
        attention._launch(call)
        assert torch.allclose(out[10:-10].cpu(), expected, atol=1e-5)
        assert (out[:10] == 77).all() and (out[-10:] == 77).all()


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", [None, 7])
def test_pages_that_none_sees_may_be_any_number_and_their_neighbours_nan(
    window: int | None, in_int8: bool
) -> None:
    """A read of such a page ends the process."""
    batch = mixed_batch(torch.Generator().manual_seed(9))
    q, pages, table, query_lens, kv_lens = batch
    pages = quantised(pages) if in_int8 else pages
    batch = (q, pages, table, query_lens, kv_lens)
    expected = paged.attention_reference(*batch, window)
    poison_all_but(batch, window, NAN)
    for row, n_new, n_keys in zip(table, query_lens, kv_lens, strict=True):
        row[-(-n_keys // pages.page_size) :] = 10**12
        if window is not None:
            row[: max(0, n_keys - n_new - window + 1) // pages.page_size] = -(10**12)
    assert relative_error(by_triton(*batch, window), expected) < (0.01 if in_int8 else 1e-5)


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("splits", [1, 4, 32])
def test_into_however_many_runs_keys_are_cut_the_answer_is_the_same(
    splits: int, window: int | None, in_int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More runs than blocks, too: the rest have no keys."""
    monkeypatch.setattr(decode, "n_splits", lambda *_: splits)
    q, pages, *rest = long_sequence(torch.Generator().manual_seed(3), 3, 650, 1, 32)
    batch: Any = (q, quantised(pages) if in_int8 else pages, *rest, window)
    limit = 0.01 if in_int8 else 1e-5
    assert relative_error(by_triton(*batch), paged.attention_reference(*batch)) < limit


def test_keys_are_cut_into_enough_runs_to_fill_the_device_and_no_more() -> None:
    fill = decode.PROGRAMS * decode._multiprocessors(DEVICE)
    for n_programs in (1, 8, 100, 10_000):
        splits = decode.n_splits(n_programs, 100_000, DEVICE)
        assert splits == 1 or n_programs * splits <= fill
        assert 2 * splits > decode.MOST_SPLITS or 2 * n_programs * splits > fill
    assert decode.n_splits(1, decode.SPLIT_KEYS - 1, DEVICE) == 1


@pytest.mark.parametrize("in_int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("window", [None, 20])
def test_where_the_host_knows_bounds_alone_the_devices_lengths_count(
    window: int | None, in_int8: bool
) -> None:
    """As in a captured graph: rows without keys are given zeros, and nothing past a length."""
    generator = torch.Generator().manual_seed(4)
    kv_lens = [37, 0, 1, 300]
    pages = KVPages(*(torch.randn(90, 2, 4, 32, generator=generator) for _ in range(2)))
    pages = quantised(pages) if in_int8 else pages
    q = torch.randn(4, 4, 32, generator=generator)
    page_table = torch.randperm(90, generator=generator)[:75].repeat(4, 8)
    page_table[0] = page_table[0].roll(11)
    seen = [0, 2, 3]
    batch: Batch = (q[seen], pages, page_table[seen], [1] * 3, [kv_lens[i] for i in seen])
    expected = paged.attention_reference(*batch, window)
    poison_all_but(batch, window, NAN)
    bounds = Lens([2000] * 4, torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE))
    found = by_triton(q, pages, page_table, Lens([1] * 4), bounds, window)
    assert (found[1] == 0).all()
    assert relative_error(found[seen], expected) < (0.01 if in_int8 else 1e-5)


def test_chunks_shorter_than_the_host_knows() -> None:
    generator = torch.Generator().manual_seed(5)
    q, pages, page_table, query_lens, kv_lens = random_batch(generator, 9, 2)
    lens = (
        Lens([len(q)] * len(query_lens), torch.tensor(query_lens, dtype=torch.int32).to(DEVICE)),
        Lens([999] * len(kv_lens), torch.tensor(kv_lens, dtype=torch.int32).to(DEVICE)),
    )
    expected = paged.attention_reference(q, pages, page_table, query_lens, kv_lens, 9)
    assert torch.allclose(by_triton(q, pages, page_table, *lens, 9), expected, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="counts the steps of the interpreter")
@pytest.mark.parametrize(("n_queries", "n_keys", "window", "n_blocks"), [
    (1, 1000, None, 16),
    (1, 1000, 40, 1),  # keys 960…999
    (1, 1000, 41, 2),  # keys 959…999
    (32, 1000, 40, 2),  # the first query sees 929…968
    (32, 1000, 1000, 16),
    (100, 1000, 64, 5),  # two blocks of 64 and 36 queries: 837…963 and 901…999
])  # fmt: skip
def test_blocks_outside_the_window_are_never_visited(
    n_queries: int, n_keys: int, window: int | None, n_blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    visits = []
    product = key_loop._product

    def counted(*args: Any) -> Any:
        visits.append(args)
        return product(*args)

    monkeypatch.setattr(key_loop, "_product", counted)
    monkeypatch.setattr(decode, "FEW_QUERIES", 1)
    sequence = long_sequence(torch.Generator().manual_seed(6), n_queries, n_keys, 2, 32)
    by_triton(*sequence, window)
    n_kv_heads, products_a_block = 2, 2
    assert len(visits) == n_blocks * n_kv_heads * products_a_block


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("past", [0, 500])
def test_a_chunk_of_4096_tokens(
    past: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(7)
    q, *rest = long_sequence(generator, 4096, 4096 + past, n_kv_heads=1, head_dim=32)
    if INTERPRETED:
        in_blocks_of(monkeypatch, Blocks(rows=1024, keys=512, warps=4, stages=2))
    batch: Any = (q[:, :1].contiguous(), *rest, window)
    assert torch.allclose(by_triton(*batch), paged.attention(*batch), atol=1e-5)


@pytest.mark.parametrize("window", [None, 30])
def test_a_sequence_that_is_not_kept(window: int | None) -> None:
    q = torch.randn(90, 6, 32)
    k, v = torch.randn(100, 2, 32), torch.randn(100, 2, 32)
    found = attention.attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), window)
    assert torch.allclose(found.cpu(), reference.attention(q, k, v, window), atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "group", "served"),
    [(128, 16, 4, True), (96, 16, 4, False), (128, 12, 4, False), (128, 16, 32, False)],
)
def test_what_the_kernels_take(head_dim: int, page_size: int, group: int, served: bool) -> None:
    pages = KVPages(*(torch.zeros(3, 1, page_size, head_dim, device=DEVICE) for _ in range(2)))
    assert attention.serves(torch.zeros(2, group, head_dim, device=DEVICE), pages) == served


def test_bounds_of_lengths_are_never_taken_for_lengths() -> None:
    pages = KVPages(*torch.randn(2, 3, 1, 16, 96, device=DEVICE))  # head_dim is not Triton's
    q, page_table = torch.randn(2, 4, 96, device=DEVICE), torch.zeros(2, 1, dtype=torch.int64)
    lens = torch.tensor([7, 9], dtype=torch.int32, device=DEVICE)
    bounds = Lens([16] * 2, lens, are_bounds=True)
    with pytest.raises(RuntimeError, match="takes lengths from the host"):
        attention.paged_attention(q, pages, page_table.to(DEVICE), [1, 1], bounds, None)


def test_kernels_that_compute_wrong_are_not_used_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention._is_trusted.cache_clear()
    monkeypatch.setattr(attention, "_launch", lambda call: call.out.fill_(NAN))
    q, k, v = torch.randn(9, 4, 32), torch.randn(9, 2, 32), torch.randn(9, 2, 32)
    batch = random_batch(torch.Generator().manual_seed(8), 20, 2)
    try:
        with caplog.at_level(logging.WARNING, "octavo"):
            assert torch.equal(attention.attention(q, k, v, None), fused.attention(q, k, v, None))
            found = attention.paged_attention(*batch, None)
    finally:
        attention._is_trusted.cache_clear()
    assert torch.allclose(found, paged.attention_reference(*batch, None), atol=1e-5)
    assert len(caplog.messages) == 1 and "attention of float32" in caplog.text
