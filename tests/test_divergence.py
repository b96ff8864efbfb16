"""KL divergence and perplexity by hand, and the copy of a model with activation outliers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo import Transformer
from octavo.evaluate.divergence import Divergence, kl_divergence
from octavo.evaluate.outliers import with_outliers
from tests.checkpoints import random_state, small_config, write_mistral


def test_kl_by_hand() -> None:
    """p = (1/2, 1/2) and q = (1/4, 3/4): ½ ln 2 + ½ ln(2/3) = ½ ln(4/3)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).tolist() == pytest.approx([0.5 * math.log(4 / 3)])
    assert kl_divergence(q, p).tolist() == pytest.approx(
        [0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    )
    assert kl_divergence(p, p + 7.0).item() == pytest.approx(0, abs=1e-7)  # logits know no zero


def test_kl_is_taken_in_fp64() -> None:
    reference = torch.randn(5, 2000, dtype=torch.bfloat16)
    nudged = reference.float()
    nudged[:, 0] += 2**-10  # KL ≈ p (1 - p) δ² / 2, some 1e-10: lost in fp32
    found = kl_divergence(reference, nudged)
    p = reference.double().softmax(-1)[:, 0]
    expected = p * (1 - p) * 2**-20 / 2
    assert found.dtype == torch.float64 and found.shape == (5,)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.0)


def test_perplexity_by_hand() -> None:
    """Who knows nothing of four tokens has perplexity 4; who gives the first one half and the
    second one eighth has √(2 · 8), the same.
    """
    divergence = Divergence()
    eighth = [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    divergence.add(
        torch.zeros(3, 4), torch.tensor([eighth, eighth, eighth]).log(), torch.tensor([3, 0])
    )
    assert divergence.n_tokens == 3 and divergence.n_targets == 2
    assert divergence.perplexity_reference == pytest.approx(4.0)
    assert divergence.perplexity == pytest.approx(4.0)
    one = math.log(1 / 4) - sum(math.log(p) for p in eighth) / 4
    assert divergence.kl == pytest.approx(one)


def test_parts_of_a_text_add_up() -> None:
    reference, logits = torch.randn(9, 30), torch.randn(9, 30)
    targets = torch.randint(30, (8,))
    whole, parts = Divergence(), Divergence()
    whole.add(reference, logits, targets)
    for low in (0, 4, 8):
        rows = slice(low, low + 4)
        parts.add(reference[rows], logits[rows], targets[rows])
    assert (parts.n_tokens, parts.n_targets) == (whole.n_tokens, whole.n_targets) == (9, 8)
    assert parts.kl == pytest.approx(whole.kl)
    assert parts.perplexity == pytest.approx(whole.perplexity)
    assert parts.perplexity_reference == pytest.approx(whole.perplexity_reference)
    assert parts.perplexity != pytest.approx(parts.perplexity_reference)


def test_a_model_with_outliers_is_the_same_function(tmp_path: Path) -> None:
    config = small_config((None, 8))
    state = random_state(config)
    before = {name: tensor.clone() for name, tensor in state.items()}
    outliers = with_outliers(state, (3, 40), 256.0)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    original = Transformer.from_folder(write_mistral(tmp_path / "a", config, state))
    changed = Transformer.from_folder(write_mistral(tmp_path / "b", config, outliers))
    ids = torch.randint(config.vocab_size, (60,))
    expected = original(ids, [60])
    torch.testing.assert_close(changed(ids, [60]), expected, rtol=0, atol=1e-4 * expected.std())
    largest: list[Tensor] = []
    for i in range(config.n_layers):
        for name in ("attention.wq", "feed_forward.w1"):  # that are given what norms give
            linear = changed.get_submodule(f"layers.{i}.{name}")
            linear.register_forward_pre_hook(lambda _, x: largest.append(x[0].abs().amax(0)))
    changed(ids, [60])
    assert len(largest) == 2 * config.n_layers
    for channels in largest:
        others = channels.median()
        assert (channels[[3, 40]] > 50 * others).all()
        assert (channels > 50 * others).sum() == 2
