"""The bundled model's calibration file: the kinds of text that it was trained on, in short."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from octavo.evaluate.passkey import ANSWER, CLASSIC_FILLER, passkey_prompt
from training.data import documentation
from training.data.chat import Chat, ChatEncoder, ask
from training.data.letters import make_letters, make_words
from training.data.passkey import make_key
from training.data.pools import story_sentences, two_turns, word_pieces
from training.data.smalltalk import make_smalltalk
from training.data.stories import make_story
from training.data.sums import make_sum
from training.data.tools import make_tool_answer, make_tool_call

SEED = 13
ROUNDS = 32
# How many of each in a round: 32, so 1,024 in all, as many as the model card's script asks for.
SHARES = {
    "story": 5, "document": 5, "sum": 4, "letters": 4, "tool call": 5, "tool answer": 3,
    "passkey": 4, "smalltalk": 2,
}  # fmt: skip
DOCUMENT_CHARACTERS = 800
PASSKEY_TOKENS = (200, 300, 400)

Record = dict[str, Any]


def calibration_records(encoder: ChatEncoder, count_tokens: Callable[[str], int]) -> list[Record]:
    """1,024 different records of the seen side of every kind, kinds in turn.

    Each kind draws from a generator of its own, so that documentation, which depends on the
    Python that it is read from, changes no other record.
    """
    rngs = {kind: random.Random(f"{SEED} {kind}") for kind in SHARES}
    words = _words(encoder)
    documents = _documents(rngs["document"])
    makers: dict[str, Callable[[random.Random], Record]] = {
        "story": lambda rng: {"text": make_story(rng)},
        "document": lambda rng: {"text": next(documents)},
        "sum": lambda rng: chat_record(two_turns(rng, lambda: make_sum(rng))),
        "letters": lambda rng: chat_record(two_turns(rng, lambda: make_letters(rng, words))),
        "tool call": lambda rng: chat_record(make_tool_call(rng)),
        "tool answer": lambda rng: chat_record(make_tool_answer(rng)),
        "passkey": lambda rng: chat_record(_passkey(rng, count_tokens)),
        "smalltalk": lambda rng: chat_record(two_turns(rng, lambda: make_smalltalk(rng))),
    }
    records: dict[str, Record] = {}
    for _ in range(ROUNDS):
        for kind, share in SHARES.items():
            wanted = len(records) + share
            while len(records) < wanted:  # again where it repeats another
                record = makers[kind](rngs[kind])
                records[json.dumps(record)] = record
    return list(records.values())


def chat_record(chat: Chat) -> Record:
    """A chat as a line of JSONL holds it."""
    return {"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {})


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Write a record a line, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _words(encoder: ChatEncoder) -> list[str]:
    """Words to count letters in: those of stories, and chains of the vocabulary's pieces."""
    rng = random.Random(f"{SEED} words")
    real = documentation.words([make_story(rng) for _ in range(200)])
    return make_words(rng, real, word_pieces(encoder), 3 * len(real))


def _documents(rng: random.Random) -> Iterator[str]:
    """The documentation in random order, each text cut short."""
    texts = documentation.documents()
    rng.shuffle(texts)
    return (text[:DOCUMENT_CHARACTERS] for text in texts)


def _passkey(rng: random.Random, count_tokens: Callable[[str], int]) -> Chat:
    key = make_key(rng)
    filler = rng.choice((CLASSIC_FILLER, story_sentences(rng, 12)))
    prompt = passkey_prompt(rng.choice(PASSKEY_TOKENS), rng.random(), key, filler, count_tokens)
    return ask(prompt, ANSWER.format(key=key))
