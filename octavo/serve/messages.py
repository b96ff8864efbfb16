"""From OpenAI's messages and tools to what mistral-common's template takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from octavo.serve.requests import Message, ToolSpec
from octavo.tool_calls import ID_LENGTH


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as `Tokenizer.encode_chat` takes them.

    A client sends back what it was given, and the template has no place for some of it: of an
    answer with text and calls it takes the calls, and of an empty answer nothing.
    """
    return [_message(message) for message in messages if not _is_empty_answer(message)]


def template_tools(tools: Sequence[ToolSpec] | None) -> list[dict[str, Any]] | None:
    """Tools as `Tokenizer.encode_chat` takes them; the template has no place for `strict`."""
    if not tools:
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": tool.function.name,
                "description": tool.function.description or "",
                "parameters": tool.function.parameters or {},
            },
        }
        for tool in tools
    ]


def _message(message: Message) -> dict[str, Any]:
    result: dict[str, Any] = {"role": message.role, "content": _content(message)}
    if message.tool_calls:
        result["content"] = None
        result["tool_calls"] = [
            {"id": _call_id(call.id), "type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        result["tool_call_id"] = _call_id(message.tool_call_id)
    if message.role == "tool" and message.name:
        result["name"] = message.name
    return result


def _is_empty_answer(message: Message) -> bool:
    return message.role == "assistant" and not message.content and not message.tool_calls


def _content(message: Message) -> str | list[dict[str, str]] | None:
    if not isinstance(message.content, list):
        return message.content
    return [{"type": "text", "text": part.text or part.refusal or ""} for part in message.content]


def _call_id(given: str) -> str:
    """A call's id as the template requires it: nine letters and digits.

    Conversations that began at another server bring other ids; the same one must become the same.
    """
    if len(given) == ID_LENGTH and given.isascii() and given.isalnum():
        return given
    return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[:ID_LENGTH]
