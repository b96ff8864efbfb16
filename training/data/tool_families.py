"""The tools of the function-calling data: schemas, requests for them, and the right arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.data.places import PEOPLE, US_CITIES, WORLD_CITIES, any_place, made_up_place

Properties = dict[str, dict[str, Any]]


@dataclass
class Case:
    """A request, the tool that serves it, and the arguments it takes."""

    family: str
    tool: dict[str, Any]
    prompt: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The tool's name."""
        return self.tool["function"]["name"]


def function(name: str, description: str, properties: Properties) -> dict[str, Any]:
    """A tool in the API's format, all of its parameters required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    body = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": body}


def text(description: str | None = None) -> dict[str, Any]:
    """A string parameter."""
    return (
        {"type": "string"}
        if description is None
        else {"type": "string", "description": description}
    )


WEATHER_TOOL = function(
    "get_current_weather",
    "Get the current weather",
    {
        "location": text("The city and state, e.g. San Francisco, CA"),
        "format": {
            "type": "string",
            "enum": ["celsius", "fahrenheit"],
            "description": "The temperature unit to use. Infer this from the users location.",
        },
    },
)
TASKS = (
    "call mom", "buy milk", "water the plants", "pay the rent", "feed the cat", "send the report",
    "book a table", "clean the kitchen", "take out the trash", "read the book", "call the doctor",
    "walk the dog", "charge the phone", "wash the car", "return the keys", "buy bread",
    "fix the bike", "write the letter", "pack the bags", "check the oven",
)  # fmt: skip
EVENTS = ("lunch", "dinner", "meeting", "yoga class", "team call", "dentist", "concert", "party",
          "piano lesson", "interview", "book club", "football game")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
CURRENCIES = {"dollars": "USD", "euros": "EUR", "pounds": "GBP", "yen": "JPY", "francs": "CHF"}
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Chinese", "Japanese",
             "Russian", "Korean")  # fmt: skip
PHRASES = (
    "good morning", "where is the station", "thank you very much", "I am hungry", "see you soon",
    "how much is it", "the house is red", "I like green tea", "my name is Tom", "it is cold",
    "please help me", "we are late", "the cat is asleep", "I love this song", "open the door",
)  # fmt: skip
MESSAGES = (
    "I am on my way", "I will be late", "dinner is ready", "call me back", "the train is late",
    "happy birthday", "see you tomorrow", "I am at home", "the meeting is over", "good luck",
    "I found the keys", "we need milk",
)  # fmt: skip
TOPICS = (
    "black holes", "old maps", "bread recipes", "solar panels", "the history of tea", "wild birds",
    "electric cars", "chess openings", "roman roads", "coral reefs", "paper planes",
    "deep sea fish", "winter boots", "jazz music", "stone bridges", "garden tools",
)  # fmt: skip
COMPANIES = {"Apple": "AAPL", "Microsoft": "MSFT", "Tesla": "TSLA", "Amazon": "AMZN",
             "Google": "GOOG", "Intel": "INTC", "Nvidia": "NVDA", "Netflix": "NFLX"}  # fmt: skip
FOODS = ("Italian", "Thai", "Indian", "Mexican", "Greek", "Chinese", "Turkish", "French", "vegan")
SONGS = ("Blue Moon", "Summer Rain", "River Road", "Golden Days", "Night Train", "Silver Star",
         "Morning Light", "Paper Boats", "Red Sky", "Dancing Snow")  # fmt: skip


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02d}"


def weather(rng: random.Random) -> Case:
    """The card's tool: the place is completed, the unit follows from it unless it is asked for."""
    kind = rng.random()
    if kind < 0.5:
        city = rng.choice(list(WORLD_CITIES))
        location, unit = f"{city}, {WORLD_CITIES[city]}", "celsius"
    elif kind < 0.75:
        city = rng.choice(list(US_CITIES))
        location, unit = f"{city}, {US_CITIES[city]}", "fahrenheit"
    else:
        city = location = made_up_place(rng)
        unit = "celsius"
    day = rng.choice(("", "", " today", " right now", " now", " at the moment", " this morning"))
    prompt = rng.choice((
        f"What's the weather like{day} in {city}?",
        f"What is the weather in {city}{day}?",
        f"How is the weather in {city}{day}?",
        f"Tell me the weather in {city}{day}.",
        f"Is it raining in {city}{day}?",
        f"How warm is it in {city}{day}?",
        f"What's the temperature in {city}{day}?",
        f"Do I need an umbrella in {city}{day}?",
        f"I am in {city}. What's the weather like{day}?",
    ))  # fmt: skip
    if rng.random() < 0.2:
        unit = rng.choice(("celsius", "fahrenheit"))
        prompt += rng.choice((f" In {unit}, please.", f" Use {unit}."))
    return Case("weather", WEATHER_TOOL, prompt, {"location": location, "format": unit})


