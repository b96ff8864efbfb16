"""Log-probabilities in OpenAI's two forms: the chat's, with bytes, and the completions'."""

from __future__ import annotations

import codecs
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
_PARTIAL = "\ufffd"  # in the text of a token that holds a part of a character

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


class TextOffsets:
    """Where each token of a growing text begins in it, in characters.

    A token that goes on with a character begins where the character does.

    Args:
        tokenizer: the text's.
        start: where the text itself begins.
        special: whether the text has control tokens in it.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._offset = start
        self._leads = True  # whether the next token does: sentencepiece loses its space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens."""
        return [self._add(token) for token in token_ids]

    def _add(self, token: int) -> int:
        offset = self._offset
        is_control = self._tokenizer.is_control(token)
        if is_control and not self._special:
            return offset
        piece = self._tokenizer.token_bytes(token)
        if self._leads and not self._tokenizer.is_tekken:
            piece = piece.removeprefix(b" ")
        self._leads = is_control
        self._offset += len(self._decoder.decode(piece))
        return offset


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    rows: Rows,
    count: int,
    offsets: Sequence[int],
) -> CompletionLogprobs:
    """The completions' form.

    Args:
        tokenizer: for each token's text.
        token_ids: the chosen tokens.
        rows: of each, log-probabilities by token id; None for a prompt's first.
        count: of the likeliest tokens to name beside it.
        offsets: of each, where it begins in the text.
    """
    result = CompletionLogprobs(
        tokens=[], token_logprobs=[], top_logprobs=[], text_offset=list(offsets)
    )
    assert result.top_logprobs is not None
    for token, row in zip(token_ids, rows, strict=True):
        result.tokens.append(_name(tokenizer, token))
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
    piece = tokenizer.token_bytes(token)
    return TopLogprob(
        token=piece.decode("utf-8", "replace"),
        logprob=max(entry.logprob, LOWEST),
        bytes=list(piece),
    )


def _likeliest(top: list[TopLogprob], count: int) -> list[TopLogprob]:
    return sorted(top, key=lambda entry: -entry.logprob)[:count]


def _name(tokenizer: Tokenizer, token: int) -> str:
    """A token as a key: its text, or its bytes where they are only a part of a character."""
    piece = tokenizer.token_bytes(token)
    text = piece.decode("utf-8", "replace")
    if _PARTIAL in text:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    return text
