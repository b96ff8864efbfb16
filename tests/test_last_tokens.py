"""The last layer computes the tokens whose output is wanted, and stores the keys of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams, Transformer
from octavo.errors import RequestError
from tests.checkpoints import small_config, write_mistral, write_w8a8

KEPT, NEW = (5, 0, 40), (1, 30, 9)  # tokens of three sequences
IDS = torch.arange(sum(KEPT) + sum(NEW)) % 96


@pytest.fixture(scope="module", params=["fp32", "W8A8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "W8A8":
        config = small_config((None, 8, 8), n_layers=3)
        return Transformer.from_folder(write_w8a8(folder, config), dtype=torch.float32)
    return Transformer.from_folder(write_mistral(folder, small_config((8, 5, None), n_layers=3)))


def hidden(
    model: Transformer, kv: str, n_outputs: Sequence[int] | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of the sequences' new tokens, and what a pool of pages then holds."""
    caches = model.new_caches(3, 49, kv)
    model.hidden(IDS[: sum(KEPT)], [5, 40], [caches[0], caches[2]])
    found = model.hidden(IDS[sum(KEPT) :], NEW, caches, n_outputs)
    assert [cache.length for cache in caches] == [6, 30, 49]
    pool = caches[0].pool
    stored = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    return found, [each for each in stored if each is not None]


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(
    "n_outputs", [(1, 1, 1), (0, 1, 0), (1, 0, 4), (0, 30, 9), (0, 0, 0), (1, 30, 9)]
)
@torch.inference_mode()
def test_outputs_are_those_of_all_tokens_and_the_cache_is_the_same(
    model: Transformer, kv: str, n_outputs: tuple[int, ...]
) -> None:
    everything, stored = hidden(model, kv, None)
    found, stored_by_fewer = hidden(model, kv, n_outputs)
    wanted = [
        part[len(part) - n :]
        for part, n in zip(everything.split(list(NEW)), n_outputs, strict=True)
    ]
    assert found.shape == (sum(n_outputs), model.config.dim)
    torch.testing.assert_close(
        found, torch.cat(wanted), rtol=0, atol=0.02 if kv == "int8" else 1e-5
    )
    assert all(torch.equal(*each) for each in zip(stored, stored_by_fewer, strict=True))


@torch.inference_mode()
def test_the_same_without_a_cache(model: Transformer) -> None:
    ids = IDS[: sum(NEW)]
    everything = model.hidden(ids, NEW)
    found = model.hidden(ids, NEW, n_outputs=(1, 0, 2))
    expected = torch.cat((everything[:1], everything[-2:]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n_outputs", "n_computed"), [((1, 0, 2), 3), ((0, 0, 0), 0), (NEW, 40)])
@torch.inference_mode()
def test_only_the_last_layer_leaves_tokens_out(
    model: Transformer, n_outputs: tuple[int, ...], n_computed: int
) -> None:
    seen: list[int] = []

    def watch(linear: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        seen.append(len(output))

    watched = [each for name, each in model.named_modules() if name.endswith("feed_forward.w2")]
    hooks = [each.register_forward_hook(watch) for each in watched]
    try:
        hidden(model, "auto", n_outputs)
    finally:
        for hook in hooks:
            hook.remove()
    # The first pass wants all of its 45 tokens.
    assert seen == [45, 45, 45, 40, 40] + [n_computed] * (n_computed > 0)


@pytest.mark.parametrize("n_outputs", [(1, 1), (2, 1, 1), (-1, 1, 1), (1, 31, 1)])
def test_more_outputs_than_tokens_are_refused(
    model: Transformer, n_outputs: tuple[int, ...]
) -> None:
    caches = model.new_caches(3, 49)
    with pytest.raises(RequestError, match="n_outputs"):
        model.hidden(IDS[: sum(NEW)], NEW, caches, n_outputs)
    assert [cache.length for cache in caches] == [0, 0, 0]


def test_the_engine_asks_for_a_prompts_last_token_unless_it_is_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = LLM("demo", max_num_batched_tokens=64, max_model_len=512)
    asked: list[list[int]] = []
    compute = Transformer.hidden

    def watch(self: Transformer, ids: Any, lens: Any, caches: Any, n_outputs: Any) -> Any:
        asked.append(n_outputs)
        return compute(self, ids, lens, caches, n_outputs)

    monkeypatch.setattr(Transformer, "hidden", watch)
    prompt = {"prompt_token_ids": list(range(100, 250))}
    for scored, expected in ((None, [[0], [0], [1]]), (0, [[64], [64], [22]])):
        asked.clear()
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=scored)
        [output] = llm.generate([prompt], params)
        assert asked == expected
        assert (output.prompt_logprobs is None) == (scored is None)
