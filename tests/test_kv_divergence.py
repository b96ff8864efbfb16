"""What int8 keys and values cost the bundled model on text that it was not made with."""

from __future__ import annotations

import pytest
import torch

from octavo import Transformer
from octavo.checkpoint import DEMO
from octavo.evaluate.divergence import Divergence
from octavo.kernels.cpu import attention, library
from tests.quantising import samples_of

N_TEXTS = 24


@pytest.mark.parametrize("isa", ["chosen", "avx512_emulated"])
def test_int8_keys_and_values_move_the_predictions_by_less_than_a_hundredth_of_a_nat(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against bf16 ones; with VNNI, as emulated, queries and weights have 8 bits too."""
    emulated = library.ISAS.index("avx512_emulated")
    if isa == "avx512_emulated" and not library.runs(emulated):
        pytest.skip("no emulation here")
    model = Transformer.from_folder(DEMO, dtype="float32")
    total = Divergence()
    for text in samples_of(DEMO, num_samples=1).held_out[:N_TEXTS]:
        ids = torch.tensor(text)
        # The end one token at a time, as answers are written.
        parts = [len(ids) - 8, *[1] * 8] if len(ids) > 16 else [len(ids)]
        caches = [model.new_cache(len(ids), kept) for kept in ("bf16", "int8")]
        logits = []
        for cache in caches:
            with monkeypatch.context() as patch:
                if isa == "avx512_emulated" and cache is caches[1]:
                    patch.setattr(attention, "best_isa", lambda: emulated)
                logits.append(torch.cat([model(p, [len(p)], [cache]) for p in ids.split(parts)]))
        total.add(logits[0], logits[1], ids[1:])
    assert total.n_tokens > 1000
    assert 0 < total.kl < 0.01
