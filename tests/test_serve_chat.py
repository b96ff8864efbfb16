"""/v1/chat/completions through the official client, unchanged, against a server process."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest
from openai import OpenAI

from octavo import LLM, SamplingParams
from octavo.demo.prompts import WEATHER_TOOL
from tests.serving import CARD_MODEL, Server

SUM: Any = [{"role": "user", "content": "What is 23 + 48?"}]
WEATHER: Any = [{"role": "user", "content": "What's the weather like today in Paris?"}]
TOOLS: Any = [WEATHER_TOOL]
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
def client(server: Server) -> OpenAI:
    return server.openai()


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM("demo", dtype="float32")


def ask(client: OpenAI, messages: Any = SUM, **fields: Any) -> Any:
    fields = {"model": CARD_MODEL, "temperature": 0, "max_tokens": 24} | fields
    create: Any = client.chat.completions.create
    return create(messages=messages, **fields)


class Streamed:
    """A streamed answer put together again, choice by choice."""

    def __init__(self, chunks: Any) -> None:
        self.content: dict[int, str] = {}
        self.calls: dict[int, list[dict[str, str]]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.finish_reasons: dict[int, str] = {}
        self.usage: Any = None
        self.n_chunks = 0
        for chunk in chunks:
            self.n_chunks += 1
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        i = choice.index
        self.content[i] = self.content.get(i, "") + (choice.delta.content or "")
        if choice.logprobs is not None:
            self.logprobs.setdefault(i, []).extend(choice.logprobs.content)
        for call in choice.delta.tool_calls or ():
            calls = self.calls.setdefault(i, [])
            if call.index == len(calls):
                assert len(call.id) == 9 and call.type == "function"
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        if choice.finish_reason is not None:
            assert i not in self.finish_reasons
            self.finish_reasons[i] = choice.finish_reason


def stream(client: OpenAI, messages: Any = SUM, **fields: Any) -> Streamed:
    return Streamed(ask(client, messages, stream=True, **fields))


def calls_of(choice: Any) -> list[dict[str, str]]:
    return [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or ()
    ]


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


def test_a_tool_is_called(client: OpenAI) -> None:
    answer = ask(client, WEATHER, tools=TOOLS, max_tokens=64)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = calls_of(choice)
    assert call["name"] == "get_current_weather"
    assert json.loads(call["arguments"])["format"] == "celsius"
    assert len(choice.message.tool_calls[0].id) == 9


@pytest.mark.parametrize("max_tokens", [64, 20, 7])
def test_a_streamed_tool_call_is_the_unstreamed_one(client: OpenAI, max_tokens: int) -> None:
    whole = ask(client, WEATHER, tools=TOOLS, max_tokens=max_tokens).choices[0]
    pieces = stream(client, WEATHER, tools=TOOLS, max_tokens=max_tokens)
    assert pieces.calls.get(0, []) == calls_of(whole)
    assert pieces.content[0] == (whole.message.content or "")
    assert pieces.finish_reasons[0] == whole.finish_reason


def test_a_tools_result_comes_back_in(client: OpenAI, demo: LLM) -> None:
    """Also with the ids of another server, which the template would refuse."""
    call = ask(client, WEATHER, tools=TOOLS, max_tokens=64).choices[0].message
    answers = []
    for call_id in (call.tool_calls[0].id, "call_abcdefghijklmnopqrstuvwx"):
        message = call.model_dump(exclude_none=True)
        message["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "tool_call_id": call_id, "content": '{"temperature": 22}'}
        answers.append(ask(client, [*WEATHER, message, result], tools=TOOLS))
    assert answers[0].choices[0].message.content and answers[0].choices[0].finish_reason == "stop"
    assert answers[0].usage.prompt_tokens > 100 and answers[1].choices[0].message.content


def test_tool_choice_none_calls_nothing(client: OpenAI) -> None:
    choice = ask(client, WEATHER, tools=TOOLS, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason != "tool_calls"


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
