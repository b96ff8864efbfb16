"""The data as token pools, made once: chats of every task, prose, filler sentences."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.data import documentation
from training.data.chat import Chat, ChatEncoder
from training.data.letters import make_letters, make_words, word_held_out
from training.data.smalltalk import make_smalltalk
from training.data.stories import make_story
from training.data.sums import make_sum
from training.data.tools import make_tool_answer, make_tool_call
from training.tokenizer import load_tokenizer

Tokens = np.ndarray  # uint16
COUNTS = {"sum": 120_000, "letters": 120_000, "smalltalk": 12_000, "tool": 60_000, "answer": 8_000}
STORIES = 16_000


@dataclass
class Pools:
    """`chats`: task -> (tokens, length of the prompt); prose streams; filler as sentences."""

    chats: dict[str, list[tuple[Tokens, int]]] = field(default_factory=dict)
    stories: list[Tokens] = field(default_factory=list)
    documents: list[Tokens] = field(default_factory=list)
    fillers: list[list[Tokens]] = field(default_factory=list)  # story, documentation sentences


def word_lists(encoder: ChatEncoder) -> list[str]:
    """Words to count letters in: documentation's, and chains of the vocabulary's pieces."""
    real = documentation.words(documentation.documents() + documentation.documents(unseen=True))
    return make_words(random.Random(1), real, word_pieces(encoder), 3 * len(real))


def word_pieces(encoder: ChatEncoder) -> list[str]:
    """The vocabulary's tokens that are letters only, in lower case."""
    pieces = []
    for token in range(encoder.tekken.num_special_tokens, encoder.tekken.n_words):
        piece = encoder.tekken.decode([token]).strip()
        if re.fullmatch("[A-Za-z]{1,9}", piece):
            pieces.append(piece.lower())
    return pieces


def story_sentences(rng: random.Random, count: int) -> list[str]:
    """Single sentences of stories, as filler."""
    found: list[str] = []
    while len(found) < count:
        flat = " ".join(make_story(rng).split())
        found.extend(re.findall(r"[A-Z][^.\"?]+[.](?= |$)", flat))
    return found[:count]


def two_turns(rng: random.Random, make: Callable[[], Chat]) -> Chat:
    """One chat, sometimes after another or under a system message."""
    chat, shape = make(), rng.random()
    if shape < 0.08:
        chat.messages = make().messages + chat.messages
    elif shape < 0.11:
        chat.messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            *chat.messages,
        ]
    return chat


def build(encoder: ChatEncoder, scale: float = 1.0, seed: int = 0) -> Pools:
    """All pools; `scale` shrinks them for a trial."""
    pools, rng = Pools(), random.Random(seed)
    words = word_lists(encoder)
    makers: dict[str, Callable[[], Chat]] = {
        "sum": lambda: make_sum(rng),
        "letters": lambda: make_letters(rng, words),
        "smalltalk": lambda: make_smalltalk(rng),
        "tool": lambda: make_tool_call(rng),
        "answer": lambda: make_tool_answer(rng),
    }
    for task, make in makers.items():
        chats = pools.chats[task] = []
        for _ in range(int(COUNTS[task] * scale)):
            chat = make() if task in ("tool", "answer") else two_turns(rng, make)
            tokens, prompt = encoder.encode(chat)
            chats.append((np.array(tokens, dtype=np.uint16), prompt))
    stories = [make_story(rng) for _ in range(int(STORIES * scale))]
    texts = documentation.documents()
    pools.stories = [_document(encoder, text) for text in stories]
    pools.documents = [_document(encoder, text) for text in texts]
    for filler in (story_sentences(rng, int(40_000 * scale)), documentation.sentences(texts)):
        pools.fillers.append([_sentence(encoder, sentence) for sentence in filler])
    return pools


def load(folder: Path, scale: float = 1.0) -> Pools:
    """The pools in `folder`, built there first where they are missing."""
    path = folder / f"pools-{scale:g}.pickle"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pools = build(ChatEncoder(load_tokenizer()), scale)
        path.write_bytes(pickle.dumps(pools))
    return pickle.loads(path.read_bytes())


def held_out_words(encoder: ChatEncoder) -> list[str]:
    """Words of the documentation that no training chat asks about."""
    real = documentation.words(documentation.documents() + documentation.documents(unseen=True))
    return [word for word in real if 3 <= len(word) <= 13 and word_held_out(word)]


def _document(encoder: ChatEncoder, text: str) -> Tokens:
    return np.array(encoder.tekken.encode(text, bos=True, eos=True), dtype=np.uint16)


def _sentence(encoder: ChatEncoder, sentence: str) -> Tokens:
    return np.array(encoder.text(" " + sentence), dtype=np.uint16)
