"""The loop that runs requests: each step mixes prompt chunks and single new tokens in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from octavo.cache import CacheLayout, PagePool, RaggedCache, kv_dtype
from octavo.cache.planner import LOGPROB_ROWS, CachePlan, default_memory, plan_cache
from octavo.device import current
from octavo.engine import sampler
from octavo.engine.choose import Turn, choose, choose_adjusted, pick
from octavo.engine.constraint import Constraint
from octavo.engine.decode import DecodeSteps, decode_bytes, decode_steps
from octavo.engine.decode_graph import DecodeGraphs
from octavo.engine.defaults import MAX_NUM_BATCHED_TOKENS, default_num_seqs
from octavo.engine.outputs import Logprob, RequestOutput
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.scheduler import Scheduled, Scheduler
from octavo.engine.sequence import Sequence
from octavo.engine.stats import EngineStats
from octavo.engine.step_limits import StepLimits
from octavo.engine.warm_up import warm_up_prompts
from octavo.errors import ConfigError, RequestError
from octavo.model import Transformer
from octavo.tokenizer import Tokenizer


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
            finished=self.finished,
            num_cached_tokens=first.n_cached or 0,
        )

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)


class Engine:
    """Runs requests by continuous batching over a ragged paged cache.

    Args:
        model: the transformer.
        tokenizer: for text and stop strings; None runs on token ids alone.
        eos_id: ends an answer; None takes the tokenizer's.
        max_model_len: tokens of prompt and answer together; None is the model's context, or as much
            of it as fits.
        max_num_seqs: answers in the making at once; None is 64 on a GPU, 16 elsewhere.
        max_num_batched_tokens: tokens in one forward pass, which bounds its memory and how long a
            long prompt can delay the answers that are being written.
        memory: bytes of the model's device for weights, cache and all else; None takes most of what
            is free.
        kv_cache_dtype: of keys and values: `auto` (the model's), `bf16`, or `int8` with a scale
            for each token and head.
        enable_prefix_caching: whether prompts that begin alike are computed once.
        speculate: whether tokens are guessed by prompt lookup; the answers are the same.
        cuda_graphs: whether a GPU replays steps of few tokens from captured graphs.

    Attributes:
        plan: how the memory is shared out.

    Raises:
        ConfigError: what does not fit in the memory, with the figures that would; a limit that
            is no positive integer, or is past the model's context; a dtype that there is not.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        eos_id: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        memory: int | None = None,
        kv_cache_dtype: str = "auto",
        enable_prefix_caching: bool = True,
        speculate: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        check_positive(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        check_context(max_model_len, model.config.max_seq_len)
        self.model = model
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_id if eos_id is None and tokenizer else eos_id
        max_num_seqs = max_num_seqs or default_num_seqs(model.device)
        # Fewer would leave some of the running answers without their one token a step.
        max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        layout = CacheLayout.of(model.config, kv_dtype(kv_cache_dtype, model.dtype))
        weight_bytes = model.config.weight_bytes(model.dtype.itemsize)
        if memory is None:
            # Weights that are in memory already are part of the budget.
            memory = default_memory(model.device) + weight_bytes - model.mapped_bytes
        replays = cuda_graphs or model.device.type != "cuda"
        longest = max_model_len or model.config.max_seq_len
        self.plan: CachePlan = plan_cache(
            model.config,
            layout,
            memory=memory,
            weight_bytes=weight_bytes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            chunk=max_num_batched_tokens,
            device=model.device,
            decode_bytes=decode_bytes(layout, model, StepLimits(max_num_seqs, longest, speculate))
            if replays
            else 0,
        )
        self.max_model_len = self.plan.max_model_len
        self.pool = PagePool(layout, self.plan.n_pages, model.device, enable_prefix_caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_num_batched_tokens, speculate)
        self.decode: DecodeSteps | None = None
        if replays:
            limits = StepLimits(max_num_seqs, self.max_model_len, speculate)
            self.decode = decode_steps(model, self.pool, limits)
        self._requests: dict[int, _Request] = {}
        self._finished: dict[int, RequestOutput] = {}  # until `run` or `stream` takes them
        self._next_id = 0
        self._totals: dict[str, int] = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "generated_tokens", "draft_tokens",
             "accepted_tokens"), 0
        )  # fmt: skip

    def add_request(
        self, prompt_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> int:
        """Queue a prompt; its request id.

        Raises:
            RequestError: an empty or over-long prompt, a token outside the vocabulary (of the
                prompt, stop_token_ids or logit_bias), stop strings without a tokenizer, a form
                that answers cannot be held to.
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
        self.scheduler.waiting.append(request.sequences[0])
        return request.request_id

    def abort(self, request_id: int) -> None:
        """Forget a request, whatever its state; its pages are free at once."""
        self._finished.pop(request_id, None)
        if self._requests.pop(request_id, None) is not None:
            self.scheduler.remove(request_id)

    def output(self, request_id: int) -> RequestOutput:
        """The answers to a live request, as far as they are."""
        return self._requests[request_id].output()

    def stats(self) -> EngineStats:
        """What the engine is doing, and has done."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_used=self.pool.n_held,
            pages_total=self.pool.n_pages,
            preemptions_total=self.scheduler.n_preempted,
            **{f"{name}_total": count for name, count in self._totals.items()},
        )

    @property
    def max_num_seqs(self) -> int:
        """Answers in the making at once."""
        return self.scheduler.max_num_seqs

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """On a GPU, compile, try and capture what the first prompts and steps would wait for.

        Only while nothing runs. Elsewhere, and without graphs, there is nothing to do.
        """
        assert not self.has_work
        if isinstance(self.decode, DecodeGraphs):
            most = min(self.scheduler.max_num_batched_tokens, self.max_model_len)
            with current(self.model.device):
                warm_up_prompts(self.model, self.pool, most)
                self.decode.warm_up()

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """One forward pass; the requests that finished with it."""
        batch = self.scheduler.schedule()
        if not batch:
            return []
        with current(self.model.device):
            self._run(batch)
        return self._collect_finished()

    def run(self, request_ids: list[int]) -> Iterator[RequestOutput]:
        """Step until these requests are done; each as it finishes. Stopping early aborts them.

        Several of `run` and `stream` may take turns. What was aborted, or a call of `step` has
        returned, does not come.
        """
        left = set(request_ids)
        try:
            while left:
                if finished := self._finished.keys() & left:
                    request_id = min(finished)
                    left.remove(request_id)
                    yield self._finished.pop(request_id)
                elif left.isdisjoint(self._requests):
                    break
                else:
                    self._step_for_all()
        finally:
            for request_id in left:
                self.abort(request_id)

    def stream(self, request_id: int) -> Iterator[RequestOutput]:
        """Step until this request is done; its answers after each step that changed them.

        Several of `run` and `stream` may take turns. Stopping early aborts the request.
        """
        n_before = 0
        try:
            while request_id in self._requests:
                self._step_for_all()
                if request_id in self._requests:
                    output = self.output(request_id)
                    n_tokens = sum(len(answer.token_ids) for answer in output.outputs)
                    if n_tokens > n_before:
                        yield output
                    n_before = n_tokens
            if request_id in self._finished:
                yield self._finished.pop(request_id)
        finally:
            self.abort(request_id)

    def _step_for_all(self) -> None:
        """Step, and keep what has finished for whoever waits for it."""
        self._finished.update((output.request_id, output) for output in self.step())

    def _run(self, batch: list[Scheduled]) -> None:
        """Put a step's tokens through the model, and choose those that come next."""
        self._count_started(batch)
        complete = [each.n_tokens == each.sequence.n_pending for each in batch]
        hidden, logits, n_outputs = self._forward(batch, complete)
        ends = accumulate(n_outputs)
        sampled: list[tuple[Scheduled, int]] = []  # with their first row of the logits
        rows: list[int] = []
        for each, n, end, is_complete in zip(batch, n_outputs, ends, complete, strict=True):
            n_draft = len(each.draft)
            if _scores_prompt(each.sequence):
                self._score_prompt(each, hidden[end - n : end - n_draft])
            self.scheduler.remember(each.sequence)
            if is_complete:
                sampled.append((each, len(rows)))
                rows.extend(range(end - n_draft - 1, end))
        if not rows:
            return
        logits = self.model.logits(pick(hidden, rows)) if logits is None else pick(logits, rows)
        turns = [
            Turn(answer, each.draft, row)
            for each, row in sampled
            for answer in self._fork_siblings(each.sequence)
        ]
        for turn, chosen in zip(turns, choose(logits, turns), strict=True):
            self._advance(turn, logits, chosen)

    def _forward(
        self, batch: list[Scheduled], complete: list[bool]
    ) -> tuple[Tensor, Tensor | None, list[int]]:
        """Put a step's tokens through the model. Caches are moved on, but for the drafts.

        Args:
            batch: the step.
            complete: of each sequence, whether no token of it is left for later steps.

        Returns:
            The hidden states of each sequence's last tokens, as many as are wanted or more; their
            logits, if they come with them; how many there are of each sequence.
        """
        token_ids: list[int] = []
        caches: list[RaggedCache] = []
        for each in batch:
            assert each.sequence.cache is not None
            token_ids += each.sequence.pending(each.n_tokens) + each.draft
            caches.append(each.sequence.cache)
        query_lens = [each.n_tokens + len(each.draft) for each in batch]
        is_decode = all(each.n_tokens == 1 for each in batch)
        logits: Tensor | None = None
        if self.decode is not None and is_decode and self.decode.takes(query_lens):
            hidden, logits = self.decode.run(token_ids, caches, query_lens)
            n_outputs = query_lens
        else:
            n_outputs = [_n_outputs(*each) for each in zip(batch, complete, strict=True)]
            hidden = self.model.hidden(torch.tensor(token_ids), query_lens, caches, n_outputs)
        for each, cache in zip(batch, caches, strict=True):
            cache.length -= len(each.draft)  # until they prove right
        return hidden, logits, n_outputs

    def _fork_siblings(self, sequence: Sequence) -> list[Sequence]:
        """Right after the prompt, start the siblings from the same pages, as many as may run.

        Returns:
            The sequence, and those that were started.
        """
        started = [sequence]
        if not sequence.output_ids and sequence.index == 0:
            for sibling in self._requests[sequence.request_id].sequences[1:]:
                self.scheduler.fork(sequence, sibling)
                if sibling.cache is not None:
                    started.append(sibling)
        return started

    def _advance(self, turn: Turn, logits: Tensor, chosen: list[int]) -> None:
        """Append the next token, and further ones as long as the guesses were right.

        Args:
            turn: whose.
            logits: [R, vocab_size], of all turns.
            chosen: what was drawn from its rows, as far as it is known.
        """
        sequence, draft = turn.sequence, turn.draft
        if sequence.max_tokens == 0:
            sequence.finish_unsampled()
            return
        assert sequence.cache is not None
        n_accepted = 0
        for i, guess in enumerate([*draft, None]):
            row = turn.row + i
            token = chosen[i] if i < len(chosen) else choose_adjusted(sequence, logits[row])
            if sequence.params.logprobs is not None:
                top = sampler.top_logprobs(
                    logits[row : row + 1],
                    torch.tensor([token]),
                    sequence.params.logprobs,
                )
                sequence.add_logprobs(token, self._named(top[0]))
            sequence.append(token)
            self._totals["generated_tokens"] += 1
            if token != guess or sequence.finish_reason is not None:
                break
            n_accepted += 1
            sequence.cache.length += 1  # the guess is stored, and stays
        if draft:
            sequence.lookup.report(len(draft), n_accepted)
            self._totals["draft_tokens"] += len(draft)
            self._totals["accepted_tokens"] += n_accepted

    def _count_started(self, batch: list[Scheduled]) -> None:
        for each in batch:
            sequence = each.sequence
            if sequence.n_cached is not None and not sequence.was_counted:
                sequence.was_counted = True
                self._totals["prompt_tokens"] += len(sequence.prompt_ids)
                self._totals["cached_tokens"] += sequence.n_cached

    def _score_prompt(self, scheduled: Scheduled, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow this chunk's rows [n, dim]."""
        sequence = scheduled.sequence
        assert sequence.cache is not None and sequence.params.prompt_logprobs is not None
        first = sequence.cache.length - hidden.shape[0]  # position of the chunk's first row
        # After a preemption rows come a second time.
        done = max(0, len(sequence.prompt_logprobs) - 1 - first)
        first, hidden = first + done, hidden[done:]
        following = sequence.prompt_ids[first + 1 : first + 1 + hidden.shape[0]]
        for start in range(0, len(following), LOGPROB_ROWS):
            chosen = torch.tensor(following[start : start + LOGPROB_ROWS])
            logits = self.model.logits(hidden[start : start + len(chosen)])
            rows = sampler.top_logprobs(logits, chosen, sequence.params.prompt_logprobs)
            sequence.prompt_logprobs.extend(self._named(row) for row in rows)

    def _named(self, row: dict[int, tuple[float, int]]) -> dict[int, Logprob]:
        decode = self.tokenizer.decode if self.tokenizer else None
        return {
            token: Logprob(logprob, rank, decode([token], special=True) if decode else None)
            for token, (logprob, rank) in row.items()
        }

    def _collect_finished(self) -> list[RequestOutput]:
        # Only what just ran can have finished; thousands of requests may be waiting.
        finished = [s for s in self.scheduler.running if s.finish_reason is not None]
        for sequence in finished:
            self.scheduler.remember(sequence)
            self.scheduler.finish(sequence)
        outputs = []
        for request_id in sorted({sequence.request_id for sequence in finished}):
            request = self._requests[request_id]
            if request.finished:
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
                f"prompt: token {high if low >= 0 else low} is outside the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        if params.structured_outputs is not None and self.tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer")
        for name in ("stop_token_ids", "logit_bias"):
            highest = max(getattr(params, name) or (), default=0)
            if highest >= self.model.config.vocab_size:
                raise RequestError(
                    f"{name}: token {highest} is outside the vocabulary of "
                    f"{self.model.config.vocab_size}"
                )


def _scores_prompt(sequence: Sequence) -> bool:
    """Whether log-probabilities of its prompt are asked for, which siblings share."""
    return sequence.params.prompt_logprobs is not None and sequence.index == 0


def _n_outputs(scheduled: Scheduled, is_complete: bool) -> int:
    """Of how many last tokens of a sequence in a step the output is wanted."""
    n_draft = len(scheduled.draft)
    if _scores_prompt(scheduled.sequence):
        return scheduled.n_tokens + n_draft
    return 1 + n_draft if is_complete else 0


def check_positive(**options: int | None) -> None:
    """Refuse an option that is given and is no positive integer.

    Raises:
        ConfigError: naming it.
    """
    for name, value in options.items():
        if value is not None and (type(value) is not int or value <= 0):
            raise ConfigError(f"{name} must be a positive integer, not {value!r}")


def check_context(max_model_len: int | None, context: int) -> None:
    """Refuse sequences longer than the model's context.

    Raises:
        ConfigError: with both lengths.
    """
    if max_model_len is not None and max_model_len > context:
        raise ConfigError(
            f"max_model_len {max_model_len} is more than the model's context of {context}"
        )
