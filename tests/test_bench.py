"""`octavo bench`: what it prints, the model and the context it makes, and how it counts bytes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.bench import BenchSettings, memory, run_bench
from octavo.bench.context import fill
from octavo.bench.memory import step_bytes
from octavo.bench.random_model import RandomBlocks, random_model
from octavo.bench.run import Run, Steps
from octavo.bench.shapes import SHAPES, find_shape, quantised
from octavo.cache import CacheLayout
from octavo.config import ModelConfig
from octavo.errors import ConfigError
from octavo.kernels import timing
from octavo.kernels.cpu import machine
from octavo.model import Transformer
from octavo.model.linear import Linear, LinearW8A8
from tests.checkpoints import small_config, write_mistral
from tests.test_cli import Capsys, fails, run

CONFIG = small_config((None, 8, 8, 8))
MEASURED: dict[str, type] = {
    "prefill_tok_s": float,
    "decode_tok_s": float,
    "prefill_s": float,
    "decode_step_s": float,
    "decode_step_min_s": float,
    "time_to_first_token_s": float,
    "peak_rss_bytes": int,
    "weights_bytes": int,
    "kv_bytes": int,
    "read_gb_s": float,
    "machine_read_gb_s": float,
    "machine_read_best_gb_s": float,
    "machine_int8_tops": float,
    "versions": dict,
    "threads": int,
    "layers": int,
    "device": str,
}
ON_A_GPU_ONLY = {"peak_device_bytes", "machine_bf16_tflops", "device_name"}  # fmt: skip
MAY_BE_NULL = {"kv_read_gb_s"}


@pytest.fixture(autouse=True)
def _little_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = partial(machine.read_bytes_per_second, 2**24)
    monkeypatch.setattr(machine, "read_bytes_per_second", quick)
    monkeypatch.setattr(timing, "SECONDS", 0.02)


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A folder with a small config, and weights that nobody reads."""
    return write_mistral(tmp_path / "shape", CONFIG)


def settings(**options: Any) -> BenchSettings:
    given: dict[str, Any] = {"prompt": 20, "decode": 3, "device": "cpu"}
    return BenchSettings(**given | options)


def test_json_has_every_figure_and_every_setting(shape: Path, capsys: Capsys) -> None:
    code, out, _ = run(
        capsys, "bench", "--shape", shape, "--layers", 2, "--prompt", 20, "--decode", 4,
        "--batch", 3, "--context", 30, "--threads", 1, "--json",
    )  # fmt: skip
    values = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    for name, kind in MEASURED.items():
        assert type(values[name]) is kind, name
        assert kind in (dict, int, str) or 0 < values[name] < math.inf, name
    assert all(values[name] is None for name in ON_A_GPU_ONLY)
    assert set(values) - set(MEASURED) - ON_A_GPU_ONLY - MAY_BE_NULL == set(
        BenchSettings.__dataclass_fields__
    ) - {"layers", "threads", "device"}
    assert values["device"] == "cpu"
    assert values["layers"] == 2 and values["threads"] == 1 and values["context"] == 30
    assert set(values["versions"]) == {"octavo", "torch", "python"}
    assert values["decode_step_min_s"] <= values["decode_step_s"]
    assert values["prefill_tok_s"] == pytest.approx(3 * 20 / values["prefill_s"])
    assert values["decode_tok_s"] == pytest.approx(3 / values["decode_step_s"])


