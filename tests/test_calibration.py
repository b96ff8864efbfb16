"""Calibration text: JSONL files, what is held out, and the bundled model's own file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import DEMO
from octavo.demo.prompts import PROMPTS
from octavo.errors import ConfigError, RequestError
from octavo.jsonl import read_jsonl
from octavo.quantize.calibration import SEED, Samples, read_samples
from octavo.tokenizer import Tokenizer
from training.calibration import SHARES, calibration_records
from training.data import documentation
from training.data.chat import ChatEncoder
from training.export import counter

ANSWER = {"role": "assistant", "content": "4"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def write(path: Path, *records: Any) -> Path:
    """A JSONL file; strings are written as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def numbered(n: int) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}"} for i in range(n)]


def read(tokenizer: Tokenizer, source: Path | str | None = None, **changes: Any) -> Samples:
    """`source` read with small numbers; `folder` is one that brings nothing."""
    options: dict[str, Any] = {"folder": Path("nowhere"), "dataset_split": "train"}
    options |= {"num_samples": 8, "max_length": 64, "num_held_out": 4} | changes
    folder = options.pop("folder")
    dataset_id = None if source is None else str(source)
    return read_samples(folder, tokenizer, dataset_id=dataset_id, **options)


def fails(tokenizer: Tokenizer, source: Path | str | None = None, **changes: Any) -> str:
    with pytest.raises((RequestError, ConfigError)) as caught:
        read(tokenizer, source, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_is_shuffled_and_the_next_ones_are_held_out(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = numbered(30)
    samples = read(tokenizer, write(tmp_path / "texts.jsonl", *records))
    random.Random(SEED).shuffle(records)
    expected = [tokenizer.encode(record["text"]) for record in records]
    assert samples.calibration == expected[:8] and samples.held_out == expected[8:12]
    assert samples.source == "texts.jsonl, 8 of 30 texts; held out: 4 more"
    assert samples.notes == []


def test_messages_are_encoded_with_their_answer_and_tools(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    chats = [
        {"messages": [{"role": "user", "content": f"2 + {i}?"}, ANSWER], "tools": tools}
        for i in range(2)
    ]
    samples = read(tokenizer, write(tmp_path / "chats.jsonl", *chats), max_length=512)
    texts = [tokenizer.decode(ids, special=True) for ids in samples.calibration + samples.held_out]
    assert all(t.startswith("<s>[AVAILABLE_TOOLS]") and t.endswith("[/INST]4</s>") for t in texts)


def test_the_folders_own_files_are_used_without_a_dataset_id(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write(folder / "calibration.jsonl", *numbered(6))
    write(folder / "held_out.jsonl", {"text": "text number 3"}, {"text": "a"}, {"text": "b"})
    samples = read(tokenizer, folder=folder)
    assert len(samples.calibration) == 6
    assert sorted(map(tokenizer.decode, samples.held_out)) == ["a", "b"]  # not what is in both
    assert samples.source == "calibration.jsonl, 6 of 6 texts; held out: held_out.jsonl, 2 texts"
    assert samples.notes == ["asked for 8 samples, found 6"]
    given = read(tokenizer, folder / "calibration.jsonl", folder=folder, num_samples=2)
    assert given.source == "calibration.jsonl, 2 of 6 texts; held out: 4 more"


def test_of_a_set_that_is_too_small_a_tenth_is_held_out(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = write(tmp_path / "few.jsonl", *numbered(20))
    samples = read(tokenizer, source, num_samples=1024, num_held_out=32)
    assert (len(samples.calibration), len(samples.held_out)) == (18, 2)
    assert samples.notes == ["asked for 1024 samples, found 20 and kept 2 of them to measure on"]
    almost = read(tokenizer, source, num_samples=17, num_held_out=32)
    assert (len(almost.calibration), len(almost.held_out)) == (17, 3)


def test_no_text_is_in_both(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "twice.jsonl", *numbered(6), *numbered(6), *numbered(6))
    for n in (2, 4, 12, 100):
        samples = read(tokenizer, source, num_samples=n)
        both = {*map(tuple, samples.calibration)} & {*map(tuple, samples.held_out)}
        assert samples.held_out and not both
    same = write(tmp_path / "same.jsonl", *[{"text": "again"}] * 9)
    assert "same.jsonl: fewer than 2 usable samples that differ" in fails(tokenizer, same)


@pytest.mark.parametrize("records", [[], ["", "  "], [{"text": "one"}], [{"text": ""}] * 5])
def test_too_few_samples_are_named(tokenizer: Tokenizer, tmp_path: Path, records: Any) -> None:
    source = write(tmp_path / "few.jsonl", *records)
    assert f"{source}: fewer than 2 usable samples" in fails(tokenizer, source)


def test_empty_samples_are_skipped_and_long_ones_cut_with_a_note(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    empty = [{"text": " "}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}]
    source = write(tmp_path / "mixed.jsonl", *empty, {"text": "long " * 99}, *numbered(7))
    samples = read(tokenizer, source, num_samples=7, num_held_out=1)
    lengths = [len(ids) for ids in samples.calibration + samples.held_out]
    assert len(lengths) == 8 and max(lengths) == 64
    assert samples.notes == [
        "mixed.jsonl: skipped 3 samples that are empty",
        "mixed.jsonl: truncated 1 sample to 64 tokens",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 3 is not JSON"),
        ("[" * 100_000, "line 3 is not JSON"),
        ("[]", "line 3 must be an object"),
        ('{"prompt": "x"}', "line 3 must have"),
        ('{"text": 3}', "line 3 must have"),
        ('{"messages": "x"}', "line 3 must have"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "f"}', "line 3 must have"),
        ('{"messages": ["x"]}', "line 3: messages: "),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 3: messages: "),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 3: messages: "),
    ],
)
def test_a_malformed_line_is_named(
    tokenizer: Tokenizer, tmp_path: Path, line: str, problem: str
) -> None:
    source = write(tmp_path / "bad.jsonl", {"text": "a"}, "", line)
    assert fails(tokenizer, source).startswith(f"{source}: {problem}")


def test_a_file_that_cannot_be_read_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert "none.jsonl: cannot be read: No such file" in fails(tokenizer, tmp_path / "none.jsonl")
    (tmp_path / "latin").write_bytes(b'{"text": "\xe9"}')
    assert "latin: cannot be read: not UTF-8 text" in fails(tokenizer, tmp_path / "latin")


def test_line_separators_in_a_string_are_no_new_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\x85c"}', "", '{"text": "d"}\r')
    assert read_jsonl(source) == [(1, {"text": "a\u2028b\x85c"}), (3, {"text": "d"})]


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"num_samples": 0}, "--num_calibration_samples"),
        ({"num_samples": True}, "--num_calibration_samples"),
        ({"max_length": -1}, "--max_sequence_length"),
        ({"max_length": 1}, "--max_sequence_length"),
        ({"max_length": 8.5}, "--max_sequence_length"),
    ],
)
def test_numbers_out_of_range_name_their_flag(
    tokenizer: Tokenizer, changes: dict[str, Any], flag: str
) -> None:
    assert fails(tokenizer, **changes).startswith(flag)


