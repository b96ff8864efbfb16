"""A server as its users meet it: a process of its own, on a port of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType

import httpx2 as httpx
from openai import OpenAI

# Threads that wait for each other lose most of a machine that other tests share.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
CARD_MODEL = "mistralai/Ministral-8B-Instruct-2410"


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
        address = re.search(r"http://127\.0\.0\.1:\d+", self.printed)
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
