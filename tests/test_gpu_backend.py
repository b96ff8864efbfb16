"""The whole model by the GPU's backend; without a GPU, by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.kernels import dispatch

PROMPT = "What is 12 + 30?"
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
HAS_GPU = torch.cuda.is_available()


def answer(device: str, kv_cache_dtype: str) -> list[int]:
    # Weights are packed as the backend wants them, so the model is loaded for each.
    llm = LLM(
        "demo", dtype="float32", device=device, kv_cache_dtype=kv_cache_dtype, max_model_len=256,
        max_num_seqs=2, memory="2G",
    )  # fmt: skip
    [output] = llm.chat([{"role": "user", "content": PROMPT}], PARAMS)
    return output.outputs[0].token_ids


@pytest.fixture
def gpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device whose tensors go to the GPU's backend, for the time of a test."""
    if HAS_GPU:
        yield "cuda"
        return
    with monkeypatch.context() as patched:
        patched.setitem(dispatch._MODULES, "cpu", dispatch._MODULES["cuda"])
        dispatch.backend.cache_clear()
        yield "cpu"
    dispatch.backend.cache_clear()


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return {kv: answer("cpu", kv) for kv in ("auto", "int8")}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_greedy_tokens_in_fp32_are_the_cpus(
    expected: dict[str, list[int]], gpu_backend: str, kv_cache_dtype: str
) -> None:
    assert answer(gpu_backend, kv_cache_dtype) == expected[kv_cache_dtype]
    if not HAS_GPU:
        assert dispatch.backend("cpu").__name__ == "octavo.kernels.cuda.backend"
