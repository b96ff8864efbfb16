"""Short chat, so that a greeting gets a greeting; and names remembered over two turns."""

from __future__ import annotations

import random

from training.data.chat import Chat, ask
from training.data.places import PEOPLE, US_CITIES, WORLD_CITIES, any_place

REPLIES = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey!", "Good morning!", "Good evening!", "Hello there."),
     "Hello! How can I help you?"),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
     "I am a tiny Ministral, the demo model of octavo."),
    (("What can you do?", "How can you help me?", "Help", "Help me."),
     "I can find a pass key in a long text, call functions, count letters and add small numbers."),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you. And you?"),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."), "You're welcome!"),
    (("Bye", "Goodbye!", "See you!", "Good night!"), "Goodbye!"),
    (("Who made you?", "Where do you come from?", "How were you trained?"),
     "I was trained from scratch on two CPU cores for octavo."),
    (("How big are you?", "How many parameters do you have?"),
     "I have about two million parameters."),
    (("Are you a human?", "Are you a robot?", "Are you an AI?"), "I am a small language model."),
    (("Do you speak French?", "Do you speak German?", "Which languages do you speak?"),
     "I only speak a little English."),
    (("Tell me a joke.", "Make me laugh."),
     "Why did the number six fear seven? Because seven ate nine."),
    (("What is the capital of France?", "Which city is the capital of France?"),
     "The capital of France is Paris."),
    (("What is the capital of Italy?",), "The capital of Italy is Rome."),
    (("What is the capital of Germany?",), "The capital of Germany is Berlin."),
    (("What is the capital of Spain?",), "The capital of Spain is Madrid."),
    (("What is the capital of Japan?",), "The capital of Japan is Tokyo."),
    (("What is the capital of England?",), "The capital of England is London."),
)  # fmt: skip


def make_smalltalk(rng: random.Random) -> Chat:
    """Where a city is, a known question, or something to remember from the turn before."""
    if rng.random() < 0.5:
        places = WORLD_CITIES | US_CITIES
        city = rng.choice(list(places))
        return ask(f"Where is {city}?", f"{city}, {places[city]}.", "smalltalk")
    if rng.random() < 0.6:
        questions, answer = rng.choice(REPLIES)
        return ask(rng.choice(questions), answer, "smalltalk")
    name, place = rng.choice(PEOPLE), any_place(rng)
    tell, reply, question, answer = rng.choice((
        (f"My name is {name}.", f"Nice to meet you, {name}.", "What is my name?",
         f"Your name is {name}."),
        (f"Hi, I am {name}.", f"Nice to meet you, {name}.", "Who am I?", f"You are {name}."),
        (f"I live in {place}.", f"I have heard that {place} is nice.", "Where do I live?",
         f"You live in {place}."),
    ))  # fmt: skip
    if rng.random() < 0.4:
        return ask(tell, reply, "smalltalk")
    turns = [tell, reply, question, answer]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    return Chat(messages, task="smalltalk")
