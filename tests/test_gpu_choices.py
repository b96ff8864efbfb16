"""The benchmark of the GPU kernels' choices: it runs on a CPU, and takes each choice back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import triton.language as tl

from benchmarks.gpu_choices import CHOICES
from octavo.kernels.cuda import (
    decode,
    dequantize,
    early_launch,
    prefill,
    quantize,
    tiling,
    top_p,
    w8a8,
)
from octavo.kernels.cuda.call import AttentionCall
from octavo.kernels.kv_pages import KVPages
from octavo.kernels.lens import Lens
from tests import test_gpu_benchmark
from tests.test_cuda_linears import H100

SMALL = (
    "--shape", "demo", "--layers", "2", "--context", "24", "--steps", "2", "--queries", "16",
    "--keys", "48", "--seconds", "0", "--rounds", "1",
)  # fmt: skip


benchmark = partial(test_gpu_benchmark.benchmark, module="benchmarks.gpu_choices")


def test_every_choice_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    done = benchmark("--device", "cpu", *SMALL, "--json", path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert [row["choice"] for row in rows] == [choice.name for choice in CHOICES]
    for row in rows:
        assert row["ratio"] == row["instead_s"] / row["chosen_s"] > 0
        assert f"| {row['choice']} | {row['of']} |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    done = benchmark()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert done.stderr.startswith("benchmarks.gpu_choices needs a GPU")


def on_hopper(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """What launches would be given there."""
    early_launch.early_launch.cache_clear()
    with monkeypatch.context() as patched:
        for module in (w8a8, dequantize):
            patched.setattr(module, "processors", lambda: H100)
        for module in (early_launch, prefill, decode):
            patched.setattr(module, "INTERPRETED", False)
        patched.setattr(early_launch, "_is_right", lambda: True)
        patched.setattr(tl.target_info, "cuda_capability_geq", lambda major: True)
        q = torch.zeros(300, 4, 32, dtype=torch.bfloat16)
        pages = torch.zeros(3, 1, 64, 32, dtype=torch.int8)
        call = AttentionCall(
            q, q, KVPages(pages, pages), torch.zeros(1, 5, dtype=torch.int64), Lens([300]),
            Lens([300]), None,
        )  # fmt: skip
        cut = tiling.tiling(1, 4096, 12288, H100)
        launches = (
            quantize._options(torch.ones(1, 64)).get("launch_pdl"),
            w8a8._constants(cut, 12288)["FETCHED"],
            cut.n_stages,
            prefill.block_sizes(tl.bfloat16, torch.bfloat16, H100).keys,
            dequantize.pays(call),
            top_p.usable(),
        )
    early_launch.early_launch.cache_clear()
    return launches


def test_each_takes_back_one_choice_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert top_p.usable()  # which the interpreter tries
    chosen = (True, 1024, 6, 128, True, True)
    instead = (None, 0, 4, 64, False, False)
    assert on_hopper(monkeypatch) == chosen
    for i, choice in enumerate(CHOICES):
        with choice.instead():
            assert on_hopper(monkeypatch) == (*chosen[:i], instead[i], *chosen[i + 1 :])
    assert on_hopper(monkeypatch) == chosen
