"""The chat page as its users meet it: in a browser."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

# Nothing that the browser does of itself; Chromium as root has no sandbox.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CHAT = "**/v1/chat/completions"


def chromium() -> str | None:
    """The browser's file: $CHROMIUM, or Debian's."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium")


class Chat:
    """The page of a server, and what it asked for and complained about."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.urls: list[str] = []
        self.bodies: list[dict[str, Any]] = []  # of chat requests
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.context.on("request", lambda request: self._note(request.url, request.post_data))
        self.page.goto(url)

    def _note(self, url: str, body: str | None) -> None:
        self.urls.append(url)
        if body is not None:
            self.bodies.append(json.loads(body))

    def set(self, label: str, value: str) -> None:
        self.page.get_by_label(label, exact=True).fill(value)

    def send(self, text: str) -> None:
        prompt = self.page.get_by_label("Message")
        prompt.fill(text)
        prompt.press("Enter")

    def answer(self, text: str) -> Locator:
        """Send, and wait until the answer is whole."""
        n_answers = self.answers.count()
        self.send(text)
        return self.finished(n_answers)

    def finished(self, index: int) -> Locator:
        answer = self.answers.nth(index)
        expect(answer.locator(".figures")).to_be_attached(timeout=20_000)
        return answer

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.assistant")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name)

    def reply(self, *deltas: dict[str, Any], finish_reason: str = "stop") -> None:
        """Have chats answered by these deltas, whatever the model would say."""
        choices: list[dict[str, Any]] = [{"delta": delta} for delta in deltas]
        choices.append({"delta": {}, "finish_reason": finish_reason})
        self.reply_events(*(json.dumps({"choices": [choice]}) for choice in choices), "[DONE]")

    def reply_events(self, *events: str) -> None:
        """Have chats answered by a stream of these events, which then ends."""
        body = "".join(f"data: {event}\n\n" for event in events)
        self.page.unroute(CHAT)
        self.page.route(
            CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream")
        )
