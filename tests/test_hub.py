"""Downloading from a hub: the real client against a small hub of our own, on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octavo.checkpoint.hub import needed
from tests.checkpoints import small_config, write_hugging_face, write_mistral

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one folder as one repository.

    Attributes:
        requests: (method, path, Range header) of every request.
        stall_after: bytes after which a long answer waits for `release`, with `stalled` set; None
            serves all at once.
        flip: whether one byte of what is sent is wrong.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.requests: list[tuple[str, str, str | None]] = []
        self.stall_after: int | None = None
        self.flip = False
        self.stalled, self.release = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {p.rsplit("/", 1)[1] for m, p, _ in self.requests if m == "GET" and "/resolve/" in p}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        folder = self.server.folder
        if path.startswith(f"/api/models/{REPO}"):
            files = [{"rfilename": f.name} for f in sorted(folder.iterdir())]
            info = {"id": REPO, "sha": COMMIT, "siblings": files, "private": False, "tags": []}
            card = {"license": "other", "license_name": "mrl", "license_link": "https://l.example"}
            if "/tree/" in path:
                tree = [self._entry(f) for f in sorted(folder.iterdir())]
                return self._send(json.dumps(tree).encode(), body)
            return self._send(json.dumps(info | {"cardData": card}).encode(), body)
        name = path.rsplit("/", 1)[1]
        if not path.startswith(f"/{REPO}/resolve/") or not (folder / name).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self._send((folder / name).read_bytes(), body)

    @staticmethod
    def _entry(file: Path) -> dict[str, object]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}

    def _send(self, content: bytes, body: bool) -> None:
        first = 0
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        if self.server.flip and self.path.endswith(".safetensors"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        at = self.server.stall_after
        if at is not None and len(content) > at:
            self.wfile.write(content[:at])
            self.server.stalled.set()
            self.server.release.wait(60)
            return
        self.wfile.write(content[first:])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_mistral(tmp_path / "repo", small_config())
    write_hugging_face(folder, small_config())
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    (folder / "big.gguf").write_bytes(b"x" * 1000)
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def settings(endpoint: str, home: Path) -> dict[str, str]:
    """An environment whose hub is at `endpoint`, with its cache in `home`."""
    kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    kept.pop("HF_HUB_OFFLINE", None)
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def octavo(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command against that hub."""
    return subprocess.run(
        [sys.executable, "-m", "octavo", *arguments],
        env=settings(endpoint, home), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_download_fetches_one_layout_and_names_the_licence(hub: Hub, tmp_path: Path) -> None:
    target = tmp_path / "here"
    done = octavo(hub.url, tmp_path / "home", "download", REPO, "--local-dir", str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(target), "Licence: mrl (https://l.example)"]
    expected = {"params.json", "config.json", "consolidated.safetensors", "README.md"}
    assert {f.name for f in target.iterdir() if f.is_file()} == expected
    assert hub.fetched() == expected
    for name in expected:
        assert (target / name).read_bytes() == (hub.folder / name).read_bytes()


def test_a_hub_id_is_a_model_and_is_kept_for_offline_use(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    online = octavo(hub.url, home, "inspect", REPO)
    assert online.returncode == 0 and "Ragged (256,8,8,8)" in online.stdout, online.stderr
    hub.shutdown()
    hub.server_close()
    offline = octavo(hub.url, home, "inspect", REPO)
    assert offline.returncode == 0 and offline.stdout == online.stdout, offline.stderr


def test_a_download_that_was_killed_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    name, target = "consolidated.safetensors", tmp_path / "here"
    config = small_config(vocab_size=60_000)  # 30 MB; the client writes 10 MiB at a time
    write_mistral(hub.folder, config)
    arguments = ["download", REPO, "--local-dir", str(target)]
    hub.stall_after = 25_000_000
    process = subprocess.Popen(
        [sys.executable, "-m", "octavo", *arguments], env=settings(hub.url, tmp_path / "home")
    )
    assert hub.stalled.wait(60)
    process.kill()
    process.wait()
    hub.release.set()
    assert not (target / name).exists()
    hub.stall_after = None
    done = octavo(hub.url, tmp_path / "home", *arguments)
    assert done.returncode == 0, done.stderr
    assert (target / name).read_bytes() == (hub.folder / name).read_bytes()
    ranges = [r for m, p, r in hub.requests if p.endswith(name) and r and m == "GET"]
    assert len(ranges) == 1 and int(ranges[0].removeprefix("bytes=").rstrip("-")) >= 10 * 2**20


def test_unknown_repository_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = octavo(hub.url, tmp_path / "home", "download", "someone/else")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "someone/else: not found on the hub" in done.stderr


def test_no_network_is_one_line(tmp_path: Path) -> None:
    done = octavo("http://127.0.0.1:9", tmp_path / "home", "chat", REPO)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"octavo: {REPO}: not in the local cache, and the hub cannot be reached" in done.stderr


def test_weights_of_one_layout_are_enough() -> None:
    assert "consolidated*.safetensors" in needed(["params.json", "consolidated.safetensors"])
    assert "model*.safetensors" not in needed(
        ["params.json", "consolidated.safetensors", "model-00001-of-00002.safetensors"]
    )
    assert "model*.safetensors" in needed(["config.json", "params.json", "model.safetensors"])


def test_folder_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "below"
    done = octavo(hub.url, tmp_path / "home", "download", REPO, "--local-dir", str(target))
    assert done.returncode == 2 and "cannot be written: Not a directory" in done.stderr


def test_file_that_arrives_damaged_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.flip = True
    target = tmp_path / "here"
    arguments = ("download", REPO, "--local-dir", str(target))
    done = octavo(hub.url, tmp_path / "home", *arguments)
    assert done.returncode == 2 and "consolidated.safetensors arrived damaged" in done.stderr
    hub.flip = False
    assert octavo(hub.url, tmp_path / "home", *arguments).returncode == 0


def test_two_downloads_at_once_both_succeed_and_fetch_weights_once(
    hub: Hub, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "octavo", "inspect", REPO]
    both = [
        subprocess.Popen(command, env=settings(hub.url, tmp_path), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and outputs[0] == outputs[1]
    fetched = [p for m, p, _ in hub.requests if m == "GET" and p.endswith(".safetensors")]
    assert len(fetched) == 1
