"""The chat page in headless Chromium, against a server process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect, sync_playwright

from octavo.demo.prompts import WEATHER_TOOL
from tests.browsing import CHAT, FLAGS, Chat, chromium
from tests.serving import Server, eventually

SUM = "What is 23 + 48?"
WEATHER = "What's the weather like today in Paris?"
KEY = "a-secret"
# What the model is called is asked for once `letGo` is called, if nobody stops it before.
HOLD_NAME = """(() => {
    const held = new Promise((resolve) => { window.letGo = resolve; });
    window.real = window.fetch;
    window.fetch = async (path, options) => {
        const signal = options.signal ?? new AbortController().signal;
        const stopped = new Promise((resolve) => { signal.onabort = resolve; });
        if (path.endsWith("/models")) await Promise.race([held, stopped]);
        return real(path, options);
    };
})()"""
HOSTILE = "<img src=x onerror='window.broken=1'><script>window.broken=1</script>&lt;b&gt;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. A machine without it skips, but CI does not."""
    executable = chromium()
    if executable is None:
        problem = "no Chromium; install it, or name it in $CHROMIUM"
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def chat(browser: Browser, server: Server) -> Iterator[Chat]:
    """The page of a server without a key. It must not complain, nor ask any other server."""
    opened = Chat(browser, f"{server.url}/")
    opened.set("Temperature", "0")
    yield opened
    opened.context.close()
    assert opened.complaints == []
    assert [url for url in opened.urls if not url.startswith(f"{server.url}/")] == []


@pytest.fixture(scope="module")
def server_with_key() -> Iterator[Server]:
    with Server("demo", "--dtype", "float32", "--host", "127.0.0.1", "--api-key", KEY) as running:
        yield running


def test_an_answer_is_shown_as_it_comes(chat: Chat) -> None:
    # In place of the server's answer, so that each piece waits until the one before it was seen.
    chat.page.evaluate(
        """() => {
            const body = new ReadableStream({ start(controller) { window.stream = controller; } });
            const real = window.fetch;  // by which the page asks for the model meanwhile
            window.fetch = async (path, options) =>
                path.endsWith("/chat/completions") ? new Response(body) : real(path, options);
        }"""
    )
    chat.send(SUM)
    shown = ""
    for piece in ("23 +", " 48 =", " 71."):
        event = json.dumps({"choices": [{"delta": {"content": piece}}]})
        chat.page.evaluate(
            "(event) => stream.enqueue(new TextEncoder().encode(event))", f"data: {event}\n\n"
        )
        shown += piece
        expect(chat.answers.locator(".text")).to_have_text(shown)
        expect(chat.button("Stop")).to_be_enabled()
        expect(chat.answers.locator(".figures")).to_have_count(0)


def test_an_answer_and_its_figures(chat: Chat) -> None:
    answer = chat.answer(SUM)
    expect(answer.locator(".text")).to_have_text("23 + 48 = 60 + 11 = 71.")
    figures = answer.locator(".figures").inner_text()
    assert " tokens · " in figures and " tokens/s · first after " in figures
    assert " prompt tokens cached" in figures
    expect(chat.page.locator("#model")).not_to_be_empty()
    expect(chat.page.get_by_label("Message")).to_be_focused()


def test_settings_are_what_is_asked_for(chat: Chat) -> None:
    chat.set("System prompt", "Be brief.")
    chat.set("Temperature", "0.25")
    chat.set("Max tokens", "3")
    answer = chat.answer(SUM)
    body = chat.bodies[-1]
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": SUM},
    ]
    assert (body["temperature"], body["max_tokens"]) == (0.25, 3)
    expect(answer.locator(".figures")).to_contain_text("3 tokens")
    expect(answer.locator(".figures")).to_contain_text("cut off at the limit of tokens")


def test_a_conversation_goes_on_and_begins_anew(chat: Chat) -> None:
    first = chat.answer(SUM).locator(".text").inner_text()
    chat.answer("hello")
    assert [message["role"] for message in chat.bodies[-1]["messages"]] == [
        "user", "assistant", "user",
    ]  # fmt: skip
    assert chat.bodies[-1]["messages"][1]["content"] == first
    chat.button("New conversation").click()
    expect(chat.page.locator("article")).to_have_count(0)
    chat.answer("hello")
    assert chat.bodies[-1]["messages"] == [{"role": "user", "content": "hello"}]


def test_an_answer_that_waits_for_the_models_name_is_stopped(chat: Chat) -> None:
    chat.page.add_init_script(HOLD_NAME)
    chat.page.reload()
    chat.send(SUM)
    chat.button("Stop").click()
    expect(chat.page.get_by_label("Message")).to_have_value(SUM)
    expect(chat.page.locator("article")).to_have_count(0)
    assert chat.bodies == []


