"""An answer as it grows, read as events: text, tool calls, pieces of their arguments.

Streamed and unstreamed responses are made from these same events, so that they cannot differ.
"""

from __future__ import annotations

from octavo.engine.outputs import CompletionOutput
from octavo.tokenizer import Tokenizer
from octavo.tool_calls import ArgumentsDelta, CallStarted, ContentDelta, Event, ToolCallParser


class AnswerReader:
    """What is new in one answer since it was last read.

    Args:
        tokenizer: the model's.
        parses_tools: whether the answer may hold tool calls.

    Attributes:
        finish_reason: OpenAI's, once the answer is finished.
    """

    def __init__(self, tokenizer: Tokenizer, *, parses_tools: bool) -> None:
        self.finish_reason: str | None = None
        self._parser = ToolCallParser(tokenizer) if parses_tools else None
        self._n_tokens = 0
        self._n_text = 0
        self._has_calls = False

    def read(self, answer: CompletionOutput) -> list[Event]:
        """Events since the last call; an empty list where only a part of a character is new."""
        calls = self._read_calls(answer)
        if self._parser is None:
            text = answer.text
        elif self._has_calls:
            text = self._parser.content
        else:  # the engine's text is cut at stop strings, the parser's is not
            text = answer.text[: len(self._parser.content)]
        events: list[Event] = []
        if len(text) > self._n_text:
            events.append(ContentDelta(text[self._n_text :]))
            self._n_text = len(text)
        if answer.finish_reason is not None:
            calls_tools = self._has_calls and answer.finish_reason == "stop"
            self.finish_reason = "tool_calls" if calls_tools else answer.finish_reason
        return events + calls

    def _read_calls(self, answer: CompletionOutput) -> list[Event]:
        if self._parser is None:
            return []
        events = self._parser.add(answer.token_ids[self._n_tokens :])
        self._n_tokens = len(answer.token_ids)
        if answer.finish_reason is not None:
            events += self._parser.finish()
        calls: list[Event] = [e for e in events if isinstance(e, CallStarted | ArgumentsDelta)]
        self._has_calls |= bool(calls)
        return calls
