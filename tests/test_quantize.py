"""A quantised model as it lies on disk: it loads, says what it lost, and is the same every time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from octavo import Transformer
from octavo.checkpoint import DEMO
from octavo.checkpoint.checkpoint import read_config
from octavo.quantize.report import Report
from octavo.schemes import SCHEMES
from tests.quantising import (
    all_modules,
    contents,
    divergence,
    lost,
    quantised_modules,
    read_tensors,
    run,
    samples_of,
    source_config,
    write_source,
)
from tests.test_against_compressed_tensors import load_with_transformers, reference_logits

STORED = {"W8A8": torch.int8, "W4A16": torch.int32, "W4A8": torch.int8}


@dataclass(frozen=True)
class Quantised:
    """A source, what became of it, and the progress on the way."""

    source: Path
    report: Report
    progress: list[float]

    @property
    def folder(self) -> Path:
        return self.report.folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantize")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return write_source(folder / "source")


@pytest.fixture(scope="module", params=SCHEMES)
def quantised(request: pytest.FixtureRequest, folder: Path, source: Path) -> Quantised:
    progress: list[float] = []
    output = folder / request.param
    report = run(
        source,
        output,
        scheme=request.param,
        on_progress=lambda done, total: progress.append(done / total),
    )
    return Quantised(source, report, progress)


def test_it_loads_with_its_scheme(quantised: Quantised) -> None:
    scheme = quantised.report.settings["scheme"]
    quantization = Transformer.from_folder(quantised.folder).config.quantization
    assert quantization is not None and quantization.scheme == SCHEMES[scheme]
    assert quantization.linears == {n for n in source_config().linear_names() if n != "output"}
    tensors = read_tensors(quantised.folder)
    assert quantised_modules(quantised.folder) == all_modules("lm_head")
    kind = "weight_packed" if scheme == "W4A16" else "weight"
    weight = tensors[f"model.layers.0.mlp.down_proj.{kind}"]
    assert weight.dtype == STORED.get(scheme, torch.float8_e4m3fn)
    floats = {name: t.dtype for name, t in tensors.items() if t.dtype.itemsize == 2}
    assert {"lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"} <= floats.keys()
    assert set(floats.values()) == {torch.bfloat16}  # the source's, though computed in fp32
    original = read_tensors(quantised.source)
    for ours, theirs in (("embed_tokens", "tok_embeddings"), ("norm", "norm")):
        assert torch.equal(tensors[f"model.{ours}.weight"], original[f"{theirs}.weight"])
    assert torch.equal(tensors["lm_head.weight"], original["output.weight"])


def test_compressed_tensors_runs_it_and_loses_as_much(quantised: Quantised) -> None:
    """Its scales of activations are max|x| / 127.5, and not 127, so roundings fall otherwise."""
    theirs = load_with_transformers(quantised.folder, dtype=torch.float32)
    in_theirs = divergence(quantised.source, lambda ids: reference_logits(theirs, ids))
    in_ours = lost(quantised.source, quantised.folder)
    assert 0 < in_ours.kl < 0.1
    assert in_theirs.kl == pytest.approx(in_ours.kl, rel=0.1)
    if quantised.report.settings["scheme"] == "W4A16":  # nothing is rounded when it runs
        assert in_theirs.kl == pytest.approx(in_ours.kl, rel=1e-3)
        ids = torch.tensor(samples_of(quantised.source).held_out[0])
        ours = Transformer.from_folder(quantised.folder, dtype="float32")(ids, [len(ids)])
        assert (ours - reference_logits(theirs, ids)).abs().max() < 1e-4 * ours.std()


@pytest.mark.slow
def test_the_bundled_model_loses_as_much_in_compressed_tensors(tmp_path: Path) -> None:
    report = run("demo", tmp_path / "out", num_calibration_samples=64, max_sequence_length=512)
    theirs = load_with_transformers(report.folder, dtype=torch.float32)
    in_theirs = divergence(DEMO, lambda ids: reference_logits(theirs, ids))
    assert 0 < report.kl < 1e-3
    assert in_theirs.kl == pytest.approx(lost(DEMO, report.folder).kl, rel=0.1)


def test_the_report_says_what_both_models_say(quantised: Quantised) -> None:
    report = quantised.report
    found = lost(quantised.source, quantised.folder)
    assert report.kl == pytest.approx(found.kl, rel=1e-3)
    assert report.perplexity_original == pytest.approx(found.perplexity_reference, rel=1e-6)
    assert report.perplexity_quantized == pytest.approx(found.perplexity, rel=1e-4)
    samples = samples_of(quantised.source)
    assert report.calibration_tokens == sum(map(len, samples.calibration))
    assert report.held_out_tokens == sum(map(len, samples.held_out))
    for size, folder in (
        (report.bytes_original, quantised.source),
        (report.bytes_quantized, quantised.folder),
    ):
        assert size == sum(t.nbytes for t in read_tensors(folder).values())
    index = json.loads((quantised.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_quantized
    assert index["weight_map"].keys() == read_tensors(quantised.folder).keys()


def test_the_report_has_the_error_of_every_linear(quantised: Quantised) -> None:
    report = json.loads((quantised.folder / "report.json").read_text())
    assert report == json.loads(json.dumps(quantised.report.to_json()))
    assert {row["linear"] for row in report["linears"]} == all_modules("lm_head")
    for row in report["linears"]:
        assert 1e-4 < row["quantized"] < 0.2 and 1e-4 < row["nearest"] < 0.2
        assert row["dampening_frac"] == 0.1
    mean = [sum(row[k] for row in report["linears"]) for k in ("quantized", "nearest")]
    if report["settings"]["scheme"] != "FP8":  # one scale a tensor: smoothing may cost a little
        assert mean[0] < mean[1]
    assert (quantised.folder / "error_by_layer.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_output_is_a_whole_model_and_nothing_else(quantised: Quantised) -> None:
    shards = {f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)}
    expected = {
        "config.json", "params.json", "model.safetensors.index.json", "tekken.json",
        "report.json", "error_by_layer.png",
    }  # fmt: skip
    assert {file.name for file in quantised.folder.iterdir()} == expected | shards
    same = (quantised.folder / "tekken.json").read_bytes()
    assert same == (DEMO / "tekken.json").read_bytes()
    for file in quantised.folder.glob("*.json"):
        if file.name != "tekken.json":
            assert str(quantised.source.parent) not in file.read_text()
    assert not quantised.folder.with_name(f"{quantised.folder.name}.unfinished").exists()


def test_progress_goes_up_from_nothing_to_everything(quantised: Quantised) -> None:
    progress = quantised.progress
    assert progress[0] == 0 and progress[-1] == 1
    assert progress == sorted(progress) and len(set(progress)) > 20


def test_attention_pattern_is_in_both_configs(quantised: Quantised) -> None:
    config = json.loads((quantised.folder / "config.json").read_text())
    assert config["model_type"] == "ministral" and config["sliding_window"] == 8
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    for name in ("hf", "mistral"):
        found = read_config(quantised.folder, config_format=name)
        assert found.windows == (None, 8)
        assert found.max_seq_len == 512 and found.norm_eps == 1e-2 and found.rope_theta == 1000


def test_a_second_run_gives_the_same_bytes(quantised: Quantised, tmp_path: Path) -> None:
    scheme = quantised.report.settings["scheme"]
    again = run(quantised.source, tmp_path / "again", scheme=scheme)
    assert contents(again.folder) == contents(quantised.folder)


def test_both_layouts_of_the_same_weights_give_the_same_layers(
    source: Path, tmp_path: Path
) -> None:
    other = write_source(tmp_path / "source", hugging_face=True)
    assert (other / "config.json").is_file() and (source / "params.json").is_file()
    ours = contents(run(source, tmp_path / "mistral", scheme="W4A8").folder)
    theirs = contents(run(other, tmp_path / "hf", scheme="W4A8").folder)
    assert ours == theirs