def test_an_answer_that_waits_for_the_models_name_stays_in_its_conversation(chat: Chat) -> None:
    chat.page.add_init_script(HOLD_NAME)
    chat.page.reload()
    chat.send(SUM)
    expect(chat.page.locator("article.user")).to_have_count(1)
    chat.button("New conversation").click()
    chat.page.evaluate("letGo()")
    chat.answer("hello")
    expect(chat.page.locator("article")).to_have_count(2)
    assert [body["messages"] for body in chat.bodies] == [[{"role": "user", "content": "hello"}]]


def test_shift_enter_is_a_new_line(chat: Chat) -> None:
    prompt = chat.page.get_by_label("Message")
    prompt.press_sequentially("a")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("b")
    assert chat.bodies == []
    prompt.press("Enter")
    chat.finished(0)
    assert chat.bodies[-1]["messages"][0]["content"] == "a\nb"


def test_a_stopped_answer_stays_and_the_conversation_goes_on(chat: Chat, server: Server) -> None:
    def endlessly(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        body |= {"ignore_eos": True, "max_tokens": 20_000}
        route.continue_(post_data=json.dumps(body))

    chat.page.route(CHAT, endlessly)
    chat.send(SUM)
    expect(chat.answers.locator(".text")).not_to_be_empty()
    chat.button("Stop").click()
    expect(chat.finished(0).locator(".figures")).to_have_text("stopped")
    partial = chat.answers.locator(".text").text_content()
    assert eventually(server.is_idle)
    assert chat.answers.locator(".text").text_content() == partial
    chat.page.unroute(CHAT)
    chat.answer("hello")
    assert chat.bodies[-1]["messages"][1] == {"role": "assistant", "content": partial}


def test_a_tool_call_is_shown_and_its_result_sent_back(chat: Chat) -> None:
    chat.set("Tools", json.dumps([WEATHER_TOOL]))
    answer = chat.answer(WEATHER)
    assert chat.bodies[-1]["tools"] == [WEATHER_TOOL]
    expect(answer.locator(".name")).to_have_text("get_current_weather")
    shown = answer.locator(".arguments").inner_text()
    assert json.loads(shown)["format"] == "celsius" and shown.startswith('{\n  "location": "')
    answer.get_by_label("Result").fill('{"temperature": 22}')
    chat.button("Send result").click()
    expect(chat.finished(1).locator(".text")).not_to_be_empty()
    _, asking, result = chat.bodies[-1]["messages"]
    (call,) = asking["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == json.loads(shown)
    assert result == {
        "role": "tool",
        "tool_call_id": call["id"],
        "name": "get_current_weather",
        "content": '{"temperature": 22}',
    }
    expect(answer.get_by_label("Result")).to_be_disabled()


def test_two_calls_are_answered_together(chat: Chat) -> None:
    def delta(index: int, **function: str) -> dict[str, Any]:
        start = {"id": f"call{index}", "type": "function"} if "name" in function else {}
        return {"tool_calls": [{"index": index, "function": {"arguments": ""} | function} | start]}

    chat.reply(
        delta(0, name="f"), delta(0, arguments='{"n": 1'), delta(0, arguments="23456789012345678}"),
        delta(1, name="g"), delta(1, arguments="not JSON"), finish_reason="tool_calls",
    )  # fmt: skip
    answer = chat.answer("go")
    # A number that JavaScript would round is shown as it came.
    expect(answer.locator(".arguments").nth(0)).to_have_text('{"n": 123456789012345678}')
    expect(answer.locator(".arguments").nth(1)).to_have_text("not JSON")
    for i in range(2):
        answer.get_by_label("Result").nth(i).fill(f"result {i}")
    chat.button("Send results").click()
    chat.finished(1)
    results = chat.bodies[-1]["messages"][-2:]
    assert [(r["tool_call_id"], r["content"]) for r in results] == [
        ("call0", "result 0"),
        ("call1", "result 1"),
    ]


def test_markup_stays_text(chat: Chat) -> None:
    function = {"name": HOSTILE, "arguments": HOSTILE}
    call = {"index": 0, "id": "a", "type": "function", "function": function}
    chat.reply({"content": HOSTILE}, {"tool_calls": [call]})
    answer = chat.answer(HOSTILE)
    for place in (".text", ".name", ".arguments"):
        assert answer.locator(place).text_content() == HOSTILE
    assert chat.page.locator(".user .text").text_content() == HOSTILE
    chat.reply_events(json.dumps({"error": {"message": HOSTILE}}))
    chat.send("again")
    expect(chat.page.get_by_role("alert")).to_have_text(HOSTILE)
    assert chat.page.locator("#log img, #log script, #log b, #error *").count() == 0
    assert chat.page.evaluate("window.broken") is None


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Tools", "[nope", "Tools: not JSON."),
        ("Tools", "{}", "Tools: a JSON list is needed."),
        ("Temperature", "9", "Temperature: "),
    ],
)
def test_a_bad_setting_is_named_and_the_text_given_back(
    chat: Chat, label: str, value: str, message: str
) -> None:
    chat.set(label, value)
    chat.send(SUM)
    expect(chat.page.get_by_role("alert")).to_contain_text(message)
    expect(chat.page.get_by_label(label, exact=True)).to_be_focused()
    expect(chat.page.get_by_label("Message")).to_have_value(SUM)
    expect(chat.page.locator("article")).to_have_count(0)
    assert chat.bodies == []


def test_an_error_outlasts_the_models_name(chat: Chat) -> None:
    chat.page.add_init_script(HOLD_NAME)
    chat.page.reload()
    chat.set("Tools", "{}")
    chat.send(SUM)
    expect(chat.page.get_by_role("alert")).to_have_text("Tools: a JSON list is needed.")
    chat.page.evaluate("letGo()")
    expect(chat.page.locator("#model")).not_to_be_empty()
    expect(chat.page.get_by_role("alert")).to_have_text("Tools: a JSON list is needed.")


def test_the_servers_own_errors_are_shown(chat: Chat) -> None:
    chat.set("Tools", '[{"type": "function", "function": {"name": "two words"}}]')
    chat.send(SUM)
    expect(chat.page.get_by_role("alert")).to_contain_text("tools[0].function.name")
    expect(chat.page.get_by_label("Message")).to_have_value(SUM)
    assert "400" in chat.complaints.pop()  # the browser's own note of the status


def test_a_broken_stream_keeps_what_came(chat: Chat) -> None:
    chat.reply_events(json.dumps({"choices": [{"delta": {"content": "So far"}}]}))
    chat.send(SUM)
    expect(chat.finished(0).locator(".text")).to_have_text("So far")
    expect(chat.page.get_by_role("alert")).to_have_text("The answer ended too early.")
    chat.page.unroute(CHAT)
    chat.answer("hello")
    assert chat.bodies[-1]["messages"][1]["content"] == "So far"


def test_events_are_the_same_wherever_the_stream_is_cut(chat: Chat) -> None:
    results = chat.page.evaluate(
        """async (text) => {
            const { events } = await import("/page/api.js");
            const bytes = new TextEncoder().encode(text);
            const cuts = Array.from(bytes, (_, i) => [bytes.slice(0, i), bytes.slice(i)]);
            cuts.push(Array.from(bytes, (byte) => Uint8Array.of(byte)));
            const results = [];
            for (const pieces of cuts) {
                const stream = new ReadableStream({ start(controller) {
                    for (const piece of pieces) controller.enqueue(piece);
                    controller.close();
                } });
                const found = [];
                for await (const data of events(stream)) found.push(data);
                results.push(found);
            }
            return results;
        }""",
        "data: é€😀\r\n\r\ndata:a\ndata: b\n\n: a comment\nid: 7\n\ndata: c\r\rdata: lost",
    )
    assert len(results) > 50
    assert all(found == ["é€😀", "a\nb", "c"] for found in results)


def test_a_key_is_asked_for_and_kept_in_memory(browser: Browser, server_with_key: Server) -> None:
    chat = Chat(browser, f"{server_with_key.url}/", viewport={"width": 360, "height": 640})
    key = chat.page.get_by_label("API key")
    alert = chat.page.get_by_role("alert")
    expect(alert).to_have_text("This server asks for an API key.")
    expect(key).to_be_focused()  # in settings that a narrow page had closed
    for wrong in ("wrong", "schlüssel"):
        key.fill(wrong)
        key.press("Enter")
        expect(alert).to_have_text("The server does not know this API key.")
    chat.send(SUM)
    expect(chat.page.get_by_label("Message")).to_have_value(SUM)
    key.fill(KEY)
    key.press("Enter")
    expect(alert).to_be_hidden()
    expect(chat.page.locator("#model")).to_have_text("demo")
    expect(chat.answer(SUM).locator(".text")).to_contain_text("71")
    remembered = "localStorage.length + sessionStorage.length + document.cookie.length"
    assert chat.page.evaluate(remembered) == 0
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
    chat.page.reload()
    expect(key).to_have_value("")
    expect(chat.page.locator("article")).to_have_count(0)
    chat.context.close()


def test_a_key_that_is_no_longer_there_is_no_error(
    browser: Browser, server_with_key: Server
) -> None:
    chat = Chat(browser, f"{server_with_key.url}/")
    key, name = chat.page.get_by_label("API key"), chat.page.locator("#model")
    expect(chat.page.get_by_role("alert")).to_have_text("This server asks for an API key.")
    chat.page.evaluate(HOLD_NAME)
    key.fill("wrong")
    key.press("Enter")
    expect(chat.page.get_by_role("alert")).to_be_hidden()
    chat.page.evaluate("() => { window.fetch = real; }")
    key.fill(KEY)
    key.press("Enter")
    expect(name).to_have_text("demo")
    name.evaluate("(element) => { element.textContent = ''; letGo(); }")
    expect(name).to_have_text("demo")  # shown anew: the answer to the wrong key was looked at
    expect(chat.page.get_by_role("alert")).to_be_hidden()
    chat.context.close()


def test_the_page_lets_nothing_else_in(server: Server) -> None:
    response = server.http.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert server.http.get("/page/page.js").headers["content-type"].startswith("text/javascript")
    assert server.http.get("/page/__init__.py").status_code == 404
