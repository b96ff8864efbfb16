"""Tool calls held to their tools: every tool_choice, however wildly the model samples."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from mistral_common.protocol.instruct.tool_calls import Function, Tool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.demo.prompts import WEATHER_TOOL
from octavo.engine.constraint import Constraint
from octavo.engine.outputs import CompletionOutput
from octavo.engine.tool_grammar import ToolChoice, hold_to_tools
from octavo.errors import RequestError
from octavo.tokenizer import Tokenizer
from octavo.tool_calls import split_answer
from tests.threads import threads

PROMPT = [{"role": "user", "content": "What's the weather like today in Paris?"}]


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, "parameters": parameters or {}, "description": "", **more}
    return {"type": "function", "function": function}


PAIR = tool(
    "pair",
    {
        "$defs": {"é": {"enum": ["Köln", "図書館"]}},
        "type": "object",
        "properties": {"one": {"$ref": "#/$defs/é"}, "two": {"type": "boolean"}},
        "required": ["one", "two"],
        "additionalProperties": False,
    },
)
PICK = tool(
    "pick",
    {
        "type": "object",
        "properties": {"n": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 2}},
        "required": ["n"],
        "additionalProperties": False,
    },
)
TOOLS = [PAIR, PICK]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    with threads(1):  # this small, more would mostly wait for one another
        yield LLM("demo", max_num_seqs=16)


def answers(
    llm: LLM, tool_choice: ToolChoice, parallel: bool = True, n: int = 8, **params: Any
) -> list[CompletionOutput]:
    sampling = SamplingParams(n=n, seed=0, max_tokens=120, **params)
    return llm.chat(
        PROMPT, sampling, tools=TOOLS, tool_choice=tool_choice, parallel_tool_calls=parallel
    )[0].outputs


def check_calls(outputs: list[CompletionOutput]) -> list[list[str]]:
    """The functions that each whole answer calls, with arguments that fit and no other text."""
    whole = [output for output in outputs if output.finish_reason == "stop"]
    assert len(whole) >= len(outputs) / 2
    for output in whole:
        assert output.tool_calls
        for call in output.tool_calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return [[call.name for call in output.tool_calls] for output in whole]


def test_required_answers_are_calls(demo: LLM) -> None:
    outputs = answers(demo, "required")
    check_calls(outputs)
    for output in outputs:
        assert output.token_ids[0] == demo.tokenizer.tool_calls_id
        assert split_answer(demo.tokenizer, output.token_ids)[0] == ""


def test_one_call_where_no_parallel_ones_are_wanted(demo: LLM) -> None:
    more = {demo.tokenizer.encode("a}, b", bos=False)[1]: 50.0}  # "}," if it may come
    assert max(len(names) for names in check_calls(answers(demo, "required", logit_bias=more))) > 1
    once = check_calls(answers(demo, "required", parallel=False, logit_bias=more))
    assert {len(names) for names in once} == {1}


def test_a_named_function_is_called_once(demo: LLM) -> None:
    for name in ("pair", "pick"):
        choice = {"type": "function", "function": {"name": name}}
        assert all(names == [name] for names in check_calls(answers(demo, choice)))


def test_auto_holds_calls_and_leaves_text_free(demo: LLM) -> None:
    assert demo.tokenizer.tool_calls_id is not None
    calling = {demo.tokenizer.tool_calls_id: 50.0}
    assert check_calls(answers(demo, "auto", logit_bias=calling, temperature=1.5))
    silent = {demo.tokenizer.tool_calls_id: -100.0}
    params = SamplingParams(n=3, seed=0, max_tokens=20, logit_bias=silent)
    held = demo.chat(PROMPT, params, tools=TOOLS)[0].outputs
    prompt = demo.tokenizer.encode_chat(PROMPT, TOOLS)
    free = demo.generate([prompt], params)[0].outputs
    assert [answer.token_ids for answer in held] == [answer.token_ids for answer in free]


def test_the_models_own_greedy_call_is_unchanged(demo: LLM) -> None:
    greedy = SamplingParams(max_tokens=60, temperature=0)
    prompt = demo.tokenizer.encode_chat(PROMPT, [WEATHER_TOOL])
    free = demo.generate([prompt], greedy)[0].outputs[0]
    assert free.token_ids[0] == demo.tokenizer.tool_calls_id
    named = {"type": "function", "function": {"name": "get_current_weather"}}
    choice: ToolChoice
    for choice in ("auto", "required", named):
        held = demo.chat(PROMPT, greedy, tools=[WEATHER_TOOL], tool_choice=choice)[0].outputs[0]
        assert held.token_ids == free.token_ids and len(held.tool_calls) == 1


def test_none_shows_no_tools_and_calls_none(demo: LLM) -> None:
    output = demo.chat(PROMPT, SamplingParams(max_tokens=2), tools=TOOLS, tool_choice="none")[0]
    assert output.prompt_token_ids == demo.tokenizer.encode_chat(PROMPT)
    token = demo.tokenizer.tool_calls_id
    assert token is not None
    params = SamplingParams(logit_bias={70: 1.0})
    held = hold_to_tools(params, demo.tokenizer, TOOLS, "none")
    assert held.logit_bias == {70: 1.0, token: -100.0} and params.logit_bias == {70: 1.0}


def test_a_streamed_chat_is_held_as_well(demo: LLM) -> None:
    params = SamplingParams(seed=0, max_tokens=120)
    streamed = list(demo.stream_chat(PROMPT, params, tools=TOOLS, tool_choice="required"))[-1]
    whole = demo.chat(PROMPT, params, tools=TOOLS, tool_choice="required")[0]
    assert streamed.outputs[0].token_ids == whole.outputs[0].token_ids
    check_calls(streamed.outputs)


def test_text_may_be_held_to_a_schema_beside_calls(demo: LLM) -> None:
    form = StructuredOutputsParams(json=SCHEMAS["pick"])
    token = demo.tokenizer.tool_calls_id
    assert token is not None
    calling, silent = ({token: bias} for bias in (50.0, -100.0))
    check_calls(answers(demo, "auto", structured_outputs=form, logit_bias=calling))
    for output in answers(demo, "auto", structured_outputs=form, logit_bias=silent, n=4):
        assert output.tool_calls == []
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), SCHEMAS["pick"])


def accepts(tokenizer: Tokenizer, params: SamplingParams, text: str) -> bool:
    """Whether calls may be written so."""
    assert params.structured_outputs is not None and tokenizer.tool_calls_id is not None
    constraint = Constraint.compile(params.structured_outputs, tokenizer)
    for token in [tokenizer.tool_calls_id, *tokenizer.encode(text, bos=False), tokenizer.eos_id]:
        if constraint.mask(torch.zeros(tokenizer.vocab_size))[token] != 0:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"name": "free", "arguments": {}}]', True),
        (' [{"name": "free", "arguments": {"é": [1, null]}}]', True),
        ('[{"name": "free", "arguments": {}, "id": "abcDEF123"}]', True),
        ('[{"name": "free", "arguments": {}, "id": "abc"}]', False),
        ('[{"name": "free", "arguments": []}]', False),
        ('[{"name": "other", "arguments": {}}]', False),
        ('[{"arguments": {}, "name": "free"}]', False),
        ("[]", False),
        ('[{"name": "free", "arguments": {}}] and text', False),
        ('[{"name": "pick", "arguments": {"n": [1]}}, {"name": "free", "arguments": {}}]', True),
        ('[{"name": "pick", "arguments": {"n": [3]}}]', False),
    ],
)
def test_calls_are_written_as_the_template_writes_them(
    demo: LLM, text: str, expected: bool
) -> None:
    for choice in ("auto", "required"):
        params = hold_to_tools(SamplingParams(), demo.tokenizer, [PICK, tool("free")], choice)
        assert accepts(demo.tokenizer, params, text) is expected


def test_tools_of_mistral_common_are_held_too(demo: LLM) -> None:
    function = Function(name="f", parameters=SCHEMAS["pick"])
    params = hold_to_tools(SamplingParams(), demo.tokenizer, [Tool(function=function)])
    assert accepts(demo.tokenizer, params, '[{"name": "f", "arguments": {"n": [1]}}]')
    assert not accepts(demo.tokenizer, params, '[{"name": "f", "arguments": {}}]')


UNKNOWN = {
    "type": "object",
    "properties": {"a": {"type": "array", "uniqueItems": True}},
    "required": ["a"],
}
IMPOSSIBLE = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}


def test_keywords_that_are_not_known_are_passed_over_unless_strict(
    demo: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    params = hold_to_tools(SamplingParams(), demo.tokenizer, [tool("f", UNKNOWN)])
    assert accepts(demo.tokenizer, params, '[{"name": "f", "arguments": {"a": [1, 1]}}]')
    assert not accepts(demo.tokenizer, params, '[{"name": "f", "arguments": {}}]')
    with caplog.at_level(logging.WARNING, "octavo"):
        params = hold_to_tools(SamplingParams(), demo.tokenizer, [tool("f", IMPOSSIBLE)])
    assert "tools.0.function.parameters: arguments are any object, since: " in caplog.text
    assert accepts(demo.tokenizer, params, '[{"name": "f", "arguments": {}}]')
    for parameters in (UNKNOWN, IMPOSSIBLE):
        strict = [tool("g"), tool("f", parameters, strict=True)]
        with pytest.raises(RequestError, match=r"^tools\.1\.function\.parameters: [^\n]*$"):
            hold_to_tools(SamplingParams(), demo.tokenizer, strict)


@pytest.mark.parametrize(
    ("tools", "choice", "problem"),
    [
        (None, "required", "tool_choice: required, but no tools are given"),
        ([PICK], "sometimes", "tool_choice: one of auto, none, required, or"),
        ([PICK], {"type": "function"}, "tool_choice: one of auto, none, required, or"),
        ([PICK], {"function": {"name": "f"}}, "tool_choice: f is none of the tools \\(pick\\)"),
        ([PICK, {"type": "function"}], "auto", "tools.1: no function with a name"),
        (
            [tool("f", {"type": "array"})],
            "auto",
            "parameters: type must be \"object\", not 'array'",
        ),
        ([tool("f", {"enum": ["a" * 131_072]})], "auto", "tools.0.function.parameters: .* at most"),
    ],
)
def test_wrong_tools_and_choices_are_refused_by_name(
    demo: LLM, tools: Any, choice: Any, problem: str
) -> None:
    with pytest.raises(RequestError, match=problem):
        hold_to_tools(SamplingParams(), demo.tokenizer, tools, choice)


def test_a_grammar_cannot_stand_beside_tools(demo: LLM) -> None:
    form = StructuredOutputsParams(grammar='start: "a"')
    with pytest.raises(RequestError, match=r"structured_outputs\.grammar: not together with tools"):
        demo.chat(PROMPT, SamplingParams(structured_outputs=form), tools=TOOLS)


def test_where_nothing_can_be_held_auto_is_free_and_required_refused() -> None:
    sentencepiece = Tokenizer(MistralTokenizer.v3(), Path("tokenizer.model.v3"))
    params = SamplingParams()
    assert hold_to_tools(params, sentencepiece, TOOLS) is params
    with pytest.raises(RequestError, match="needs a Tekken tokenizer"):
        hold_to_tools(params, sentencepiece, TOOLS, "required")
    first = Tokenizer(MistralTokenizer.v1(), Path("tokenizer.model.v1"))
    with pytest.raises(RequestError, match=r"tokenizer.model.v1 has no \[TOOL_CALLS\] token"):
        hold_to_tools(params, first, TOOLS)