def test_without_json_there_is_a_table(shape: Path, capsys: Capsys) -> None:
    code, out, _ = run(capsys, "bench", "--shape", shape, "--prompt", 9, "--decode", 2)
    assert code == 0 and "4 layers, w8a8, bf16 head" in out and "1 x 9 tokens" in out
    assert "│ Decode" in out and "│ The machine reads" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shape", "ministral-9b"], "--shape: 'ministral-9b' is not one of ministral-8b, "),
        (["--layers", 0], "--layers: 0 is not between 1 and 1000"),
        (["--scheme", "w2a2"], "--scheme: 'w2a2' is not one of bf16, w8a8"),
        (["--head", "fp8"], "--head: 'fp8' is not one of bf16, int8"),
        (["--kv", "int3"], "--kv: 'int3' is not one of auto, bf16, int8"),
        (["--prompt", "long"], "--prompt: 'long' is not a size"),
        (["--decode", 0], "--decode: 0 is not a positive number"),
        (["--threads", -1], "--threads: -1 is not a positive number"),
        (["--threads", 100_000], "--threads: 100000 is too many for this machine's"),
        (["--seed", 2**64], "--seed: 18446744073709551616 does not fit in 64 bits"),
        (["--device", "tpu"], "device: 'tpu' is none of auto, cpu, cuda"),
        (["--context", 250], "--context 250, --prompt 512 and --decode 32 make 794 tokens, more"),
    ],
)
def test_a_users_mistake_is_one_line(
    shape: Path, capsys: Capsys, arguments: list[object], problem: str
) -> None:
    assert problem in fails(capsys, "bench", "--shape", shape, *arguments)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * 10**9)
    monkeypatch.setattr("octavo.bench.measure.random_model", lambda *_: pytest.fail("was made"))
    words = r"weights take 9\.\d+ GB, the KV cache .*; 4\.00 GB are free: take fewer --layers"
    with pytest.raises(ConfigError, match=words):
        run_bench(BenchSettings(device="cpu"))


def test_published_shapes_have_their_parameters() -> None:
    counts = {name: config.n_parameters() for name, config in SHAPES.items()}
    assert counts == {
        "ministral-8b": 8_019_808_256,
        "mistral-7b": 7_248_023_552,
        "mistral-nemo": 12_247_782_400,
    }


def test_layers_follow_the_shapes_pattern() -> None:
    assert find_shape("ministral-8b", 1).windows == (None,)
    assert find_shape("Ministral-8B", 6).windows == (None, 32768, 32768, 32768, None, 32768)
    assert find_shape("ministral-8b") == SHAPES["ministral-8b"]
    assert find_shape("demo").quantization is None


def test_int8_keys_and_values_are_read_and_held_in_fewer_bytes(shape: Path) -> None:
    results = {
        kv: run_bench(settings(shape=str(shape), context=100, kv=kv, decode=1, scheme="bf16"))
        for kv in ("auto", "bf16", "int8")
    }
    assert results["auto"].kv_bytes == results["bf16"].kv_bytes
    # 121 tokens: all in one layer, and in three with a window of 8 the last page. Of two heads with
    # 24 elements pages hold 32 tokens in bf16; 64 in int8, with a bf16 scale each.
    assert results["bf16"].kv_bytes == (4 + 3) * 2 * 32 * 2 * 24 * 2
    assert results["int8"].kv_bytes == (2 + 3) * 2 * 64 * 2 * (24 + 2)


@pytest.mark.parametrize(
    ("scheme", "head", "n_int8"),
    [("bf16", "bf16", 0), ("w8a8", "bf16", 28), ("w8a8", "int8", 29), ("bf16", "int8", 1)],
)
def test_linears_and_head_are_as_asked(scheme: str, head: str, n_int8: int) -> None:
    model = random_model(quantised(CONFIG, scheme, head))
    linears = [module for module in model.modules() if isinstance(module, Linear | LinearW8A8)]
    assert len(linears) == 29
    assert sum(isinstance(linear, LinearW8A8) for linear in linears) == n_int8
    assert isinstance(model.output, LinearW8A8) == (head == "int8")
    assert model.dtype == torch.bfloat16
    assert bool(model(torch.arange(50), [20, 30]).isfinite().all())


def test_a_tied_shape_has_one_matrix_and_no_int8_head() -> None:
    config = small_config(tied_embeddings=True)
    model = random_model(quantised(config, "w8a8", "bf16"))
    assert model.output.weight is model.tok_embeddings.weight
    with pytest.raises(ConfigError, match="--head int8: this shape's head is its embedding"):
        quantised(config, "w8a8", "int8")