def test_only_as_many_as_needed_are_tokenised(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = tokenizer.encode

    def count(text: str) -> list[int]:
        encoded.append(text)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", count)
    read(tokenizer, write(tmp_path / "many.jsonl", *numbered(500)))
    assert len(encoded) == 12


def test_the_bundled_model_brings_1024_samples_and_others_to_measure_on(
    tokenizer: Tokenizer,
) -> None:
    samples = read(tokenizer, folder=DEMO, num_samples=1024, max_length=4096)
    assert len(samples.calibration) == 1024 and samples.notes == []
    own = {json.dumps(record) for _, record in read_jsonl(DEMO / "calibration.jsonl")}
    held_out = {json.dumps(record) for _, record in read_jsonl(DEMO / "held_out.jsonl")}
    assert len(own) == 1024 and len(samples.held_out) == len(held_out) and not own & held_out
    prompts = {p.messages()[-1]["content"] for p in PROMPTS}
    messages = [m for line in own for m in json.loads(line).get("messages", [])]
    assert not any(message.get("content") in prompts for message in messages)


def test_the_bundled_calibration_file_is_made_again_alike(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another Python has other documentation, and it takes seconds to read.
    monkeypatch.setattr(documentation, "documents", lambda: [f"document {i}" for i in range(200)])
    encoder = ChatEncoder(tokenizer.mistral)
    kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
    shipped = [record for _, record in read_jsonl(DEMO / "calibration.jsonl")]
    made = calibration_records(encoder, counter(encoder))
    for i, (record, again) in enumerate(zip(shipped, made, strict=True)):
        assert record == again or kinds[i % len(kinds)] == "document"
