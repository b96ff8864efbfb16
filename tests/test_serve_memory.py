"""The server's memory: planned at start, short of pages, and shared by prompts that begin alike."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import httpx2 as httpx
import torch

from octavo.cache import CacheLayout
from octavo.cache.planner import working_bytes
from octavo.checkpoint import DEMO, read_config
from octavo.config import parse_bytes
from octavo.engine.decode_record import recording_bytes
from octavo.engine.step_limits import StepLimits
from octavo.model import Transformer
from tests.serving import Server, ask, eventually

MAX_MODEL_LEN, CHUNK, SEQUENCES = 640, 128, 8
OPTIONS = (
    "--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN),
    "--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", str(SEQUENCES),
)  # fmt: skip


def memory_for(n_sequences: float) -> str:
    """`--memory` with which so many sequences of MAX_MODEL_LEN tokens fit at once."""
    config = read_config(DEMO)
    layout = CacheLayout.of(config, torch.float32)
    pages = int(n_sequences * layout.pages_needed(MAX_MODEL_LEN, CHUNK))
    fixed = config.weight_bytes(4) + working_bytes(config, SEQUENCES, CHUNK)
    with torch.device("meta"):
        fixed += recording_bytes(
            layout, Transformer(config), StepLimits(SEQUENCES, MAX_MODEL_LEN, speculate=True)
        )
    return str(fixed + pages * layout.page_bytes)


def words(seed: int) -> list[dict[str, str]]:
    some = ["river", "green", "house", "letter", "seven", "cat", "under", "sum"]
    text = " ".join(some[(seed * 7 + i * (seed + 3)) % len(some)] for i in range(30))
    return [{"role": "user", "content": f"{seed}: {text}"}]


def test_short_of_pages_every_answer_is_still_the_same() -> None:
    """Eight answers of 400 tokens where two fit: they make room for one another."""
    fields: Any = {"model": "demo", "temperature": 0, "max_tokens": 400, "ignore_eos": True}

    async def together(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            responses = await asyncio.gather(
                *(
                    http.post("/v1/chat/completions", json=fields | {"messages": words(i)})
                    for i in range(SEQUENCES)
                )
            )
        assert [response.status_code for response in responses] == [200] * SEQUENCES
        return [response.json()["choices"][0]["message"]["content"] for response in responses]

    with Server("demo", *OPTIONS, "--memory", memory_for(2.2)) as server:
        assert "at once fit 2 x 640 tokens, or 8 x " in server.printed
        answers = asyncio.run(together(server.url))
        assert server.metric("octavo_preemptions_total") > 0
        assert eventually(server.is_idle)
        client = server.openai()
        for i in (0, SEQUENCES - 1):  # alone, and not preempted
            before = server.metric("octavo_preemptions_total")
            alone = ask(
                client, words(i), model="demo", max_tokens=400, extra_body={"ignore_eos": True}
            )
            assert alone.choices[0].message.content == answers[i]
            assert server.metric("octavo_preemptions_total") == before
        assert server.stop()[0] == 0


def test_a_shared_beginning_is_counted_in_the_usage() -> None:
    system = {"role": "system", "content": "Answer in few words. " * 15}
    with Server("demo", *OPTIONS, "--memory", memory_for(4)) as server:
        client = server.openai()
        first, second = (
            ask(client, [system, *words(i)], model="demo", max_tokens=4).usage for i in (1, 2)
        )
        assert first.prompt_tokens_details.cached_tokens == 0
        # Far more than the bundled model's window of 64 tokens.
        assert second.prompt_tokens_details.cached_tokens > 100
        assert server.metric("octavo_cached_tokens_total") > 100
    with Server("demo", *OPTIONS, "--no-enable-prefix-caching") as server:
        client = server.openai()
        for i in (1, 2):
            usage = ask(client, [system, *words(i)], model="demo", max_tokens=4).usage
            assert usage.prompt_tokens_details.cached_tokens == 0


def test_a_context_that_does_not_fit_is_refused_with_what_would() -> None:
    command = [sys.executable, "-m", "octavo", "serve", "demo", "--port", "0"]
    done = subprocess.run(
        [*command, "--memory", "580M", "--max-model-len", "128k"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip()
    assert "max_model_len: 131,072 tokens do not fit in 580M of memory" in message
    enough = message.split("or give ")[1].split(" ")[0]
    with Server("demo", "--memory", enough, "--max-model-len", "128k") as server:
        assert "at once fit 1 x 131,072 tokens" in server.printed
    assert parse_bytes(enough, "memory") < 2 * 2**30
