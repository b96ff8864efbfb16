"""What a user may ask of a quantisation, each in the output: patterns, dtypes, names to ignore."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import Transformer
from octavo.checkpoint import DEMO, open_checkpoint
from octavo.evaluate.outliers import with_outliers
from tests.checkpoints import random_state, write_mistral
from tests.quantising import (
    all_modules,
    lost,
    quantised_modules,
    read_tensors,
    run,
    samples_of,
    source_config,
    write_source,
)
from tests.test_against_compressed_tensors import load_with_transformers, reference_logits

PLAIN: dict[str, Any] = {
    "rounding": "nearest",
    "smoothing_strength": None,
    "clipping": False,
    "inner_smoothing": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("recipe") / "source")


@pytest.mark.parametrize("window", [None, 8])
def test_a_uniform_pattern_is_mistrals(tmp_path: Path, window: int | None) -> None:
    source = write_source(tmp_path / "source", source_config((window,)))
    output = run(source, tmp_path / "out").folder
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["sliding_window"] == window
    assert config["architectures"] == ["MistralForCausalLM"] and "layer_types" not in config
    assert Transformer.from_folder(output).config.windows == (window, window)
    ids = torch.tensor(samples_of(source).held_out[0])
    theirs = reference_logits(load_with_transformers(output, dtype=torch.float32), ids)
    ours = Transformer.from_folder(output, dtype="float32")(ids, [len(ids)])
    assert (ours - theirs).norm() < 0.1 * ours.norm()  # another window would be far off


def test_a_pattern_given_by_the_user_is_kept(source: Path, tmp_path: Path) -> None:
    output = run(source, tmp_path / "out", attention_pattern="16,full").folder
    assert Transformer.from_folder(output).config.windows == (16, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_source_keeps_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write_source(tmp_path / "source", dtype=dtype)
    report = run(source, tmp_path / "out")
    tensors = read_tensors(report.folder)
    assert {t.dtype for t in tensors.values()} == {torch.int8, dtype}
    # The norm that quantises adds in another order than the one that calibration reads, and at a tie
    # between two numbers of the grid that decides: 0.1 % of a divergence of 9e-5 was seen.
    assert report.kl == pytest.approx(lost(source, report.folder).kl, rel=5e-3)


def test_the_computation_may_be_in_bfloat16(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", dtype="bfloat16")
    assert report.settings["dtype"] == "bfloat16"
    assert lost(source, report.folder).kl < 0.1


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        ([], ()),
        (["re:.*down_proj"], ("down_proj",)),
        (["lm_head", "model.layers.1.self_attn.v_proj"], ("lm_head", "1.self_attn.v_proj")),
        (["lm_head", "re:.*self_attn"], ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_what_is_ignored_stays_in_floating_point(
    source: Path, tmp_path: Path, ignore: list[str], kept: tuple[str, ...]
) -> None:
    report = run(source, tmp_path / "out", ignore=ignore)
    assert quantised_modules(report.folder) == all_modules(*kept)
    assert {row.linear for row in report.linears} == all_modules(*kept)
    config = json.loads((report.folder / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ignore
    found = lost(source, report.folder)
    assert report.kl == pytest.approx(found.kl, rel=1e-3) and 0 < found.kl < 0.1


def test_smoothing_alone_changes_nothing(tmp_path: Path) -> None:
    """With one linear of the last layer quantised, all before it is smoothed and not rounded."""
    config = source_config()
    state = with_outliers(random_state(config), (3, 40), 256.0)
    source = write_source(tmp_path / "source", config, state, dtype=torch.float32)
    report = run(source, tmp_path / "out", ignore=["re:(?!model.layers.1.mlp.down_proj)"])
    assert quantised_modules(report.folder) == {"model.layers.1.mlp.down_proj"}
    before, after = (Transformer.from_folder(path) for path in (source, report.folder))
    norm = "layers.0.attention_norm.weight"
    gain = before.state_dict()[norm] / after.state_dict()[norm]
    assert gain[3] > 10 * gain.median()  # the outlier has gone into the weights
    outputs = []
    ids = torch.tensor(samples_of(source).held_out[0])
    for model in (before, after):
        given: list[Tensor] = []
        model.get_submodule("layers.1.feed_forward.w2").register_forward_hook(
            lambda _m, inputs, _out, given=given: given.append(inputs[0])
        )
        model(ids, [len(ids)])
        outputs.append(given[0])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4 * outputs[0].std()


def test_the_sample_prompt_is_continued_by_the_quantised_model(
    source: Path, tmp_path: Path
) -> None:
    report = run(source, tmp_path / "out", sample_prompt="Hello my name is")
    assert report.sample.startswith("Hello my name is") and len(report.sample) > 30


def test_a_head_tied_to_the_embedding_stays(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", source_config(tied_embeddings=True))
    report = run(source, tmp_path / "out")
    model = Transformer.from_folder(report.folder)
    assert model.config.tied_embeddings
    assert model.output.weight is model.tok_embeddings.weight
    assert "lm_head.weight" not in read_tensors(report.folder)
    assert report.kl == pytest.approx(lost(source, report.folder).kl, rel=1e-3)


def test_a_folder_that_is_there_but_empty_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (run(source, tmp_path / "out").folder / "config.json").is_file()


def write_demo_with_outliers(folder: Path) -> Path:
    """The bundled model and its texts, with channels 256 times the others after every norm."""
    checkpoint = open_checkpoint(DEMO)
    state = with_outliers(checkpoint.load(), (3, 40, 101), 256.0)
    write_mistral(folder, checkpoint.config, state)
    for name in ("tekken.json", "calibration.jsonl", "held_out.jsonl"):
        shutil.copy(DEMO / name, folder)
    return folder


def test_outliers_break_plain_rounding_and_cost_octavo_little(tmp_path: Path) -> None:
    outliers = write_demo_with_outliers(tmp_path / "outliers")
    few: dict[str, Any] = {"num_calibration_samples": 64, "max_sequence_length": 128}
    plain = run(outliers, tmp_path / "plain", **few, **PLAIN)
    original = run(DEMO, tmp_path / "original", **few)
    smoothed = run(outliers, tmp_path / "smoothed", **few)
    assert plain.kl > 1
    assert original.kl < 0.01
    assert smoothed.kl == pytest.approx(original.kl, rel=0.25)
    assert smoothed.perplexity_original == pytest.approx(original.perplexity_original, rel=1e-5)
