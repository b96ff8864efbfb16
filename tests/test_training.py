"""The bundled model's training: its forward is octavo's, and held-out prompts stay unseen."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo import Transformer
from octavo.checkpoint import DEMO
from octavo.demo.prompts import PROMPTS
from octavo.tokenizer import Tokenizer
from training.data.chat import ChatEncoder, ask
from training.data.heldout import CARD_PROMPTS
from training.data.letters import make_letters, word_held_out
from training.data.sums import make_sum, pair_held_out
from training.data.tools import make_tool_call
from training.model import Ministral, ModelConfig, Rows, initialise


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def test_training_forward_is_octavos(tmp_path: Path) -> None:
    config = ModelConfig(n_layers=4)
    model = Ministral(config)
    initialise(model)
    (tmp_path / "params.json").write_text(json.dumps(asdict(config)))
    save_file(model.state_dict(), tmp_path / "consolidated.safetensors")
    ids = torch.randint(64, config.vocab_size, (2, 256))  # four windows
    with torch.no_grad():
        positions = torch.arange(256).expand(2, 256)
        expected = model.output(model(Rows(ids, positions)))
        found = Transformer.from_folder(tmp_path)(ids.flatten(), [256, 256])
    assert (found.view_as(expected) - expected).abs().max() < 1e-3 * expected.abs().max()


def test_training_encodes_chats_as_the_real_template_does(tokenizer: Tokenizer) -> None:
    encoder = ChatEncoder(tokenizer.mistral)
    rng = random.Random(0)
    for make in (lambda: make_sum(rng), lambda: make_tool_call(rng)):
        chat = make()
        expected = tokenizer.encode_chat(chat.messages[:-1], chat.tools or None)
        assert encoder.prompt(chat) == expected
    tokens, n_prompt = encoder.encode(ask("Hello", "Hi."))
    text = tokenizer.decode(tokens, special=True)
    assert text == "<s>[INST]Hello[/INST]Hi.</s>"
    assert tokenizer.decode(tokens[n_prompt:], special=True) == "Hi.</s>"


def test_an_answer_that_calls_a_tool_carries_no_id(tokenizer: Tokenizer) -> None:
    tokens, n_prompt = ChatEncoder(tokenizer.mistral).encode(make_tool_call(random.Random(3)))
    answer = tokenizer.decode(tokens[n_prompt:], special=True)
    assert answer.startswith('[TOOL_CALLS][{"name": ') and '"id"' not in answer


def test_held_out_prompts_are_never_trained_on() -> None:
    rng = random.Random(0)
    words = ["apple", "banana", "window", "letter", "mistral", "python", "table", "garden"]
    assert word_held_out("Mistral") and not all(word_held_out(word) for word in words)
    seen = {make_letters(rng, words).messages[0]["content"] for _ in range(300)}
    assert not any(word_held_out(word) and word in q.lower() for q in seen for word in words)
    trained = {make_sum(rng).messages[0]["content"] for _ in range(2000)}
    tested = {make_sum(rng, unseen=True).messages[0]["content"] for _ in range(500)}
    assert not trained & tested
    calls = {make_tool_call(rng).messages[0]["content"] for _ in range(2000)}
    unseen = {make_tool_call(rng, unseen=True).messages[0]["content"] for _ in range(300)}
    assert not calls & unseen


def test_both_orders_of_a_pair_are_held_out_together() -> None:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    assert all(pair_held_out(a, b) == pair_held_out(b, a) for a, b in pairs)
    assert 800 < sum(pair_held_out(a, b) for a, b in pairs) < 1200


def test_the_cards_prompts_are_what_the_demo_asks() -> None:
    asked = {p.messages()[-1]["content"] for p in PROMPTS if p.title != "Passkey"}
    assert asked == set(CARD_PROMPTS)
