"""A server as its users meet it: a process of its own, on a port of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx2 as httpx
from openai import OpenAI

# Threads that wait for each other lose most of a machine that other tests share.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CARD_MODEL = "mistralai/Ministral-8B-Instruct-2410"
SUM: Any = [{"role": "user", "content": "What is 23 + 48?"}]


class Server:
    """`octavo serve ARGUMENTS --port 0`, ready when made (or as soon as it listens)."""

    def __init__(self, *arguments: str, until: str = "describes the API", **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "octavo", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | ONE_THREAD | env,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.printed = ""
        while until not in self.printed:
            line = self.process.stdout.readline()
            assert line, self.printed + self.process.communicate()[1]
            self.printed += line
        address = re.search(r"http://[\d.]+:\d+", self.printed)
        self.url = address[0] if address else ""
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def openai(self, key: str = "token") -> OpenAI:
        """The official client, pointed here."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        match = re.search(rf"^{name} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert match is not None, name
        return float(match[1])

    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and no page is held."""
        names = ("octavo_answers_running", "octavo_requests_waiting", "octavo_pages_used")
        return all(self.metric(name) == 0 for name in names)

    def stop(self) -> tuple[int, str]:
        """SIGTERM; exit code and stderr."""
        self.process.terminate()
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ask(client: OpenAI, messages: Any = SUM, **fields: Any) -> Any:
    fields = {"model": CARD_MODEL, "temperature": 0, "max_tokens": 24} | fields
    create: Any = client.chat.completions.create
    return create(messages=messages, **fields)


class Streamed:
    """A streamed answer put together again, choice by choice."""

    def __init__(self, chunks: Any) -> None:
        self.content: dict[int, str] = {}
        self.calls: dict[int, list[dict[str, str]]] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.finish_reasons: dict[int, str] = {}
        self.usage: Any = None
        self.n_chunks = 0
        for chunk in chunks:
            self.n_chunks += 1
            self.usage = chunk.usage or self.usage
            for choice in chunk.choices:
                self._add(choice)

    def _add(self, choice: Any) -> None:
        i = choice.index
        self.content[i] = self.content.get(i, "") + (choice.delta.content or "")
        if choice.logprobs is not None:
            self.logprobs.setdefault(i, []).extend(choice.logprobs.content)
        for call in choice.delta.tool_calls or ():
            calls = self.calls.setdefault(i, [])
            if call.index == len(calls):
                assert len(call.id) == 9 and call.type == "function"
                calls.append({"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        if choice.finish_reason is not None:
            assert i not in self.finish_reasons
            self.finish_reasons[i] = choice.finish_reason


def stream(client: OpenAI, messages: Any = SUM, **fields: Any) -> Streamed:
    return Streamed(ask(client, messages, stream=True, **fields))
