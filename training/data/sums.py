"""Sums of two numbers from 0 to 99, in the words of the model card and others.

Beyond single digits the answer adds tens and units first: "38 + 53 = 80 + 11 = 91". Said at once,
the first digit would have to know the carry.
"""

from __future__ import annotations

import random

from training.data.chat import Chat, ask
from training.data.heldout import CARD_PROMPTS, held_out

TEMPLATES = (
    ("What is {a} + {b}?", "{work}."),
    ("{a} + {b} = ?", "{work}."),
    ("Add {a} and {b}.", "{work}."),
    ("How much is {a} plus {b}?", "{work}. The answer is {s}."),
    ("What is the sum of {a} and {b}?", "{work}. The sum is {s}."),
    ("Can you add {a} and {b} for me?", "Of course. {work}."),
    (
        "Do we need to think for {n} seconds to find the answer of {a} + {b}?",
        "No. You don't need to think for {n} seconds to find the answer to {a} + {b}. "
        "{shown}The answer is {s}.",
    ),
    (
        "I have {a} {things} and get {b} more. How many {things} do I have?",
        "{work}. You have {s} {things}.",
    ),
)
THINGS = ("apples", "books", "coins", "stamps", "pens", "eggs", "cards", "shells")


def pair_held_out(a: int, b: int) -> bool:
    """Both orders of a pair are held out together; pairs of digits are too few to spare any."""
    return max(a, b) > 9 and held_out(f"sum {min(a, b)} {max(a, b)}")


def working(a: int, b: int) -> str:
    """The sum as it is written down: digits at once, greater numbers by tens and units."""
    if max(a, b) < 10:
        return f"{a} + {b} = {a + b}"
    units = a % 10 + b % 10
    return f"{a} + {b} = {a + b - units} + {units} = {a + b}"


def make_sum(rng: random.Random, unseen: bool = False) -> Chat:
    """A sum, of a held-out pair if `unseen`; never the card's own prompt."""
    while True:
        top = 10 if rng.random() < 0.15 else 100
        a, b = rng.randrange(top), rng.randrange(top)
        question, answer = rng.choice(TEMPLATES)
        work = working(a, b)
        values = {
            "a": a,
            "b": b,
            "s": a + b,
            "n": rng.randint(2, 60),
            "things": rng.choice(THINGS),
            "work": work,
            "shown": "" if max(a, b) < 10 else f"{work}. ",
        }
        question = question.format(**values)
        if pair_held_out(a, b) == unseen and question not in CARD_PROMPTS:
            return ask(question, answer.format(**values), "sum", str(a + b))
