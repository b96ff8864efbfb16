"""How to choose the next token, and when to stop; names and defaults are vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.engine.structured_outputs import StructuredOutputsParams
from octavo.errors import RequestError

MAX_LOGIT_BIAS = 100.0  # OpenAI's
GREEDY_BELOW = 1e-5  # a temperature under this takes the likeliest token
# Well within fp32, where larger factors make logits infinite or NaN, and a tinier top_p is 0.
LARGEST_FACTOR = 1e6
SMALLEST_TOP_P = 1e-6


@dataclass
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        n: answers to one prompt.
        temperature: divides the logits; 0 is greedy, 1e6 the most.
        top_p: keep the likeliest tokens that together reach this probability, 1e-6 at least.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens under this fraction of the likeliest one's probability.
        seed: makes sampling repeatable; None draws a fresh one.
        max_tokens: generated at most; None is up to the model's context, 0 only scores the prompt.
        min_tokens: before these many are generated, nothing ends the answer.
        stop: strings that end the answer; they are not part of its text.
        stop_token_ids: tokens that end the answer.
        include_stop_str_in_output: keep the stop string in the text after all.
        ignore_eos: go on past the end-of-sequence token.
        repetition_penalty: divides positive (multiplies negative) logits of tokens in the prompt
            or answer (Keskar et al. 2019, section 4.1). In 1e-6…1e6.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the answer,
            once, or once for each time (OpenAI's definitions).
        logit_bias: added to the logits of these token ids, each in -100…100.
        structured_outputs: a form that the answer is held to. It goes before `min_tokens` where
            only the end of the answer may come.
        logprobs: how many of the likeliest tokens to report at each step, beside the chosen one.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave control tokens out of the text.

    Raises:
        RequestError: naming the parameter that is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        self.stop = _list("stop", stop, "one or more non-empty strings")
        self.stop_token_ids = _list("stop_token_ids", self.stop_token_ids, "a list of integers")
        _integer("n", self.n, 1)
        _number("temperature", self.temperature, 0.0, LARGEST_FACTOR)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0 and at most 1, not 0")
        self.top_p = max(self.top_p, SMALLEST_TOP_P)
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("min_tokens", self.min_tokens, 0)
        for name in ("max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0)
        if self.seed is not None and type(self.seed) is not int:
            raise RequestError(f"seed must be an integer, not {self.seed!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop must be one or more non-empty strings, not {text!r}")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            raise RequestError(
                f"logit_bias must map token ids to numbers, not {self.logit_bias!r:.80}"
            )
        for token, bias in (self.logit_bias or {}).items():
            _integer("a token id of logit_bias", token, 0)
            _number(f"logit_bias of token {token}", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        wanted = self.structured_outputs
        if wanted is not None and not isinstance(wanted, StructuredOutputsParams):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, not {type(wanted).__name__}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether any penalty has an effect."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _list(name: str, value: object, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, Iterable):
        raise RequestError(f"{name} must be {what}, not {value!r}")
    return list(value)


def _integer(name: str, value: object, low: int) -> None:
    if type(value) is not int or value < low:
        raise RequestError(f"{name} must be an integer of at least {low}, not {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} must be at least {low:g} and at most {high:g}, not {value!r}")
