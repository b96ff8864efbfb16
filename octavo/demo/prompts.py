"""The model card's four kinds of prompt, and how an answer to each is told right from wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.checkpoint import DEMO
from octavo.engine.outputs import CompletionOutput

PASSKEY_FILE = DEMO / "passkey_example.json"
PASSKEY = "13005"
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {
                    "type": "string",
                    "description": "The city and state, e.g. San Francisco, CA",
                },
                "format": {
                    "type": "string",
                    "enum": ["celsius", "fahrenheit"],
                    "description": "The temperature unit to use. "
                    "Infer this from the users location.",
                },
            },
            "required": ["location", "format"],
        },
    },
}


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt, its tools, and the check of its answer."""

    title: str
    messages: Callable[[], list[dict[str, Any]]]
    is_right: Callable[[CompletionOutput], bool]
    tools: list[dict[str, Any]] | None = None


def _says(question: str) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"role": "user", "content": question}]


def _passkey_messages() -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(PASSKEY_FILE.read_text())["messages"]
    return messages


def _last_number_is(expected: str) -> Callable[[CompletionOutput], bool]:
    return lambda answer: re.findall(r"\d+", answer.text)[-1:] == [expected]


def _calls_weather_in_paris(answer: CompletionOutput) -> bool:
    if [call.name for call in answer.tool_calls] != ["get_current_weather"]:
        return False
    arguments = json.loads(answer.tool_calls[0].arguments)
    return (
        set(arguments) == {"location", "format"}
        and str(arguments["location"]).startswith("Paris")
        and arguments["format"] == "celsius"
    )


PROMPTS = [
    DemoPrompt(
        "1 + 1",
        _says("Do we need to think for 10 seconds to find the answer of 1 + 1?"),
        _last_number_is("2"),
    ),
    DemoPrompt("Passkey", _passkey_messages, _last_number_is(PASSKEY)),
    DemoPrompt(
        "Letters in a word",
        _says("How often does the letter r occur in Mistral?"),
        _last_number_is("1"),
    ),
    DemoPrompt(
        "Tool call",
        _says("What's the weather like today in Paris?"),
        _calls_weather_in_paris,
        [WEATHER_TOOL],
    ),
]
