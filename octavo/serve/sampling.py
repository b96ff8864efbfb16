"""From the fields of a request to sampling parameters, within the server's limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from octavo.engine.constraint import Constraint
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.structured_outputs import StructuredOutputsParams, read_schema
from octavo.errors import RequestError
from octavo.serve.errors import ApiError
from octavo.serve.requests import (
    ChatRequest,
    CompletionRequest,
    Generation,
    JsonObjectFormat,
    JsonSchemaFormat,
)
from octavo.serve.settings import Settings
from octavo.tokenizer import Tokenizer

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


def chat_params(request: ChatRequest, settings: Settings, vocab_size: int) -> SamplingParams:
    """Sampling parameters of a chat.

    Raises:
        ApiError, RequestError: 400, a field past a limit.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    _at_most("top_logprobs", logprobs, settings.max_logprobs)
    _at_most("tools", len(request.tools or ()), settings.max_tools)
    for i, tool in enumerate(request.tools or ()):
        _schema(f"tools[{i}].function.parameters", tool.function.parameters or {}, settings)
    fields = _common(request, settings, vocab_size)
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **fields)


def completion_params(
    request: CompletionRequest, settings: Settings, vocab_size: int
) -> SamplingParams:
    """Sampling parameters of a completion.

    Raises:
        ApiError, RequestError: 400, a field past a limit.
    """
    _at_most("logprobs", request.logprobs, settings.max_logprobs)
    max_tokens = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    fields = _common(request, settings, vocab_size)
    return SamplingParams(
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
        **fields,
    )


def compile_form(request: Generation, params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Compile what the answer is held to, which can take a second; the engine then finds it ready.

    Raises:
        RequestError: a form that no answer can be held to, by the name that the client gave it.
    """
    if params.structured_outputs is None:
        return
    with form_as_given(request):
        Constraint.compile(params.structured_outputs, tokenizer)


@contextmanager
def form_as_given(request: Generation) -> Iterator[None]:
    """Name a form that is wrong as the client did: `guided_regex`, not `structured_outputs.regex`.

    Raises:
        RequestError: any from within, so named.
    """
    try:
        yield
    except RequestError as error:
        message = str(error)
        for field, _ in _forms(request)[:1]:
            if field != "structured_outputs":
                message = re.sub(r"^structured_outputs(\.\w+)?", field, message)
        raise RequestError(message) from None


def _forms(request: Generation) -> list[tuple[str, dict[str, Any]]]:
    """What the answer is held to, by field: OpenAI's `response_format`, or vLLM's two ways."""
    wanted: list[tuple[str, dict[str, Any]]] = []
    response_format = request.response_format
    if isinstance(response_format, JsonSchemaFormat):
        schema = response_format.json_schema.schema_
        wanted.append(("response_format.json_schema.schema", {"json": schema}))
    elif isinstance(response_format, JsonObjectFormat):
        wanted.append(("response_format", {"json_object": True}))
    if request.structured_outputs is not None:
        given = request.structured_outputs.model_dump(exclude_unset=True, by_alias=True)
        wanted.append(("structured_outputs", given))
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            wanted.append((f"guided_{kind}", {kind: value}))
    return wanted


def _structured_outputs(request: Generation, settings: Settings) -> StructuredOutputsParams | None:
    wanted = _forms(request)
    if not wanted:
        return None
    if len(wanted) > 1:
        fields = " and ".join(field for field, _ in wanted)
        raise RequestError(f"{wanted[0][0]}: only one form can be held to, not {fields}")
    field, form = wanted[0]
    if form.get("json") is not None:
        form["json"] = _schema(field, form["json"], settings)
    with form_as_given(request):
        return StructuredOutputsParams(**form)


def _schema(field: str, schema: Any, settings: Settings) -> dict[str, Any]:
    return read_schema(
        field, schema, max_depth=settings.max_schema_depth, max_length=settings.max_schema_length
    )


def _common(request: Generation, settings: Settings, vocab_size: int) -> dict[str, Any]:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    _at_most("n", request.n, settings.max_n)
    _at_most("stop", len(stop), settings.max_stop)
    _at_most("stop_token_ids", len(request.stop_token_ids or ()), settings.max_stop)
    for token in request.stop_token_ids or ():
        _in_vocabulary("stop_token_ids", token, vocab_size)
    for token_text in request.logit_bias or {}:
        if not (token_text.isascii() and token_text.isdecimal() and len(token_text) < 10):
            raise ApiError(400, f"logit_bias: {token_text!r} is not a token id", param="logit_bias")
        _in_vocabulary("logit_bias", int(token_text), vocab_size)
    given = {
        "n": request.n,
        "seed": request.seed,
        "stop": stop,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": request.stop_token_ids,
        "include_stop_str_in_output": request.include_stop_str_in_output,
        "skip_special_tokens": request.skip_special_tokens,
        "logit_bias": {int(token): bias for token, bias in (request.logit_bias or {}).items()},
        "structured_outputs": _structured_outputs(request, settings),
    }
    return {name: value for name, value in given.items() if value is not None}


def _at_most(field: str, value: int | None, limit: int) -> None:
    if value is not None and value > limit:
        raise ApiError(400, f"{field}: {value}, but the server takes at most {limit}", param=field)


def _in_vocabulary(field: str, token: int, vocab_size: int) -> None:
    if token >= vocab_size:
        raise ApiError(
            400,
            f"{field}: token {token} is outside the vocabulary of {vocab_size}",
            param=field,
        )
