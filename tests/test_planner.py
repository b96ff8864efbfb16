"""The memory planner: figures by hand, and refusals that name what would fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from octavo import LLM, Transformer
from octavo.cache import CacheLayout, planner
from octavo.cache.planner import CachePlan, longest_fitting, plan_cache, working_bytes
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.config import format_bytes, parse_bytes
from octavo.engine.engine import Engine
from octavo.errors import ConfigError
from octavo.model.linear import LinearW8A8
from tests.checkpoints import quantized_config, write_w8a8

LAYOUT = CacheLayout.of(MINISTRAL_8B, torch.bfloat16)
GIB = 2**30


def plan(memory: int, max_model_len: int | None = None, max_num_seqs: int = 16) -> CachePlan:
    return plan_cache(
        MINISTRAL_8B,
        LAYOUT,
        memory=memory,
        weight_bytes=8 * GIB,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        chunk=1024,
    )


@pytest.mark.parametrize(
    ("n_bytes", "text", "rounded_up"),
    [
        (1000, "1000B", "1000B"),
        (2**20 + 1, "1M", "2M"),
        (50 * 2**20, "50M", "50M"),
        (GIB - 1, "1024M", "1024M"),
        (GIB + 2**20, "1.00G", "1.01G"),
        (80 * GIB, "80.00G", "80.00G"),
    ],
)
def test_no_amount_of_memory_is_written_as_nothing(
    n_bytes: int, text: str, rounded_up: str
) -> None:
    assert (format_bytes(n_bytes), format_bytes(n_bytes, up=True)) == (text, rounded_up)
    assert parse_bytes(rounded_up, "memory") >= n_bytes


def test_ministral_8b_in_pages_by_hand() -> None:
    assert LAYOUT.rows == (1, 3) and LAYOUT.layers_per_page == 9
    assert LAYOUT.page_bytes == 2 * 9 * 32 * 8 * 128 * 2
    # 131,072 tokens: 4,096 pages in the full layers; window and chunk, 33,791 tokens, may touch
    # 1,057 pages of each of the three rows of windowed ones.
    assert LAYOUT.pages_needed(131_072, 1024) == 4096 + 3 * 1057
    assert LAYOUT.pages_needed(32, 32) == 4 and LAYOUT.pages_needed(33, 33) == 8


def test_ministral_8b_at_128k_in_int8_takes_the_gigabytes_it_promises() -> None:
    layout = CacheLayout.of(MINISTRAL_8B, torch.int8)
    # A byte an element, and a scale of two for each token and head.
    assert layout.page_bytes == 2 * 9 * 64 * 8 * (128 + 2)
    full, windowed = MINISTRAL_8B.kv_bytes(131_072, 1, layout.scale_bytes)
    assert full == 131_072 // 64 * layout.page_bytes
    assert (round(full / 1e9, 2), round(windowed / 1e9, 2)) == (2.45, 1.84)
    # Its pages add the chunk that is being read, and what is unused of the last of each.
    pages = layout.pages_needed(131_072, 1024) * layout.page_bytes
    assert full + windowed < pages < 4.4e9


def test_what_is_left_is_pages() -> None:
    made = plan(24 * GIB)
    fixed = 8 * GIB + working_bytes(MINISTRAL_8B, 16, 1024)
    assert made.n_pages == (24 * GIB - fixed) // LAYOUT.page_bytes
    assert made.n_sequences(131_072) == made.n_pages // (4096 + 3 * 1057)
    assert made.max_model_len == 131_072


@pytest.mark.parametrize("n_pages", [0, 3, 4, 7, 8, 100, 10_000, 7_266, 7_267, 20_000])
def test_the_longest_that_fits_is_the_longest(n_pages: int) -> None:
    longest = longest_fitting(LAYOUT, n_pages, 1024)
    if longest:
        assert LAYOUT.pages_needed(longest, min(1024, longest)) <= n_pages
    assert LAYOUT.pages_needed(longest + 1, min(1024, longest + 1)) > n_pages


def test_a_context_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ConfigError, match=r"131,072 tokens do not fit in 12.00G") as caught:
        plan(12 * GIB, 131_072)
    found = re.search(r"; ([\d,]+) do, or give (\S+) \(--memory\)", str(caught.value))
    assert found is not None
    fits = int(found[1].replace(",", ""))
    assert plan(12 * GIB, fits).max_model_len == fits
    with pytest.raises(ConfigError):
        plan(12 * GIB, fits + LAYOUT.page_size)
    enough = parse_bytes(found[2], "memory")
    assert plan(enough, 131_072).max_model_len == 131_072
    with pytest.raises(ConfigError):
        plan(enough - GIB // 50, 131_072)


def test_an_unspoken_context_takes_what_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = plan(12 * GIB)
    assert f"hold {made.max_model_len:,} tokens of context, not the whole 131,072" in caplog.text
    assert 16 <= made.max_model_len < 131_072
    assert made.n_sequences(made.max_model_len) == 1


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory: 5.00G is too little: weights take 8.00G"):
        plan(5 * GIB)


def test_the_plan_says_what_fits_at_once() -> None:
    made = plan(24 * GIB)
    words = made.describe()
    sequences = made.n_sequences(131_072)
    assert sequences < 16
    assert f"at once fit {sequences} x 131,072 tokens, or 16 x {made.longest(16):,}" in words
    assert made.n_sequences(made.longest(16)) >= 16
    many = plan(400 * GIB).describe()
    assert "at once fit 16 x 131,072 tokens" in many and " or " not in many


def test_an_llm_plans_with_the_memory_it_is_given() -> None:
    llm = LLM("demo", memory="900M", max_model_len=4096)
    plan = llm.engine.plan
    assert plan.memory == 900 * 2**20 and plan.max_model_len == 4096
    assert plan.weight_bytes + plan.working_bytes + plan.cache_bytes <= plan.memory
    held = LLM("demo", memory="900M", max_model_len=4096, kv_cache_dtype="int8").engine
    assert held.pool.keys.dtype == torch.int8 and " pages of int8" in held.plan.describe()
    # 34 bytes a token and head of 32 elements, for 64 in bf16; twice as many tokens a page.
    assert held.plan.n_pages == pytest.approx(plan.n_pages * 64 / 34 / 2, rel=0.01)
    with pytest.raises(ConfigError, match="memory: 'plenty'"):
        LLM("demo", memory="plenty")
    with pytest.raises(ConfigError, match=r"memory: 100M is too little: weights take 4M, "):
        LLM("demo", memory="100M")


def test_weights_that_are_in_memory_already_are_part_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "free_bytes", lambda device: 2 * GIB)
    free = int(2 * GIB * planner.SHARE_OF_FREE)
    mapped, changed = (Transformer.from_folder("demo", dtype=d) for d in (None, "float32"))
    config = mapped.config
    reordered = sum(
        config.linear_bytes(name) for name in config.linear_names() if name[-2:] in ("wq", "wk")
    )
    assert 0 < reordered == config.weight_bytes(2) - mapped.mapped_bytes
    assert Engine(mapped).plan.memory == free + reordered
    assert changed.mapped_bytes == 0
    assert Engine(changed).plan.memory == free + config.weight_bytes(4)


def test_packed_weights_are_mapped_no_more(tmp_path: Path) -> None:
    folder = write_w8a8(tmp_path, quantized_config())
    mapped, packed = (Transformer.from_folder(folder, pack=pack) for pack in (False, True))
    names = [
        name
        for name, module in packed.named_modules()
        if isinstance(module, LinearW8A8) and module.packed is not None
    ]
    n_bytes = sum(mapped.get_buffer(f"{name}.weight").nbytes for name in names)
    assert mapped.mapped_bytes - packed.mapped_bytes == n_bytes


@pytest.mark.parametrize(
    ("stat", "free"),
    [
        ("anon 300\nfile 550\ninactive_file 500\nactive_file 30\nshmem 20", 700 + 530),
        (None, 700),
        ("anon 300", 700),
        ("inactive_file", 700),
    ],
)
def test_what_files_fill_of_a_containers_memory_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stat: str | None, free: int
) -> None:
    monkeypatch.setattr(planner, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1600\n")
    (tmp_path / "memory.current").write_text("900\n")
    if stat is not None:
        (tmp_path / "memory.stat").write_text(stat + "\n")
    assert planner.free_bytes() == free
