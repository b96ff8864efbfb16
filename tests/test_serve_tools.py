"""Tool calls and structured output through the official client, streamed and not."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from openai import OpenAI

from octavo.demo.prompts import WEATHER_TOOL
from tests.serving import SUM, ask, stream

WEATHER: Any = [{"role": "user", "content": "What's the weather like today in Paris?"}]
OTHER: Any = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"kind": {"enum": ["a", "b"]}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    },
}
TOOLS: Any = [WEATHER_TOOL, OTHER]
SCHEMA: Any = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["sum"],
    "additionalProperties": False,
}


def calls_of(choice: Any) -> list[dict[str, str]]:
    return [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or ()
    ]


def test_a_tool_is_called(client: OpenAI) -> None:
    answer = ask(client, WEATHER, tools=TOOLS[:1], max_tokens=64)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = calls_of(choice)
    assert call["name"] == "get_current_weather"
    assert json.loads(call["arguments"])["format"] == "celsius"
    assert len(choice.message.tool_calls[0].id) == 9


@pytest.mark.parametrize("max_tokens", [64, 20, 7])
def test_a_streamed_tool_call_is_the_unstreamed_one(client: OpenAI, max_tokens: int) -> None:
    whole = ask(client, WEATHER, tools=TOOLS[:1], max_tokens=max_tokens).choices[0]
    pieces = stream(client, WEATHER, tools=TOOLS[:1], max_tokens=max_tokens)
    assert pieces.calls.get(0, []) == calls_of(whole)
    assert pieces.content[0] == (whole.message.content or "")
    assert pieces.finish_reasons[0] == whole.finish_reason


@pytest.mark.parametrize(("stop", "reason"), [("Par", "stop"), ("]", "tool_calls")])
def test_a_call_that_a_stop_string_cuts_is_not_a_whole_one(
    client: OpenAI, stop: str, reason: str
) -> None:
    fields: Any = {"tools": TOOLS[:1], "max_tokens": 64, "stop": stop}
    whole = ask(client, WEATHER, **fields).choices[0]
    pieces = stream(client, WEATHER, **fields)
    assert whole.finish_reason == pieces.finish_reasons[0] == reason
    assert calls_of(whole) == pieces.calls[0]


def test_a_tools_result_comes_back_in(client: OpenAI) -> None:
    """Also with the ids of another server, which the template would refuse."""
    call = ask(client, WEATHER, tools=TOOLS[:1], max_tokens=64).choices[0].message
    answers = []
    for call_id in (call.tool_calls[0].id, "call_abcdefghijklmnopqrstuvwx"):
        message = call.model_dump(exclude_none=True)
        message["tool_calls"][0]["id"] = call_id
        result = {"role": "tool", "tool_call_id": call_id, "content": '{"temperature": 22}'}
        answers.append(ask(client, [*WEATHER, message, result], tools=TOOLS[:1]))
    for answer in answers:
        assert answer.choices[0].message.content and answer.usage.prompt_tokens > 100


def test_tool_choice_none_calls_nothing(client: OpenAI) -> None:
    choice = ask(client, WEATHER, tools=TOOLS[:1], tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason != "tool_calls"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "note"}}},
        {"tool_choice": "required", "parallel_tool_calls": False},
    ],
)
def test_tools_that_must_be_called_are(client: OpenAI, fields: dict[str, Any]) -> None:
    """Sampled hot, and for a prompt that asks for none: only the grammar can make these calls."""
    fields = {"tools": TOOLS, "temperature": 1.5, "seed": 3, "max_tokens": 200} | fields
    whole = ask(client, SUM, **fields).choices[0]
    calls = calls_of(whole)
    assert calls and whole.finish_reason == "tool_calls" and whole.message.content is None
    for call in calls:
        arguments = json.loads(call["arguments"])
        if call["name"] == "note":
            assert arguments["kind"] in "ab" and set(arguments) == {"kind"}
        else:
            assert call["name"] == "get_current_weather"
            assert arguments["format"] in ("celsius", "fahrenheit")
    if isinstance(fields["tool_choice"], dict):
        assert [call["name"] for call in calls] == ["note"]
    if "parallel_tool_calls" in fields:
        assert len(calls) == 1
    assert stream(client, SUM, **fields).calls[0] == calls


@pytest.mark.parametrize("streamed", [False, True])
def test_a_schema_holds_the_answer(client: OpenAI, streamed: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True}}
    fields: Any = {"response_format": form, "temperature": 1.5, "seed": 1, "max_tokens": 100}
    if streamed:
        answer = stream(client, **fields).content[0]
    else:
        answer = ask(client, **fields).choices[0].message.content
    assert 0 <= json.loads(answer)["sum"] <= 999


def test_any_json_object_is_one(client: OpenAI) -> None:
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=200).choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_the_format_text_holds_nothing(client: OpenAI) -> None:
    answer = ask(client, response_format={"type": "text"})
    assert answer.choices[0].message.content == "23 + 48 = 60 + 11 = 71."


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[0-9]{2}"}}, "[0-9]{3}-[0-9]{2}"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_regex": "x{5}"}, "x{5}"),
        ({"guided_json": SCHEMA}, r'\{\s*"sum"\s*:\s*[0-9]+\s*\}'),
        ({"structured_outputs": {"grammar": 'start: "a" "b"~3'}}, "abbb"),
    ],
)
def test_vllms_forms_hold_the_answer(client: OpenAI, extra: dict[str, Any], pattern: str) -> None:
    fields: Any = {"temperature": 1.5, "seed": 2, "max_tokens": 200}
    answer = ask(client, extra_body=extra, **fields).choices[0].message.content
    assert re.fullmatch(pattern, answer), answer


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {
                "name": "x", "schema": {"type": "objekt"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [{"type": "function", "function": {
                "name": "x", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"type": "function", "function": {
                "name": "x", "parameters": {"type": "objekt"}}}]},
            "tools[0]",
        ),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"guided_grammar": 'start: "a"'}, "tools": [OTHER]}, "guided_grammar"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs.regex"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs"),
        (
            {"extra_body": {"guided_regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_is_refused(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **fields)
    assert refused.value.param == param


def test_a_bias_moves_the_answer(client: OpenAI) -> None:
    plain = ask(client, max_tokens=1, logprobs=True).choices[0]
    token = plain.logprobs.content[0].token
    barred = ask(client, max_tokens=1, logit_bias={str(token_id("2")): -100}).choices[0]
    assert token == "2" and barred.message.content != "2"


def token_id(text: str) -> int:
    from octavo.checkpoint import DEMO
    from octavo.tokenizer import Tokenizer

    (found,) = Tokenizer.from_folder(DEMO).encode(text, bos=False)
    return found


def test_an_answer_with_text_and_calls_can_be_sent_back(client: OpenAI) -> None:
    """The template holds either: the calls count. An empty answer counts as none."""
    call = {
        "id": "abcdefghi",
        "type": "function",
        "function": {"name": "get_current_weather", "arguments": '{"location": "Paris"}'},
    }
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "22"}

    def prompt_tokens(*between: Any) -> int:
        messages = [*WEATHER, *between]
        return int(ask(client, messages, tools=TOOLS[:1], max_tokens=1).usage.prompt_tokens)

    with_text = {"role": "assistant", "content": "I will look.", "tool_calls": [call]}
    without = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert prompt_tokens(with_text, result) == prompt_tokens(without, result)
    empty = {"role": "assistant", "content": ""}
    more = {"role": "user", "content": "Hello?"}
    assert prompt_tokens(empty, more) == prompt_tokens(more)
