"""A model whose layers stay on disk is the same model, with one layer in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo import Transformer, generate
from octavo.checkpoint import open_checkpoint
from octavo.model import streamed
from octavo.model.streamed import load_layer, streamed_transformer
from octavo.model.transformer import Layer
from tests.checkpoints import quantized_config, small_config, write_mistral, write_quantized

CONFIG = small_config((None, 8, 8, 8))
WRITERS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda folder: write_mistral(folder, CONFIG, dtype=torch.bfloat16),
    "tied": lambda folder: write_mistral(folder, small_config((8,), tied_embeddings=True)),
    "W8A8": lambda folder: write_quantized(folder, quantized_config(), "W8A8"),
    "W4A16": lambda folder: write_quantized(folder, quantized_config(), "W4A16"),
}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("kind", WRITERS)
def test_it_computes_and_generates_the_same(
    tmp_path: Path, kind: str, dtype: torch.dtype | None
) -> None:
    folder = WRITERS[kind](tmp_path)
    whole = Transformer.from_folder(folder, dtype=dtype)
    model = streamed_transformer(open_checkpoint(folder), dtype)
    assert model.dtype == whole.dtype and model.device == whole.device
    ids = torch.randint(96, (50,))
    assert torch.equal(model(ids, [30, 20]), whole(ids, [30, 20]))
    prompts = [ids[:30].tolist(), ids[30:].tolist()]
    answers = [generate(prompts, m, max_tokens=6, temperature=0) for m in (model, whole)]
    assert answers[0] == answers[1] and len(answers[0][0][0]) == 6


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Layer]] = []
    at_once: list[int] = []

    def watch(*arguments: object) -> Layer:
        gc.collect()
        at_once.append(sum(reference() is not None for reference in alive))
        layer = load_layer(*arguments)  # type: ignore[arg-type]
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(streamed, "load_layer", watch)
    model = streamed_transformer(open_checkpoint(write_mistral(tmp_path, CONFIG)))
    assert not [name for name, _ in model.named_parameters() if name.startswith("layers.")]
    model(torch.randint(96, (5,)), [5])
    # While one is read, the one before it is still what the loop calls `layer`.
    assert len(alive) == CONFIG.n_layers and max(at_once) <= 1


def test_a_layer_is_read_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_mistral(tmp_path, CONFIG, dtype=torch.bfloat16))
    whole = Transformer.from_checkpoint(checkpoint).layers[2].state_dict()
    layer = load_layer(checkpoint, 2).state_dict()
    assert layer.keys() == whole.keys()
    assert all(torch.equal(layer[name], tensor) for name, tensor in whole.items())
    assert load_layer(checkpoint, 2, torch.float32).attention_norm.weight.dtype == torch.float32
