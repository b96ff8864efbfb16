"""The ragged paged cache: any chunking gives one pass's result, and windowed layers stay small."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from octavo import Transformer
from octavo.cache import CacheLayout, OutOfPages, PagePool, RaggedCache, kv_dtype
from octavo.errors import ConfigError, RequestError
from tests.checkpoints import small_config, write_mistral

LENGTH = 61  # not a multiple of any window, chunk or page here
WINDOWS = (None, 8, 5, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return Transformer.from_folder(
        write_mistral(tmp_path_factory.mktemp("m"), small_config(WINDOWS))
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 9, 16, 17, 60, 61])
def test_prefill_in_chunks_of_any_size_equals_one_pass(model: Transformer, chunk: int) -> None:
    ids = torch.randint(0, 96, (LENGTH,))
    expected = model(ids, [LENGTH])
    cache = model.new_cache(LENGTH)
    chunks = [model(part, [len(part)], [cache]) for part in ids.split(chunk)]
    assert (torch.cat(chunks) - expected).abs().max() < 1e-4


def test_chunks_of_changing_size_equal_one_pass(model: Transformer) -> None:
    ids = torch.randint(0, 96, (LENGTH,))
    cache = model.new_cache(LENGTH)
    chunks = [model(part, [len(part)], [cache]) for part in ids.split([1, 12, 1, 1, 20, 3, 23])]
    assert (torch.cat(chunks) - model(ids, [LENGTH])).abs().max() < 1e-4


def test_packed_sequences_do_not_see_each_other(model: Transformer) -> None:
    first, second = torch.randint(0, 96, (13,)), torch.randint(0, 96, (30,))
    alone = torch.cat((model(first, [13]), model(second, [30])))
    assert torch.allclose(model(torch.cat((first, second)), [13, 30]), alone, atol=1e-5)


def test_packed_sequences_with_caches_mix_prefill_and_decode(model: Transformer) -> None:
    first, second = torch.randint(0, 96, (13,)), torch.randint(0, 96, (30,))
    caches = model.new_caches(2, 30)
    model(first[:12], [12], caches[:1])
    mixed = model(torch.cat((first[12:], second)), [1, 30], caches)
    assert torch.allclose(mixed[0], model(first, [13])[-1], atol=1e-5)
    assert torch.allclose(mixed[1:], model(second, [30]), atol=1e-5)
    assert [cache.length for cache in caches] == [13, 30]


@pytest.mark.parametrize(("kept", "error"), [("bf16", 0.01), ("int8", 0.02)])
def test_fewer_bits_in_the_cache_move_the_logits_a_little(
    model: Transformer, kept: str, error: float
) -> None:
    ids = torch.randint(0, 96, (LENGTH,))
    expected = model(ids, [LENGTH])
    cache = model.new_cache(LENGTH, kept)
    logits = torch.cat([model(part, [len(part)], [cache]) for part in ids.split([40, 1, 1, 19])])
    assert cache.pool.layout.dtype == kv_dtype(kept, model.dtype) != model.dtype
    assert 0 < (logits - expected).norm() / expected.norm() < error


def test_a_copy_in_int8_has_its_scales_too(model: Transformer) -> None:
    ids = torch.randint(0, 96, (20,))
    cache, _ = model.new_caches(2, 64, "int8")
    model(ids, [20], [cache])
    twin = cache.copy()
    following = torch.randint(0, 96, (5,))
    assert torch.equal(model(following, [5], [twin]), model(following, [5], [cache]))


def test_a_cache_dtype_that_there_is_not_is_named(model: Transformer) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: 'fp8' is not one of auto, bf16, int8"):
        model.new_cache(10, "fp8")


def test_forgotten_tokens_are_written_over(model: Transformer) -> None:
    ids, wrong = torch.randint(0, 96, (40,)), torch.randint(0, 96, (9,))
    cache = model.new_cache(60)
    model(ids[:30], [30], [cache])
    model(wrong, [9], [cache])
    cache.length -= 9
    again = model(ids[30:], [10], [cache])
    assert torch.allclose(again, model(ids, [40])[30:], atol=1e-5)


def test_layers_share_pages_by_kind() -> None:
    pattern = (None, 64, 64, 64)
    layout = CacheLayout.of(small_config(pattern, n_layers=8, max_seq_len=512), torch.float32)
    assert layout.windows == (None, 64) and layout.rows == (1, 3) and layout.layers_per_page == 2
    places = [(place.kind, place.row, place.slot) for place in layout.places]
    assert places == [
        (0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0), (0, 0, 1), (1, 1, 1), (1, 2, 0), (1, 2, 1)
    ]  # fmt: skip
    config = small_config(WINDOWS, max_seq_len=512)
    assert CacheLayout.of(config, torch.float32).rows == (1, 1, 1, 1)
    # A window that no context fills is no window.
    assert CacheLayout.of(small_config((None, 512), max_seq_len=512), torch.float32).windows == (
        None,
    )


def test_a_page_counts_all_its_bytes() -> None:
    config = small_config((None, 64), n_layers=4, n_kv_heads=2, head_dim=24)
    layout = CacheLayout.of(config, torch.bfloat16)
    pool = PagePool(layout, 10)  # and the spare page
    assert layout.page_bytes == 2 * 2 * 32 * 2 * 24 * 2
    assert pool.keys.nbytes + pool.values.nbytes == 11 * layout.page_bytes
    layout = CacheLayout.of(config, torch.int8)
    pool = PagePool(layout, 10)
    tensors = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    assert sum(t.nbytes for t in tensors if t is not None) == 11 * layout.page_bytes


@pytest.mark.parametrize("window", [1, 5, 15, 16, 17, 64])
@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_a_windowed_layer_never_holds_more_than_window_and_chunk(window: int, chunk: int) -> None:
    layout = CacheLayout.of(small_config((None, window), max_seq_len=4096), torch.float32)
    pool = PagePool(layout, layout.pages_needed(2000, chunk), enable_prefix_caching=False)
    cache = RaggedCache(pool)
    for start in range(0, 2000 - chunk + 1, chunk):
        cache.prepare(chunk)
        full, windowed = cache.tables
        held = len(windowed.blocks) * layout.page_size
        # Both ends may lie within a page.
        assert held <= window - 1 + chunk + 2 * (layout.page_size - 1)
        assert windowed.first * layout.page_size <= max(0, start - window + 1)
        cache.length += chunk
        assert len(full.blocks) == layout.n_blocks(cache.length) and full.first == 0
        assert pool.n_held == cache.n_pages <= layout.pages_needed(cache.length, chunk)
    cache.free()
    assert pool.n_held == 0 and pool.n_available == pool.n_pages


def test_copy_goes_its_own_way_and_shares_full_pages(model: Transformer) -> None:
    ids = torch.randint(0, 96, (40,))
    cache, other = model.new_caches(2, 64)
    model(ids, [40], [cache])
    before = cache.pool.n_held
    twin = cache.copy()
    # Of the full layer two pages are shared and one is the twin's own; of the windowed layers,
    # one each is its own.
    assert twin.n_pages == cache.n_pages and cache.pool.n_held == before + 4
    model(torch.randint(0, 96, (15,)), [15], [cache])
    continued = model(ids[:5], [5], [twin])
    expected = model(torch.cat((ids, ids[:5])), [45])[-5:]
    assert torch.allclose(continued, expected, atol=1e-5)
    cache.free()
    again = model(ids[5:10], [5], [twin])
    expected = model(torch.cat((ids, ids[:10])), [50])[-5:]
    assert torch.allclose(again, expected, atol=1e-5)
    twin.free()
    assert other.pool.n_held == 0


def test_full_cache_refuses_more_and_takes_nothing(model: Transformer) -> None:
    cache = model.new_cache(10)
    with pytest.raises(RequestError, match="11 more do not fit in its capacity of 10"):
        model(torch.zeros(11, dtype=torch.int64), [11], [cache])
    assert cache.length == 0 and cache.n_pages == 0
    pool = PagePool(CacheLayout.of(small_config((None,)), torch.float32), 3)
    cache = RaggedCache(pool)
    with pytest.raises(OutOfPages, match="4 more pages, and 3 are left"):
        cache.prepare(49)
    assert pool.n_held == 0
    cache.prepare(48)
    with pytest.raises(OutOfPages):
        pool.allocate(0, 0, 1)


def test_pages_lie_in_order_however_they_were_given_back() -> None:
    pool = PagePool(CacheLayout.of(small_config((None, 64, 64), n_layers=3), torch.float32), 100)
    caches = [RaggedCache(pool) for _ in range(3)]
    for n_new in (20, 7, 90, 40):
        for cache in caches:
            cache.prepare(n_new)
            cache.length += n_new
        caches[1].free()
    for cache in (caches[2], caches[0], caches[1]):
        cache.free()
    caches[0].prepare(320)
    full, windowed = (table.ids[:, : table.stop].tolist() for table in caches[0].tables)
    assert full == [[*range(20)]]
    assert windowed == [[*range(20, 40)], [*range(40, 60)]]


class AlwaysAsked(RaggedCache):
    """Works out before every token what has to be taken and given back."""

    def _has_room(self, n_new: int) -> bool:
        return False


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("windows", [(None,), (None, 8, 5, 1), (3, 17), (64, None)])
def test_whether_there_is_room_is_what_the_tables_say(
    windows: tuple[int | None, ...], seed: int
) -> None:
    """Answers that grow by tokens and by guesses that are taken back, copies, begun anew."""
    layout = CacheLayout.of(small_config(windows, max_seq_len=512), torch.float32, page_size=4)
    choose = random.Random(seed)
    caches = [kind(PagePool(layout, 400)) for kind in (RaggedCache, AlwaysAsked)]
    n_quick = 0
    for _ in range(150):
        n_new = choose.choice([1, 1, 1, 1, 2, 5, 16])
        n_quick += caches[0]._has_room(n_new)
        assert len({cache.pages_to_take(n_new) for cache in caches}) == 1
        n_back = choose.choice([0, 0, min(n_new - 1, 3)])
        what = choose.choice(["go on"] * 30 + ["copy", "free"])
        for cache in caches:
            cache.prepare(n_new)
            cache.length += n_new - n_back
        if what == "free":
            for cache in caches:
                cache.free()
        if what == "copy":
            twins = [cache.copy() for cache in caches]
            for cache in caches:
                cache.free()
            caches = [twins[0], AlwaysAsked(twins[1].pool)]
            caches[1].length, caches[1].tables = twins[1].length, twins[1].tables
        held = [[(t.first, t.stop, t.ids.tolist()) for t in cache.tables] for cache in caches]
        assert held[0] == held[1]
        assert len({cache.pool.n_available for cache in caches}) == 1
    assert n_quick > 20


def test_caches_of_one_pass_share_a_pool(model: Transformer) -> None:
    caches = [model.new_cache(10), model.new_cache(10)]
    with pytest.raises(RequestError, match="share a pool"):
        model(torch.zeros(2, dtype=torch.int64), [1, 1], caches)


@pytest.mark.parametrize(
    ("ids", "seqlens", "message"),
    [
        ([1, 2, 3], [2], "add up"),
        ([1, 2, 3], [3, 0], "positive"),
        ([1, 2, 96], [3], "0…95; found 1…96"),
        ([-1], [1], "found -1…-1"),
        ([], [], "T > 0"),
    ],
)
def test_wrong_input_is_refused(
    model: Transformer, ids: list[int], seqlens: list[int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        model(torch.tensor(ids, dtype=torch.int64), seqlens)


def test_load_keeps_no_gradients_and_the_files_dtype(tmp_path: Path) -> None:
    folder = write_mistral(tmp_path, small_config(), dtype=torch.bfloat16)
    model = Transformer.from_folder(folder)
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert Transformer.from_folder(folder, dtype="float32").dtype == torch.float32
