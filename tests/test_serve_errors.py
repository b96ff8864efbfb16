"""Every error a client can cause: OpenAI's shape, the right status, the field, and one line."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serving import CARD_MODEL, Server

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = "/v1/chat/completions"


def nested(depth: int) -> Any:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


def error_of(response: Any) -> dict[str, Any]:
    """The error of a response, its shape checked."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    kind = "server_error" if response.status_code >= 500 else "invalid_request_error"
    assert error["type"] == ("rate_limit_error" if response.status_code == 429 else kind)
    return error


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"model": "gpt-4"}, 404, "model", CARD_MODEL),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": "Hello"}, 400, "messages", "list"),
        ({"messages": [{"role": "boss", "content": "x"}]}, 400, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0]", "content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", "tool_call_id"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "user message"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400, "messages[0].content[0]", "text only",
        ),
        ({"temperature": 3}, 400, "temperature", "2"),
        ({"temperature": "warm"}, 400, "temperature", "number"),
        ({"temperature": True}, 400, "temperature", "number"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 0}, 400, "n", "1"),
        ({"n": 1000}, 400, "n", "at most 16"),
        ({"max_tokens": 0}, 400, "max_tokens", "1"),
        ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ({"stop": [""]}, 400, "stop", "non-empty"),
        ({"stop": 5}, 400, "stop", "string"),
        ({"seed": 2**70}, 400, "seed", ""),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "at most 20"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "top_logprobs"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "2048"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias", "100"),
        ({"stop_token_ids": [5000]}, 400, "stop_token_ids", "2048"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream_options"),
        ({"max_token": 5}, 400, "max_token", "did you mean max_tokens?"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].function", "required"),
        ({"tools": [TOOL, TOOL]}, 400, "tools", "same name"),
        ({"tools": [TOOL] * 129}, 400, "tools", "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(40)}}]},
            400, "tools[0].function.parameters", "32",
        ),
        (
            {"tools": [{"type": "function",
                        "function": {"name": "f", "parameters": {"title": "x" * 70_000}}}]},
            400, "tools[0].function.parameters", "65536",
        ),
        ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        (
            {"tools": [TOOL],
             "tool_choice": {"type": "function", "function": {"name": "g"}}},
            400, "tool_choice", "'g' is not one of the tools",
        ),
        ({"response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, 400, None, "json_schema"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(
    server: Server, fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    body = {"model": CARD_MODEL, "messages": HELLO, "max_tokens": 2} | fields
    response = server.http.post(CHAT, json=body)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert says in error["message"]
    if param is not None:
        assert error["param"] == param
    assert error["code"] == ("model_not_found" if status == 404 else None)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt[0]", ""),
        ({"prompt": [5000]}, "prompt", "2048"),
        ({"prompt": [-1]}, "prompt[0]", ""),
        ({"prompt": {"a": 1}}, "prompt", ""),
        ({"prompt": ["x"] * 129}, "prompt", "at most 128"),
        ({"prompt": " " * 1_000_000}, "prompt", ""),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"best_of": 3}, "best_of", "same as n"),
        ({"suffix": "x"}, "suffix", "does not fill in"),
    ],
)
def test_a_bad_completion_is_named(
    server: Server, fields: dict[str, Any], param: str, says: str
) -> None:
    body = {"model": CARD_MODEL, "prompt": "x", "max_tokens": 2} | fields
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert says in error["message"] and error["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a b " * 70_000}]}, "messages"),
        ("/v1/completions", {"prompt": "a b " * 70_000}, "prompt"),
    ],
)
def test_a_prompt_that_is_too_long_is_told_both_numbers(
    server: Server, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    response = server.http.post(path, json={"stream": stream} | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "context_length_exceeded" and error["param"] == param
    assert "131072" in error["message"] and "14000" in error["message"]


def test_the_client_raises_its_own_exceptions(server: Server) -> None:
    client = server.openai()
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        create(model=CARD_MODEL, messages=HELLO, n=99, stream=True)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not JSON at byte"),
        (b"", "the body must be a JSON object, not empty"),
        (b"[]", "the body must be a JSON object, not list"),
        (b"\xff\xfe{}", ""),
        (b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "messages[0].role"),
        (b'{"\\ud800max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}', ""),
        (b'{"temperature": NaN, "messages": []}', "temperature"),
        (b"[" * 100_000, ""),
        (b'{"seed": ' + b"9" * 10_000 + b"}", ""),
    ],
)
def test_a_hostile_body_is_only_a_bad_request(server: Server, body: bytes, says: str) -> None:
    response = server.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert says in error_of(response)["message"]


def test_a_body_that_does_not_say_it_is_json_is_refused(server: Server) -> None:
    """A web page of another origin can send such a one without asking leave."""
    body = b'{"messages": [{"role": "user", "content": "x"}]}'
    for headers, found in (({"Content-Type": "text/plain"}, "text/plain"), ({}, "missing")):
        response = server.http.post(CHAT, content=body, headers=headers)
        assert response.status_code == 400
        says = f"the Content-Type is {found}; send application/json"
        assert error_of(response)["message"] == says


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", CHAT, 405), ("POST", "/health", 405), ("POST", "/v1/", 404)],
)
def test_a_wrong_address_or_method(server: Server, method: str, path: str, status: int) -> None:
    response = server.http.request(method, path)
    assert response.status_code == status
    error_of(response)


def test_tokens_outside_the_vocabulary_are_refused(server: Server) -> None:
    response = server.http.post("/detokenize", json={"tokens": [2048]})
    assert response.status_code == 400 and "2048" in error_of(response)["message"]
    for body in ({}, {"prompt": "x", "messages": HELLO}):
        response = server.http.post("/tokenize", json=body)
        assert response.status_code == 400 and error_of(response)["param"] == "prompt"
