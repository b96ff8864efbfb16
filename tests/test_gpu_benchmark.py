"""The benchmark on a GPU: it runs from end to end on a CPU, and holds targets against figures."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_targets import rows_of
from benchmarks.processes import Finished
from benchmarks.targets import Row
from octavo.bench.shapes import find_shape

ROOT = Path(__file__).parent.parent
SMALL = (
    "--shape", "demo", "--layers", "2", "--context", "24", "--decode", "1", "--steps", "2",
    "--prefill", "40", "--long", "64", "--chunk", "16", "--keys", "48", "--window", "32",
    "--passkey", "512", "--tries", "1",
)  # fmt: skip


def benchmark(
    *arguments: object, module: str = "benchmarks.gpu"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_all_parts_run_on_a_cpu_with_a_small_shape(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = benchmark("--device", "cpu", *SMALL, "--json", path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(path.read_text())
    assert result["failed"] == {} and result["machine"]["gpu"] is None
    assert result["decode_1"]["batch"] == 1
    assert result["decode_1"]["context"] + result["decode_1"]["prompt"] == 24
    assert result["prefill"]["prompt"] == 40 and result["prefill"]["device"] == "cpu"
    assert (result["long"]["prompt"], result["long"]["kv"]) == (56, "int8")
    peer = result["transformers"]
    assert set(peer["prefill_s"]) == {"40"} and set(peer["decode_step_s"]) == {"1"}
    assert {row["window"] for row in result["attention"]["rows"]} == {None, 32}
    [linears] = result["linears"]["rows"]
    assert linears["tokens"] == 16 and linears["tops"] > 0
    assert result["passkey"]["models"][0]["tries"] == 1
    whats = {(row.what, row.against) for row in rows_of(result)}
    assert ("decode, batch 1, after 24 tokens", "transformers") in whats
    assert ("prefill, 40 tokens", "transformers") in whats
    table = path.with_suffix(".md").read_text()
    assert table in done.stdout and "| passkey in 512 tokens, 1 tries |" in table


def test_the_linears_of_a_prompt_are_those_that_all_of_its_tokens_go_through() -> None:
    names = gpu.linears_of_a_prompt(find_shape("demo", 2))
    whole = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
    assert [name.rsplit(".")[-1] for name in names] == [*whole, "wq", "wk", "wv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = benchmark("--json", tmp_path / "gpu.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith("benchmarks.gpu needs a GPU that PyTorch can use: device: 'cuda'")
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    done = benchmark("--device", "cpu", *SMALL, "--json", path, "--minutes", "0")
    result = json.loads(path.read_text())
    assert done.returncode == 1 and "failed: decode_1, prefill, " in done.stderr
    assert result["failed"]["passkey"] == "not begun: --minutes 0 are over"


def parts_of(
    monkeypatch: pytest.MonkeyPatch, path: Path, program: Callable[[list[str], float], Finished],
    *arguments: object,
) -> dict[str, Any]:  # fmt: skip
    """What the benchmark makes of programs that `program` stands in for, and leaves in its file."""

    def run(command: list[str], env: dict[str, str], timeout: float) -> Finished:
        return program(command, timeout)

    monkeypatch.setattr(gpu, "run", run)
    command = ["gpu", "--device", "cpu", *SMALL, "--json", path, *arguments]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    gpu.Benchmark(gpu.parse_arguments(), torch.device("cpu")).measure()
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def written(command: list[str]) -> Path:
    """The file that a program is to write."""
    return Path(command[1 + max(command.index(f) for f in WRITES if f in command)])


WRITES = ("--out", "--output", "--json")


def test_whatever_a_part_fails_of_the_others_go_on_and_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    seen: list[dict[str, Any]] = []

    def program(command: list[str], timeout: float) -> Finished:
        seen.append(json.loads(path.read_text()))
        if "bench" in command:
            stdout = "no JSON" if "40" in command else '{"batch": 1}'
            return Finished(stdout, "octavo: by PyTorch\nloading\n", 0.0, 0)
        if "passkey" in command:
            assert command[command.index("--device") + 1] == "cpu"
            raise OSError("no such program")
        if "benchmarks.attention" in command or "benchmarks.linears" in command:
            raise SystemExit("exit code 1")
        written(command).write_text('{"prefill_s": {"40": 2.0}}')
        raise SystemExit("killed after 9 s")

    result = parts_of(monkeypatch, path, program)
    failed = ["prefill", "linears", "attention", "passkey", "transformers"]
    assert list(result["failed"]) == failed
    assert "JSONDecodeError" in result["failed"]["prefill"]
    assert "no such program" in result["failed"]["passkey"]
    assert result["transformers"] == {"prefill_s": {"40": 2.0}}  # before it was killed
    assert result["long"] == result["decode_1"] == {"batch": 1} and "attention" not in result
    by_pytorch = ["octavo: by PyTorch"]
    assert result["warnings"] == dict.fromkeys(("decode_1", "prefill", "long"), by_pytorch)
    assert "decode_1" not in seen[0] and "decode_1" in seen[1] and "attention" in seen[4]["failed"]


def test_a_program_that_hangs_leaves_time_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def program(command: list[str], timeout: float) -> Finished:
        given.append(timeout)
        now[0] += timeout
        raise SystemExit("killed")

    parts_of(monkeypatch, tmp_path / "gpu.json", program, "--minutes", 8)
    assert given == [240 / 2**i for i in range(7)]


def test_figures_of_a_passkey_are_kept_where_the_cpus_are_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"lengths": [512], "depths": [0.5], "tries": 1, "seed": 0}
    on_cpu = tmp_path / "cpu.json"

    def program(command: list[str], timeout: float) -> Finished:
        if "passkey" in command:
            written(command).write_text(json.dumps(own))
            return Finished("", "", 0.0, 0)
        raise SystemExit("left out")

    for seed in (0, 1):
        other = own | {"seed": seed, "models": [{"right": 1}]}
        on_cpu.write_text(json.dumps(other))
        path = tmp_path / f"{seed}.json"
        result = parts_of(monkeypatch, path, program, "--cpu-passkey", on_cpu)
        assert result["passkey"] == own | ({} if seed else {"right_on_cpu": 1})
        assert ("passkey" in result["failed"]) == bool(seed)


def test_what_is_not_installed_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: "/nowhere")
    lacking = gpu.missing(cuda)
    assert [each.split()[0] for each in lacking] == ["transformers", "triton", "a", "Python.h"]
    assert len(gpu.missing(cpu)) == 1
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setenv("CC", "cc")
    assert gpu.missing(cpu) == [] and len(gpu.missing(cuda)) == 1


def figures() -> dict[str, Any]:
    """A result of `benchmarks.gpu` in round numbers."""
    own = {"batch": 1, "decode_tok_s": 100.0, "read_gb_s": 70.0, "machine_read_gb_s": 100.0}
    long = {"prompt": 131_064, "decode": 8, "prefill_s": 20.0, "peak_device_bytes": 17 * 10**9}
    return {
        "context": 1024,
        "linear_operations_per_token": 2 * 10**9,
        "decode_1": own,
        "decode_64": own | {"batch": 64, "decode_tok_s": 3000.0},
        "prefill": {"prompt": 8192, "prefill_tok_s": 30_000.0, "machine_int8_tops": 100.0},
        "transformers": {
            "prefill_s": {"8192": 8192 / 10_000}, "decode_step_s": {"1": 0.02, "64": 0.064},
        },
        "linears": {"machine_int8_tops": 100.0, "rows": [{"tokens": 4096, "tops": 70.0}]},
        "attention": {
            "machine_bf16_tflops": 50.0,
            "rows": [
                {"by": by, "queries": queries, "keys": 131_072, "window": window, "tflop_s": rate}
                for by, queries, window, rate in (
                    ("octavo, bf16 KV", 4096, None, 30.0),
                    ("octavo, bf16 KV", 4096, 32_768, 29.0),
                    ("octavo, int8 KV", 1, None, 1.0),
                )
            ],
        },
        "long": long,
        "passkey": {
            "lengths": [131_072], "models": [{"right": 4, "tries": 5}], "right_on_cpu": 4,
        },
    }  # fmt: skip


def by_name(result: dict[str, Any]) -> dict[tuple[str, str], Row]:
    return {(row.what, row.against): row for row in rows_of(result)}


def test_every_target_is_held_against_the_right_figures() -> None:
    rows = by_name(figures())
    long = "prompt of 131,064 tokens, int8 weights and KV"
    alone = "attention alone, 4,096 x 131,072"
    expected = {  # ratio, target, whether it is met
        ("decode, batch 1, after 1,024 tokens: memory read", "the machine reads"): (0.7, 0.7, True),
        ("decode, batch 1, after 1,024 tokens", "transformers"): (2.0, 2.5, False),
        ("decode, batch 64, after 1,024 tokens", "the target"): (0.5, 1.0, False),
        ("decode, batch 64, after 1,024 tokens", "transformers"): (3.0, None, None),
        ("prefill, 8,192 tokens: linears", "the machine's int8"): (0.6, None, None),
        ("prefill in chunks of 4,096: linears alone", "the machine's int8"): (0.7, 0.6, True),
        ("prefill, 8,192 tokens", "transformers"): (3.0, 1.5, True),
        (f"{alone}, full, octavo, bf16 KV", "the machine's bf16"): (0.6, 0.6, True),
        (f"{alone}, window 32,768, octavo, bf16 KV", "the machine's bf16"): (0.58, 0.6, False),
        (f"{long}: first token", "the target"): (1.0, 1.0, True),
        (f"{long}: device memory", "the target"): (17 / 16, 1.0, False),
        ("passkey in 131,072 tokens, 5 tries", "the CPU"): (1.0, 1.0, True),
    }
    assert set(rows) == set(expected)
    for key, (ratio, target, met) in expected.items():
        assert rows[key].ratio == pytest.approx(ratio), key
        assert (rows[key].target, rows[key].met) == (target, met), key


def test_what_was_not_measured_has_no_row() -> None:
    result = figures()
    for part in ("transformers", "linears", "attention", "decode_64", "passkey"):
        del result[part]
    result["passkey"] = {"models": []}  # ended before the first answer
    result["long"]["peak_device_bytes"] = None  # as on a CPU
    against = {row.against for row in rows_of(result)}
    assert against == {"the machine reads", "the machine's int8"}
    shorter = copy.deepcopy(figures())
    shorter["long"]["prompt"] = 1000
    del shorter["passkey"]["right_on_cpu"]
    rows = rows_of(shorter)
    assert [row.target for row in rows if row.what.startswith(("prompt", "pass"))] == [None] * 3
