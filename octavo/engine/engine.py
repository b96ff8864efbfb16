"""The loop that runs requests: each step mixes prompt chunks and single new tokens in one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.engine import sampler
from octavo.engine.constraint import Constraint
from octavo.engine.outputs import Logprob, RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.engine.stats import EngineStats
from octavo.errors import CheckpointError, RequestError
from octavo.model import Transformer
from octavo.tokenizer import Tokenizer

MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 1024
LOGPROB_ROWS = 64  # prompt rows whose [rows, vocab] log-probabilities are in memory at a time


@dataclass
class _Request:
    request_id: int
    prompt: str | None
    prompt_ids: list[int]
    sequences: list[Sequence] = field(default_factory=list)

    def output(self) -> RequestOutput:
        first = self.sequences[0]
        wants_prompt = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            prompt_logprobs=first.prompt_logprobs if wants_prompt else None,
            finished=all(s.finish_reason is not None for s in self.sequences),
        )


class Engine:
    """Runs requests, first come first served, a bounded number of tokens a step.

    Args:
        model: the transformer.
        tokenizer: for text and stop strings; None runs on token ids alone.
        eos_id: ends an answer; None takes the tokenizer's.
        max_model_len: tokens of prompt and answer together; None is the model's context.
        max_num_seqs: answers in the making at once.
        max_num_batched_tokens: tokens in one forward pass, which bounds its memory.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        eos_id: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = MAX_NUM_SEQS,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_id if eos_id is None and tokenizer else eos_id
        self.max_model_len = max_model_len or model.config.max_seq_len
        self.max_num_seqs = max_num_seqs
        # Fewer would leave some of the running answers without their one token a step.
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self._requests: dict[int, _Request] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._next_id = 0

    def add_request(
        self, prompt_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> int:
        """Queue a prompt; its request id.

        Raises:
            RequestError: an empty or over-long prompt, a token outside the vocabulary, stop
                strings without a tokenizer, a form that answers cannot be held to.
        """
        self._check(prompt_ids, params)
        room = self.max_model_len - len(prompt_ids)
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        request = _Request(self._next_id, prompt, prompt_ids)
        self._next_id += 1
        request.sequences = [
            Sequence(
                request.request_id, i, prompt_ids, params, max_tokens, self.tokenizer, self.eos_id
            )
            for i in range(params.n)
        ]
        if params.structured_outputs is not None and self.tokenizer is not None:
            constraint = Constraint.compile(params.structured_outputs, self.tokenizer)
            for sequence in request.sequences:
                sequence.constraint = constraint.copy()
        self._requests[request.request_id] = request
        # The other answers start as copies of the first, once it has read the prompt.
        self._waiting.append(request.sequences[0])
        return request.request_id

    def abort(self, request_id: int) -> None:
        """Forget a request, whatever its state; its cache is free at once."""
        self._requests.pop(request_id, None)
        self._waiting = deque(s for s in self._waiting if s.request_id != request_id)
        self._running = [s for s in self._running if s.request_id != request_id]

    def output(self, request_id: int) -> RequestOutput:
        """The answers to a live request, as far as they are."""
        return self._requests[request_id].output()

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        return EngineStats(running=len(self._running), waiting=len(self._waiting))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward pass; the requests that finished with it."""
        batch = self._schedule()
        caches = [s.cache for s, _ in batch if s.cache is not None]
        token_ids = [token for sequence, n in batch for token in sequence.pending(n)]
        seqlens = [n for _, n in batch]
        device = self.model.device
        hidden = self.model.hidden(torch.tensor(token_ids, device=device), seqlens, caches)
        ends = torch.tensor(seqlens).cumsum(0).tolist()
        for (sequence, n), end in zip(batch, ends, strict=True):
            if sequence.params.prompt_logprobs is not None and sequence.index == 0:
                self._score_prompt(sequence, hidden[end - n : end])
        ready = [
            (sequence, end)
            for (sequence, _), end in zip(batch, ends, strict=True)
            if sequence.n_pending == 0
        ]
        if ready:
            logits = self.model.logits(hidden[torch.tensor([end - 1 for _, end in ready])])
            for (sequence, _), row in zip(ready, logits, strict=True):
                self._advance(sequence, row)
        return self._collect_finished()

    def run(self, request_ids: list[int]) -> Iterator[RequestOutput]:
        """Step until these requests are done; each as it finishes. Stopping early aborts them."""
        left = set(request_ids)
        try:
            while left:
                for output in self.step():
                    left.discard(output.request_id)
                    yield output
        finally:
            for request_id in left:
                self.abort(request_id)

    def stream(self, request_id: int) -> Iterator[RequestOutput]:
        """Step until this request is done; its answers after each step that changed them."""
        n_before = -1
        try:
            while request_id in self._requests:
                finished = [o for o in self.step() if o.request_id == request_id]
                output = finished[0] if finished else self.output(request_id)
                n_tokens = sum(len(answer.token_ids) for answer in output.outputs)
                if finished or n_tokens > max(n_before, 0):
                    yield output
                n_before = n_tokens
        finally:
            self.abort(request_id)

    def _schedule(self) -> list[tuple[Sequence, int]]:
        """Which sequences run now, and how many of their pending tokens.

        Answers being written come first, a token each, so that a long prompt delays them by one
        chunk at most; prompts share what is left of the budget in order of arrival.
        """
        while self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting.popleft()
            sequence.cache = self.model.new_cache(len(sequence.prompt_ids) + sequence.max_tokens)
            self._running.append(sequence)
        budget = self.max_num_batched_tokens
        batch: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._running, key=lambda s: s.n_pending > 1):
            n = min(sequence.n_pending, budget)
            if n > 0:
                batch.append((sequence, n))
                budget -= n
        return batch

    def _advance(self, sequence: Sequence, logits: Tensor) -> None:
        """Sample the token after the last one; right after the prompt, for every answer."""
        if bool(logits.isnan().any()):
            raise CheckpointError(
                "the model computed NaN: its weights are damaged, or overflow in float16 "
                "(try dtype float32)"
            )
        siblings = [sequence]
        if not sequence.output_ids and sequence.index == 0:
            others = self._requests[sequence.request_id].sequences[1:]
            for other in others:
                assert sequence.cache is not None
                other.cache = sequence.cache.copy()
            self._running.extend(others)
            siblings += others
        for each in siblings:
            if each.max_tokens == 0:
                each.finish_unsampled()
                continue
            allowed = each.constraint.mask(logits) if each.constraint else logits
            token = sampler.sample(
                allowed, each.params, each.prompt_ids, each.output_ids, each.generator,
                each.banned_ids(),
            )  # fmt: skip
            if each.params.logprobs is not None:
                rows = sampler.top_logprobs(
                    logits[None], torch.tensor([token], device=logits.device), each.params.logprobs
                )
                each.logprobs.append(self._named(rows[0]))
            each.append(token)

    def _score_prompt(self, sequence: Sequence, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow this chunk's rows."""
        assert sequence.cache is not None
        first = sequence.cache.length - hidden.shape[0]  # position of the chunk's first row
        count = sequence.params.prompt_logprobs or 0
        following = sequence.prompt_ids[first + 1 : first + 1 + hidden.shape[0]]
        for start in range(0, len(following), LOGPROB_ROWS):
            chosen = torch.tensor(following[start : start + LOGPROB_ROWS], device=hidden.device)
            logits = self.model.logits(hidden[start : start + len(chosen)])
            rows = sampler.top_logprobs(logits, chosen, count)
            sequence.prompt_logprobs.extend(self._named(row) for row in rows)

    def _named(self, row: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
        decode = self.tokenizer.decode if self.tokenizer else None
        return {
            token: Logprob(logprob, rank, decode([token], special=True) if decode else None)
            for token, (logprob, rank) in row.items()
        }

    def _collect_finished(self) -> list[RequestOutput]:
        # Only what just ran can have finished; thousands of requests may be waiting.
        touched = sorted({s.request_id for s in self._running if s.finish_reason is not None})
        self._running = [s for s in self._running if s.finish_reason is None]
        outputs = []
        for request_id in touched:
            request = self._requests[request_id]
            if all(s.finish_reason is not None for s in request.sequences):
                del self._requests[request_id]
                outputs.append(request.output())
        return outputs

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        if not prompt_ids:
            raise RequestError("the prompt is empty")
        if len(prompt_ids) + (params.max_tokens != 0) > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context is "
                f"{self.max_model_len} with the answer; shorten it or raise max_model_len"
            )
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.model.config.vocab_size:
            raise RequestError(
                f"prompt token {high if low >= 0 else low} is outside the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        if params.structured_outputs is not None and self.tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer")
        highest = max(params.logit_bias or {}, default=0)
        if highest >= self.model.config.vocab_size:
            raise RequestError(
                f"logit_bias: token {highest} is outside the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