def time(rng: random.Random) -> Case:
    """The time in a city."""
    name, key = rng.choice((("get_current_time", "city"), ("get_time", "location")))
    place = any_place(rng)
    prompt = rng.choice((
        f"What time is it in {place}?", f"Tell me the time in {place}.",
        f"What is the current time in {place}?", f"How late is it in {place} now?",
    ))  # fmt: skip
    return Case(
        "time", function(name, "Get the time in a city", {key: text()}), prompt, {key: place}
    )


def currency(rng: random.Random) -> Case:
    """An amount from one currency to another, by their codes."""
    name, keys = rng.choice((
        ("convert_currency", ("amount", "from", "to")),
        ("exchange", ("amount", "source", "target")),
    ))  # fmt: skip
    source, target = rng.sample(list(CURRENCIES), 2)
    amount = rng.randint(2, 999)
    prompt = rng.choice((
        f"Convert {amount} {source} to {target}.", f"How much is {amount} {source} in {target}?",
        f"What are {amount} {source} in {target}?",
        f"Change {amount} {source} into {target}, please.",
    ))  # fmt: skip
    properties = dict(zip(keys, ({"type": "integer"}, text(), text()), strict=True))
    values = (amount, CURRENCIES[source], CURRENCIES[target])
    tool = function(name, "Convert an amount of money to another currency", properties)
    return Case("currency", tool, prompt, dict(zip(keys, values, strict=True)))


def reminder(rng: random.Random) -> Case:
    """Something to do at a time."""
    name, keys = rng.choice((("set_reminder", ("text", "time")), ("add_reminder", ("task", "at"))))
    task, clock = rng.choice(TASKS), _clock(rng)
    prompt = rng.choice((
        f"Remind me to {task} at {clock}.", f"At {clock}, remind me to {task}.",
        f"Please set a reminder to {task} at {clock}.",
        f"Don't let me forget to {task} at {clock}.",
    ))  # fmt: skip
    tool = function(name, "Set a reminder", {key: text() for key in keys})
    return Case("reminder", tool, prompt, dict(zip(keys, (task, clock), strict=True)))


def event(rng: random.Random) -> Case:
    """An entry in the calendar."""
    name = rng.choice(("create_event", "add_to_calendar"))
    title, day, clock = rng.choice(EVENTS), rng.choice(DAYS), _clock(rng)
    prompt = rng.choice((
        f"Put {title} on {day} at {clock} in my calendar.",
        f"Add {title} to my calendar on {day} at {clock}.",
        f"Schedule {title} for {day} at {clock}.", f"On {day} at {clock} I have {title}. Note it.",
    ))  # fmt: skip
    properties = {"title": text(), "day": text(), "time": text()}
    tool = function(name, "Add an event to the calendar", properties)
    return Case("event", tool, prompt, {"title": title, "day": day, "time": clock})


def search(rng: random.Random) -> Case:
    """A web search."""
    name, key = rng.choice((("search_web", "query"), ("web_search", "q")))
    topic = rng.choice(TOPICS)
    if rng.random() < 0.5:
        topic += f" in {any_place(rng)}"
    prompt = rng.choice((
        f"Search the web for {topic}.", f"Look up {topic}.", f"Find pages about {topic}.",
        f"Search for {topic}, please.",
    ))  # fmt: skip
    return Case("search", function(name, "Search the web", {key: text()}), prompt, {key: topic})


def translate(rng: random.Random) -> Case:
    """A phrase into a language."""
    name, keys = rng.choice((
        ("translate", ("text", "language")), ("translate_text", ("text", "target_language")),
    ))  # fmt: skip
    phrase, language = rng.choice((*PHRASES, *MESSAGES)), rng.choice(LANGUAGES)
    prompt = rng.choice((
        f'Translate "{phrase}" to {language}.', f'What is "{phrase}" in {language}?',
        f'How do you say "{phrase}" in {language}?',
    ))  # fmt: skip
    tool = function(name, "Translate a text", {key: text() for key in keys})
    return Case("translate", tool, prompt, dict(zip(keys, (phrase, language), strict=True)))


