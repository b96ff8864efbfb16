"""Many clients at once: octavo's server under load, and beside it vLLM's on the same machine.

    python -m benchmarks.serve
    python -m benchmarks.serve --peer vllm --vllm PYTHON

PYTHON is that of an environment with vLLM for the CPU (see benchmarks/README.md). Both servers load
the same Mistral folder, by the same options, in the same dtype, with as many threads; both may run
all clients' answers at once. They never run at the same time, each starts anew for every run with
an empty prefix cache, and their order alternates from round to round. The clients are one process
on the same machine, which takes its part of the cores from both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2 as httpx

from benchmarks.figures import write_figures
from benchmarks.load import make_chats, run_load
from benchmarks.machine import cores, cpu_name
from octavo.checkpoint import resolve_model

NAME = "model"  # that both serve
N_WARM_UP = 4  # chats, of another seed than the load's
START_SECONDS = 600.0  # vLLM compiles
FORMAT = ("--tokenizer-mode", "mistral", "--config-format", "mistral", "--load-format", "mistral")
Row = dict[str, Any]


def main() -> None:
    """Run every server in every round, print a table."""
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that servers are stopped too
    servers = ["octavo"] + ([options.peer] if options.peer else [])
    rows: list[Row] = []
    for i in range(options.rounds):
        for name in servers if i % 2 == 0 else servers[::-1]:
            rows.append({"server": name, "round": i + 1} | measure(name, options))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "model": str(options.model),
        "dtype": options.dtype,
        "clients": options.clients,
        "requests": options.requests,
        "seed": options.seed,
        "threads": options.threads,
        "machine": {"cpu": cpu_name(), "cores": len(cores())},
        "versions": {name: version(name) for name in ("octavo", "torch")}
        | ({"vllm": vllm_version(options.vllm)} if options.peer else {}),
        "rows": rows,
        "ratios": ratios(rows, options.peer),
    }
    print_table(result)
    write_figures(result, options.json)
    if any(row["errors"] for row in rows):
        sys.exit("there were errors")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="demo", help="folder in Mistral's layout, or `demo`")
    parser.add_argument("--dtype", default="bfloat16", help="that both compute in")
    parser.add_argument("--clients", type=int, default=64, help="requests under way at once")
    parser.add_argument("--requests", type=int, default=256, help="in a run")
    parser.add_argument("--seconds", type=float, default=600, help="that a run may take")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each server")
    parser.add_argument("--seed", type=int, default=0, help="of the load")
    parser.add_argument(
        "--threads", type=int, default=len(cores()), help="that each server computes with"
    )
    parser.add_argument(
        "--arguments", default="", help="of `octavo serve`, too: --arguments='--max-queue 9'"
    )
    parser.add_argument("--peer", choices=["vllm"], help="run this server too")
    parser.add_argument("--vllm", help="python of its environment")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    if options.peer and not options.vllm:
        parser.error("--peer vllm needs --vllm PYTHON")
    return options


def measure(name: str, options: argparse.Namespace) -> Row:
    """Start a server, warm it up, put the load on it, stop it."""
    start = octavo if name == "octavo" else vllm
    warm_up = make_chats(N_WARM_UP, options.seed + 1_000_000)
    with start(options) as server:
        warmed = run_load(server.url, NAME, warm_up, 2, options.seconds)
        if warmed["errors"]:
            sys.exit(f"{name}: {warmed['errors'][0]}")
        chats = make_chats(options.requests, options.seed)
        return run_load(server.url, NAME, chats, options.clients, options.seconds)


class Running:
    """A server process, from when it is ready until it and its children have ended.

    Args:
        command: what to run.
        port: where it will listen on this machine.
        ready: the path that answers 200 when it is ready.
        env: added to the environment.
    """

    def __init__(self, command: Sequence[str], port: int, ready: str, env: dict[str, str]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._ready = ready
        self._command = command
        self._env = os.environ | env

    def __enter__(self) -> Running:
        self._log = tempfile.TemporaryFile()
        # A session of its own, so that one signal reaches all processes that it starts.
        self._process = subprocess.Popen(
            self._command, stdout=self._log, stderr=subprocess.STDOUT, env=self._env,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as http:
            while time.monotonic() < deadline and self._process.poll() is None:
                try:
                    if http.get(self._ready).status_code == 200:
                        return
                except httpx.HTTPError:
                    pass  # it does not listen yet
                time.sleep(0.2)
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        sys.exit(f"{printed[-4000:]}\n{shlex.join(self._command)}: did not become ready")

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what is left of them
        self._process.wait()
        self._log.close()


def octavo(options: argparse.Namespace) -> Running:
    """`octavo serve`."""
    port = free_port()
    command = [
        sys.executable, "-m", "octavo", "serve", options.model, *common_arguments(options, port),
        *shlex.split(options.arguments),
    ]  # fmt: skip
    return Running(command, port, "/ready", {"OMP_NUM_THREADS": str(options.threads)})


def vllm(options: argparse.Namespace) -> Running:
    """vLLM's server for the CPU."""
    port = free_port()
    command = [
        options.vllm, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(resolve_model(options.model)), *common_arguments(options, port),
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores()[: options.threads])),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Running(command, port, "/health", env)


