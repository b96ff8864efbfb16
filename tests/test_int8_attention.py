"""Attention over int8 pages by integer products: close to what fp32 makes of the same pages.

Those emulated are the code for AVX-VNNI, AVX-512 VNNI and AMX with their instructions spelled out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.kernels import paged
from octavo.kernels.cpu import library
from octavo.kernels.kv_pages import KVPages
from tests.paging import (
    INT8_ATTEND,
    INT8_NATIVE,
    TRITON,
    Attend,
    long_sequence,
    poison_all_but,
    quantised,
    random_batch,
)
from tests.threads import threads

pytestmark = pytest.mark.usefixtures("two_threads")
attend_each = pytest.mark.parametrize("attend", INT8_ATTEND.values(), ids=INT8_ATTEND.keys())
EVERY = INT8_ATTEND | TRITON
attend_every = pytest.mark.parametrize("attend", EVERY.values(), ids=EVERY.keys())
INT8_PRODUCTS = INT8_NATIVE | TRITON
EIGHT_BIT_ISAS = [name for name in library.ISAS if "vnni" in name or "512" in name or "amx" in name]
EIGHT_BITS = [INT8_NATIVE[name] for name in EIGHT_BIT_ISAS]
product_each = pytest.mark.parametrize("attend", INT8_PRODUCTS.values(), ids=INT8_PRODUCTS.keys())
native_each = pytest.mark.parametrize("attend", INT8_NATIVE.values(), ids=INT8_NATIVE.keys())


def relative_error(attend: Attend, *batch: Any) -> float:
    """Of a batch, Frobenius norms, against the definition."""
    expected = paged.attention_reference(*batch).float()
    found = attend(*batch)
    assert found.dtype == batch[0].dtype and found.shape == expected.shape
    return float((found.float() - expected).norm() / expected.norm())


@attend_each
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("longest_chunk", [1, 4, 40])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_it_is_close_to_its_definition(
    attend: Attend, head_dim: int, window: int | None, longest_chunk: int
) -> None:
    generator = torch.Generator().manual_seed(longest_chunk)
    for group in (1, 2, 3, 4, 8):
        q, pages, *rest = random_batch(generator, longest_chunk, group, head_dim)
        assert relative_error(attend, q, quantised(pages), *rest, window) < 0.01


@attend_every
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes_and_dtypes_of_queries(
    attend: Attend, head_dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(6)
    for longest_chunk in (1, 20):
        q, pages, *rest = random_batch(generator, longest_chunk, 4, head_dim)
        assert relative_error(attend, q.to(dtype), quantised(pages), *rest, 25) < 0.01


@attend_every
@pytest.mark.parametrize("n_queries", [1, 20])
def test_scores_may_be_large(attend: Attend, n_queries: int) -> None:
    """Each query is much larger than others and like one key, whose value is then the result.

    Scores of 1,000 to 100,000: beside them 1 is less than their rounding.
    """
    generator = torch.Generator().manual_seed(8)
    for size in (1e2, 1e3, 1e4):
        q, pages, table, *lens = long_sequence(generator, n_queries, 48, 1, 128)
        keys, _ = pages.tokens(table[0], 0, 48)  # [48, 1, 128]
        like = torch.randint(0, 48 - n_queries, q.shape[:2], generator=generator)
        q = size * (1 + torch.rand(*q.shape[:2], 1, generator=generator)) * keys[like, 0]
        # Of one size, so that all have a block's largest scale.
        pages = pages._replace(values=pages.values / pages.values.abs().amax(-1, keepdim=True))
        _, values = pages.tokens(table[0], 0, 48)
        found = attend(q, quantised(pages), table, *lens, None)
        assert torch.allclose(found, values[like, 0], atol=0.01)


@pytest.mark.parametrize("attend", [INT8_NATIVE["portable"], INT8_NATIVE["avx2"]])
def test_with_sixteen_bits_queries_and_weights_cost_next_to_nothing(attend: Attend) -> None:
    q, pages, *rest = random_batch(torch.Generator().manual_seed(7), 20, 4, 128)
    assert relative_error(attend, q, quantised(pages), *rest, None) < 0.001


@attend_each
@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 9000), (3, 4099), (16, 8192), (17, 5000)])
@pytest.mark.parametrize("window", [None, 4096, 4500])
def test_long_contexts(attend: Attend, n_queries: int, n_keys: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    q, pages, *rest = long_sequence(generator, n_queries, n_keys, n_kv_heads=2, head_dim=64)
    # Sharp enough that a few keys among thousands matter.
    assert relative_error(attend, 2 * q, quantised(pages), *rest, window) < 0.02


@attend_every
def test_scales_far_apart(attend: Attend) -> None:
    """One loud token among quiet ones: what the quiet ones say is not lost in its rounding."""
    generator = torch.Generator().manual_seed(9)
    q, pages, *rest = random_batch(generator, 20, 4)
    loud = torch.rand(pages.keys.shape[:3], generator=generator)[..., None] < 0.1
    values = torch.where(loud, 30 * pages.values, pages.values)
    keys = torch.where(loud, 0.1 * pages.keys, pages.keys)
    # VNNI's products have 8 bits for the weights, of which the loud values take most.
    limit = 0.03 if attend in EIGHT_BITS else 0.01
    assert relative_error(attend, q, quantised(KVPages(keys, values)), *rest, None) < limit


@product_each
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_it_reads_no_other_slot(attend: Attend, head_dim: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    for longest_chunk in (1, 30):
        q, pages, *rest = random_batch(generator, longest_chunk, 2, head_dim)
        batch: Any = (q, quantised(pages), *rest)
        before = attend(*batch, window)
        poison_all_but(batch, window, float("nan"))
        assert torch.equal(before, attend(*batch, window))


@native_each
def test_an_answer_does_not_depend_on_its_company_or_on_threads(attend: Attend) -> None:
    generator = torch.Generator().manual_seed(8)
    q, pages, page_table, query_lens, kv_lens = random_batch(generator, 30, 4)
    pages = quantised(pages)
    together = attend(q, pages, page_table, query_lens, kv_lens, 12).split(query_lens)
    with threads(1):
        for i, queries in enumerate(q.split(query_lens)):
            one = slice(i, i + 1)
            alone = attend(queries, pages, page_table[one], query_lens[one], kv_lens[one], 12)
            assert torch.equal(alone, together[i])


@product_each
@pytest.mark.parametrize("what", ["query", "key scale", "value scale"])
def test_a_nan_is_not_rounded_away(attend: Attend, what: str) -> None:
    for longest_chunk in (1, 30):
        q, pages, *rest = random_batch(torch.Generator().manual_seed(3), longest_chunk, 2)
        pages = quantised(pages)
        assert pages.key_scales is not None and pages.value_scales is not None
        if what == "query":
            q[0, 0, 5] = float("nan")
        else:
            scales = pages.key_scales if what == "key scale" else pages.value_scales
            page_table: Any = rest[0]
            scales[page_table[0, 0], 0, 0] = float("nan")
        assert attend(q, pages, *rest, None)[0, 0].isnan().all()
