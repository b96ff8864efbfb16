"""Paged attention: against its definition over random batches, and nothing outside given pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels import paged, reference

PAGE = 4


def random_batch(
    generator: torch.Generator, longest_chunk: int, group: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]:
    """Sequences with new tokens and a past each, their pages shuffled among unused ones."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    count = pick(1, 7)
    query_lens = [pick(1, longest_chunk + 1) for _ in range(count)]
    kv_lens = [n + pick(0, 60) for n in query_lens]
    n_blocks = max(-(-n // PAGE) for n in kv_lens)
    order = torch.randperm(count * n_blocks + 5, generator=generator)
    page_table = order[: count * n_blocks].view(count, n_blocks)
    shape = (len(order), PAGE, 2, 8)
    keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
    q = torch.randn(sum(query_lens), 2 * group, 8, generator=generator)
    return q, keys, values, page_table, query_lens, kv_lens


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("longest_chunk", [1, 4, 40])
@pytest.mark.parametrize("bucket_elements", [1, 600, 2**22])
def test_it_equals_its_definition(
    window: int | None,
    longest_chunk: int,
    bucket_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged, "BUCKET_ELEMENTS", bucket_elements)
    generator = torch.Generator().manual_seed(longest_chunk)
    for group in (1, 2, 4, 8):
        batch = random_batch(generator, longest_chunk, group)
        expected = paged.attention_reference(*batch, window)
        assert torch.allclose(paged.attention(*batch, window), expected, atol=1e-5)


def test_the_definition_is_attention_over_the_tokens_in_order() -> None:
    generator = torch.Generator().manual_seed(1)
    q, keys, values, page_table, query_lens, kv_lens = random_batch(generator, 9, 2)
    for window in (None, 7):
        result = paged.attention_reference(
            q, keys, values, page_table, query_lens, kv_lens, window
        ).split(query_lens)
        for i, queries in enumerate(q.split(query_lens)):
            where = [
                (int(page_table[i, p // PAGE]), p % PAGE) for p in range(kv_lens[i])
            ]  # token by token
            k = torch.stack([keys[page, offset] for page, offset in where])
            v = torch.stack([values[page, offset] for page, offset in where])
            expected = reference.attention(queries, k, v, window)
            assert torch.allclose(result[i], expected, atol=1e-6)


@pytest.mark.parametrize("attend", [paged.attention, paged.attention_reference])
@pytest.mark.parametrize("window", [None, 6])
def test_it_reads_no_other_page(attend, window: int | None) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(2)
    for longest_chunk in (1, 30):
        q, keys, values, page_table, query_lens, kv_lens = random_batch(generator, longest_chunk, 2)
        before = attend(q, keys, values, page_table, query_lens, kv_lens, window)
        poisoned = torch.ones(keys.shape[:2], dtype=torch.bool)
        for row, n_new, n_keys in zip(page_table, query_lens, kv_lens, strict=True):
            low = 0 if window is None else max(0, n_keys - n_new - window + 1)
            for position in range(low, n_keys):
                poisoned[row[position // PAGE], position % PAGE] = False
        keys[poisoned], values[poisoned] = 1e9, -1e9
        after = attend(q, keys, values, page_table, query_lens, kv_lens, window)
        assert torch.equal(before, after)


def test_append_writes_its_slots_and_no_others() -> None:
    keys, values = torch.full((5, PAGE, 2, 8), 7.0), torch.full((5, PAGE, 2, 8), 8.0)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    slots = torch.tensor([2 * PAGE + 3, 0, 4 * PAGE + 1])
    paged.append_kv(k, v, keys, values, slots)
    for pages, new, filler in ((keys, k, 7.0), (values, v, 8.0)):
        flat = pages.flatten(0, 1)
        assert torch.equal(flat[slots], new)
        others = torch.ones(len(flat), dtype=torch.bool)
        others[slots] = False
        assert (flat[others] == filler).all()
