"""Paged attention, in PyTorch and in C++: against its definition, and nothing outside its pages."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import kernels
from octavo.kernels import paged, reference
from octavo.kernels.cpu import attention, library
from octavo.kernels.kv_pages import KVPages
from tests.paging import (
    ATTEND,
    BF16_EMULATED,
    NATIVE,
    PAGE,
    TRITON,
    Attend,
    by_triton,
    long_sequence,
    poison_all_but,
    random_batch,
)
from tests.threads import threads

pytestmark = pytest.mark.usefixtures("two_threads")
attend_each = pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND.keys())
EVERY = ATTEND | TRITON
attend_every = pytest.mark.parametrize("attend", EVERY.values(), ids=EVERY.keys())


@attend_each
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("longest_chunk", [1, 4, 40])
def test_it_equals_its_definition(attend: Attend, window: int | None, longest_chunk: int) -> None:
    generator = torch.Generator().manual_seed(longest_chunk)
    for group in (1, 2, 3, 4, 8):
        batch = random_batch(generator, longest_chunk, group)
        expected = paged.attention_reference(*batch, window)
        assert torch.allclose(attend(*batch, window), expected, atol=1e-5)


@attend_every
def test_a_sequence_may_bring_nothing(attend: Attend) -> None:
    q, pages, page_table, query_lens, kv_lens = random_batch(torch.Generator().manual_seed(4), 1, 2)
    table = page_table[[0, 0, 0]]
    batch = (q[:1], pages, table, [0, 1, 0], [kv_lens[0], kv_lens[0], 0], None)
    assert query_lens[0] == 1
    expected = paged.attention_reference(*batch)
    assert torch.allclose(attend(*batch), expected, atol=1e-5)


@pytest.mark.parametrize("bucket_elements", [1, 600, 5000])
@pytest.mark.parametrize("window", [None, 9])
def test_buckets_of_any_size_give_the_same(
    bucket_elements: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "BUCKET_ELEMENTS", bucket_elements)
    generator = torch.Generator().manual_seed(3)
    for longest_chunk in (1, 4, 40):
        batch = random_batch(generator, longest_chunk, 2)
        expected = paged.attention_reference(*batch, window)
        assert torch.allclose(paged.attention(*batch, window), expected, atol=1e-5)


@attend_each
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 9000), (3, 4099), (16, 8192), (17, 5000)])
@pytest.mark.parametrize("window", [None, 4096, 4500])
def test_long_contexts(attend: Attend, n_queries: int, n_keys: int, window: int | None) -> None:
    """Past 512 keys a query the library cuts them into runs and puts these together."""
    generator = torch.Generator().manual_seed(5)
    sequence = long_sequence(generator, n_queries, n_keys, n_kv_heads=1, head_dim=32)
    expected = paged.attention_reference(*sequence, window)
    assert torch.allclose(attend(*sequence, window), expected, atol=1e-5)


@pytest.mark.parametrize(
    "attend", (EVERY | BF16_EMULATED).values(), ids=(EVERY | BF16_EMULATED).keys()
)
@pytest.mark.parametrize("window", [None, 1, 9, 25])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_head_sizes_and_bf16(attend: Attend, head_dim: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(6)
    # Triton's interpreter cuts off bits where a GPU rounds.
    atol = 2**-7 if attend is by_triton else 2**-8
    for longest_chunk in (1, 20):
        q, pages, *rest = random_batch(generator, longest_chunk, 4, head_dim)
        halved = KVPages(pages.keys.bfloat16(), pages.values.bfloat16())
        batch: Any = (q.bfloat16(), halved, *rest, window)
        expected = paged.attention_reference(*batch)
        result = attend(*batch)
        assert result.dtype == torch.bfloat16
        assert torch.allclose(result.float(), expected.float(), atol=atol, rtol=2**-7)
        # In PyTorch a probability of 0 times NaN is NaN.
        poison = 1e9 if attend is paged.attention else float("nan")
        poison_all_but(batch[:-1], window, poison)
        assert torch.equal(attend(*batch), result)


@attend_every
def test_scores_that_overflow_an_exponential(attend: Attend) -> None:
    generator = torch.Generator().manual_seed(7)
    for longest_chunk in (1, 40):
        q, pages, *rest = random_batch(generator, longest_chunk, 2)
        batch: Any = (q * 100, KVPages(pages.keys * 100, pages.values), *rest, None)
        expected = paged.attention_reference(*batch)
        assert torch.allclose(attend(*batch), expected, atol=1e-4)


@pytest.mark.parametrize("attend", NATIVE.values(), ids=NATIVE.keys())
def test_an_answer_does_not_depend_on_its_company_or_on_threads(attend: Attend) -> None:
    generator = torch.Generator().manual_seed(8)
    q, pages, page_table, query_lens, kv_lens = random_batch(generator, 30, 4)
    together = attend(q, pages, page_table, query_lens, kv_lens, 12).split(query_lens)
    with threads(1):
        for i, queries in enumerate(q.split(query_lens)):
            alone = attend(
                queries, pages, page_table[i : i + 1], query_lens[i : i + 1],
                kv_lens[i : i + 1], 12,
            )  # fmt: skip
            assert torch.equal(alone, together[i])


def test_the_definition_is_attention_over_the_tokens_in_order() -> None:
    generator = torch.Generator().manual_seed(1)
    q, pages, page_table, query_lens, kv_lens = random_batch(generator, 9, 2)
    for window in (None, 7):
        result = paged.attention_reference(q, pages, page_table, query_lens, kv_lens, window).split(
            query_lens
        )
        for i, queries in enumerate(q.split(query_lens)):
            where = [
                (int(page_table[i, p // PAGE]), p % PAGE) for p in range(kv_lens[i])
            ]  # token by token
            k = torch.stack([pages.keys[page, :, offset] for page, offset in where])
            v = torch.stack([pages.values[page, :, offset] for page, offset in where])
            expected = reference.attention(queries, k, v, window)
            assert torch.allclose(result[i], expected, atol=1e-6)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("attend", "poison"),
    # In PyTorch a probability of 0 times NaN is NaN.
    [(paged.attention, 1e9), *((each, float("nan")) for each in (NATIVE | TRITON).values())],
    ids=EVERY.keys(),
)
def test_it_reads_no_other_slot(attend: Attend, poison: float, window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    for longest_chunk in (1, 30):
        batch = random_batch(generator, longest_chunk, 2)
        before = attend(*batch, window)
        poison_all_but(batch, window, poison)
        assert torch.equal(before, attend(*batch, window))


@attend_every
def test_queries_and_pages_of_different_dtypes(attend: Attend) -> None:
    generator = torch.Generator().manual_seed(12)
    for longest_chunk in (1, 20):
        q, pages, *rest = random_batch(generator, longest_chunk, 4)
        halved = KVPages(pages.keys.bfloat16(), pages.values.bfloat16())
        for queries, kept in ((q, halved), (q.bfloat16(), pages)):
            batch: Any = (queries, kept, *rest, 25)
            expected = paged.attention_reference(*batch)
            result = attend(*batch)
            assert result.dtype == queries.dtype
            atol = 1e-5 if queries.dtype == torch.float32 else 2**-7
            assert torch.allclose(result.float(), expected.float(), atol=atol)


@pytest.fixture
def reloaded() -> Iterator[None]:
    """The library is looked for anew, and again after the test."""
    for cached in (library.load, attention.best_isa):
        cached.cache_clear()
    yield
    for cached in (library.load, attention.best_isa):
        cached.cache_clear()


def test_the_library_is_there_where_there_is_a_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no compiler here")
    assert attention.best_isa() is not None


@pytest.mark.parametrize("case", ["missing", "no library", "wrong"])
def test_without_the_library_attention_runs_on_pytorch_and_says_so_once(
    case: str,
    reloaded: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if case == "wrong":
        monkeypatch.setattr(attention, "_attend", lambda isa, q, *_: torch.zeros_like(q))
    else:
        monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    if case == "no library":
        (tmp_path / "_native.so").write_bytes(b"not a library")
    batch = random_batch(torch.Generator().manual_seed(9), 20, 2)
    with caplog.at_level(logging.WARNING, "octavo"):
        for window in (None, 5):
            result = kernels.paged_attention(*batch, window)
            expected = paged.attention_reference(*batch, window)
            assert torch.allclose(result, expected, atol=1e-5)
    if case != "wrong" or shutil.which("c++"):
        assert caplog.text.count("PyTorch") == 1