def test_random_weights_fill_their_range_and_repeat_by_seed() -> None:
    numbers = RandomBlocks(0).integers(torch.empty(3000, 4096, dtype=torch.int8))
    counts = torch.bincount(numbers.flatten().int() + 128, minlength=256)
    assert counts[0] == 0 and int(counts[1:].min()) > 0
    assert len(torch.unique(numbers, dim=0)) == 3000  # the block goes round more than twice
    again = RandomBlocks(0).integers(torch.empty(3000, 4096, dtype=torch.int8))
    assert torch.equal(numbers, again)
    assert not torch.equal(numbers[:9], RandomBlocks(1).integers(torch.empty_like(numbers))[:9])
    normal = RandomBlocks(0).normal(torch.empty(1000, 1000), std=3)
    assert normal.std().item() == pytest.approx(3, rel=0.01) and abs(normal.mean().item()) < 0.02


def test_weights_are_made_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.Generator
    torch.empty(1, device="meta").normal_()  # imports what must see the real one
    monkeypatch.setattr(torch, "Generator", lambda device: cpu())  # meta has none of its own
    for head in ("bf16", "int8"):
        made: list[torch.device] = []
        real = RandomBlocks._fill

        def spy(self: RandomBlocks, out: Any, block: Any, real: Any = real, m: Any = made) -> Any:
            m += [out.device, block.device]
            return real(self, out, block)

        monkeypatch.setattr(RandomBlocks, "_fill", spy)
        model = random_model(quantised(CONFIG, "w8a8", head), device=torch.device("meta"))
        tensors = [*model.state_dict().values()]
        assert {each.type for each in made} == {each.device.type for each in tensors} == {"meta"}


def test_a_pass_that_gives_nan_ends_the_measurement() -> None:
    run = Run(settings(), random_model(CONFIG))
    run.read_prompts()
    run.model.norm.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="infinity or NaN"):
        run.generate()
    with pytest.raises(RuntimeError, match="infinity or NaN"):
        run.read_prompts()


def test_activations_keep_their_size() -> None:
    config = find_shape("ministral-8b", 1)
    model = random_model(quantised(replace(config, vocab_size=1000), "w8a8", "int8"))
    x = torch.randn(8, 4096, dtype=torch.bfloat16)
    wq = model.get_submodule("layers.0.attention.wq")
    assert 0.8 < wq(x).float().std().item() < 1.2
    assert 0.8 < model.output(x).float().std().item() < 1.2


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize(("n_tokens", "chunk"), [(5, 64), (16, 16), (100, 7), (100, 64)])
def test_a_filled_cache_holds_the_pages_that_reading_would(
    n_tokens: int, chunk: int, kv: str
) -> None:
    model = random_model(CONFIG)
    filled, read = model.new_caches(2, 200, kv)
    fill(filled, n_tokens, chunk, RandomBlocks(0))
    for start in range(0, n_tokens, chunk):
        n_new = min(chunk, n_tokens - start)
        model(torch.zeros(n_new, dtype=torch.int64), [n_new], [read])
    assert filled.length == read.length == n_tokens
    pages = []
    for table, other in zip(filled.tables, read.tables, strict=True):
        assert (table.first, table.stop) == (other.first, other.stop)
        pages += [page for block in table.blocks for page in block.pages]
    for slot in range(filled.pool.layout.layers_per_page):
        for contents in filled.pool.layer(slot).gather(torch.tensor(pages)):
            assert bool((contents.float().std(-1) > 0.5).all())


