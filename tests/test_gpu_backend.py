"""The whole model by the GPU's backend; without a GPU, by Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.engine import decode_graph
from octavo.engine.decode_graph import Bucket, DecodeGraphs
from octavo.engine.speculation import PromptLookup
from octavo.engine.step_limits import StepLimits
from octavo.kernels import dispatch, plain
from octavo.kernels.cuda import backend, top_p

SAMPLED = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True)
PROMPT = "What is 12 + 30?"
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
HAS_GPU = torch.cuda.is_available()


def load(device: str, kv_cache_dtype: str = "auto") -> LLM:
    """The bundled model, packed as the backend wants it."""
    return LLM(
        "demo", dtype="float32", device=device, kv_cache_dtype=kv_cache_dtype, max_model_len=256,
        max_num_seqs=2, memory="2G",
    )  # fmt: skip


def answer(llm: LLM, params: SamplingParams = PARAMS) -> list[int]:
    [output] = llm.chat([{"role": "user", "content": PROMPT}], params)
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
    return {kv: answer(load("cpu", kv)) for kv in ("auto", "int8")}


def test_sampled_tokens_in_fp32_are_the_cpus(
    gpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    keep = top_p._keep

    def watched(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        kept.append(int((keep(weights, shares) > 0).sum()))
        return weights

    top_p.usable()
    monkeypatch.setattr(top_p, "_keep", watched)
    found = answer(load(gpu_backend), SAMPLED)
    assert kept and max(kept) > 1
    with monkeypatch.context() as patched:
        patched.setitem(dispatch._MODULES, "cpu", "octavo.kernels.cpu.backend")
        dispatch.backend.cache_clear()
        assert answer(load("cpu"), SAMPLED) == found
    dispatch.backend.cache_clear()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_greedy_tokens_in_fp32_are_the_cpus(
    expected: dict[str, list[int]], gpu_backend: str, kv_cache_dtype: str
) -> None:
    assert answer(load(gpu_backend, kv_cache_dtype)) == expected[kv_cache_dtype]
    if not HAS_GPU:
        assert dispatch.backend("cpu").__name__ == "octavo.kernels.cuda.backend"


@pytest.mark.skipif(
    backend.paged_attention is plain.paged_attention,
    reason="PyTorch's attention takes lengths from the host",
)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("guesses", [False, True])
def test_kernels_that_are_given_bounds_read_the_lengths_on_the_device(
    expected: dict[str, list[int]],
    gpu_backend: str,
    kv_cache_dtype: str,
    guesses: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a graph that is captured for contexts of up to 128 tokens, in batches of up to 2."""
    monkeypatch.setattr(decode_graph, "SHORTEST_CONTEXT", 128)
    compute = DecodeGraphs._compute
    used: set[Bucket] = set()

    def captured(self: DecodeGraphs, bucket: Bucket, _: object) -> None:
        used.add(bucket)
        compute(self, bucket)

    monkeypatch.setattr(DecodeGraphs, "_compute", captured)
    llm = load(gpu_backend, kv_cache_dtype)
    made = llm.engine
    limits = StepLimits(2, made.max_model_len, guesses)
    decode = DecodeGraphs(llm.model, made.pool, limits, capture=False)
    decode.buckets = [each for each in decode.buckets if each.size == 2]  # one answer is padded
    made.decode = decode
    made.scheduler.speculate = guesses
    if guesses:  # the answer and what is wrong, whatever there is to be found
        right = expected[kv_cache_dtype]
        drafts = [[*right[1:3], 0, 7], [0], right[4:6]]
        monkeypatch.setattr(PromptLookup, "propose", lambda *_: drafts.pop(0) if drafts else [])
    assert answer(llm) == expected[kv_cache_dtype]
    assert any(bucket.guesses for bucket in used) == guesses
    assert made.stats().accepted_tokens_total == (2 if guesses else 0)
