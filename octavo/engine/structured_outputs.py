"""What an answer is held to, as its request says it; names are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps, loads
from typing import Any

from octavo.errors import RequestError

# A schema is compiled before its answer starts, and grows when it is: both bound that work.
MAX_SCHEMA_DEPTH = 64  # nested objects and lists of the schema's own text; a property costs two
MAX_GRAMMAR_LENGTH = 131_072  # characters of a schema, regex, grammar, or all choices


@dataclass
class StructuredOutputsParams:
    """A form that the whole answer has, unless max_tokens or a stop string cuts it. Exactly one of:

    Attributes:
        json: a JSON schema, as a dict or as text. Objects have their properties in its order.
        regex: what the answer matches from beginning to end (Rust's syntax: no look-around).
        choice: strings, of which the answer is one.
        grammar: in llguidance's dialect of Lark, with the rule `start`.
        json_object: any JSON object.

    And of octavo's own:
        trigger: a token at which the form begins; the answer is free before it, and may end
            without it.

    Raises:
        RequestError: naming the field that is wrong, or too large.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False
    trigger: int | None = None

    def __post_init__(self) -> None:
        if type(self.json_object) is not bool:
            raise _wrong("json_object", "must be true or false", self.json_object)
        if len(self.given) != 1:
            found = ", ".join(self.given) or "none"
            raise RequestError(
                "structured_outputs: exactly one of json, regex, choice, grammar, json_object, "
                f"not {found}"
            )
        if self.json is not None:
            self.json = read_schema("structured_outputs.json", self.json)
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise _wrong(name, "must be a non-empty string", text)
        if self.choice is not None and not (
            isinstance(self.choice, list)
            and self.choice
            and all(isinstance(each, str) and each for each in self.choice)
        ):
            raise _wrong("choice", "must be a list of non-empty strings", self.choice)
        length = len(self.regex or "") + len(self.grammar or "") + len("".join(self.choice or []))
        if length > MAX_GRAMMAR_LENGTH:
            raise RequestError(
                f"structured_outputs.{self.given[0]}: {length} characters; at most "
                f"{MAX_GRAMMAR_LENGTH} are allowed"
            )
        if self.trigger is not None and (type(self.trigger) is not int or self.trigger < 0):
            raise _wrong("trigger", "must be a token id", self.trigger)

    @property
    def given(self) -> list[str]:
        """The names of the forms that are set."""
        names = ("json", "regex", "choice", "grammar")
        found = [name for name in names if getattr(self, name) is not None]
        return [*found, "json_object"] if self.json_object else found


def read_schema(
    field: str,
    schema: object,
    *,
    max_depth: int = MAX_SCHEMA_DEPTH,
    max_length: int = MAX_GRAMMAR_LENGTH,
) -> dict[str, Any]:
    """A JSON schema of bounded size.

    Args:
        field: what the user calls it.
        schema: a dict, or its JSON.
        max_depth: of objects and lists in it.
        max_length: characters of its JSON.

    Raises:
        RequestError: not a schema, or one beyond the limits.
    """
    if isinstance(schema, str):
        text = schema
        if len(text) <= max_length:
            try:
                schema = loads(text)
            except RecursionError:
                raise _too_deep(field, max_depth) from None
            except ValueError as error:
                raise RequestError(f"{field}: not JSON: {error}") from None
    if not isinstance(schema, (dict, str)):
        raise RequestError(f"{field}: a JSON schema is an object, not {type(schema).__name__}")
    if isinstance(schema, dict):
        _check_depth(field, schema, max_depth)
        try:
            text = dumps(schema)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{field}: not JSON: {error}") from None
    if len(text) > max_length or isinstance(schema, str):
        raise RequestError(f"{field}: {len(text)} characters; at most {max_length} are allowed")
    return schema


def _check_depth(field: str, schema: object, max_depth: int) -> None:
    level: list[object] = [schema]
    for _ in range(max_depth):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise _too_deep(field, max_depth)


def _inside(value: object) -> list[object]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [inner for inner in values if isinstance(inner, (dict, list))]


def _too_deep(field: str, max_depth: int) -> RequestError:
    return RequestError(f"{field}: nested deeper than the {max_depth} levels that are allowed")


def _wrong(name: str, expected: str, found: object) -> RequestError:
    return RequestError(f"structured_outputs.{name} {expected}, not {found!r:.80}")
