"""Tool calls in a model's answer: one parser for answers that stream and answers that do not."""

from __future__ import annotations

import secrets
import string
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from octavo.tokenizer import Detokenizer, Tokenizer
from octavo.tool_call_json import NotACall, read_calls

_ID_CHARACTERS = string.ascii_letters + string.digits
ID_LENGTH = 9  # what the V3 template requires of a call's id


def new_tool_call_id() -> str:
    """Nine random letters and digits."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(ID_LENGTH))


@dataclass(frozen=True)
class ToolCall:
    """One call the model asks for.

    Attributes:
        name: the function's.
        arguments: a JSON object, as the model wrote it; incomplete if the answer was cut there.
        id: nine characters, to be repeated by the tool message that answers.
    """

    name: str
    arguments: str
    id: str = field(default_factory=new_tool_call_id)

    def to_openai(self) -> dict[str, object]:
        """As OpenAI's assistant messages carry it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ContentDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call begins; its arguments follow in ArgumentsDeltas."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the arguments of call `index`."""

    index: int
    text: str


Event = ContentDelta | CallStarted | ArgumentsDelta


class ToolCallParser:
    """Splits one answer into its text and its tool calls, while it is being generated.

    However the tokens are split over calls of `add`, the events add up to the same `content` and
    `calls`: an answer that is not streamed is this parser, fed once.

    - [TOOL_CALLS] counts as the control token only; the same letters in the text are text.
    - Nothing of a call is handed out before its name and the start of an arguments object are
      certain. From there on its arguments come as the model writes them, and stay so if the answer
      is cut in their middle.
    - What follows [TOOL_CALLS] and does not become a call is content, as it stands. Only what was
      begun after a call when the answer ended is dropped.
    - Ids are new ones: the model writes its own, if at all, after the arguments.

    A stop string cuts the engine's text, not its tokens, and the engine keeps back what may become
    one. The text that this parser reads is the engine's, so its length says how far to read.

    Attributes:
        content: the text so far.
        calls: the calls so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tool_calls_id = tokenizer.tool_calls_id
        self._detokenizer = Detokenizer(tokenizer)
        # Text that is not read yet, with None where [TOOL_CALLS] stood.
        self._unread: deque[str | None] = deque()
        self._n_read = 0
        self._events: list[Event] = []  # not handed out yet
        self._content: list[str] = []
        self._calls = _Calls(self._events)
        self._reader: Generator[None, str, None] | None = None  # behind [TOOL_CALLS]
        self._after_calls = False  # where whitespace is no content

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def calls(self) -> list[ToolCall]:
        return [ToolCall(c.name, "".join(parts), c.id) for c, parts in self._calls.found]

    @property
    def is_cut(self) -> bool:
        """Whether the last call has begun and not come to its end."""
        return self._calls.n_whole < len(self._calls.found)

    def add(self, token_ids: Sequence[int], *, text_length: int | None = None) -> list[Event]:
        """Take newly generated tokens in.

        Args:
            token_ids: only the new ones.
            text_length: characters of the engine's text so far (`len(CompletionOutput.text)`);
                what lies beyond waits. None reads all there is.

        Returns:
            What became certain, neighbouring deltas joined.
        """
        for token_id in token_ids:
            if token_id == self._tool_calls_id:
                self._unread.extend((self._detokenizer.flush(), None))
            self._unread.append(self._detokenizer.add([token_id]))
        self._read(text_length)
        return self._take_events()

    def finish(self, *, text_length: int | None = None) -> list[Event]:
        """What is left, now that no more tokens will come.

        Args:
            text_length: characters of the engine's final text; what lies beyond was cut off.
        """
        self._unread.append(self._detokenizer.flush())
        self._read(text_length)
        self._unread.clear()
        self._end_block()
        return self._take_events()

    def _read(self, text_length: int | None) -> None:
        while self._unread:
            piece = self._unread.popleft()
            if piece is None:
                self._end_block()
                self._calls.n_before = len(self._calls.found)
                self._reader = read_calls(self._calls)
                next(self._reader)
                continue
            room = len(piece) if text_length is None else max(0, text_length - self._n_read)
            self._n_read += len(piece[:room])
            self._read_text(piece[:room])
            if room < len(piece):
                self._unread.appendleft(piece[room:])
                break

    def _read_text(self, text: str) -> None:
        for at, character in enumerate(text):
            if self._reader is None:
                return self._add_content(text[at:])
            self._calls.pending.append(character)
            try:
                self._reader.send(character)
            except StopIteration:
                self._calls.take_pending()
                self._reader, self._after_calls = None, True
            except NotACall:
                self._reader = None
                self._add_content(self._calls.take_pending())
        return None

    def _end_block(self) -> None:
        """End what was being read behind [TOOL_CALLS], if anything."""
        self._reader = None
        rest = self._calls.take_pending()
        if len(self._calls.found) == self._calls.n_before:
            self._add_content(rest)

    def _add_content(self, text: str) -> None:
        if self._after_calls:
            text = text.lstrip()
        if text:
            self._after_calls = False
            self._content.append(text)
            self._events.append(ContentDelta(text))

    def _take_events(self) -> list[Event]:
        events = _joined(self._events)
        self._events.clear()
        return events


class _Calls:
    """The calls that the reader found, as events and in full.

    Attributes:
        found: each call with its arguments in pieces.
        pending: characters since the last that became part of a call.
        n_before: calls before this [TOOL_CALLS].
        n_whole: calls up to the last that came to its end.
    """

    def __init__(self, events: list[Event]) -> None:
        self._events = events
        self.found: list[tuple[CallStarted, list[str]]] = []
        self.pending: list[str] = []
        self.n_before = 0
        self.n_whole = 0

    def begin(self, name: str) -> None:
        call = CallStarted(len(self.found), new_tool_call_id(), name)
        self.found.append((call, []))
        self._events.append(call)
        self.pending.clear()

    def write(self, arguments: str) -> None:
        self.found[-1][1].append(arguments)
        self._events.append(ArgumentsDelta(len(self.found) - 1, arguments))
        self.pending.clear()

    def end(self) -> None:
        self.n_whole = len(self.found)
        self.pending.clear()

    def take_pending(self) -> str:
        rest = "".join(self.pending)
        self.pending.clear()
        return rest


def split_answer(
    tokenizer: Tokenizer, token_ids: Sequence[int], text_length: int | None = None
) -> tuple[str, list[ToolCall]]:
    """An answer's text and its tool calls.

    Args:
        tokenizer: the model's.
        token_ids: what it generated.
        text_length: characters of the engine's text, if a stop string may have cut it.
    """
    parser = ToolCallParser(tokenizer)
    parser.add(token_ids, text_length=text_length)
    parser.finish(text_length=text_length)
    return parser.content, parser.calls


def _joined(events: list[Event]) -> list[Event]:
    """The same with neighbouring deltas of one kind made one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, ContentDelta) and isinstance(last, ContentDelta):
            joined[-1] = ContentDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            joined[-1] = ArgumentsDelta(last.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
