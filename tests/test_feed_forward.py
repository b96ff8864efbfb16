"""Feed-forwards whose hidden numbers are made of some tokens at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo import Transformer, kernels
from octavo.kernels import QuantizedTokens
from octavo.kernels.cpu import backend
from tests.checkpoints import small_config, write_w8a8

IDS = torch.arange(40) % 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_what_all_tokens_give(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer.from_folder(write_w8a8(tmp_path, small_config()), dtype=dtype)
    rows: list[int] = []
    gate = kernels.silu_mul_quantize

    def silu_mul_quantize(*inputs: Tensor) -> QuantizedTokens:
        rows.append(len(inputs[0]))
        return gate(*inputs)

    monkeypatch.setattr(kernels, "silu_mul_quantize", silu_mul_quantize)
    expected = model(IDS, [33, 7], model.new_caches(2, 40))
    assert set(rows) == {40}
    rows.clear()
    monkeypatch.setattr(backend, "FEED_FORWARD_TOKENS", 15)
    assert torch.equal(model(IDS, [33, 7], model.new_caches(2, 40)), expected)
    assert rows == [14, 14, 12] * model.config.n_layers


def test_a_gpu_makes_all_at_once() -> None:
    assert kernels.feed_forward_tokens(torch.device("cuda")) is None
    assert kernels.feed_forward_tokens(torch.device("meta")) is None