def test_the_next_token_sees_the_filled_context() -> None:
    model = random_model(CONFIG)
    outputs = []
    for seed in (0, 0, 1):
        cache = model.new_cache(100)
        fill(cache, 60, 16, RandomBlocks(seed))
        outputs.append(model(torch.tensor([7]), [1], [cache]))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_prompts_are_read_in_chunks_and_each_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    hidden = Transformer.hidden

    def spy(self: Transformer, ids: Any, lens: Any, *rest: Any) -> Any:
        passes.append(list(lens))
        return hidden(self, ids, lens, *rest)

    monkeypatch.setattr(Transformer, "hidden", spy)
    run = Run(settings(batch=3, prompt=20, chunk=16, context=40), random_model(CONFIG))
    for _ in range(2):  # a round begins where the one before did
        passes.clear()
        assert run.read_prompts() > 0
        assert passes == [[16], [4, 12], [8, 8], [12]]
        assert [cache.length for cache in run.caches] == [60] * 3
    between: list[int] = []
    steps = run.generate(lambda: between.append(len(passes)))
    # In turn with as many steps of sequences without the context; each comes after `between`.
    assert passes[4:] == [[1, 1, 1]] * 6 and between == [5, 6, 7, 8, 9, 10]
    assert len(steps.seconds) == len(steps.short) == 3
    assert [cache.length for cache in run.short_caches] == [3] * 3
    assert [cache.length for cache in run.caches] == [63] * 3
    assert run.first_token_s is not None and run.first_token_s > 0
    held = sum(cache.n_pages for cache in run.caches)
    assert run.kv_bytes == held * run.caches[0].pool.layout.page_bytes


def test_the_bytes_of_a_step_by_hand() -> None:
    layer = 2 * 64 * 96 + 2 * 64 * 48 + 3 * 64 * 96  # weights
    scales = 4 * (96 + 48 + 48 + 64 + 96 + 96 + 64)
    embedding_rows, head = 2 * 64 * 2, 96 * 64 * 2
    token = 2 * 2 * 24 * 2  # keys and values of 2 heads of 24, bf16
    kv = token * (100 + 5) + 3 * token * (8 + 5)  # a full layer, three with windows of 8
    plain = step_bytes(CONFIG, _layout(CONFIG), [100, 5])
    assert plain == embedding_rows + 4 * layer * 2 + head + kv
    w8a8 = quantised(CONFIG, "w8a8", "bf16")
    expected = embedding_rows + 4 * (layer + scales) + head + kv
    assert step_bytes(w8a8, _layout(w8a8), [100, 5]) == expected
    int8_kv = step_bytes(w8a8, CacheLayout.of(w8a8, torch.int8), [100, 5])
    assert int8_kv == expected - kv + kv * 26 // 48
    int8_head = quantised(CONFIG, "w8a8", "int8")
    expected += 96 * 64 + 4 * 96 - head
    assert step_bytes(int8_head, _layout(int8_head), [100, 5]) == expected


def test_read_rate_is_the_bytes_of_a_step_over_its_time(shape: Path) -> None:
    result = run_bench(settings(shape=str(shape), context=50, batch=2, decode=1))
    config = quantised(CONFIG, "w8a8", "bf16")
    expected = step_bytes(config, _layout(config), [71, 71])
    assert result.read_gb_s == pytest.approx(expected / result.decode_step_s / 1e9)
    assert result.weights_bytes == config.weight_bytes(2)


def test_the_contexts_rate_is_its_bytes_over_what_it_adds_to_a_step(
    shape: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rate(seconds: list[float], short: list[float], context: int) -> float | None:
        monkeypatch.setattr(Run, "generate", lambda *_: Steps(seconds, short))
        monkeypatch.setattr(machine.Reads, "bytes_per_second", lambda _: 5e9)
        result = run_bench(settings(shape=str(shape), context=context, decode=3))
        assert result.decode_step_s == 0.5 and result.machine_read_gb_s == 5.0
        return result.kv_read_gb_s

    config = quantised(CONFIG, "w8a8", "bf16")
    read, short = (step_bytes(config, _layout(config), [n]) for n in (50 + 20 + 2, 2))
    assert rate([0.9, 0.5, 0.3], [0.3, 0.1, 0.7], 50) == pytest.approx((read - short) / 0.2 / 1e9)
    assert rate([0.5], [0.5], 50) is None and rate([0.5], [], 0) is None


def _layout(config: ModelConfig) -> CacheLayout:
    return CacheLayout.of(config, torch.bfloat16)
