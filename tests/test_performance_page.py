"""The benchmark on the CPU: targets held against figures, its page, its processes and models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu
from benchmarks.checkpoints import write_w8a8
from benchmarks.pace import fastest_at_one_pace
from benchmarks.performance_page import BEGIN, END, PAGE, PICTURE, write_page
from benchmarks.processes import run, run_to_file
from benchmarks.targets import RATE, Row, rows_of
from octavo.bench.shapes import quantised
from octavo.model import Transformer
from tests.checkpoints import small_config


def bench(**figures: Any) -> dict[str, Any]:
    """An output of `octavo bench`, as far as the page looks at it."""
    return {
        "layers": 4, "head": "int8", "kv": "int8", "prompt": 128, "batch": 1, "context": 0,
        "prefill_tok_s": 100.0, "decode_tok_s": 20.0, "decode_step_s": 0.05, "read_gb_s": 38.0,
        "kv_read_gb_s": None, "machine_read_gb_s": 40.0, "machine_read_best_gb_s": 44.0,
        "weights_bytes": 2 * 10**9, "kv_bytes": 10**9,
        "peak_rss_bytes": 32 * 10**8,
    } | figures  # fmt: skip


def figures() -> dict[str, Any]:
    """A result of `benchmarks.cpu` in round numbers."""
    return {
        "date": "2026-01-02",
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gb": 24.0},
        "shape": "ministral-8b",
        "layers": 4,
        "threads": 2,
        "kv": "int8",
        "octavo": {
            "version": "9.9",
            "first_token_s": 4.0,
            "prefill": {
                "512": bench(prefill_tok_s=600.0),
                "700": bench(weights_bytes=10**9, peak_rss_bytes=23 * 10**8),
            },
            "decode_int8_head": {"1": bench(), "16": bench(decode_tok_s=50.0, batch=16)},
            "decode_bf16_head": {"1": bench(decode_tok_s=16.0, head="bf16")},
            "context": bench(context=1000, kv_read_gb_s=30.0),
        },
        "vLLM": {
            "version": "8.8",
            "first_token_s": 80.0,
            "prefill_s": {"512": 1.0},
            "decode_step_s": {"1": 0.1, "16": 0.4},
        },
        "llama.cpp": {
            "version": "7.7",
            "first_token_s": 2.0,
            "prefill_s": {"512": 5.12},
            "decode_step_s": {"1": 0.05},
        },
        "attention": {
            "machine_int8_tops": 2.0,
            "rows": [
                {"by": by, "queries": queries, "keys": 16384, "window": window, "tflop_s": rate}
                for by, queries, window, rate in (
                    ("octavo, int8 KV", 512, None, 9.0),
                    ("octavo, int8 KV", 1024, None, 1.5),
                    ("octavo, int8 KV", 1024, 4096, 9.0),
                    ("octavo, bf16 KV", 1024, None, 0.5),
                    ("PyTorch, bf16", 1024, None, 0.1),
                )
            ],
        },
        "prompt_lookup": {"on_tok_s": 30.0, "off_tok_s": 10.0},
    }


def by_name(result: dict[str, Any]) -> dict[tuple[str, str], Row]:
    return {(row.what, row.against): row for row in rows_of(result)}


def test_every_target_is_held_against_the_right_figures() -> None:
    rows = by_name(figures())
    expected = {  # ratio, target, whether it is met
        ("decode, batch 1, int8 head", "vLLM"): (2.0, 1.5, True),
        ("decode, batch 1, int8 head", "llama.cpp"): (1.0, 1.15, False),
        ("decode, batch 1, bf16 head", "vLLM"): (1.6, 1.15, True),
        ("decode, batch 1, int8 head: memory read", "the machine reads"): (0.95, 0.9, True),
        ("decode, batch 1, bf16 head: memory read", "the machine reads"): (0.95, None, None),
        ("decode, batch 16, int8 head", "vLLM"): (1.25, 1.3, False),
        ("prefill, 512 tokens", "vLLM"): (600 / 512, 1.3, False),
        ("prefill, 512 tokens", "llama.cpp"): (6.0, 5.0, True),
        ("decode after 1,000 tokens: keys and values read", "the machine reads"): (
            0.75, 0.75, True,
        ),
        ("attention alone, 1,024 queries x 16,384 keys, int8 KV", "the target"): (1.25, 1.0, True),
        ("attention alone, 1,024 queries x 16,384 keys, int8 KV", "SDPA"): (15.0, None, None),
        ("attention alone, 1,024 queries x 16,384 keys, bf16 KV", "the target"): (
            0.5 / 0.6, 1.0, False,
        ),
        ("start to first token", "vLLM"): (0.05, 0.1, True),
        ("start to first token", "llama.cpp"): (2.0, None, None),
        # Of the run with the most; several sequences have a target of none.
        ("peak memory, 4 layers", "weights and KV"): (2.3 / 2.0, 1.1, False),
        ("peak memory, 4 layers, several sequences", "weights and KV"): (3.2 / 3.0, None, None),
        ("peak memory, 4 layers at the end of the context", "weights and KV"): (
            3.2 / 3.0, 1.1, True,
        ),
        ("repetitive text, prompt lookup", "without it"): (3.0, 2.0, True),
    }  # fmt: skip
    for key, (ratio, target, met) in expected.items():
        assert rows[key].ratio == pytest.approx(ratio), key
        assert (rows[key].target, rows[key].met) == (target, met), key
    assert ("decode, batch 1, bf16 head", "llama.cpp") not in rows  # whose head is int8
    assert not any("700" in what for what, _ in rows)  # nobody else measured it


def test_what_was_not_measured_has_no_row() -> None:
    result = figures()
    for part in ("vLLM", "llama.cpp", "attention", "prompt_lookup"):
        del result[part]
    against = {row.against for row in rows_of(result)}
    assert against == {"the machine reads", "weights and KV"}
    result["octavo"] = {"version": "9.9", "first_token_s": 4.0}
    assert rows_of(result) == []


def test_a_ratio_is_met_at_its_target_and_not_beyond() -> None:
    assert Row("x", 1.1, 1.0, "y", "GB", 1.1, at_most=True).met
    assert Row("x", 1.11, 1.0, "y", "GB", 1.1, at_most=True).met is False
    assert Row("x", 1.5, 1.0, "y", "GB", 1.5).met
    assert Row("x", 1.49, 1.0, "y", "GB", 1.5).met is False


def test_the_page_is_written_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / PAGE
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(figures(), tmp_path)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and f"]({PICTURE})" in text
    assert "A CPU, 2 cores" in text and "vLLM 8.8, llama.cpp 7.7" in text
    line = "| decode, batch 1, int8 head | 20 tokens/s | vLLM 10 tokens/s | 2.00 | ≥ 1.5 | met |"
    assert line in text
    assert "| start to first token | 4 s | vLLM 80 s | 0.05 | ≤ 0.1 | met |" in text
    assert "| 4, int8, int8 | 128 after 1,000 | 1 | 100 | 20 | 38 GB/s | 40 (44) GB/s |" in text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    write_page(figures(), tmp_path)
    assert page.read_text() == text


def test_a_page_without_its_markers_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"performance.md: No such file"):
        write_page(figures(), tmp_path)
    for text in ("nothing", f"{END} {BEGIN}", BEGIN):
        (tmp_path / PAGE).write_text(text)
        with pytest.raises(SystemExit, match="must be in it, in this order"):
            write_page(figures(), tmp_path)
        assert (tmp_path / PAGE).read_text() == text
    docs = Path(__file__).parent.parent / "docs" / PAGE
    assert docs.read_text().index(BEGIN) < docs.read_text().index(END)


WRITER = """
import argparse, json, time
parser = argparse.ArgumentParser()
parser.add_argument("--out")
held = bytearray(b"x") * (300 << 20)
time.sleep(1.5)
with open(parser.parse_args().out, "w") as file:
    json.dump({"first_token_at": time.time(), "other": 1}, file)
