"""Tool calls held to the tools' own schemas: OpenAI's tool_choice, as sampling parameters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from json import dumps
from typing import Any

from octavo.engine.constraint import content, json_rule, problem_with
from octavo.engine.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from octavo.engine.structured_outputs import StructuredOutputsParams, read_schema
from octavo.errors import RequestError
from octavo.tokenizer import Tokenizer
from octavo.tool_calls import ID_LENGTH

ToolChoice = str | dict[str, Any]  # auto, none, required, or OpenAI's dict that names a function

logger = logging.getLogger("octavo")


def hold_to_tools(
    params: SamplingParams,
    tokenizer: Tokenizer,
    tools: Sequence[Any] | None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
) -> SamplingParams:
    """The sampling parameters of an answer that may, must, or must not call tools.

    - `auto`: text is free (or held to `structured_outputs`); calls are held to the schemas. Without
      llguidance or a Tekken tokenizer they are free as well.
    - `required`: calls only. A named function: one call of it.
    - `none`: no calls. Give `encode_chat` no tools then.

    Control tokens are left out of the text, whose length says how far calls are read.

    Arguments fit the function's `parameters`. A keyword that llguidance does not know is an error
    in a function that is `strict`, and is passed over in others.

    Args:
        params: the request's; not changed.
        tokenizer: the model's.
        tools: OpenAI's dicts or mistral-common's `Tool`s.
        tool_choice: `auto`, `none`, `required`, or a dict that names a function.
        parallel_tool_calls: whether several calls may be made at once.

    Raises:
        RequestError: naming the tool or choice that is wrong.
    """
    token = tokenizer.tool_calls_id
    names = _choose(tool_choice, tools)
    if tool_choice == "none" or not tools:
        if token is None or not tools:
            return params
        return replace(params, logit_bias={**(params.logit_bias or {}), token: -MAX_LOGIT_BIAS})
    if token is None:
        raise RequestError(f"tools: {tokenizer.path} has no [TOOL_CALLS] token")
    if not params.skip_special_tokens:
        params = replace(params, skip_special_tokens=True)
    free = params.structured_outputs is None
    if tool_choice == "auto" and free and not _can_guide(tokenizer):
        return params
    one = not parallel_tool_calls or isinstance(tool_choice, dict)
    functions = [_function(i, tool) for i, tool in enumerate(tools)]
    rules = [
        _call_rule(i, function, tokenizer)
        for i, function in enumerate(functions)
        if function["name"] in names
    ]
    calls = _calls_grammar(rules, one)
    if tool_choice != "auto":
        start, trigger = f"<[{token}]> calls", None
    elif free:
        start, trigger = "calls", token
    else:
        start, trigger = f"content | <[{token}]> calls", None
        calls += _content(params, tokenizer)
    grammar = f"start: {start}\n{calls}"
    wanted = StructuredOutputsParams(grammar=grammar, trigger=trigger)
    return replace(params, structured_outputs=wanted)


def _choose(tool_choice: object, tools: Sequence[Any] | None) -> list[str]:
    """The names of the functions that may be called."""
    names = [_function(i, tool)["name"] for i, tool in enumerate(tools or ())]
    if tool_choice in ("auto", "none"):
        return names
    if tool_choice == "required":
        if not names:
            raise RequestError("tool_choice: required, but no tools are given")
        return names
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice: one of auto, none, required, or {"type": "function", "function": '
            f'{{"name": ...}}}}, not {tool_choice!r:.80}'
        )
    if name not in names:
        raise RequestError(f"tool_choice: {name} is none of the tools ({', '.join(names)})")
    return [name]


def _function(index: int, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) and hasattr(tool, "to_openai"):
        tool = tool.to_openai()
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"tools.{index}: no function with a name")
    return function


def _can_guide(tokenizer: Tokenizer) -> bool:
    try:
        return tokenizer.guidance is not None
    except RequestError:
        return False


def _content(params: SamplingParams, tokenizer: Tokenizer) -> str:
    """The rule for the text of an answer that calls no tool."""
    assert params.structured_outputs is not None
    if params.structured_outputs.grammar is not None:
        raise RequestError("structured_outputs.grammar: not together with tools")
    assert tokenizer.guidance is not None  # says so if it cannot be
    return content(params.structured_outputs)


def _calls_grammar(rules: list[str], one: bool) -> str:
    """The list of calls as V3 writes it, in the order of keys that the model was trained on."""
    lines = [
        'calls: " "? "[" call "]"' if one else 'calls: " "? "[" call (", " call)* "]"',
        f"call: {' | '.join(f'call_{i}' for i in range(len(rules)))}",
        *(f"call_{i}: {rule}" for i, rule in enumerate(rules)),
        f'id: {dumps(", " + dumps("id") + ": ")} /"[a-zA-Z0-9]{{{ID_LENGTH}}}"/',
    ]
    return "\n".join(lines) + "\n"


def _call_rule(index: int, function: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Lark for a call of one function."""
    opening = f'{{"name": {dumps(function["name"], ensure_ascii=False)}, "arguments": '
    return f'{dumps(opening)} {_arguments(index, function, tokenizer)} id? "}}"'


def _arguments(index: int, function: dict[str, Any], tokenizer: Tokenizer) -> str:
    field = f"tools.{index}.function.parameters"
    parameters = read_schema(field, function.get("parameters") or {})
    schema = {"type": "object", **parameters}
    if schema["type"] != "object":
        raise RequestError(f'{field}: type must be "object", not {schema["type"]!r:.80}')
    strict = function.get("strict") is True
    rule = json_rule(schema, lenient=not strict)
    problem = problem_with(rule, tokenizer)
    if not problem:
        return rule
    if strict:
        raise RequestError(f"{field}: {problem}")
    logger.warning("octavo: %s: arguments are any object, since: %s", field, problem)
    return json_rule({"type": "object"})
