"""`octavo eval passkey`: its prompts' lengths, its grid, what it writes, and how it stops."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from octavo import LLM
from octavo.checkpoint import DEMO, writer
from octavo.cli import passkey as command
from octavo.evaluate.passkey import CLASSIC_FILLER
from octavo.evaluate.passkey_run import (
    ANSWER_TOKENS,
    Trial,
    encode_trial,
    make_trials,
    run_trial,
    spread,
)
from octavo.tokenizer import Tokenizer
from tests.test_cli import OCTAVO, Capsys, fails, run

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def room_left(tokenizer: Tokenizer, length: int, depth: float = 0.5) -> int:
    """Tokens of `length` that neither the prompt nor the answer's room takes."""
    token_ids = encode_trial(tokenizer, Trial(length, depth, "13005", 2))
    text = tokenizer.decode(token_ids)
    assert text.count("13005") == 2 and text.rstrip().endswith("What is the pass key?")
    return length - ANSWER_TOKENS - len(token_ids)


def longest_sentence(tokenizer: Tokenizer) -> int:
    return max(len(tokenizer.encode(" " + text, bos=False)) for text in CLASSIC_FILLER)


@pytest.mark.parametrize("length", [256, 1000, 4096, 16384, 65536, 131072])
def test_prompt_and_answer_fill_the_length_but_for_less_than_a_sentence(
    tokenizer: Tokenizer, length: int
) -> None:
    assert 0 <= room_left(tokenizer, length) < longest_sentence(tokenizer)


def test_so_they_do_with_the_tokenizer_of_the_8b_model() -> None:
    mistral = MistralTokenizer.v3(is_tekken=True)
    tekken = Tokenizer(mistral, Path(mistral.instruct_tokenizer.tokenizer.file_path))
    assert 0 <= room_left(tekken, 16384) < longest_sentence(tekken)


