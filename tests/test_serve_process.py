"""`octavo serve` as a process: how it starts, what it refuses, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.serving import SUM, Server, eventually
from tests.test_cli import Capsys, fails
from tests.test_serve_errors import CHAT, error_of

LONG: Any = {"messages": SUM, "max_tokens": 300, "ignore_eos": True, "stream": True}


def test_sigterm_finishes_what_was_begun_refuses_what_is_new_and_exits_0(text_model: Path) -> None:
    with Server(str(text_model), "--dtype", "float32") as server:
        with server.http.stream("POST", CHAT, json=LONG) as response:
            lines = (line for line in response.iter_lines() if line)
            assert response.status_code == 200 and next(lines).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)

            def is_draining() -> bool:
                return httpx.get(f"{server.url}/ready").status_code == 503

            assert eventually(is_draining, 5)
            refused = httpx.post(f"{server.url}{CHAT}", json=LONG)
            assert refused.status_code == 503 and "shutting down" in error_of(refused)["message"]
            *pieces, last = lines
        assert last == "data: [DONE]"
        end = json.loads(pieces[-1].removeprefix("data: "))["choices"][0]
        assert end["finish_reason"] == "length"
        _, err = server.process.communicate(timeout=30)
        assert (server.process.returncode, err) == (0, "")


def test_a_second_signal_ends_it_at_once() -> None:
    with Server("demo", OCTAVO_API_KEY="one,two") as server:
        assert "no --api-key" not in server.printed and "0.0.0.0" in server.printed
        local = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{local}/v1/models").status_code == 401
        keys = {"Authorization": "Bearer two"}
        assert httpx.get(f"{local}/v1/models", headers=keys).status_code == 200
        body = LONG | {"max_tokens": 9000}
        with httpx.stream("POST", f"{local}{CHAT}", json=body, headers=keys) as response:
            lines = response.iter_lines()  # httpx hangs up when these are forgotten
            next(lines)
            server.process.send_signal(signal.SIGINT)
            assert eventually(lambda: httpx.get(f"{local}/ready").status_code == 503, 5)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(10) == 130


def test_a_signal_while_the_model_is_loaded_ends_it(text_model: Path) -> None:
    with Server(str(text_model), until="loading") as server:
        code, err = server.stop()
        assert (code, err) == (0, "")


def test_answers_that_outlast_the_drain_are_told() -> None:
    with (
        Server("demo", "--drain-timeout", "0.1") as server,
        server.http.stream("POST", CHAT, json=LONG | {"max_tokens": 9000}) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        *_, last = lines
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "shut down" in error["message"] and error["code"] == "unavailable"
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--host", "0.0.0.0"], "--host: 0.0.0.0 would let anyone in; set --api-key"),
        (["--host", "not a host", "--api-key", "x"], "--host: 'not a host' is not an address"),
        (["--host", "192.0.2.1", "--api-key", "x"], "--host: '192.0.2.1' is not an address"),
        (["--host", "x" * 64, "--api-key", "x"], "is not an address or name of this machine"),
        (["--served-model-name", ""], "--served-model-name: a name is one or more characters"),
        (["--allowed-origins", "foo"], "--allowed-origins: 'foo' is no origin; give scheme"),
        (["--allowed-origins", "https://page.example/"], "'https://page.example/' is no origin"),
        (["--api-key", ""], "--api-key: a key is one or more printable"),
        (["--api-key", "a b\n"], "--api-key: a key is one or more printable"),
        (["--max-body", "much"], "--max-body: 'much'"),
        (["--max-model-len", "9999", "--port", "0"], "max_model_len 9999 is more than"),
        (["--tokenizer", "no.json", "--port", "0"], "no.json: no such tokenizer"),
    ],
)
def test_a_mistake_is_one_line(
    text_model: Path, capsys: Capsys, arguments: list[str], problem: str
) -> None:
    assert problem in fails(capsys, "serve", text_model, *arguments)


def test_a_port_that_is_taken_is_one_line(text_model: Path, capsys: Capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fails(capsys, "serve", text_model, "--port", port)
    assert f"--port: cannot listen on 127.0.0.1:{port}: Address already in use" in error


def test_without_its_packages_it_says_what_to_install(text_model: Path) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['octavo', 'serve', 'demo'];"
        "from octavo.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "octavo: serve needs uvicorn; install octavo[serve]\n"
