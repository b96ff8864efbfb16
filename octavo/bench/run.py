"""A model at work: prompts read in chunks, then a token for every sequence a step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from octavo.bench.context import fill
from octavo.bench.random_model import RandomBlocks
from octavo.bench.settings import BenchSettings
from octavo.model import Transformer
from octavo.process import seconds_since_start


class Run:
    """The sequences of one measurement, answered greedily.

    Attributes:
        caches: [batch], one a sequence.
        next_ids: [batch] int64, what each sequence goes on with.
        first_token_s: from the process's start until the first sequence had its first token; None
            before that.
    """

    def __init__(self, settings: BenchSettings, model: Transformer) -> None:
        self.settings = settings
        self.model = model
        self.caches = model.new_caches(settings.batch, settings.length, settings.kv)
        self.next_ids = torch.zeros(settings.batch, dtype=torch.int64)
        self.first_token_s: float | None = None
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (settings.batch, settings.prompt)
        self._prompts = torch.randint(model.config.vocab_size, shape, generator=generator)

    @property
    def kv_bytes(self) -> int:
        """Of the pages that are held."""
        pool = self.caches[0].pool
        return pool.n_held * pool.layout.page_bytes

    @torch.inference_mode()
    def read_prompts(self) -> float:
        """Fill the context anew, then read all prompts; the seconds that reading them took."""
        blocks = RandomBlocks(self.settings.seed)
        for cache in self.caches:
            cache.free()
            if self.settings.context:
                fill(cache, self.settings.context, self.settings.chunk, blocks)
        started = time.perf_counter()
        n_read = [0] * self.settings.batch
        while n_read[-1] < self.settings.prompt:
            self._read_chunk(n_read)
        return time.perf_counter() - started

    @torch.inference_mode()
    def generate(self) -> list[float]:
        """Generate the tokens that the settings ask for; the seconds of each step."""
        seconds = []
        ones = [1] * self.settings.batch
        for _ in range(self.settings.decode):
            started = time.perf_counter()
            hidden = self.model.hidden(self.next_ids, ones, self.caches)
            self._choose(list(range(self.settings.batch)), hidden)
            seconds.append(time.perf_counter() - started)
        return seconds

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
        hidden = self.model.hidden(torch.cat(parts), lens, [self.caches[i] for i in indices])
        ends = torch.tensor(lens).cumsum(0) - 1
        complete = [n_read[i] == self.settings.prompt for i in indices]
        if any(complete):
            done = [i for i, is_complete in zip(indices, complete, strict=True) if is_complete]
            self._choose(done, hidden[ends[torch.tensor(complete)]])
        if self.first_token_s is None and complete[0]:
            self.first_token_s = seconds_since_start()

    def _choose(self, indices: list[int], hidden: Tensor) -> None:
        """The likeliest token for each of these sequences, by its row [n, dim]."""
        logits = self.model.logits(hidden)
        if not bool(logits.isfinite().all()):
            raise RuntimeError("the model computed infinity or NaN; a kernel is at fault")
        self.next_ids[indices] = logits.argmax(-1)
