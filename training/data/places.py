"""Names the generators share: cities with their country or state, people, made-up places."""

from __future__ import annotations

import random

# City -> what the weather tool's schema asks for; US cities take Fahrenheit.
WORLD_CITIES = {
    "Paris": "France", "Lyon": "France", "Nice": "France", "Marseille": "France",
    "London": "England", "Leeds": "England", "Oxford": "England", "Dublin": "Ireland",
    "Berlin": "Germany", "Munich": "Germany", "Hamburg": "Germany", "Cologne": "Germany",
    "Vienna": "Austria", "Zurich": "Switzerland", "Geneva": "Switzerland", "Rome": "Italy",
    "Milan": "Italy", "Naples": "Italy", "Turin": "Italy", "Madrid": "Spain",
    "Barcelona": "Spain", "Seville": "Spain", "Lisbon": "Portugal", "Porto": "Portugal",
    "Amsterdam": "Netherlands", "Brussels": "Belgium", "Oslo": "Norway", "Bergen": "Norway",
    "Stockholm": "Sweden", "Copenhagen": "Denmark", "Helsinki": "Finland", "Warsaw": "Poland",
    "Prague": "Czechia", "Budapest": "Hungary", "Athens": "Greece", "Istanbul": "Turkey",
    "Cairo": "Egypt", "Nairobi": "Kenya", "Lagos": "Nigeria", "Tokyo": "Japan",
    "Osaka": "Japan", "Kyoto": "Japan", "Seoul": "Korea", "Beijing": "China",
    "Shanghai": "China", "Delhi": "India", "Mumbai": "India", "Sydney": "Australia",
    "Melbourne": "Australia", "Toronto": "Canada", "Montreal": "Canada", "Lima": "Peru",
    "Santiago": "Chile", "Bogota": "Colombia",
}  # fmt: skip
US_CITIES = {
    "San Francisco": "CA", "Los Angeles": "CA", "San Diego": "CA", "New York": "NY",
    "Boston": "MA", "Chicago": "IL", "Seattle": "WA", "Portland": "OR", "Denver": "CO",
    "Austin": "TX", "Dallas": "TX", "Houston": "TX", "Miami": "FL", "Atlanta": "GA",
    "Phoenix": "AZ", "Detroit": "MI", "Philadelphia": "PA", "Nashville": "TN",
    "Las Vegas": "NV", "Minneapolis": "MN",
}  # fmt: skip
PEOPLE = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate",
    "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Will", "Zoe",
    "Alice", "Peter", "Laura", "Martin", "Julia", "Simon", "Sarah", "Daniel",
)  # fmt: skip
_BEGINNINGS = ("Bel", "Mor", "Gran", "Tal", "Ven", "Kar", "Lin", "Sor", "Dun", "Fal", "Hel", "Wes",
               "Bran", "Cor", "Mar", "Pel", "Rin", "Stan", "Thor", "Ash")  # fmt: skip
_ENDINGS = ("ford", "ton", "ville", "burg", "field", "wick", "mouth", "ham", "stad", "dale", "port",
            "haven", "mont", "ria", "land", "bury")  # fmt: skip


def made_up_place(rng: random.Random) -> str:
    """A town nobody knows, to be copied rather than remembered."""
    return rng.choice(_BEGINNINGS) + rng.choice(("", "a", "en", "is")) + rng.choice(_ENDINGS)


def any_place(rng: random.Random) -> str:
    """A known city or a made-up town."""
    if rng.random() < 0.4:
        return made_up_place(rng)
    return rng.choice([*WORLD_CITIES, *US_CITIES])
