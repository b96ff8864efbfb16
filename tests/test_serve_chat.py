"""/v1/chat/completions through the official client, unchanged, against a server process."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from openai import OpenAI

from octavo import LLM, SamplingParams
from tests.serving import CARD_MODEL, SUM, Server, ask, stream

CARDS_CURL = """curl --location 'http://<your-node-url>:8000/v1/chat/completions' \
--header 'Content-Type: application/json' \
--header 'Authorization: Bearer token' \
--data '{
    "model": "mistralai/Ministral-8B-Instruct-2410",
    "messages": [
      {
        "role": "user",
        "content": "Do we need to think for 10 seconds to find the answer of 1 + 1?"
      }
    ]
  }'
"""


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", dtype="float32")


def test_the_cards_curl_line_works_as_it_stands(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    command = CARDS_CURL.replace("http://<your-node-url>:8000", server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    answer = json.loads(done.stdout)
    assert answer["object"] == "chat.completion" and answer["model"] == CARD_MODEL
    assert answer["choices"][0]["message"]["content"]


def test_start_up_says_what_it_did_with_the_cards_line(server: Server) -> None:
    assert "--tensor_parallel=2 comes later; serving on one device" in server.printed
    assert "no --api-key, so only this machine can connect (127.0.0.1)" in server.printed
    assert f"serving {CARD_MODEL} at {server.url}/v1" in server.printed
    assert f"{server.url}/docs" in server.printed


def test_an_answer_is_the_engines_own(client: OpenAI, demo: LLM) -> None:
    expected = demo.chat(SUM, SamplingParams(max_tokens=24, temperature=0))[0]
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.message.content == expected.outputs[0].text == "23 + 48 = 60 + 11 = 71."
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == (
        "stop", "assistant", None,
    )  # fmt: skip
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 5},
        {"stop": [" = 60", "nowhere"]},
        {"n": 3, "temperature": 1.5, "seed": 7},
        {"temperature": 2, "seed": 3, "top_p": 0.99},  # broken characters, too
        {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1, "temperature": 1},
        {"presence_penalty": 1.0, "frequency_penalty": -1.0},
        {"extra_body": {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}, "seed": 5},
    ],
)
def test_a_streamed_answer_is_the_unstreamed_one(client: OpenAI, fields: dict[str, Any]) -> None:
    whole = ask(client, **fields)
    pieces = stream(client, stream_options={"include_usage": True}, **fields)
    for choice in whole.choices:
        assert pieces.content[choice.index] == choice.message.content
        assert pieces.finish_reasons[choice.index] == choice.finish_reason
        if choice.logprobs is not None:
            assert pieces.logprobs[choice.index] == choice.logprobs.content
    assert len(whole.choices) == fields.get("n", 1)
    assert pieces.usage.completion_tokens == whole.usage.completion_tokens
    assert pieces.usage.prompt_tokens == whole.usage.prompt_tokens
    assert pieces.n_chunks > 3


def test_a_stream_tells_its_usage_only_if_asked(client: OpenAI) -> None:
    assert stream(client, max_tokens=2).usage is None


def test_a_seed_repeats_an_answer_and_n_are_different(client: OpenAI) -> None:
    def answers(seed: int) -> list[str]:
        answer = ask(client, n=3, temperature=1.8, seed=seed)
        return [choice.message.content for choice in answer.choices]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_ends_at_the_limit(client: OpenAI, name: str) -> None:
    answer = ask(client, **{"max_tokens": None, name: 3})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: OpenAI) -> None:
    choice = ask(client, stop=" + 11").choices[0]
    assert (choice.message.content, choice.finish_reason) == ("23 + 48 = 60", "stop")


def test_logprobs_name_the_contents_bytes(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert bytes(b for entry in content for b in entry.bytes).decode() == choice.message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token  # greedy
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)


def test_logprobs_without_top_ones(client: OpenAI) -> None:
    content = ask(client, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in content] == [[], []]


def test_text_parts_are_the_text(client: OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": SUM[0]["content"]}]}]
    assert ask(client, parts).choices[0].message == ask(client).choices[0].message


def test_fields_that_change_no_answer_are_taken(client: OpenAI) -> None:
    answer = ask(
        client, user="u", metadata={"a": "b"}, store=False, service_tier="auto", logit_bias={},
        parallel_tool_calls=True, extra_body={"prompt_cache_key": "x", "some_future_field": [1]},
        tools=None, tool_choice="auto",
    )  # fmt: skip
    assert answer.choices[0].message.content == "23 + 48 = 60 + 11 = 71."


def test_a_final_message_is_continued(client: OpenAI) -> None:
    begun = [*SUM, {"role": "assistant", "content": "23 + 48 = 60"}]
    choice = ask(client, begun, extra_body={"continue_final_message": True}).choices[0]
    assert choice.message.content == " + 11 = 71."