@pytest.mark.parametrize("missed", [-1, 1])
def test_so_they_do_where_sentences_alone_have_other_tokens_than_joined_ones(
    tokenizer: Tokenizer, missed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = Tokenizer(tokenizer.mistral, tokenizer.path)
    monkeypatch.setattr(
        apart, "encode", lambda text, bos: [0] * (len(tokenizer.encode(text, bos=bos)) + missed)
    )
    assert 0 <= room_left(apart, 4096) < longest_sentence(tokenizer) + 1


@pytest.mark.parametrize(
    ("tries", "n_depths"), [(20, 11), (40, 11), (11, 11), (3, 11), (2, 5), (1, 5), (7, 1)]
)
def test_tries_are_spread_evenly_over_the_depths(tries: int, n_depths: int) -> None:
    indices = spread(tries, n_depths)
    assert len(indices) == tries and indices == sorted(indices)
    counts = [indices.count(i) for i in range(n_depths)]
    assert max(counts) - min(counts) <= 1
    if 1 < tries < n_depths:
        assert indices[0] == 0 and indices[-1] == n_depths - 1


def test_trials_are_the_same_for_a_seed_whatever_else_is_run(tokenizer: Tokenizer) -> None:
    trials = make_trials([512, 1024], [0.0, 1.0], 10, seed=3)
    assert trials[10:] == make_trials([1024], [0.0, 1.0], 10, seed=3)
    assert trials != make_trials([512, 1024], [0.0, 1.0], 10, seed=4)
    assert len({trial.key for trial in trials}) > 15
    # At one depth, prompts differ before the key too.
    begins = {tuple(encode_trial(tokenizer, trial)[:60]) for trial in trials[5:10]}
    assert len(begins) == 5


def test_answers_do_not_depend_on_the_prefix_cache() -> None:
    trials = make_trials([1024], [0.5, 1.0], 12)
    plain = LLM("demo", enable_prefix_caching=False)
    cached = LLM("demo")
    expected = [run_trial(plain, trial) for trial in trials]
    found = [run_trial(cached, trial) for trial in trials]
    assert [each.answer for each in found] == [each.answer for each in expected]
    assert sum(each.n_cached_tokens for each in found) > 1024
    assert all(each.n_cached_tokens == 0 for each in expected)


def test_the_bundled_model_finds_every_key_and_all_is_written_down(
    tmp_path: Path, capsys: Capsys
) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    code, out, err = run(
        capsys, "eval", "passkey", "demo", "--lengths", "1k,3000", "--depths", "0,50,100",
        "--tries", 4, "-o", output, "--picture", picture,
    )  # fmt: skip
    assert (code, err) == (0, "")
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [
        ["0 %", "2/2", "2/2", "4/4"],
        ["50 %", "1/1", "1/1", "2/2"],
        ["100 %", "1/1", "1/1", "2/2"],
        ["all", "4/4 = 100%", "4/4 = 100%", "8/8 = 100%"],
    ]
    assert "demo (bf16)" in out and "3,000" in out and str(picture) in out
    values = json.loads(output.read_text())
    assert values["lengths"] == [1024, 3000] and values["depths"] == [0, 0.5, 1]
    (model,) = values["models"]
    assert (model["model"], model["right"], model["tries"]) == ("demo", 8, 8)
    assert model["by_length"][1] == {"length": 3000, "right": 4, "tries": 4}
    for trial in model["trials"]:
        assert trial["right"] and trial["key"] in trial["answer"]
        assert 0 <= trial["length"] - ANSWER_TOKENS - trial["n_prompt_tokens"] < 9
    assert picture.read_bytes().startswith(PNG)


def test_a_wrong_answer_is_counted_and_told(
    text_model: Path, tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "out.json"
    code, out, _ = run(
        capsys, "eval", "passkey", text_model, "--lengths", 300, "--depths", 1, "--tries", 2,
        "-o", output, "--picture", tmp_path / "out.svg",
    )  # fmt: skip
    assert code == 0 and "0/2 = 0%" in out
    (model,) = json.loads(output.read_text())["models"]
    assert model["right"] == 0 and not any(trial["right"] for trial in model["trials"])


def test_models_stand_beside_each_other_each_with_its_kv_dtype(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(*arguments: Any, kv_cache_dtype: str = "not given", **options: Any) -> LLM:
        asked.append(kv_cache_dtype)
        return LLM(*arguments, **options)

    monkeypatch.setattr(command, "LLM", load)
    output = tmp_path / "out.json"
    arguments = ["demo", DEMO, "--lengths", "512", "--tries", 1, "-o", output]
    arguments += ["--picture", tmp_path / "out.png"]
    code, out, _ = run(capsys, "eval", "passkey", *arguments, "--kv-cache-dtype", "auto,int8")
    assert code == 0 and asked == ["not given", "int8"]
    assert out.index("demo (bf16)") < out.index("demo (bf16, int8 KV)")
    first, second = json.loads(output.read_text())["models"]
    assert first["trials"][0]["key"] == second["trials"][0]["key"]  # the same prompts
    assert second["kv_cache_dtype"] == "int8"
    run(capsys, "eval", "passkey", *arguments, "--kv-cache-dtype", "bf16")
    assert asked[2:] == ["bf16", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--lengths", "4k,lots"], "--lengths: 'lots' is not a size"),
        (["--lengths", "4k,"], "--lengths: '' is not a size"),
        (["--lengths", "100"], "--lengths: 100 tokens are too few"),
        (["--lengths", "4k,256k"], "--lengths: 256k is more than the context of demo, 128k"),
        (["--tries", "0"], "--tries: 0"),
        (["--depths", "0"], "--depths: '0' is neither"),
        (["--depths", "2.5"], "--depths: '2.5' is neither"),
        (["--depths", "0,101"], "--depths: '0,101' is neither"),
        (["--depths", "nan,1"], "--depths: 'nan,1' is neither"),
        (["--depths", "deep"], "--depths: 'deep' is neither"),
        (["--kv-cache-dtype", "int4"], "--kv-cache-dtype: 'int4' is not one of auto, bf16, int8"),
        (["--kv-cache-dtype", "auto,int8"], "--kv-cache-dtype: 2 for 1 models"),
        (["--output", "nowhere/x.json"], "--output: nowhere/x.json: cannot be written"),
        (["--picture", "nowhere/x.png"], "--picture: nowhere: no such folder"),
        (["--picture", "x.xyz"], "--picture: x.xyz: not one of .png"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_a_mistake_is_one_line_before_any_answer(
    arguments: list[str], problem: str, tmp_path: Path, capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert problem in fails(capsys, "eval", "passkey", "demo", *arguments)


def test_a_second_model_that_is_not_there_is_named_before_the_first_runs(
    tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "out.json"
    assert "gone" in fails(capsys, "eval", "passkey", "demo", tmp_path / "gone", "-o", output)
    assert not output.exists()


def test_without_matplotlib_a_line_says_so_and_the_rest_is_there(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, out, err = run(
        capsys, "eval", "passkey", "demo", "--lengths", 512, "--tries", 1,
        "-o", tmp_path / "out.json", "--picture", tmp_path / "out.png",
    )  # fmt: skip
    assert code == 0 and "1/1 = 100%" in out
    assert err == "octavo: no picture without matplotlib; pip install 'octavo[evaluate]'\n"
    assert not (tmp_path / "out.png").exists()


def test_ctrl_c_leaves_what_there_is(tmp_path: Path) -> None:
    output, picture = tmp_path / "out.json", tmp_path / "out.png"
    process = subprocess.Popen(
        [*OCTAVO, "eval", "passkey", "demo", "--lengths", "512", "--tries", "10000",
         "-o", output, "--picture", picture],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end and process.poll() is None:
            models = json.loads(output.read_text())["models"] if output.exists() else []
            if models and models[0]["tries"] >= 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == "", err
    (model,) = json.loads(output.read_text())["models"]
    assert 2 <= model["right"] == model["tries"] < 10000
    assert f"{model['right']}/{model['tries']} = 100%" in out
    assert picture.read_bytes().startswith(PNG)


def test_ctrl_c_while_an_answer_is_written_loses_none(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    written = 0

    def write_json(path: Path, values: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:  # before the first try, after it, after the second
            raise KeyboardInterrupt
        writer.write_json(path, values)

    monkeypatch.setattr(command, "write_json", write_json)
    code, out, err = run(
        capsys, "eval", "passkey", "demo", "--lengths", 512, "--tries", 3,
        "-o", output, "--picture", tmp_path / "out.png",
    )  # fmt: skip
    assert (code, err) == (130, "")
    (model,) = json.loads(output.read_text())["models"]
    assert model["right"] == model["tries"] == 2
    assert "2/2 = 100%" in out


def test_a_run_that_was_stopped_goes_on_with_the_next_try(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.json"
    arguments = ["eval", "passkey", "demo", DEMO, "--lengths", 512, "--tries", 4, "-o", output]
    arguments += ["--picture", tmp_path / "out.png"]
    run(capsys, *arguments)
    whole = json.loads(output.read_text())
    stopped = json.loads(output.read_text())
    stopped["models"] = stopped["models"][:1]  # in the middle of the first model
    del stopped["models"][0]["trials"][3:]
    stopped["models"][0]["trials"][0]["answer"] = "I forgot."
    output.write_text(json.dumps(stopped))
    made: list[Trial] = []

    def run_one(llm: LLM, trial: Trial) -> Any:
        made.append(trial)
        return run_trial(llm, trial)

    monkeypatch.setattr(command, "run_trial", run_one)
    code, out, err = run(capsys, *arguments, "--resume")
    assert (code, err) == (0, "") and "3/4 = 75%" in out and "4/4 = 100%" in out
    assert len(made) == 1 + 4
    first, second = json.loads(output.read_text())["models"]
    keys = [trial["key"] for trial in whole["models"][0]["trials"]]
    assert [trial["key"] for trial in first["trials"]] == keys
    assert (first["right"], second["right"]) == (3, 4)
    assert run(capsys, *arguments, "--resume")[0] == 0 and len(made) == 5  # all is there


@pytest.mark.parametrize(
    ("further", "problem"),
    [
        (["--seed", 1], "its tries of demo are not those that are asked for"),
        (["--lengths", "600"], "its tries of demo are not those that are asked for"),
        (["--dtype", "float32", "--lengths", "512,600"], "demo had bf16 weights, not fp32"),
    ],
)
def test_other_tries_are_not_taken_over(
    further: list[Any], problem: str, tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "out.json"
    arguments = ["eval", "passkey", "demo", "--lengths", 512, "--tries", 2, "-o", output]
    arguments += ["--picture", tmp_path / "out.png"]
    run(capsys, *arguments)
    before = output.read_text()
    told = fails(capsys, *arguments, "--resume", *further)
    assert problem in told and f"--resume: {output}" in told
    if "--dtype" not in further:
        assert output.read_text() == before


@pytest.mark.parametrize("content", [None, "not JSON", "[]", '{"models": [{}]}'])
def test_a_file_that_cannot_be_resumed_is_named(
    content: str | None, tmp_path: Path, capsys: Capsys
) -> None:
    output = tmp_path / "out.json"
    if content is not None:
        output.write_text(content)
    told = fails(capsys, "eval", "passkey", "demo", "--lengths", 512, "-o", output, "--resume")
    assert f"--resume: {output}" in told


def test_help_names_the_group_and_the_command(capsys: Capsys) -> None:
    assert "passkey" in run(capsys, "eval", "--help")[1]
    code, out, _ = run(capsys, "eval", "passkey", "--help")
    assert code == 0 and "--lengths" in out
