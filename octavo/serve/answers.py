"""An answer as it grows, read as events: text, tool calls, pieces of their arguments.

Streamed and unstreamed responses are made from these same events, so that they cannot differ.
"""

from __future__ import annotations

from octavo.engine.outputs import CompletionOutput
from octavo.tokenizer import Tokenizer
from octavo.tool_calls import ContentDelta, Event, ToolCallParser


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

    def read(self, answer: CompletionOutput) -> list[Event]:
        """Events since the last call; none where only a part of a character is new."""
        self.finish_reason = answer.finish_reason
        if self._parser is not None:
            return self._read_calls(self._parser, answer)
        text = answer.text[self._n_text :]
        self._n_text += len(text)
        return [ContentDelta(text)] if text else []

    def _read_calls(self, parser: ToolCallParser, answer: CompletionOutput) -> list[Event]:
        text_length = len(answer.text)
        events = parser.add(answer.token_ids[self._n_tokens :], text_length=text_length)
        self._n_tokens = len(answer.token_ids)
        if answer.finish_reason is not None:
            events += parser.finish(text_length=text_length)
            # A stop string or token of the client's may stand in the middle of a call.
            is_cut = answer.stop_reason is not None and parser.is_cut
            if answer.finish_reason == "stop" and parser.calls and not is_cut:
                self.finish_reason = "tool_calls"
        return events
