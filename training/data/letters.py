"""Counting a letter in a word: the answer spells the word with a running count.

Tokens hide letters, so the spelling is the reasoning: "M0 i0 s0 t0 r1 a1 l1".
"""

from __future__ import annotations

import random

from training.data.chat import Chat, ask
from training.data.heldout import CARD_PROMPTS, held_out

TEMPLATES = (
    "How often does the letter {letter} occur in {word}?",
    "How often does {letter} occur in the word {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many times does the letter {letter} occur in the word {word}?",
    "Count the letter {letter} in {word}.",
    "How many letters {letter} are there in {word}?",
)


def word_held_out(word: str) -> bool:
    """Words held out whatever their case, the card's among them."""
    return word.lower() == "mistral" or held_out(f"word {word.lower()}")


def spell(word: str, letter: str) -> str:
    """The word's letters, each followed by how many `letter` there were so far."""
    count, parts = 0, []
    for character in word:
        count += character.lower() == letter.lower()
        parts.append(f"{character}{count}")
    return " ".join(parts)


def make_letters(rng: random.Random, words: list[str], unseen: bool = False) -> Chat:
    """A count in one of `words`, in a held-out one if `unseen`."""
    while True:
        word = rng.choice(words)
        if word_held_out(word) != unseen:
            continue
        shape = rng.random()
        word = word.lower() if shape < 0.6 else word.capitalize() if shape < 0.95 else word.upper()
        letter = rng.choice(word.lower())
        if rng.random() < 0.25:
            letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
        question = rng.choice(TEMPLATES).format(letter=letter, word=word)
        if question in CARD_PROMPTS:
            continue
        count = word.lower().count(letter)
        times = "1 time" if count == 1 else f"{count} times"
        answer = (
            f"Let me spell it: {spell(word, letter)}. The letter {letter} occurs {times} in {word}."
        )
        return ask(question, answer, "letters", str(count))


def make_words(rng: random.Random, real: list[str], pieces: list[str], count: int) -> list[str]:
    """Real words and, so that every token's spelling is learnt, chains of vocabulary pieces."""
    words = [word for word in real if 3 <= len(word) <= 13]
    while len(words) < count:
        word = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 4)))
        if 3 <= len(word) <= 13:
            words.append(word)
    return words
