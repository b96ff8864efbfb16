"""What some tools return, and the sentence which tells the user."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Arguments = dict[str, Any]


def _weather(rng: random.Random, arguments: Arguments) -> tuple[dict[str, Any], str]:
    unit = arguments["format"]
    degrees = rng.randint(-5, 35) if unit == "celsius" else rng.randint(20, 99)
    sky = rng.choice(("sunny", "cloudy", "rainy", "windy", "clear"))
    place = arguments["location"].split(",")[0]
    result = {"temperature": degrees, "sky": sky}
    return result, f"It is {sky} in {place}, at {degrees} degrees {unit}."


def _time(rng: random.Random, arguments: Arguments) -> tuple[dict[str, Any], str]:
    time = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    return {"time": time}, f"It is {time} in {next(iter(arguments.values()))}."


def _stock(rng: random.Random, arguments: Arguments) -> tuple[dict[str, Any], str]:
    price = f"{rng.randint(5, 900)}.{rng.randint(0, 99):02d}"
    return {"price": price}, f"{next(iter(arguments.values()))} is at {price} dollars."


def _currency(rng: random.Random, arguments: Arguments) -> tuple[dict[str, Any], str]:
    amount, source, target = arguments.values()
    result = rng.randint(1, 2000)
    return {"result": result}, f"{amount} {source} is {result} {target}."


def _done(rng: random.Random, arguments: Arguments) -> tuple[dict[str, Any], str]:
    return {"status": "ok"}, "Done."


RESULTS: dict[str, Callable[[random.Random, Arguments], tuple[dict[str, Any], str]]] = {
    "weather": _weather,
    "time": _time,
    "stock": _stock,
    "currency": _currency,
    "reminder": _done,
    "message": _done,
    "alarm": _done,
}
