"""The JSON that follows [TOOL_CALLS], read a character at a time: where calls and arguments are."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

_T = TypeVar("_T")
_Reading = Generator[None, str, _T]  # takes a character at each yield
_WHITESPACE = " \t\r\n"


class NotACall(Exception):
    """The character just read cannot stand there in a list of calls."""


class Calls(Protocol):
    """Is told of calls as soon as they are certain."""

    def begin(self, name: str) -> None:
        """A call begins."""

    def write(self, arguments: str) -> None:
        """More of its arguments."""

    def end(self) -> None:
        """The call's JSON ends, its arguments before that."""


def read_calls(calls: Calls) -> Generator[None, str, None]:
    """Reads `[{"name": ..., "arguments": {...}}, ...]`, or one such object without the list.

    A generator: start it with `next`, then `send` one character after another; it returns behind
    the list. Keys may come in any order, and others are passed over. `arguments` may also be a
    string that holds an object, and be missing, which is an empty one. What is inside an object
    of arguments is not checked, only where it ends.

    Args:
        calls: is told what was found.

    Raises:
        NotACall: this is no list of calls, or no longer one.
    """
    character = yield from _visible()
    if character == "{":
        return (yield from _call(calls))
    if character != "[":
        raise NotACall
    while True:
        if (yield from _visible()) != "{":
            raise NotACall
        yield from _call(calls)
        character = yield from _visible()
        if character == "]":
            return None
        if character != ",":
            raise NotACall


def _call(calls: Calls) -> _Reading[None]:
    """One call, from behind its opening brace to its closing one."""
    name = arguments = None
    character = yield from _visible()
    while character != "}":
        if character != '"':
            raise NotACall
        key = yield from _string()
        if (yield from _visible()) != ":":
            raise NotACall
        character = yield from _visible()
        if key == "name" and name is None:
            name = yield from _name(character)
            if arguments is not None:
                calls.begin(name)
                calls.write(arguments)
            character = yield from _visible()
        elif key == "arguments" and arguments is None:
            if name is not None and character == "{":
                calls.begin(name)
                arguments = yield from _object(calls.write)
            else:
                arguments = yield from _whole_arguments(character)
                if name is not None:
                    calls.begin(name)
                    calls.write(arguments)
            character = yield from _visible()
        else:
            character = yield from _behind_value(character)
        if character == ",":
            character = yield from _visible()
        elif character != "}":
            raise NotACall
    if name is None:
        raise NotACall
    if arguments is None:
        calls.begin(name)
        calls.write("{}")
    calls.end()


def _visible() -> _Reading[str]:
    """The next character that is not whitespace."""
    while (character := (yield)) in _WHITESPACE:
        pass
    return character


def _name(character: str) -> _Reading[str]:
    name = (yield from _string()) if character == '"' else ""
    if not name:
        raise NotACall
    return name


def _whole_arguments(character: str) -> _Reading[str]:
    """Arguments that cannot be handed out before they end: as a string, or before the name."""
    if character == "{":
        return (yield from _object(lambda _: None))
    text = (yield from _string()) if character == '"' else ""
    try:
        is_object = isinstance(json.loads(text, strict=False), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise NotACall
    return text


def _object(write: Callable[[str], None]) -> _Reading[str]:
    """An object from behind its opening brace; its text, written as it is read."""
    text = ["{"]
    write("{")
    depth = 1
    in_string = escaped = False
    while depth:
        character = yield
        text.append(character)
        write(character)
        if in_string:
            in_string = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            in_string = True
        else:
            depth += (character in "{[") - (character in "}]")
    return "".join(text)


def _string() -> _Reading[str]:
    """What a string says, from behind its opening quote."""
    text = ['"']
    escaped = False
    while True:
        character = yield
        text.append(character)
        if character == '"' and not escaped:
            break
        escaped = not escaped and character == "\\"
    try:
        said = str(json.loads("".join(text), strict=False))
        said.encode()  # half a surrogate pair is no text
    except ValueError:
        raise NotACall from None
    return said


def _behind_value(character: str) -> _Reading[str]:
    """Passes over a value that starts with `character`; the visible character behind it."""
    if character == '"':
        yield from _string()
    elif character in "{[":
        yield from _object(lambda _: None)
    else:
        while character not in _WHITESPACE and character not in ",}":
            character = yield
        if character not in _WHITESPACE:
            return character
    return (yield from _visible())
