"""Log-probabilities in OpenAI's two forms: the chat's, with bytes, and the completions'."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.engine.outputs import CompletionOutput, Logprob
from octavo.serve.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from octavo.tokenizer import Tokenizer

LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say

Rows = Sequence[dict[int, Logprob] | None]


def told_tokens(answer: CompletionOutput) -> int:
    """How many of an answer's tokens are told: all but one that ended it and is not in its text."""
    ended_by_token = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
    return len(answer.token_ids) - ended_by_token


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], rows: Rows, count: int
) -> ChatLogprobs:
    """The chat's form.

    Args:
        tokenizer: for each token's text and bytes.
        token_ids: the chosen tokens.
        rows: of each, log-probabilities by token id.
        count: of the likeliest tokens to name beside it.
    """
    content = []
    for token, row in zip(token_ids, rows, strict=True):
        assert row is not None
        top = [_top(tokenizer, i, entry) for i, entry in row.items() if entry.rank <= count]
        chosen = _top(tokenizer, token, row[token])
        content.append(TokenLogprob(**chosen.model_dump(), top_logprobs=_likeliest(top, count)))
    return ChatLogprobs(content=content, refusal=None)


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], rows: Rows, count: int, offset: int
) -> CompletionLogprobs:
    """The completions' form; `offset` is where the first token's text begins, in characters."""
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    assert result.top_logprobs is not None
    for token, row in zip(token_ids, rows, strict=True):
        result.tokens.append(_name(tokenizer, token))
        result.text_offset.append(offset)
        offset += len(tokenizer.decode([token]))
        if row is None:  # nothing comes before a prompt's first token
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            continue
        result.token_logprobs.append(max(row[token].logprob, LOWEST))
        likeliest = [(i, entry) for i, entry in row.items() if entry.rank <= count or i == token]
        result.top_logprobs.append(
            {_name(tokenizer, i): max(entry.logprob, LOWEST) for i, entry in likeliest}
        )
    return result


def _top(tokenizer: Tokenizer, token: int, entry: Logprob) -> TopLogprob:
    text = tokenizer.decode([token], special=True)
    return TopLogprob(
        token=text,
        logprob=max(entry.logprob, LOWEST),
        bytes=list(tokenizer.token_bytes(token)),
    )


def _likeliest(top: list[TopLogprob], count: int) -> list[TopLogprob]:
    return sorted(top, key=lambda entry: -entry.logprob)[:count]


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a key: its text, or its bytes where they are only a part of a character."""
    text = tokenizer.decode([token], special=True)
    if "\ufffd" in text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))
    return text
