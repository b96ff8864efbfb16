"""An answer held to a form: which tokens may come next (llguidance)."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from json import dumps
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from octavo.device import to_device
from octavo.engine.structured_outputs import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Between JSON's tokens: a blank, or a new line and its indentation. Any whitespace at all would let
# a model that has lost its way write blanks until max_tokens.
_WHITESPACE = r" |\r?\n[ \t]{0,20}"

_URI_CHARACTERS = "#/%:?&=+$,;@!*'()~"  # beside letters and digits

logger = logging.getLogger("octavo")


class Constraint:
    """Holds one answer to a grammar: `mask` before a token is chosen, `accept` after.

    The end of the sequence may come only where the grammar may end, and only it where the grammar
    allows nothing else. Control tokens are never text. Tokens that hold a part of a character may
    come where the character may.
    """

    def __init__(self, matcher: LLMatcher, eos_id: int, trigger: int | None) -> None:
        self._matcher = matcher
        self._eos_id = eos_id
        self._trigger = trigger  # None: the grammar has begun
        self._ended = False

    @classmethod
    def compile(cls, params: StructuredOutputsParams, tokenizer: Tokenizer) -> Constraint:
        """The constraint at the start of an answer.

        Raises:
            RequestError: a form that llguidance cannot hold an answer to, or no llguidance.
        """
        env = tokenizer.guidance
        try:
            matcher = _compiled(to_lark(params), env)
        except UnicodeEncodeError as error:
            raise RequestError(f"structured_outputs.{params.given[0]}: {error}") from None
        if matcher.is_error():
            name = params.given[0]
            reason = _first_reason(matcher.get_error(), keep_position=name == "grammar")
            raise RequestError(f"structured_outputs.{name}: {reason}")
        return cls(matcher.deep_copy(), tokenizer.eos_id, params.trigger)

    def copy(self) -> Constraint:
        """Another answer's, which is as far as this one."""
        copied = Constraint(self._matcher.deep_copy(), self._eos_id, self._trigger)
        copied._ended = self._ended
        return copied

    @property
    def active(self) -> bool:
        """Whether the next token is held to anything."""
        return self._trigger is None and not self._ended

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the sequence may come, or it has come."""
        return self._ended or (self._trigger is None and self._matcher.is_stopped())

    def mask(self, logits: Tensor) -> Tensor:
        """The logits with -inf for tokens that may not come next.

        Args:
            logits: [vocab_size] fp32; not changed.
        """
        if not self.active:
            return logits
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=logits.numel(), bitorder="little")
        allowed = torch.from_numpy(bits).view(torch.bool)
        return torch.where(to_device(allowed, logits.device), logits, float("-inf"))

    def accept(self, token_id: int) -> None:
        """Take the chosen token in. What `ignore_eos` adds after the end is free."""
        if not self.active:
            if token_id == self._trigger:
                self._trigger = None
        elif token_id == self._eos_id:
            self._ended = True
        elif not self._matcher.consume_token(token_id):
            # Masked tokens are never chosen, so it is a limit of llguidance's that was met.
            reason = _first_reason(self._matcher.get_error(), keep_position=False)
            logger.warning("octavo: a structured answer ends early: %s", reason)


def _new_matcher(lark: str, env: LLTokenizer) -> LLMatcher:
    """llguidance's state at the start of a grammar; `is_error()` if there is no such grammar."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(env, LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
    matcher.compute_bitmask()  # a grammar that nothing fits fails here
    return matcher


# Dozens of tools take tens of milliseconds, and a conversation brings them with every turn.
_compiled = lru_cache(maxsize=32)(_new_matcher)  # only to be copied


@lru_cache(maxsize=256)
def problem_with(rule: str, tokenizer: Tokenizer) -> str:
    """Why llguidance cannot hold an answer to the right side of a rule; empty if it can.

    Raises:
        RequestError: no llguidance, or not a Tekken tokenizer.
    """
    error = _new_matcher(f"start: {rule}\n", tokenizer.guidance).get_error()
    return _first_reason(error, keep_position=False) if error else ""


def to_lark(params: StructuredOutputsParams) -> str:
    """The form as a whole grammar."""
    return params.grammar if params.grammar is not None else f"start: content\n{content(params)}"


def content(params: StructuredOutputsParams) -> str:
    """The form, other than `grammar`, as the lark rule `content`."""
    if params.regex is not None:
        from llguidance import regex_to_lark

        return f"content: /{regex_to_lark(params.regex, use_ascii='')}/\n"
    if params.choice is not None:
        # As one terminal: as a rule, thousands would be followed one by one.
        return f"content: CHOICE\nCHOICE: {' | '.join(dumps(each) for each in params.choice)}\n"
    if params.json is not None:
        assert isinstance(params.json, dict)
        return f"content: {json_rule(params.json)}\n"
    return f"content: {json_rule({'type': 'object'})}\n"


def json_rule(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """Lark for what fits a schema.

    Args:
        schema: JSON schema; its own `x-guidance` options, if any, go before these.
        lenient: pass over keywords that llguidance does not know instead of failing.
    """
    options = {"whitespace_pattern": _WHITESPACE, "lenient": lenient}
    schema = _with_uri_references(schema)
    given = schema.get("x-guidance")
    if isinstance(given, dict):
        options |= given
    return "%json " + dumps({**schema, "x-guidance": options})


def _with_uri_references(value: Any) -> Any:
    """The same with every `$ref` spelled as URIs must be: `#/$defs/Maß` is not, and often met."""
    if isinstance(value, list):
        return [_with_uri_references(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: quote(inner, safe=_URI_CHARACTERS, errors="surrogatepass")
        if key == "$ref" and isinstance(inner, str)
        else _with_uri_references(inner)
        for key, inner in value.items()
    }


def _first_reason(error: str, *, keep_position: bool) -> str:
    """llguidance's error in one line.

    Args:
        error: several lines, with the grammar's own and a regex's beneath.
        keep_position: keep line and column, which mean something in a grammar of the user's.
    """
    lines = [line.strip() for line in error.strip().splitlines()] or ["unknown error"]
    first = lines[0] if keep_position else re.sub(r"^(at )?\d+\(\d+\): ", "", lines[0])
    first = first.removeprefix("failed to compile JSON schema: ")
    details = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([first, *details[:1]])[:300]
