"""A model at work: prompts read in chunks, then a token for every sequence a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.bench.context import fill
from octavo.bench.memory import n_pages
from octavo.bench.random_model import RandomBlocks
from octavo.bench.settings import BenchSettings
from octavo.cache import CacheLayout, PagePool, RaggedCache, kv_dtype
from octavo.engine.decode import decode_steps
from octavo.engine.sampler import likeliest
from octavo.engine.step_limits import StepLimits
from octavo.model import Transformer
from octavo.process import seconds_since_start


@dataclass(frozen=True)
class Steps:
    """The time that steps took, each for one token of every sequence.

    Attributes:
        seconds: of each step.
        short: of each step in turn with those, of sequences that have no context; empty if none
            has any.
    """

    seconds: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)


class Run:
    """The sequences of one measurement, answered greedily.

    Attributes:
        caches: [batch], one a sequence.
        short_caches: [batch], of sequences without the context, to compare steps with; empty if
            there is no context.
        next_ids: [batch] int64 on the CPU, what each sequence goes on with.
        first_token_s: from the process's start until the first sequence had its first token; None
            before that.
    """

    def __init__(self, settings: BenchSettings, model: Transformer) -> None:
        self.settings = settings
        self.model = model
        layout = CacheLayout.of(model.config, kv_dtype(settings.kv, model.dtype))
        pool = PagePool(
            layout, n_pages(layout, settings), model.device, enable_prefix_caching=False
        )
        self.caches = [RaggedCache(pool, settings.length) for _ in range(settings.batch)]
        n_short = settings.batch if settings.context else 0
        self.short_caches = [RaggedCache(pool, settings.decode) for _ in range(n_short)]
        limits = StepLimits(settings.batch, settings.length, speculate=False)
        self._decode = decode_steps(model, pool, limits)
        self.next_ids = torch.zeros(settings.batch, dtype=torch.int64)
        self.first_token_s: float | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.batch, settings.prompt)
        self._ones = [1] * settings.batch
        self._prompts = torch.randint(model.config.vocab_size, shape, generator=generator)

    @property
    def kv_bytes(self) -> int:
        """Of the pages that the sequences hold."""
        page_bytes = self.caches[0].pool.layout.page_bytes
        return sum(cache.n_pages for cache in self.caches) * page_bytes

    @torch.inference_mode()
    def read_prompts(self) -> float:
        """Fill the context anew, then read all prompts; the seconds that reading them took."""
        self._fill_context()
        started = self._now()
        n_read = [0] * self.settings.batch
        while n_read[-1] < self.settings.prompt:
            self._read_chunk(n_read)
        return self._now() - started

    def _fill_context(self) -> None:
        """Begin all sequences anew; nothing but their pages is kept of it."""
        blocks = RandomBlocks(self.settings.seed, self.model.device)
        for cache in self.caches:
            cache.free()
            if self.settings.context:
                fill(cache, self.settings.context, self.settings.chunk, blocks)

    @torch.inference_mode()
    def generate(self, between: Callable[[], object] = lambda: None) -> Steps:
        """Generate the tokens that the settings ask for.

        Args:
            between: what is done after each step, of either kind; not counted.
        """
        steps = Steps()
        for _ in range(self.settings.decode):
            started = self._now()
            logits = self._step(self.caches)
            self.next_ids = likeliest(logits)[1].cpu()
            steps.seconds.append(self._now() - started)
            _require_finite(logits)
            if self.short_caches:
                between()  # so that both come after the same: what is cold takes 1 % of a step
                started = self._now()
                likeliest(self._step(self.short_caches))[1].cpu()
                steps.short.append(self._now() - started)
            between()
        return steps

    def _step(self, caches: Sequence[RaggedCache]) -> Tensor:
        """The logits of one more token for each sequence, [batch, vocab_size]."""
        if self._decode is not None:
            for cache in caches:
                cache.prepare(1)
            return self._decode.run(self.next_ids.tolist(), caches)[1]
        hidden = self.model.hidden(self.next_ids, self._ones, caches)
        return self.model.logits(hidden)

    def _read_chunk(self, n_read: list[int]) -> None:
        """One pass over the next tokens of the first prompts that are not read yet.

        Args:
            n_read: of each prompt; is moved on.
        """
        room = self.settings.chunk
        parts, lens, indices = [], [], []
        for i, start in enumerate(n_read):
            n_new = min(room, self.settings.prompt - start)
            if n_new:
                parts.append(self._prompts[i, start : start + n_new])
                lens.append(n_new)
                indices.append(i)
                n_read[i] += n_new
                room -= n_new
        complete = [n_read[i] == self.settings.prompt for i in indices]
        caches = [self.caches[i] for i in indices]
        hidden = self.model.hidden(torch.cat(parts), lens, caches, list(map(int, complete)))
        if any(complete):
            done = [i for i, is_complete in zip(indices, complete, strict=True) if is_complete]
            logits = self.model.logits(hidden)
            self.next_ids[done] = likeliest(logits)[1].cpu()
            _require_finite(logits)
        if self.first_token_s is None and complete[0]:
            self.first_token_s = seconds_since_start()

    def _now(self) -> float:
        """The time once the device has done all that it was given."""
        torch.get_device_module(self.model.device).synchronize()
        return time.perf_counter()


def _require_finite(logits: Tensor) -> None:
    # By the ends, which NaN is both of: to ask each number is to hold its magnitude too.
    if not all(bool(end.isfinite()) for end in logits.aminmax()):
        raise RuntimeError("the model computed infinity or NaN; a kernel is at fault")
