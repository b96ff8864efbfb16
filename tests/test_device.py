"""The device: chosen by name, its memory planned, and never waited for but for the tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import LLM, SamplingParams, Transformer
from octavo.cache import CacheLayout, planner
from octavo.cache.planner import (
    DEVICE_RUNTIME_BYTES,
    LOGIT_BYTES,
    LOGPROB_ROWS,
    RUNTIME_BYTES,
    activation_bytes,
    default_memory,
    free_bytes,
    working_bytes,
)
from octavo.checkpoint import open_checkpoint
from octavo.checkpoint.ministral import MINISTRAL_8B
from octavo.device import choose_device, to_device
from octavo.engine import llm
from octavo.engine.decode_graph import DecodeGraphs
from octavo.engine.engine import Engine
from octavo.engine.step_limits import StepLimits
from octavo.errors import ConfigError
from octavo.kernels import plain

CUDA = torch.device("cuda:1")
DEVICES = ("cpu", "cuda")
GIB = 2**30


@pytest.mark.parametrize("has_gpu", [False, True])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert choose_device("auto").type == ("cuda" if has_gpu else "cpu")


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert choose_device("cuda:1") == CUDA
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:x", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device: '{name}'") as caught:
        LLM("demo", device=name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_tensor_on_its_device_is_not_copied() -> None:
    x = torch.ones(2)
    assert to_device(x, torch.device("cpu")) is x


def test_a_gpus_budget_is_its_free_memory_and_what_the_allocator_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 20 * GIB, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GIB)
    assert free_bytes(CUDA) == 22 * GIB
    assert default_memory(CUDA) == int(22 * GIB * 0.9)
    assert asked == [CUDA, CUDA]
    assert free_bytes() != 22 * GIB


def test_a_gpus_working_memory_is_its_own_runtime_and_all_that_a_step_makes() -> None:
    n_seqs, chunk = 128, 8192
    by_device = {d: working_bytes(MINISTRAL_8B, n_seqs, chunk, torch.device(d)) for d in DEVICES}
    sampled = n_seqs * MINISTRAL_8B.vocab_size
    added = DEVICE_RUNTIME_BYTES - RUNTIME_BYTES + sampled * (LOGIT_BYTES - 16)
    assert by_device["cuda"] - by_device["cpu"] == added
    # Few answers: prompts are scored in rows of their own number.
    few = [working_bytes(MINISTRAL_8B, n, chunk, CUDA) for n in (1, LOGPROB_ROWS)]
    assert few[0] == few[1] < by_device["cuda"]


def test_the_int32_sums_of_the_widest_linear_are_within_what_a_pass_may_take() -> None:
    config, tokens = MINISTRAL_8B, 8192
    # While w3's sums are scaled: two residual streams, an int8 copy, w1's result, the sums, w3's.
    alive = 2 * 2 * config.dim + config.dim + (2 + 4 + 2) * config.hidden_dim
    assert tokens * alive <= activation_bytes(config, tokens)


def test_a_budget_that_the_gpu_does_not_have_is_refused_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "free_bytes", lambda device: 79 * GIB)
    monkeypatch.setattr(llm, "choose_device", lambda name: CUDA)
    with pytest.raises(ConfigError) as caught:
        LLM("demo", memory="80G")
    message = str(caught.value)
    assert message.startswith("memory: 80.00G are more than the 79.00G that are free on cuda:1;")
    assert "give less (--memory)" in message and "\n" not in message
    planner.check_budget(79 * GIB, CUDA)
    planner.check_budget(80 * GIB, torch.device("cpu"))  # whose weights may be mapped


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How often a tensor was read back from the device, which holds nothing: zeros are told.

    The device is PyTorch's `meta`. There `int()`, `bool()` and all else that would wait for a
    result is an error.
    """
    read: list[Any] = []
    tolist, tensor = Tensor.tolist, torch.tensor

    def counted(self: Tensor) -> Any:
        if self.device.type != "meta":
            return tolist(self)
        read.append(self.shape)
        return torch.zeros(self.shape, dtype=self.dtype).tolist()

    def from_host(*arguments: Any, device: Any = None, **further: Any) -> Tensor:
        assert device is None or torch.device(device).type == "cpu", "an upload that waits"
        return tensor(*arguments, **further)

    monkeypatch.setattr(Tensor, "tolist", counted)
    monkeypatch.setattr(torch, "tensor", from_host)
    # PyTorch's own buckets sequences on the host; a GPU's kernels do not.
    monkeypatch.setattr(plain, "paged_attention", lambda q, *_: torch.empty_like(q))
    return read


@pytest.mark.parametrize("as_graphs", [False, True])
def test_the_host_waits_for_nothing_in_a_step_but_its_tokens(
    text_model: Path, waits: list[Any], as_graphs: bool
) -> None:
    checkpoint = open_checkpoint(text_model)
    with torch.device("meta"):
        model = Transformer(checkpoint.config).requires_grad_(False).eval()
    layout = CacheLayout.of(checkpoint.config, model.dtype)
    memory = (
        checkpoint.config.weight_bytes(4)
        + working_bytes(checkpoint.config, 16, 32, torch.device("meta"))
        + 500 * layout.page_bytes
    )
    made = Engine(model, max_num_seqs=16, max_num_batched_tokens=32, memory=memory, eos_id=5)
    if as_graphs:
        limits = StepLimits(16, made.max_model_len, speculate=False)
        made.decode = DecodeGraphs(model, made.pool, limits, capture=False)
    for further in (
        {"temperature": 0.0},
        {"n": 3},
        {"top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.5, "presence_penalty": 0.5},
        {"logit_bias": {7: 1.0}, "min_tokens": 3, "stop_token_ids": [9]},
    ):
        made.add_request([3, 4, 5] * 15, SamplingParams(max_tokens=6, ignore_eos=True, **further))
    made.scheduler.speculate = False
    n_steps = n_waits = 0
    while made.has_work:
        made.step()
        n_steps += 1
        assert len(waits) - n_waits <= 1
        n_waits = len(waits)
    assert 6 <= n_waits < n_steps
