"""Held-out accuracy while training: an answer is right if each of its tokens is the likeliest.

With the right answer as input this is greedy decoding without decoding.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch

from training.data.batches import PASSKEY_TAIL, Row, collate
from training.data.chat import Chat, ChatEncoder
from training.data.letters import make_letters
from training.data.passkey import PasskeyRows
from training.data.pools import held_out_words, story_sentences
from training.data.sums import make_sum
from training.data.tools import make_tool_answer, make_tool_call
from training.model import Ministral

CHATS = 48
PASSKEYS = ((256, 16), (1024, 8), (4096, 8), (16384, 2))


@cache
def _rows(encoder: ChatEncoder) -> dict[str, list[list[Row]]]:
    """Held-out rows of every task, in groups of one length."""
    rng = random.Random(7)
    words = held_out_words(encoder)

    def pack(chats: list[Chat], length: int) -> list[list[Row]]:
        rows = []
        for chat in chats:
            row = Row(length)
            tokens, prompt = encoder.encode(chat)
            row.add(np.array(tokens), prompt, chat.task.split()[-1])
            rows.append(row)
        return [rows]

    found = {
        "sum": pack([make_sum(rng, True) for _ in range(CHATS)], 128),
        "letters": pack([make_letters(rng, words, True) for _ in range(CHATS)], 128),
        "tool": pack([make_tool_call(rng, True) for _ in range(CHATS)], 576),
        "answer": pack([make_tool_answer(rng, True) for _ in range(16)], 448),
    }
    fillers = [[_tokens(encoder, s) for s in story_sentences(rng, 500)] for _ in range(2)]
    passkeys = PasskeyRows(encoder, fillers)
    for length, count in PASSKEYS:
        groups = []
        for _ in range(count):
            row = Row(length)
            tokens, prompt, _ = passkeys.draw(rng, length, unseen=True)
            row.add(tokens, prompt, "passkey")
            groups.append([row])
        found[f"passkey {length}"] = groups
    return found


def probe(model: Ministral, encoder: ChatEncoder) -> str:
    """Right answers of every task, as a line for the log."""
    shown = []
    for task, groups in _rows(encoder).items():
        right = total = 0
        for rows in groups:
            batch = collate(rows, {}, PASSKEY_TAIL if task.startswith("passkey") else None)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                # The uncompiled layers: these shapes are seen once in a while only.
                with torch.compiler.set_stance("force_eager"):
                    hidden = model(batch.rows)
                logits = model.output(hidden)
            wanted = hidden.shape[1]
            wrong = logits.argmax(-1) != batch.labels[:, -wanted:]
            wrong &= batch.tasks[:, -wanted:] >= 0
            right += int((~wrong.any(1)).sum())
            total += len(rows)
        shown.append(f"{task} {right}/{total}")
    return ", ".join(shown)


def _tokens(encoder: ChatEncoder, sentence: str) -> np.ndarray:
    return np.array(encoder.text(" " + sentence), dtype=np.int64)
