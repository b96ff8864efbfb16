"""Weights, activations and texts that are damaged, degenerate or too few to quantise by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.schemes import SCHEMES
from tests.checkpoints import State, random_state
from tests.quantising import (
    fails,
    lost,
    read_tensors,
    run,
    source_config,
    write_source,
    write_texts,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("data") / "source")


@pytest.mark.parametrize(
    ("name", "stored", "value"),
    [
        ("layers.1.feed_forward.w2.weight", "layers.1.feed_forward.w2.weight", "nan"),
        ("layers.0.attention_norm.weight", "layers.0.attention_norm.weight", "inf"),
        ("tok_embeddings.weight", "tok_embeddings.weight", "-inf"),
        ("norm.weight", "norm.weight", "nan"),
        ("output.weight", "output.weight", "nan"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, name: str, stored: str, value: str
) -> None:
    state = random_state(source_config())
    state[name].view(-1)[-7] = float(value)
    source = write_source(tmp_path / "source", state=state)
    assert fails(source, tmp_path / "out") == (
        f"{source / 'consolidated.safetensors'}: the tensor {stored} holds NaN or infinity; "
        "download it again"
    )


def test_activations_that_overflow_are_named(tmp_path: Path) -> None:
    state = random_state(source_config())
    state["layers.0.feed_forward.w1.weight"] *= 1e4
    state["layers.0.feed_forward.w3.weight"] *= 1e4
    source = write_source(tmp_path / "source", state=state)
    message = fails(source, tmp_path / "out", dtype="float16")
    assert message.startswith("model.layers.0.mlp.down_proj: its inputs are not finite; ")
    assert message.endswith("need a wider --dtype")
    assert run(source, tmp_path / "wider").kl < 0.1


def degenerate() -> State:
    """Zeros where a division or a factorisation might stumble over them."""
    state = random_state(source_config())
    state["layers.0.attention.wo.weight"].zero_()
    state["layers.0.feed_forward.w3.weight"].zero_()  # so that all inputs of w2 are zero
    state["layers.1.attention.wq.weight"][5] = 0.0
    state["layers.1.attention.wv.weight"][3] = 0.0  # an input of wo that is always zero
    state["layers.1.attention_norm.weight"][[0, 9]] = 0.0
    state["layers.1.feed_forward.w1.weight"][:, 4] = 0.0
    state["layers.1.feed_forward.w3.weight"][:, 4] = 0.0
    return state


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_are_quantised_like_anything_else(tmp_path: Path, scheme: str) -> None:
    source = write_source(tmp_path / "source", state=degenerate())
    report = run(source, tmp_path / "out", scheme=scheme, ignore=[])
    tensors = read_tensors(report.folder)
    assert all(bool(tensor.float().isfinite().all()) for tensor in tensors.values())
    scales = [tensor for name, tensor in tensors.items() if name.endswith("_scale")]
    assert all(bool((scale > 0).all()) for scale in scales)
    assert 0 < report.kl < 0.2 and report.kl == pytest.approx(
        lost(source, report.folder).kl, rel=0.01
    )
    errors = {row.linear: row.quantized for row in report.linears}
    assert errors["model.layers.0.self_attn.o_proj"] == 0
    assert errors["model.layers.0.mlp.down_proj"] == 0


@pytest.mark.parametrize("smoothing_strength", [None, 0.8])
def test_a_single_short_text_and_no_dampening(
    tmp_path: Path, smoothing_strength: float | None
) -> None:
    """Far fewer tokens than inputs: every Hessian is singular, and gets what dampening it needs."""
    source = write_source(tmp_path / "source")
    report = run(
        source,
        tmp_path / "out",
        num_calibration_samples=1,
        max_sequence_length=8,
        dampening_frac=0,
        smoothing_strength=smoothing_strength,
    )
    assert report.calibration_tokens == 8 and report.kl < 0.2
    used = [row["dampening_frac"] for row in json_report(report.folder)["linears"]]
    assert all(0 < dampening <= 0.1 for dampening in used)


def json_report(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "report.json").read_text())
    assert isinstance(values, dict)
    return values


def test_plain_rounding_reports_no_dampening(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", rounding="nearest")
    assert {row.dampening_frac for row in report.linears} == {None}


def test_notes_on_the_texts_are_in_the_report(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    texts = source / "calibration.jsonl"
    empty = [{"text": " "}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}]
    long = [{"text": "weights of paper " * 400}]
    texts.write_text(
        texts.read_text() + "".join(f"{json.dumps(line)}\n" for line in [*empty, *long])
    )
    report = run(source, tmp_path / "out", num_calibration_samples=100)
    assert json_report(report.folder)["notes"] == [
        "asked for 100 samples, found 11",
        "calibration.jsonl: skipped 3 samples that are empty",
        "calibration.jsonl: truncated 1 sample to 512 tokens",
    ]
    one = write_texts(tmp_path / "one.jsonl", 1)
    assert f"{one}: fewer than 2 usable samples" in fails(source, tmp_path / "b", dataset_id=one)