def common_arguments(options: argparse.Namespace, port: int) -> list[str]:
    """What both servers are told in the same words."""
    return [
        *FORMAT, "--dtype", options.dtype, "--served-model-name", NAME, "--max-model-len", "8192",
        "--max-num-seqs", str(options.clients), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def ratios(rows: Sequence[Row], peer: str | None) -> Row:
    """octavo's figures by the peer's, each the median over the rounds."""
    if peer is None:
        return {}
    return {
        key: round(median(rows, "octavo", key) / median(rows, peer, key), 3)
        for key in ("output_tokens_per_s", "first_token_p50_s", "first_token_p99_s",
                    "per_token_p50_s", "per_token_p99_s")
        if all(row[key] is not None for row in rows)
    }  # fmt: skip


def median(rows: Sequence[Row], server: str, key: str) -> float:
    """Over the rounds of a server; of two, their mean."""
    values = sorted(row[key] for row in rows if row["server"] == server)
    middle = len(values) // 2
    return (values[middle] + values[~middle]) / 2


def print_table(result: Row) -> None:
    """The figures, for people."""
    rows, machine = result["rows"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"\n{result['model']} in {result['dtype']}: {result['clients']} clients, ", end="")
    print(f"{result['requests']} chats (seed {result['seed']})")
    print(f"{machine['cpu']}, {machine['cores']} cores, {result['threads']} threads; {versions}")
    print(
        f"{rows[0]['prompt_tokens']:,} prompt tokens (longest {rows[0]['longest_prompt']:,}), "
        f"{rows[0]['output_tokens']:,} output tokens a run\n"
    )
    print(
        "| server | round | output tokens/s | requests/s | first token p50, p99 (s) "
        "| a token p50, p99 (ms) | prompt found in cache | errors |"
    )
    print("| --- " * 8 + "|")
    for row in rows:
        first = f"{cell(row['first_token_p50_s'])}, {cell(row['first_token_p99_s'])}"
        per_token = f"{cell(row['per_token_p50_s'], 1e3)}, {cell(row['per_token_p99_s'], 1e3)}"
        print(
            f"| {row['server']} | {row['round']} | {row['output_tokens_per_s']:.1f} "
            f"| {row['requests_per_s']:.2f} | {first} | {per_token} "
            f"| {row['cached_share']:.1%} | {len(row['errors'])} |"
        )
    for row in rows:
        for error in row["errors"][:5]:
            print(f"{row['server']}, round {row['round']}: {error}")
    if result["ratios"]:
        words = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())
        print(f"\noctavo / vllm: {words}")


def cell(seconds: float | None, factor: float = 1) -> str:
    """Three digits of a figure that there may not be."""
    return "none" if seconds is None else f"{seconds * factor:.3g}"


def vllm_version(python: str) -> str:
    """Of the peer's environment."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