"""


def test_a_process_is_measured_from_its_start_with_its_memory() -> None:
    result = run_to_file([sys.executable, "-c", WRITER], {}, 60)
    assert result["other"] == 1 and "first_token_at" not in result
    assert 1.5 <= result["first_token_s"] < 30
    assert 300 << 20 <= result["peak_rss_bytes"] < 600 << 20


def test_a_process_that_fails_or_hangs_ends_the_benchmark_with_its_words() -> None:
    program = "import sys; print('why'); sys.exit(3)"
    with pytest.raises(SystemExit, match=r"(?s)why.*exit code 3"):
        run([sys.executable, "-c", program], {}, 60)
    with pytest.raises(SystemExit, match="killed after 0 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.4)


def test_the_checkpoint_for_all_is_one_that_octavo_reads(tmp_path: Path) -> None:
    config = quantised(small_config((None, 8)), "w8a8", "bf16")
    write_w8a8(tmp_path, config)
    assert Transformer.from_folder(tmp_path).config == config
    assert not (tmp_path / "params.json").exists()


def test_the_fastest_round_counts_figure_by_figure() -> None:
    def octavo(prefill: float, decode: float) -> dict[str, Any]:
        run = {"prefill_tok_s": prefill, "decode_tok_s": decode}
        return {"prefill": {"512": run | {"decode": 1}}, "decode": {"1": run | {"decode": 32}}}

    rounds = [octavo(5.0, 30.0), octavo(4.0, 10.0), octavo(9.0, 20.0)]
    fastest = cpu.fastest(rounds)
    assert fastest["prefill"]["512"] is rounds[2]["prefill"]["512"]
    assert fastest["decode"]["1"] is rounds[0]["decode"]["1"]
    peers = [
        {"version": "1", "decode_step_s": {"1": s, "8": s - 0.25, "16": -s}}
        for s in (0.3, 0.1, 0.2)
    ]
    steps = {"1": 0.1, "8": pytest.approx(0.05), "16": -0.3}
    assert cpu.fastest(peers) == {"version": "1", "decode_step_s": steps}


@pytest.mark.parametrize(
    ("own", "peer", "expected"),
    [
        # Both at both paces: the quicker one counts, and there the fastest.
        ([(50, 0.4), (75, 0.3), (80, 0.2)], [((48, 50), 0.5), ((77, 79), 0.4)], (0.2, 0.4)),
        # Luck that only one of them had does not.
        ([(50, 0.4), (52, 0.3)], [((76, 75), 0.2), ((49, 48), 0.6), ((51, 49), 0.5)], (0.3, 0.5)),
        ([(80, 0.1), (50, 0.4)], [((49, 50), 0.6)], (0.4, 0.6)),
        # A pace that changed meanwhile is none; but what was fast at a slower one is fast.
        ([(80, 0.1), (50, 0.4)], [((49, 50), 0.6), ((49, 77), 0.2)], (0.4, 0.6)),
        ([(80, 0.1)], [((78, 79), 0.6), ((49, 77), 0.3), ((50, 50), 0.2)], (0.1, 0.2)),
        ([(50, 0.4)], [((80, 80), 0.2)], None),
        ([(50, 0.4)], [((50, 80), 0.2)], None),
        ([(50, 0.4)], [((), 0.2)], None),
        ([], [], None),
    ],
)
def test_rounds_at_one_pace_are_compared(
    own: list[tuple[float, float]],
    peer: list[tuple[tuple[float, ...], float]],
    expected: tuple[float, float] | None,
) -> None:
    assert fastest_at_one_pace(own, peer) == expected


def test_a_peer_is_measured_between_two_passes_over_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    def read() -> float:
        order.append("read")
        return 40e9 + 2e9 * len(order)

    def measure_peer() -> dict[str, Any]:
        order.append("peer")
        return {"prefill_s": 1}

    monkeypatch.setattr(cpu, "read_bytes_per_second", read)
    paced = cpu.paced(measure_peer)
    assert order == ["read", "peer", "read"] and paced == {"prefill_s": 1, "paces_gb_s": [42, 46]}
    assert cpu.fastest([paced]) == {"prefill_s": 1}


def test_decoding_is_compared_at_one_pace_and_else_by_the_fastest() -> None:
    result = figures()
    slow, quick = bench(machine_read_gb_s=50.0, decode_tok_s=12.0), bench(machine_read_gb_s=80.0)
    heads = {
        "decode_int8_head": {"1": slow, "16": slow},
        "decode_bf16_head": {"1": slow},
        "context": bench(context=1000, kv_read_gb_s=30.0),
    }
    peer = {"paces_gb_s": [51.0, 49.0], "decode_step_s": {"1": 0.125, "16": 0.5}}
    lucky = {"paces_gb_s": [78.0, 76.0], "decode_step_s": {"1": 0.0625, "16": 0.25}}
    result["rounds"] = [
        {"octavo": heads, "vLLM": lucky, "llama.cpp": peer},
        {"octavo": heads, "vLLM": peer, "llama.cpp": peer},
    ]
    what = "decode, batch 1, int8 head"
    [row] = [row for row in rows_of(result) if (row.what, row.against) == (what, "vLLM")]
    assert (row.octavo, row.other) == (12.0, 8.0)
    result["rounds"][0]["octavo"] = heads | {"decode_int8_head": {"1": quick, "16": slow}}
    [row] = [row for row in rows_of(result) if (row.what, row.against) == (what, "vLLM")]
    assert (row.octavo, row.other) == (20.0, 16.0)
    del result["rounds"]
    [row] = [row for row in rows_of(result) if (row.what, row.against) == (what, "vLLM")]
    assert (row.octavo, row.other) == (20.0, 10.0)


def test_of_what_is_read_of_memory_the_round_in_the_middle_counts() -> None:
    result = figures()
    peers = {name: result[name] for name in ("vLLM", "llama.cpp")}
    result["rounds"] = []
    for read, machine in ((70.0, 77.0), (45.0, 47.0), (48.0, 75.0), (46.0, 50.0)):
        run = bench(read_gb_s=read, machine_read_gb_s=machine, context=1000, kv_read_gb_s=read / 2)
        heads = {"decode_int8_head": {"1": run, "16": run}, "decode_bf16_head": {"1": run}}
        result["rounds"].append(peers | {"octavo": heads | {"context": run}})
    rows = {row.what: row for row in rows_of(result) if row.against == RATE}
    weights = rows["decode, batch 1, int8 head: memory read"]
    kept = rows["decode after 1,000 tokens: keys and values read"]
    assert (weights.octavo, weights.other) == (70.0, 77.0)
    assert (kept.octavo, kept.other) == (35.0, 77.0)


def test_long_parts_join_the_short_ones() -> None:
    short = {"prefill": {"512": 1}, "version": "1"}
    long = {"prefill": {"16384": 2}, "first_token_s": 3.0}
    assert cpu.merged(short, long) == {
        "prefill": {"512": 1, "16384": 2}, "version": "1", "first_token_s": 3.0
    }  # fmt: skip
