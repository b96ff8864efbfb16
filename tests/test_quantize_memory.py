"""What a quantisation is planned to take, beside what PyTorch's allocator was really asked for.

The allocator's own record counts every tensor, those inside an operator included, on whatever
device; here it is the CPU's, with the operations in plain PyTorch as a device without kernels of
its own runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from octavo.bench.shapes import SHAPES, quantised
from octavo.cache.planner import DEVICE_RUNTIME_BYTES
from octavo.checkpoint import open_checkpoint
from octavo.config import ModelConfig, format_bytes
from octavo.errors import ConfigError
from octavo.kernels import dispatch
from octavo.quantize import linears, memory, streaming
from octavo.quantize.calibration import Samples
from octavo.quantize.journal import Journal
from octavo.quantize.memory import plan, tensor_bytes
from octavo.quantize.recipe import Recipe
from octavo.quantize.streaming import StreamingQuantizer
from octavo.schemes import find_scheme
from tests.checkpoints import small_config, write_mistral

GPU = torch.device("cuda", 0)
LENGTH = 512  # tokens of a sample; four are a chunk


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Operations by PyTorch alone; nothing is kept that could be computed again."""
    dispatch.backend.cache_clear()
    monkeypatch.setitem(dispatch._MODULES, "cpu", dispatch._PLAIN)
    monkeypatch.setattr(streaming, "plan", lambda *arguments: (False, 0))
    yield
    dispatch.backend.cache_clear()


def shape(dim: int, hidden_dim: int, vocab_size: int) -> ModelConfig:
    return small_config(
        (None,), n_layers=1, dim=dim, hidden_dim=hidden_dim, vocab_size=vocab_size, n_heads=4,
        head_dim=dim // 4,
    )  # fmt: skip


def quantizer(
    folder: Path, config: ModelConfig, n_samples: int, n_held_out: int, ignore: tuple[str, ...]
) -> StreamingQuantizer:
    """A run up to its first layer, computed in fp32 of weights in bf16."""
    generator = torch.Generator().manual_seed(0)

    def texts(count: int) -> list[list[int]]:
        ids = torch.randint(config.vocab_size, (count, LENGTH), generator=generator)
        return ids.tolist()

    checkpoint = open_checkpoint(write_mistral(folder / "model", config, dtype=torch.bfloat16))
    out = folder / "out"
    out.mkdir()
    run = StreamingQuantizer(
        checkpoint,
        Recipe(find_scheme("W8A8"), ignore, 0.8, 0.1, "gptq", True, True),
        Samples(texts(n_samples), texts(n_held_out), "", []),
        out,
        Journal(out, {}),
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_memory=2**40,
    )
    run._embed()
    return run


@torch.inference_mode()
def peak_bytes(run: Callable[[], object], folder: Path) -> int:
    """The most bytes that were allocated at once, of all that was allocated in here.

    Mappings of the model's file in `folder` are in the record too, and are not counted.
    """
    [file] = folder.glob("*.safetensors")
    mapped = file.stat().st_size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if abs(event.nbytes()) != mapped:
            total += event.nbytes()
        most = max(most, total)
    return most


def test_a_layer_takes_what_is_planned_whatever_the_number_of_samples(tmp_path: Path) -> None:
    config = shape(256, 1024, 512)
    few = quantizer(tmp_path / "few", config, 8, 2, ("lm_head",))
    many = quantizer(tmp_path / "many", config, 12, 40, ("lm_head",))
    planned = tensor_bytes(few.config, torch.float32, 4 * LENGTH)
    measured = peak_bytes(lambda: few._quantize_layer(0), tmp_path / "few" / "model")
    assert measured < planned < 1.5 * measured
    more = peak_bytes(lambda: many._quantize_layer(0), tmp_path / "many" / "model")
    assert more < 1.02 * measured


@pytest.mark.parametrize("ignore", [("lm_head",), ()])
@pytest.mark.parametrize("rows", [None, 16])
def test_the_head_takes_what_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int | None, ignore: tuple[str, ...]
) -> None:
    if rows is not None:  # so that the weight takes more than logits and outputs
        for module in (memory, linears):
            monkeypatch.setattr(module, "PROBE_TOKENS", rows)
        for module in (memory, streaming):
            monkeypatch.setattr(module, "LOGIT_ROWS", rows)
    run = quantizer(tmp_path, shape(128, 128, 8192 if rows is None else 65_536), 4, 2, ignore)
    run._quantize_layer(0)
    planned = tensor_bytes(run.config, torch.float32, 4 * LENGTH)
    measured = peak_bytes(run._quantize_head, tmp_path / "model")
    measured += 2 * run.config.vocab_size * run.config.dim  # mapped here, and a device's own
    assert measured < planned < 1.5 * measured


@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_the_8b_is_quantised_on_a_device_in_under_12_gb(
    monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    config = quantised(SHAPES["ministral-8b"], "w8a8", head)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 80 * 2**30)
    streams = 1024 * 4096 * config.dim * 2 * 4
    resident, room = plan(config, torch.bfloat16, 4096, streams, 8 * 2**30, GPU)
    taken = DEVICE_RUNTIME_BYTES + tensor_bytes(config, torch.bfloat16, 4096)
    assert not resident and taken + room == 8 * 2**30 < 12e9
    assert taken > 4e9
    assert tensor_bytes(config, torch.bfloat16, 4096) == tensor_bytes(
        replace(config, n_layers=72, windows=config.windows * 2), torch.bfloat16, 4096
    )


def test_a_device_keeps_no_more_than_it_has_free_and_the_host_the_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = quantised(SHAPES["ministral-8b"], "w8a8", "bf16")
    needed = DEVICE_RUNTIME_BYTES + tensor_bytes(config, torch.bfloat16, 2048)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed + 5)
    assert plan(config, torch.bfloat16, 2048, 2**20, 8 * 2**30, GPU) == (True, 5)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * 2**30)
    resident, room = plan(config, torch.bfloat16, 2048, 6 * 2**30, 8 * 2**30, GPU)
    assert (resident, room) == (False, 8 * 2**30 - needed)


def test_a_device_with_too_little_is_one_line_that_says_how_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = quantised(SHAPES["ministral-8b"], "w8a8", "bf16")
    needed = DEVICE_RUNTIME_BYTES + tensor_bytes(config, torch.bfloat16, 4096)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 2**30)
    gib = format_bytes(needed, up=True)
    words = (
        rf"device: cuda:0 has \d\.\d\dG free; .*4,096 tokens at a time need {gib}: take a shorter"
    )
    with pytest.raises(ConfigError, match=words):
        plan(config, torch.bfloat16, 4096, 0, 8 * 2**30, GPU)
    with pytest.raises(ConfigError, match=rf"max_memory: 5\.00G is .* on cuda:0; it needs {gib}"):
        plan(config, torch.bfloat16, 4096, 0, 5 * 2**30, GPU)
    with pytest.raises(ConfigError, match=r"max_memory: 2\.00G is too little for this model and "):
        plan(config, torch.bfloat16, 4096, 0, 2 * 2**30, GPU)
    with pytest.raises(ConfigError, match=r"max_memory: 50M is too little"):
        plan(config, torch.bfloat16, 4096, 0, 50 * 2**20, GPU)
