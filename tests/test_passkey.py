"""Passkey prompts: their length, the key's depth, and how an answer is judged."""

from __future__ import annotations

import pytest

from octavo.checkpoint import DEMO
from octavo.evaluate.passkey import passkey_found, passkey_prompt
from octavo.tokenizer import Tokenizer


@pytest.mark.parametrize("n_tokens", [200, 1000, 5000])
def test_prompt_has_the_length_asked_for_and_no_more(n_tokens: int) -> None:
    tokenizer = Tokenizer.from_folder(DEMO)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, bos=False))

    prompt = passkey_prompt(n_tokens, 0.5, "13005", count_tokens=count)
    assert n_tokens - 20 < count(prompt) <= n_tokens


def test_key_stands_at_its_depth_and_question_at_the_end() -> None:
    for depth in (0.0, 0.25, 0.5, 1.0):
        prompt = passkey_prompt(20_000, depth, "13005")
        at = prompt.index("The pass key is 13005.")
        assert prompt.count("13005") == 2 and prompt.endswith("What is the pass key?")
        assert abs(at / len(prompt) - depth) < 0.02


def test_impossible_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"depth is 1\.5"):
        passkey_prompt(1000, 1.5, "13005")
    with pytest.raises(ValueError, match="n_tokens is 10"):
        passkey_prompt(10, 0.5, "13005")


def test_answer_is_right_only_if_its_first_number_is_the_key() -> None:
    assert passkey_found("The pass key is 13005.", "13005")
    assert not passkey_found("The pass key is 13006, or 13005.", "13005")
    assert not passkey_found("130055", "13005")
    assert not passkey_found("I do not know.", "13005")
