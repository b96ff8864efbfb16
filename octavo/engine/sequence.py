"""One answer in the making: its tokens, its cache, its text, and whether it has ended."""

from __future__ import annotations

import secrets

from octavo.cache import RaggedCache
from octavo.engine.constraint import Constraint
from octavo.engine.outputs import CompletionOutput, Logprob
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.speculation import PromptLookup
from octavo.tokenizer import Detokenizer, Tokenizer


class Sequence:
    """A prompt and the answer that grows behind it.

    Attributes:
        request_id, index: which request, and which of its answers.
        prompt_ids, output_ids: token ids.
        token_ids: both.
        cache: keys and values of the first `cache.length` tokens; None while it waits.
        max_tokens: the request's limit, or what the context leaves.
        seed: of all its draws.
        digests: of its blocks, as the prefix cache knows them.
        n_remembered: blocks that the prefix cache has been told of.
        n_cached: tokens that the prefix cache had when it first ran; None until then.
        was_counted: whether its prompt is in the engine's statistics.
        lookup: guesses its next tokens.
        constraint: what the answer is held to, if anything.
    """

    def __init__(
        self,
        request_id: int,
        index: int,
        prompt_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        tokenizer: Tokenizer | None,
        eos_id: int | None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.prompt_ids = prompt_ids
        self.output_ids: list[int] = []
        self.token_ids = list(prompt_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.cache: RaggedCache | None = None
        self.constraint: Constraint | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        seed = secrets.randbits(63) if params.seed is None else params.seed
        self.seed = (seed + index) % 2**63
        self.digests: list[bytes] = []
        self.n_remembered = 0
        self.n_cached: int | None = None
        self.was_counted = False
        self.lookup = PromptLookup()
        self._eos_id = None if params.ignore_eos else eos_id
        self._detokenizer = (
            Detokenizer(tokenizer, special=not params.skip_special_tokens) if tokenizer else None
        )
        self._text = ""
        # A stop string may begin in text that is already there: keep its length less one back.
        stops: list[str] = list(params.stop or ())
        self._held_back = max((len(s) - 1 for s in stops), default=0)
        self._stops = stops

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def n_pending(self) -> int:
        """Tokens that have not been through the model yet."""
        return len(self.token_ids) - (self.cache.length if self.cache is not None else 0)

    def pending(self, limit: int) -> list[int]:
        """The first `limit` of them."""
        assert self.cache is not None
        return self.token_ids[self.cache.length : self.cache.length + limit]

    @property
    def is_adjusted(self) -> bool:
        """Whether the choice of its next token depends on those before, beyond the logits."""
        return (
            self.constraint is not None
            or self.params.penalizes
            or bool(self.params.logit_bias)
            or bool(self.banned_ids())
        )

    def banned_ids(self) -> list[int]:
        """Tokens that would end the answer before `min_tokens`."""
        if len(self.output_ids) >= self.params.min_tokens:
            return []
        eos = [self._eos_id] if self._eos_id is not None else []
        return [*eos, *(self.params.stop_token_ids or ())]

    def append(self, token_id: int) -> None:
        """Take a generated token in, and find out whether the answer ends with it."""
        self.output_ids.append(token_id)
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.accept(token_id)
        if token_id == self._eos_id:
            return self._finish("stop")
        if token_id in (self.params.stop_token_ids or ()):
            self._finish("stop")
            self.stop_reason = token_id
            return None
        if self._detokenizer is not None and self._add_text(self._detokenizer.add([token_id])):
            return None
        if len(self.output_ids) >= self.max_tokens:
            self._finish("length")
        return None

    def add_logprobs(self, token_id: int, row: dict[int, Logprob]) -> None:
        """Log-probabilities of the token that is about to be appended, and of others beside it."""
        self.logprobs.append(row)
        self._cumulative_logprob += row[token_id].logprob

    def finish_unsampled(self) -> None:
        """End a sequence that was only to be scored."""
        self._finish("length")

    def output(self) -> CompletionOutput:
        """The answer so far; while it grows, text that may turn out a stop string is kept back."""
        text = self._text
        if self.finish_reason is None and self._held_back:
            text = text[: -self._held_back]
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=list(self.output_ids),
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.flush())

    def _add_text(self, piece: str) -> bool:
        """Append text; if a stop string is now in it, cut there and finish."""
        searched = max(0, len(self._text) - self._held_back)
        self._text += piece
        if self.stop_reason is not None or not self._stops:
            return False
        if len(self.output_ids) < self.params.min_tokens:
            return False
        found = [(self._text.find(stop, searched), stop) for stop in self._stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if not found:
            return False
        at, stop = min(found, key=lambda match: match[0])
        keep_stop = self.params.include_stop_str_in_output
        self._text = self._text[: at + len(stop) if keep_stop else at]
        self.stop_reason = stop
        self.finish_reason = "stop"
        return True
