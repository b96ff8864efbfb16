"""The ragged cache: any chunking gives one pass's result, and memory follows window and chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo import Transformer
from octavo.cache import RaggedCache
from octavo.errors import RequestError
from tests.checkpoints import small_config, write_mistral

LENGTH = 61  # not a multiple of any window or chunk here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    config = small_config((None, 8, 5, 1))
    return Transformer.from_folder(write_mistral(tmp_path_factory.mktemp("m"), config))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 9, 16, 60, 61])
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
    caches = [model.new_cache(13), model.new_cache(30)]
    model(first[:12], [12], caches[:1])
    mixed = model(torch.cat((first[12:], second)), [1, 30], caches)
    assert torch.allclose(mixed[0], model(first, [13])[-1], atol=1e-5)
    assert torch.allclose(mixed[1:], model(second, [30]), atol=1e-5)
    assert [cache.length for cache in caches] == [13, 30]


def test_windowed_layers_hold_only_their_window() -> None:
    config = small_config((None, 8, 5, 1), n_kv_heads=2, head_dim=24)
    cache = RaggedCache.for_model(config, 1000, torch.float32)
    token = 2 * 2 * 24 * 4
    assert cache.n_bytes() == token * (1000 + 8 + 5 + 1) == sum(config.kv_bytes(1000, 4))


def test_a_chunk_sees_at_most_its_window_and_itself() -> None:
    cache = RaggedCache.for_model(small_config((8,)), 1000, torch.float32)
    for position in range(0, 800, 40):
        k = torch.full((40, 2, 24), float(position))
        keys, values = cache.layers[0].extend(position, k, k)
        assert len(keys) == len(values) == (47 if position else 40)


def test_ring_gives_the_last_positions_in_order() -> None:
    layer = RaggedCache.for_model(small_config((4,)), 100, torch.float32).layers[0]

    def positions(start: int, n: int) -> torch.Tensor:
        return torch.arange(start, start + n).float()[:, None, None].expand(n, 2, 24)

    layer.extend(0, positions(0, 7), positions(0, 7))
    keys, _ = layer.extend(7, positions(7, 2), positions(7, 2))
    assert keys[:, 0, 0].tolist() == [4, 5, 6, 7, 8]
    keys, _ = layer.extend(9, positions(9, 1), positions(9, 1))
    assert sorted(keys[:, 0, 0].tolist()) == [6, 7, 8, 9]


def test_copy_goes_its_own_way(model: Transformer) -> None:
    ids = torch.randint(0, 96, (20,))
    cache = model.new_cache(40)
    model(ids, [20], [cache])
    twin = cache.copy()
    model(torch.randint(0, 96, (15,)), [15], [cache])
    continued = model(ids[:5], [5], [twin])
    expected = model(torch.cat((ids, ids[:5])), [25])[-5:]
    assert torch.allclose(continued, expected, atol=1e-5)


def test_full_cache_refuses_more(model: Transformer) -> None:
    cache = model.new_cache(10)
    with pytest.raises(RequestError, match="11 more do not fit in its capacity of 10"):
        model(torch.zeros(11, dtype=torch.int64), [11], [cache])
    assert cache.length == 0


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
