"""Rows for a training step: packed chats, passkey prompts and prose, with weights on the loss."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.chat import ChatEncoder
from training.data.passkey import PasskeyRows, jump_positions
from training.data.pools import Pools
from training.model import Rows

SHORT_TASKS = ("sum", "letters", "smalltalk")
LONG_TASKS = ("tool", "answer")
PASSKEY_TAIL = 32  # no passkey answer is longer


@dataclass
class Batch:
    """Rows and, for each token, the next one and its weight; `tasks` numbers what it belongs to."""

    rows: Rows
    labels: Tensor  # int64 [B, T]
    weights: Tensor  # fp32 [B, T], 0 where nothing is learnt
    tasks: Tensor  # int64 [B, T], an index into TASKS


TASKS = ("passkey", "sum", "letters", "smalltalk", "tool", "answer", "story", "document")


class Row:
    """One row under construction."""

    def __init__(self, length: int) -> None:
        self.tokens = np.zeros(length, dtype=np.int64)
        self.labels = np.zeros(length, dtype=np.int64)
        self.positions = np.zeros(length, dtype=np.int64)
        self.documents = np.full(length, -1, dtype=np.int64)
        self.tasks = np.full(length, -1, dtype=np.int64)
        self.used = 0
        self.count = 0

    @property
    def room(self) -> int:
        """Free places."""
        return len(self.tokens) - self.used

    def add(
        self, tokens: np.ndarray, prompt: int, task: str, positions: np.ndarray | None = None
    ) -> None:
        """Append a document whose tokens after the first `prompt` are learnt."""
        start, end = self.used, self.used + len(tokens)
        self.tokens[start:end] = tokens
        self.labels[start : end - 1] = tokens[1:]
        self.tasks[start + prompt - 1 : end - 1] = TASKS.index(task)
        self.positions[start:end] = np.arange(len(tokens)) if positions is None else positions
        self.documents[start:end] = self.count
        self.used, self.count = end, self.count + 1


class Batches:
    """Draws batches; every draw depends on the given generator only."""

    def __init__(self, encoder: ChatEncoder, pools: Pools) -> None:
        self.pools = pools
        self.passkeys = PasskeyRows(encoder, pools.fillers)

    def passkey(self, rng: random.Random, length: int, prompts: int = 1) -> Row:
        """A row of equally long passkey prompts, most of them with up to four jumps."""
        row, each = Row(length), length // prompts
        for _ in range(prompts):
            tokens, prompt, breaks = self.passkeys.draw(rng, each)
            jumps = rng.choice((0, 0, 0, 1, 2, 3, 4))
            positions = jump_positions(rng, each, breaks, jumps) if rng.random() < 0.7 else None
            row.add(tokens, prompt, "passkey", positions)
        return row

    def chats(self, rng: random.Random, length: int, mix: dict[str, float]) -> Row:
        """As many chats as fit; three in a row that do not fit close it."""
        row, misses = Row(length), 0
        while misses < 3 and row.room > 24:
            task = rng.choices(list(mix), list(mix.values()))[0]
            tokens, prompt = rng.choice(self.pools.chats[task])
            if len(tokens) <= row.room:
                row.add(tokens, prompt, task)
            else:
                misses += 1
        return row

    def prose(self, rng: random.Random, length: int) -> Row:
        """Documents until the row is full; long ones from a random place."""
        row = Row(length)
        kind = "story" if rng.random() < 0.5 else "document"
        pool = self.pools.stories if kind == "story" else self.pools.documents
        while row.room > 1:
            # Drawn by length, or the long topics would hardly ever be read.
            text = (
                max((rng.choice(pool) for _ in range(2)), key=len)
                if row.count == 0
                else rng.choice(pool)
            )
            start = rng.randrange(max(1, len(text) - length // 2))
            row.add(text[start : start + row.room].astype(np.int64), 1, kind)
        return row


def collate(rows: list[Row], task_weights: dict[str, float], tail: int | None = None) -> Batch:
    """Stack rows; each task's weights sum to its share, however many tokens it has here."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]))

    tasks = stack("tasks")
    weights = torch.zeros(tasks.shape)
    for number, task in enumerate(TASKS):
        mask = tasks == number
        if mask.any():
            weights[mask] = task_weights.get(task, 1.0) / mask.sum()
    whole = all(row.count == 1 and row.room == 0 for row in rows)
    documents = None if whole else stack("documents")
    return Batch(
        Rows(stack("tokens"), stack("positions"), documents, tail), stack("labels"), weights, tasks
    )
