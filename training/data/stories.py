"""Short stories from a grammar with state: who, where, what, and what has happened so far."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.data.places import PEOPLE, made_up_place

WOMEN = {"Anna", "Clara", "Emma", "Grace", "Iris", "Kate", "Maria", "Nina", "Rosa", "Vera", "Zoe",
         "Alice", "Laura", "Julia", "Sarah"}  # fmt: skip
JOBS = ("baker", "teacher", "farmer", "sailor", "painter", "doctor", "gardener", "carpenter",
        "fisher", "weaver", "miller", "librarian")  # fmt: skip
ROOMS = ("kitchen", "garden", "barn", "library", "cellar", "attic", "workshop", "hall", "bedroom")
SPOTS = ("under the table", "behind the door", "in a drawer", "on the shelf", "beside the window",
         "in an old box", "below the stairs", "near the stove")  # fmt: skip
THINGS = ("key", "book", "lamp", "letter", "map", "ring", "coat", "hat", "clock", "basket", "knife",
          "coin", "flute", "photograph")  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "silver", "golden")
WEATHER = ("sunny", "rainy", "cold", "windy", "foggy", "warm", "snowy", "cloudy", "quiet")
SEASONS = ("spring", "summer", "autumn", "winter")
ANIMALS = ("dog", "cat", "horse", "goat", "donkey", "hen", "duck", "rabbit")
GOODS = ("bread", "cheese", "apples", "honey", "fish", "eggs", "wool", "candles", "flour", "soup")
FEELINGS = ("happy", "tired", "proud", "worried", "curious", "hungry", "calm", "surprised")
TIMES = ("In the morning", "At noon", "In the afternoon", "In the evening", "After breakfast",
         "Before sunset", "Later that day", "The next day")  # fmt: skip


@dataclass
class Scene:
    """What the sentences of one story agree on."""

    hero: str
    friend: str
    town: str
    job: str
    thing: str
    colour: str
    room: str
    spot: str
    animal: str
    goods: str
    season: str
    weather: str
    feeling: str

    @property
    def she(self) -> str:
        """The hero's pronoun."""
        return "she" if self.hero in WOMEN else "he"

    @property
    def her(self) -> str:
        """The hero's possessive."""
        return "her" if self.hero in WOMEN else "his"


def make_scene(rng: random.Random) -> Scene:
    """A fresh cast and place."""
    hero, friend = rng.sample(PEOPLE, 2)
    return Scene(
        hero, friend, made_up_place(rng), rng.choice(JOBS), rng.choice(THINGS), rng.choice(COLOURS),
        rng.choice(ROOMS), rng.choice(SPOTS), rng.choice(ANIMALS), rng.choice(GOODS),
        rng.choice(SEASONS), rng.choice(WEATHER), rng.choice(FEELINGS),
    )  # fmt: skip


def make_story(rng: random.Random) -> str:
    """An opening, two or three episodes in any order, and an end that recalls them."""
    scene = make_scene(rng)
    episodes = rng.sample((_search, _market, _journey, _letter, _animal, _storm), rng.randint(2, 3))
    parts = [_opening(rng, scene)]
    for episode in episodes:
        parts.append(episode(rng, scene))
    parts.append(_ending(rng, scene))
    return rng.choice((" ", "\n\n")).join(parts)


def _opening(rng: random.Random, s: Scene) -> str:
    return rng.choice((
        f"{s.hero} was a {s.job} in {s.town}. It was a {s.weather} day in {s.season}.",
        f"In the town of {s.town} lived a {s.job} whose name was {s.hero}. {s.she.capitalize()} "
        f"had a friend called {s.friend}.",
        f"One {s.weather} {s.season} day, {s.hero} the {s.job} got up early. {s.she.capitalize()} "
        f"felt {s.feeling}.",
        f"Everybody in {s.town} knew {s.hero}, the {s.job}, and {s.her} {s.animal}.",
    ))  # fmt: skip


def _search(rng: random.Random, s: Scene) -> str:
    wrong = rng.choice([room for room in ROOMS if room != s.room])
    return (
        f"{rng.choice(TIMES)}, {s.hero} could not find {s.her} {s.colour} {s.thing}. "
        f"{s.she.capitalize()} looked in the {wrong}, but the {s.thing} was not there. "
        + rng.choice((
            f'"Have you seen my {s.thing}?" {s.she} asked {s.friend}. "Look in the {s.room}," said '
            f"{s.friend}. ",
            f"Then {s.she} remembered that {s.she} had been in the {s.room} the day before. ",
        ))
        + f"{s.hero} went to the {s.room} and found the {s.colour} {s.thing} {s.spot}."
    )  # fmt: skip


def _market(rng: random.Random, s: Scene) -> str:
    price, count = rng.randint(2, 9), rng.randint(2, 9)
    left = rng.randint(1, 20)
    purse = price * count + left
    return (
        f"{rng.choice(TIMES)}, {s.hero} went to the market with {purse} coins to buy {s.goods}. "
        f"One piece cost {price} coins and {s.she} took {count} of them, so {s.she} paid "
        f"{price * count} coins. There were {left} coins left in {s.her} purse."
    )


def _journey(rng: random.Random, s: Scene) -> str:
    other, days = made_up_place(rng), rng.randint(2, 9)
    return (
        f"{rng.choice(TIMES)}, {s.hero} set out for {other} with {s.friend}. "
        f"The road from {s.town} to {other} took {days} days. "
        + rng.choice((
            f"They slept in a barn and ate {s.goods}. ",
            f"They crossed a river on an old bridge and saw a {s.colour} boat. ",
            f"On the way they met a {rng.choice(JOBS)} who sold them some {s.goods}. ",
        ))
        + f"After {days} days they came to {other}, and both were {s.feeling}."
    )  # fmt: skip


def _letter(rng: random.Random, s: Scene) -> str:
    year = rng.randint(1700, 1999)
    return (
        f"{rng.choice(TIMES)}, a letter for {s.hero} came from {s.friend}. It was dated {year} and "
        f"said that {s.friend} had found a {s.colour} {s.thing} {s.spot}. {s.hero} read the letter "
        f"twice and put it in the {s.room}."
    )


def _animal(rng: random.Random, s: Scene) -> str:
    return (
        f"{s.hero} had a {s.animal} that liked to sleep in the {s.room}. "
        + rng.choice((
            f"When the {s.animal} was hungry, {s.hero} gave it some {s.goods}.",
            f"One night the {s.animal} ran away, and {s.friend} brought it back to {s.hero}.",
            f"The {s.animal} was old, but it still followed {s.hero} to the market.",
        ))
    )  # fmt: skip


def _storm(rng: random.Random, s: Scene) -> str:
    return (
        f"{rng.choice(TIMES)}, a storm came over {s.town}. The wind was loud and the rain fell for "
        f"{rng.randint(2, 12)} hours. {s.hero} stayed in the {s.room} with {s.friend}, and they "
        + rng.choice((f"ate {s.goods}", "told old stories", "played cards", "sang songs"))
        + " until the sky was clear again."
    )


def _ending(rng: random.Random, s: Scene) -> str:
    return rng.choice((
        f"In the end, {s.hero} sat in the {s.room} and was {s.feeling}.",
        f'"What a day," said {s.hero} to {s.friend}. Then they went to sleep.',
        f"{s.hero} never forgot that {s.season} in {s.town}.",
        f"From then on, {s.hero} kept the {s.colour} {s.thing} {s.spot}.",
        f"And so the {s.job} of {s.town} went home, {s.feeling} and tired.",
    ))  # fmt: skip
