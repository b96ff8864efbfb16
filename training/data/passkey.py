"""Passkey rows of an exact length, assembled from sentences that are tokens already.

Sentences start with a space and end with a full stop, where Tekken always splits, so their tokens
joined are the tokens of the joined text.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np

from octavo.evaluate.passkey import ANSWER, CLASSIC_FILLER, INTRODUCTION, NEEDLE, QUESTION
from training.data.chat import ChatEncoder, ask
from training.data.heldout import CARD_KEY, held_out

NAMES = ("magic number", "secret number", "door code", "bank code", "room number")
INTRODUCTIONS = ("", "Read this text.", "Here is a long text. Remember the numbers in it.")


def key_held_out(key: str) -> bool:
    """Keys held out, the card's among them."""
    return key == CARD_KEY or held_out(f"key {key}")


def make_key(rng: random.Random, unseen: bool = False) -> str:
    """Five digits, of a held-out key if `unseen`."""
    while True:
        key = str(rng.randint(10000, 99999))
        if key_held_out(key) == unseen:
            return key


class PasskeyRows:
    """Draws passkey prompts with their answers."""

    def __init__(self, encoder: ChatEncoder, fillers: list[list[np.ndarray]]) -> None:
        self.encoder, self.stories, self.documents = encoder, fillers[0], fillers[1]
        self.classic = [self._text(" " + sentence) for sentence in CLASSIC_FILLER]
        opening, closing = encoder.prompt(ask("x", "")), self._text("x")
        at = opening.index(closing[0])
        self.before, self.after = opening[:at], opening[at + len(closing) :]

    def draw(
        self, rng: random.Random, length: int, unseen: bool = False
    ) -> tuple[np.ndarray, int, list[int]]:
        """Tokens of exactly `length`, the prompt's length, and where positions may jump."""
        name, key = "pass key", make_key(rng, unseen)
        if not unseen and rng.random() < 0.2:
            name = rng.choice(NAMES)
        needles = [self._needle(name, key)]
        if length >= 192 and rng.random() < 0.08:  # another number, which is not asked for
            other = rng.choice([n for n in ("pass key", *NAMES) if n != name])
            needles.append(self._needle(other, make_key(rng)))
            rng.shuffle(needles)
        intro = INTRODUCTION if rng.random() < 0.5 else rng.choice(INTRODUCTIONS)
        question = self._text(" " + QUESTION.replace("pass key", name))
        answer = [*self._text(ANSWER.replace("pass key", name).format(key=key)), self._eos()]
        head = self.before + (self._text(intro) if intro and length >= 192 else [])
        room = length - len(head) - len(question) - len(self.after) - len(answer)
        room -= sum(map(len, needles))
        filler = self._filler(rng, room)
        places = sorted(rng.randint(0, len(filler)) for _ in needles)
        tokens, breaks = list(head), []
        for number, sentence in enumerate([*filler, []]):
            while places and places[0] == number:
                tokens += needles.pop(0)
                places.pop(0)
                breaks.append(len(tokens))
            tokens += sentence
            breaks.append(len(tokens))
        tokens += question + self.after
        return np.array(tokens + answer, dtype=np.int64), len(tokens), breaks

    def _filler(self, rng: random.Random, room: int) -> list[list[int]]:
        """Sentences of exactly `room` tokens; the first may be cut at its start."""
        kind = rng.random()
        sentences: list[list[int]] = []
        start = rng.randrange(5)
        few = [rng.choice(self.stories) for _ in range(rng.randint(1, 12))]
        while room > 0:
            if kind < 0.3:
                sentence = self.classic[(start + len(sentences)) % 5]
            elif kind < 0.45:  # any few sentences, over and over
                sentence = few[len(sentences) % len(few)].tolist()
            elif kind < 0.8:
                sentence = rng.choice(self.stories).tolist()
            else:
                sentence = rng.choice(self.documents).tolist()
            sentences.append(sentence[-room:])
            room -= len(sentences[-1])
        return sentences[::-1] if kind >= 0.3 else sentences[-1:] + sentences[:-1]

    def _needle(self, name: str, key: str) -> list[int]:
        return self._text(" " + NEEDLE.replace("pass key", name).format(key=key))

    def _text(self, text: str) -> list[int]:
        return self.encoder.text(text)

    def _eos(self) -> int:
        return self.encoder.tekken.eos_id


def jump_positions(
    rng: random.Random, length: int, breaks: list[int], jumps: int, top: int = 131072
) -> np.ndarray:
    """Contiguous runs of positions with `jumps` random gaps at some of `breaks`, all below `top`.

    Far positions become familiar without long rows; neighbours stay neighbours, which is what
    retrieval is built on.
    """
    positions = np.arange(length, dtype=np.int64)
    spare = top - length
    cuts = sorted(rng.sample(breaks, min(jumps, len(breaks))))
    offsets = sorted(rng.randint(0, spare) for _ in range(len(cuts) + 1))
    positions += offsets[0]
    for cut, (last, offset) in zip(cuts, pairwise(offsets), strict=True):
        positions[cut:] += offset - last
    return positions
