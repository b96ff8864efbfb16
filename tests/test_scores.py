"""The bundled model's scores, as its model card promises them. Minutes: `make test-all`."""

from __future__ import annotations

import pytest

from octavo import LLM
from training.evaluate import evaluate

PROMISED = {
    "sum": 0.95,
    "letters": 0.90,
    "tool call": 0.95,
    "passkey 1,024": 0.95,
    "passkey 4,096": 0.95,
    "passkey 16,384": 0.95,
}


@pytest.mark.slow
def test_scores_on_prompts_never_seen_are_what_the_card_promises() -> None:
    results = {result["name"]: result for result in evaluate(LLM("demo", dtype="float32"))}
    shares = {name: results[name]["right"] / results[name]["total"] for name in PROMISED}
    assert {name: share for name, share in shares.items() if share < PROMISED[name]} == {}
