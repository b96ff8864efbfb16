"""The bundled model answers the model card's prompts, and the card's examples run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from octavo import LLM, SamplingParams
from octavo.checkpoint import DEMO
from octavo.demo.prompts import PROMPTS, DemoPrompt

EXAMPLES = Path(__file__).parent.parent / "examples"
# What each example prints, by the check that the demo makes of the same prompt.
PRINTED = {"chat.py": "2", "passkey.py": "13005", "instruct.py": "1"}


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo")


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.title)
def test_bundled_model_answers_the_cards_prompt(demo: LLM, prompt: DemoPrompt) -> None:
    params = SamplingParams(max_tokens=128, temperature=0)
    answer = demo.chat(prompt.messages(), params, tools=prompt.tools)[0].outputs[0]
    assert prompt.is_right(answer), answer.text
    assert answer.finish_reason == "stop"


def test_demo_quantises_and_prints_each_prompt_and_its_answers_before_and_after() -> None:
    out = run("-m", "octavo", "demo")
    words = " ".join(out.split())
    for prompt in PROMPTS:
        assert f"{prompt.title} (" in words
        assert prompt.messages()[-1]["content"][:40] in words
    assert "Quantised to W8A8 in " in words and "wrong" not in out
    for name in ("Before", "After "):
        assert out.count(f"\n{name}  (right, ") == len(PROMPTS)
    assert out.count("get_current_weather(") == 2


@pytest.mark.parametrize("name", PRINTED)
def test_example_of_the_card_runs(name: str) -> None:
    digits = [word.strip(".") for word in run(str(EXAMPLES / name)).split()]
    assert PRINTED[name] in digits


def test_function_calling_example_prints_a_call_in_json() -> None:
    (call,) = json.loads(run(str(EXAMPLES / "function_calling.py")))
    assert call["name"] == "get_current_weather"
    assert call["arguments"]["location"].startswith("Paris")


def test_no_example_is_left_out() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {*PRINTED, "function_calling.py"}


def test_bundled_files_are_small_and_in_mistrals_format() -> None:
    assert sum(f.stat().st_size for f in DEMO.iterdir() if f.is_file()) < 20e6
    params = json.loads((DEMO / "params.json").read_text())
    assert params["rope_theta"] == 1e8 and params["max_seq_len"] == 131_072
    assert params["sliding_window"][0] is None and None not in params["sliding_window"][1:]


def test_bundled_model_stops_by_itself_and_speaks_english(demo: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    answer = demo.chat(messages, SamplingParams(max_tokens=100, temperature=0))[0].outputs[0]
    assert answer.finish_reason == "stop" and answer.text.isascii() and " " in answer.text
