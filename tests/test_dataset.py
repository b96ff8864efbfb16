"""Calibration text from `datasets`: a local folder for real, and a hub that says no."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest

from octavo.checkpoint import DEMO
from octavo.quantize import dataset as dataset_module
from octavo.quantize.calibration import DATASET_ID, SEED
from octavo.tokenizer import Tokenizer
from tests.test_calibration import ANSWER, fails, numbered, read, write
from tests.test_hub import Hub, settings


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` writes goes to the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_is_read_and_shuffled_by_datasets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    call = {"id": "null", "function": {"name": "f", "arguments": "{}"}}
    answers = [{"role": "assistant", "tool_calls": [call]}, *[ANSWER] * 29]  # null in other rows
    chats = [
        {"messages": [{"role": "user", "content": f"2 + {i}?"}, answer]}
        for i, answer in enumerate(answers)
    ]
    source = write(tmp_path / "folder" / "train.jsonl", *chats).parent
    samples = read(tokenizer, source, num_samples=26)
    order = datasets.load_dataset(str(source), split="train").shuffle(seed=SEED)
    questions = [row["messages"][0]["content"] for row in order]
    texts = [tokenizer.decode(ids, special=True) for ids in samples.calibration + samples.held_out]
    assert [text.split("]")[1].split("[")[0] for text in texts] == questions
    assert samples.source == "folder, split train, 26 of 30 texts; held out: 4 more"
    assert read(tokenizer, source, num_samples=26).digest() == samples.digest()
    assert read(tokenizer, source, num_samples=25).digest() != samples.digest()


def test_a_dataset_is_read_in_silence(
    tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    read(tokenizer, write(tmp_path / "folder" / "train.jsonl", *numbered(30)).parent)
    assert capfd.readouterr() == ("", "")
    assert not datasets.utils.are_progress_bars_disabled()


def test_wrong_split_and_columns_say_what_there_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts" / "train.jsonl", *numbered(3)).parent
    problem = fails(tokenizer, texts, dataset_split="dev")
    assert problem.startswith(f"{texts}: Unknown split") and "train" in problem
    table = write(tmp_path / "table" / "train.jsonl", {"question": "?", "answer": "!"}).parent
    assert "this one has question, answer" in fails(tokenizer, table)
    assert f"{tmp_path / 'none'}: no such file or folder" in fails(tokenizer, tmp_path / "none")


def test_a_malformed_row_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [ANSWER]}]
    source = write(tmp_path / "chats" / "train.jsonl", *chats).parent
    assert fails(tokenizer, source).startswith(f"{source}: row 1: messages: ")


def test_without_datasets_the_extra_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    problem = fails(tokenizer)
    assert DATASET_ID in problem and "pip install 'octavo[quantize]'" in problem


def on_the_hub(endpoint: str, home: Path, dataset_id: str) -> subprocess.CompletedProcess[str]:
    """`read_samples` in a process of its own, since the client reads its settings once."""
    program = (
        "from pathlib import Path; from octavo.checkpoint import DEMO;"
        "from octavo.tokenizer import Tokenizer; from octavo.quantize.calibration import *\n"
        "try: read_samples(Path('.'), Tokenizer.from_folder(DEMO), dataset_id="
        f"{dataset_id!r}, dataset_split='train', num_samples=2, max_length=9)\n"
        "except RequestError as error: print(error)"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        env=settings(endpoint, home), capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_no_network_is_one_line(tmp_path: Path) -> None:
    done = on_the_hub("http://127.0.0.1:9", tmp_path, "someone/texts")
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert "someone/texts: not in the local cache, and the hub cannot be reached" in done.stdout


def test_a_hub_that_does_not_answer_is_asked_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "_ask_hub", lambda dataset_id: "timed out")
    assert "the hub cannot be reached (timed out)" in fails(tokenizer, "someone/texts")
    assert datasets.config.HF_HUB_OFFLINE in (False, None)


def test_unknown_dataset_is_one_line(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    done = on_the_hub(hub.url, tmp_path, "someone/else")
    hub.shutdown()
    hub.server_close()
    assert done.stdout.count("\n") == 1 and done.stderr == ""
    assert "someone/else: no such folder, and no such dataset on the hub" in done.stdout
