"""A load of streamed chats, the same for every server, and what its clients see.

The chats are made from a seed: half of them begin with one of a few system prompts, their lengths
are spread from a line to a page and a half, and each answer has its own length, which the end of a
sequence does not cut. So two servers are asked for the same work.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx

from octavo.checkpoint import DEMO

N_SYSTEM_PROMPTS, SYSTEM_WORDS = 4, 150
USER_WORDS = (8, 600)  # spread evenly over their logarithm
ANSWER_TOKENS = (16, 128)


@dataclass(frozen=True)
class Chat:
    """One request."""

    messages: list[dict[str, str]]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """What its client saw. Times are in seconds."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    to_first_token: float
    per_output_token: float  # after the first


def make_chats(n_chats: int, seed: int) -> list[Chat]:
    """Chats over words of the bundled model's own texts."""
    words = _words(DEMO / "held_out.jsonl")
    rng = random.Random(seed)

    def text(n_words: int) -> str:
        start = rng.randrange(len(words) - n_words)
        return " ".join(words[start : start + n_words])

    systems = [text(SYSTEM_WORDS) for _ in range(N_SYSTEM_PROMPTS)]
    shortest, longest = USER_WORDS
    chats = []
    for _ in range(n_chats):
        messages = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": rng.choice(systems)})
        n_words = round(shortest * (longest / shortest) ** rng.random())
        messages.append({"role": "user", "content": text(n_words)})
        chats.append(Chat(messages, rng.randint(*ANSWER_TOKENS)))
    return chats


def _words(file: Path) -> list[str]:
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return " ".join(record["text"] for record in records if "text" in record).split()


def run_load(
    url: str, model: str, chats: Sequence[Chat], n_clients: int, seconds: float
) -> dict[str, Any]:
    """Have all chats answered by a server, each client asking one after another.

    Args:
        url: of the server, without /v1.
        model: the name it serves.
        chats: from `make_chats`.
        n_clients: requests under way at once.
        seconds: after which whatever is not answered is an error.

    Returns:
        The figures, ready for JSON; `errors` are in words.
    """
    return asyncio.run(_run(url, model, chats, n_clients, seconds))


async def _run(
    url: str, model: str, chats: Sequence[Chat], n_clients: int, seconds: float
) -> dict[str, Any]:
    answers: list[Answer] = []
    errors: list[str] = []
    waiting = iter(chats)

    async def client(http: httpx.AsyncClient) -> None:
        for chat in waiting:  # one iterator, shared by all clients
            try:
                answers.append(await _ask(http, model, chat))
            except (httpx.HTTPError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    limits = httpx.Limits(max_connections=None)
    # Through no proxy, and without a limit of its own: `seconds` is the limit.
    async with httpx.AsyncClient(
        base_url=url, limits=limits, timeout=None, trust_env=False
    ) as http:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(client(http) for _ in range(n_clients)))
        except TimeoutError:
            missing = len(chats) - len(answers) - len(errors)
            errors.append(f"{missing} of {len(chats)} chats not answered within {seconds:g} s")
        elapsed = time.perf_counter() - started
    return _figures(answers, errors, elapsed)


async def _ask(http: httpx.AsyncClient, model: str, chat: Chat) -> Answer:
    """One streamed answer.

    Raises:
        ValueError: it is not the answer that was asked for. httpx.HTTPError: there is none.
    """
    body = {
        "model": model,
        "messages": chat.messages,
        "max_tokens": chat.max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = last = usage = None
    is_done = False
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise ValueError(f"status {response.status_code}: {text[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                is_done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                # An answer of control tokens only has no text; its end is then its first sign.
                if choice["delta"].get("content") or choice["finish_reason"]:
                    last = time.perf_counter()
                    first = first or last
    if not is_done or usage is None or first is None or last is None:
        raise ValueError("the stream ended too early")
    n_tokens = usage["completion_tokens"]
    if n_tokens != chat.max_tokens:
        raise ValueError(f"{n_tokens} tokens instead of {chat.max_tokens}")
    return Answer(
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        output_tokens=n_tokens,
        to_first_token=first - started,
        per_output_token=(last - first) / (n_tokens - 1),
    )


def _figures(answers: Sequence[Answer], errors: list[str], elapsed: float) -> dict[str, Any]:
    prompts = [answer.prompt_tokens for answer in answers]
    n_output = sum(answer.output_tokens for answer in answers)
    first = [answer.to_first_token for answer in answers]
    per_token = [answer.per_output_token for answer in answers]
    return {
        "answers": len(answers),
        "errors": errors,
        "seconds": elapsed,
        "prompt_tokens": sum(prompts),
        "longest_prompt": max(prompts, default=0),
        "output_tokens": n_output,
        "output_tokens_per_s": n_output / elapsed,
        "requests_per_s": len(answers) / elapsed,
        "first_token_p50_s": percentile(first, 50),
        "first_token_p99_s": percentile(first, 99),
        "per_token_p50_s": percentile(per_token, 50),
        "per_token_p99_s": percentile(per_token, 99),
        "cached_share": sum(answer.cached_tokens for answer in answers) / max(sum(prompts), 1),
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that `percent` of them do not exceed; None of nothing."""
    if not values:
        return None
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(int(rank), 1) - 1]