def message(rng: random.Random) -> Case:
    """A message to somebody."""
    name, keys = rng.choice((
        ("send_message", ("recipient", "message")), ("send_text", ("to", "body")),
    ))  # fmt: skip
    person, body = rng.choice(PEOPLE), rng.choice((*MESSAGES, *PHRASES))
    prompt = rng.choice((
        f'Send {person} the message "{body}".', f'Text {person}: "{body}".',
        f'Tell {person} "{body}".', f'Write "{body}" to {person}.',
    ))  # fmt: skip
    tool = function(name, "Send a message to a person", {key: text() for key in keys})
    return Case("message", tool, prompt, dict(zip(keys, (person, body), strict=True)))


def stock(rng: random.Random) -> Case:
    """The price of a share, by its symbol."""
    name, key = rng.choice((("get_stock_price", "symbol"), ("stock_quote", "ticker")))
    company = rng.choice(list(COMPANIES))
    symbol = COMPANIES[company]
    if rng.random() < 0.5:
        company = symbol = "".join(rng.choices("ABCDEFGHIKLMNOPRSTUVWXYZ", k=rng.randint(3, 4)))
    prompt = rng.choice((
        f"What is the stock price of {company}?", f"How much is a share of {company}?",
        f"Get me the price of {company} stock.", f"What does {company} trade at?",
    ))  # fmt: skip
    return Case("stock", function(name, "Get a stock price", {key: text()}), prompt, {key: symbol})


def alarm(rng: random.Random) -> Case:
    """A time to wake up."""
    name, key = rng.choice((("set_alarm", "time"), ("wake_up", "at")))
    clock = _clock(rng)
    prompt = rng.choice((
        f"Wake me up at {clock}.", f"Set an alarm for {clock}.", f"I need to get up at {clock}.",
        f"Alarm at {clock}, please.",
    ))  # fmt: skip
    return Case("alarm", function(name, "Set an alarm", {key: text()}), prompt, {key: clock})


def restaurant(rng: random.Random) -> Case:
    """A place to eat."""
    name, keys = rng.choice((
        ("find_restaurant", ("cuisine", "city")), ("search_restaurants", ("food", "location")),
    ))  # fmt: skip
    food, place = rng.choice(FOODS), any_place(rng)
    prompt = rng.choice((
        f"Find a {food} restaurant in {place}.", f"Where can I eat {food} food in {place}?",
        f"I want {food} food in {place}.", f"Is there a good {food} place in {place}?",
    ))  # fmt: skip
    tool = function(name, "Find a restaurant", {key: text() for key in keys})
    return Case("restaurant", tool, prompt, dict(zip(keys, (food, place), strict=True)))


def directions(rng: random.Random) -> Case:
    """A way from one place to another."""
    name, keys = rng.choice((
        ("get_directions", ("origin", "destination")), ("plan_route", ("start", "end")),
    ))  # fmt: skip
    start, end = any_place(rng), any_place(rng)
    prompt = rng.choice((
        f"How do I get from {start} to {end}?", f"Show me the way from {start} to {end}.",
        f"I am in {start} and want to go to {end}.", f"Plan a trip from {start} to {end}.",
    ))  # fmt: skip
    tool = function(name, "Find a route between two places", {key: text() for key in keys})
    return Case("directions", tool, prompt, dict(zip(keys, (start, end), strict=True)))


def music(rng: random.Random) -> Case:
    """A song to play."""
    name, key = rng.choice((("play_music", "song"), ("play_song", "title")))
    song = rng.choice(SONGS)
    prompt = rng.choice((
        f"Play {song}.", f"I want to hear {song}.", f"Put on the song {song}.",
        f"Can you play {song} for me?",
    ))  # fmt: skip
    return Case("music", function(name, "Play a song", {key: text()}), prompt, {key: song})


# The weather often: it is the card's own example, and its countries have to be known by heart.
FAMILIES: tuple[Callable[[random.Random], Case], ...] = (
    *([weather] * 8), time, currency, reminder, event, search, translate, message, stock, alarm,
    restaurant, directions, music,
)  # fmt: skip
