"""What clients get back, in OpenAI's shapes. Fields that are not set are left out of the JSON."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from pydantic import BaseModel


def new_id(prefix: str) -> str:
    """Such as chatcmpl-0b1c…"""
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


class PromptTokensDetails(BaseModel):
    """cached_tokens: found in the prefix cache, and not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request; an end-of-sequence token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One of the likeliest tokens of a step. A token may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token, and the likeliest ones beside it."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of each token of the content."""

    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionDelta(BaseModel):
    """A function's name, and arguments or a piece of them."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A call, or a piece of the call of this index; only the first one has id, type and name."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatMessage(BaseModel):
    """An answer, or a piece of one."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    """One answer; finish_reason is stop, length or tool_calls."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class Envelope(BaseModel):
    """What every answer says of itself."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatCompletion(Envelope):
    """The answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Envelope):
    """A piece of the answers to a conversation."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionLogprobs(BaseModel):
    """Of each token; `text_offset` is where it begins in `text`, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class Completion(Envelope):
    """Continuations of the prompts, or pieces of them."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    max_model_len: int | None


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    """Token ids of a text or conversation."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


def to_json(answer: BaseModel) -> str:
    """Fields that were never set are absent, those set to None are null."""
    return answer.model_dump_json(exclude_unset=True)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The sum of it."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )
