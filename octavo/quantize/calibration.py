"""The texts that a quantisation calibrates on, and those that it is measured on."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from octavo.errors import ConfigError, RequestError
from octavo.jsonl import read_jsonl
from octavo.quantize.dataset import is_local, read_dataset
from octavo.tokenizer import Tokenizer

DATASET_ID = "neuralmagic/LLM_compression_calibration"
SEED = 42
OWN_CALIBRATION = "calibration.jsonl"  # files that a model's folder may bring
OWN_HELD_OUT = "held_out.jsonl"


@dataclass(frozen=True)
class Samples:
    """Token ids of the texts to calibrate on, and of those to measure on.

    Attributes:
        calibration: at least one text; each has at least two tokens.
        held_out: the same; each text once, and none that is in `calibration`.
        source: where they come from and how many, for the report; never an absolute path.
        notes: lines for the user: too few samples, empty ones, truncated ones.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]
    source: str
    notes: list[str]

    def digest(self) -> str:
        """SHA-256 over the counts, lengths and ids of both lists, in hexadecimal."""
        sha256 = hashlib.sha256()
        for samples in (self.calibration, self.held_out):
            sha256.update(np.array([len(samples)], dtype="<i8").tobytes())
            for ids in samples:
                sha256.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
        return sha256.hexdigest()


def read_samples(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    dataset_id: str | None,
    dataset_split: str,
    num_samples: int,
    max_length: int,
    num_held_out: int = 32,
) -> Samples:
    """Read, shuffle (seed 42) and tokenise what the model in `folder` is calibrated on.

    Held out is the folder's own `held_out.jsonl`, whole, where `dataset_id` is None; otherwise the
    `num_held_out` samples that follow the calibration ones, or a tenth of a set too small for that.

    Args:
        folder: the model's.
        tokenizer: the model's.
        dataset_id: a JSONL file of `messages` (and `tools`) or `text`, a dataset of the hub, or a
            folder that `datasets` understands; None is the folder's own `calibration.jsonl`, or
            else the dataset of the model card.
        dataset_split: of a dataset; a JSONL file has none.
        num_samples: how many to calibrate on.
        max_length: in tokens; longer texts are cut off there.
        num_held_out: how many to measure on, at least 1.

    Raises:
        ConfigError: a number out of range, or `datasets` is not installed.
        RequestError: a file, one of its lines or a dataset that cannot be read, or fewer than two
            usable samples.
    """
    _require("--num_calibration_samples", num_samples, at_least=1)
    _require("--max_sequence_length", max_length, at_least=2)
    reader = _Reader(_open(folder, dataset_id, dataset_split), tokenizer, max_length)
    calibration = list(islice(reader, num_samples))
    n_found = len(calibration)
    own = folder / OWN_HELD_OUT
    if calibration and dataset_id is None and own.is_file():
        own_reader = _Reader(_from_jsonl(own), tokenizer, max_length)
        held_out = list(_others(own_reader, calibration))
        place, measured = str(own), f"{own.name}, {len(held_out):,} texts"
        notes = reader.notes() + own_reader.notes()
    else:
        held_out = list(islice(_others(reader, calibration), num_held_out))
        n_found += len(held_out)
        if len(held_out) < num_held_out:
            found = calibration + held_out
            different = list(_others(found))
            tenth = min(num_held_out, max(1, len(different) // 10))
            held_out = different[-max(len(held_out), tenth) :]
            calibration = [ids for ids in found if ids not in held_out]
        place, measured = reader.source.place, f"{len(held_out):,} more"
        notes = reader.notes()
    if not calibration or not held_out:
        raise RequestError(
            f"{place}: fewer than 2 usable samples that differ ({n_found} found); some are needed "
            "to calibrate on, and others to measure on"
        )
    if len(calibration) < num_samples:
        aside = n_found - len(calibration)
        kept = f" and kept {aside} of them to measure on" if aside else ""
        notes.insert(0, f"asked for {_samples(num_samples)}, found {n_found}{kept}")
    counts = f"{len(calibration):,} of {reader.source.size:,} texts"
    description = f"{reader.source.name}, {counts}; held out: {measured}"
    return Samples(calibration, held_out, description, notes)


@dataclass(frozen=True)
class _Source:
    """Records in shuffled order.

    Attributes:
        place: what an error calls it.
        name: what a report calls it.
        size: how many records there are.
        rows: each with its own place.
    """

    place: str
    name: str
    size: int
    rows: Iterable[tuple[str, dict[str, Any]]]


class _Reader:
    """The usable samples of a source, tokenised only as they are asked for.

    Every iteration goes on where the last one stopped.
    """

    def __init__(self, source: _Source, tokenizer: Tokenizer, max_length: int) -> None:
        self.source = source
        self._tokenizer, self._max_length = tokenizer, max_length
        self._n_empty = self._n_cut = 0
        self._samples = self._read()

    def __iter__(self) -> Iterator[list[int]]:
        return self._samples

    def notes(self) -> list[str]:
        """What was left out of the samples so far."""
        notes = []
        if self._n_empty:
            notes.append(f"{self.source.name}: skipped {_samples(self._n_empty)} that are empty")
        if self._n_cut:
            cut = f"truncated {_samples(self._n_cut)} to {self._max_length} tokens"
            notes.append(f"{self.source.name}: {cut}")
        return notes

    def _read(self) -> Iterator[list[int]]:
        for place, record in self.source.rows:
            ids = _encode(place, record, self._tokenizer)
            if len(ids) < 2:  # nothing follows anything
                self._n_empty += 1
                continue
            self._n_cut += len(ids) > self._max_length
            yield ids[: self._max_length]


def _others(samples: Iterable[list[int]], known: Iterable[list[int]] = ()) -> Iterator[list[int]]:
    """The samples that are not among the known ones, each of them once."""
    taken = {tuple(ids) for ids in known}
    for ids in samples:
        if tuple(ids) not in taken:
            taken.add(tuple(ids))
            yield ids


def _encode(place: str, record: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a record; none if it is empty."""
    messages, tools, text = (record.get(key) for key in ("messages", "tools", "text"))
    try:
        if isinstance(messages, list) and isinstance(tools, list | None):
            return tokenizer.encode_conversation(messages, tools) if _says(messages) else []
        if messages is None and isinstance(text, str):
            return tokenizer.encode(text) if text.strip() else []
    except RequestError as error:
        raise RequestError(f"{place}: {error}") from None
    except (ValueError, RuntimeError) as error:  # half a surrogate pair
        raise RequestError(f"{place}: text that cannot be tokenised: {error}") from None
    raise RequestError(
        f"{place} must have a list of `messages` (and a list of `tools`, if any) or a `text` string"
    )


def _says(messages: list[Any]) -> bool:
    """Whether anything is in any message; what is no message is for the template to refuse."""
    return any(not isinstance(m, dict) or m.get("content") or m.get("tool_calls") for m in messages)


def _open(folder: Path, dataset_id: str | None, split: str) -> _Source:
    own = folder / OWN_CALIBRATION
    if dataset_id is None:
        return _from_jsonl(own) if own.is_file() else _from_dataset(DATASET_ID, split)
    path = os.path.expanduser(dataset_id)
    if is_local(path):
        return _from_dataset(path, split)
    if os.path.isfile(path) or path.endswith((".jsonl", ".json")):
        return _from_jsonl(Path(path))
    return _from_dataset(dataset_id, split)


def _from_jsonl(path: Path) -> _Source:
    records = read_jsonl(path)
    random.Random(SEED).shuffle(records)
    rows = ((f"{path}: line {number}", record) for number, record in records)
    return _Source(str(path), path.name, len(records), rows)


def _from_dataset(dataset_id: str, split: str) -> _Source:
    size, records = read_dataset(dataset_id, split, SEED)
    rows = ((f"{dataset_id}: row {number}", record) for number, record in records)
    name = os.path.basename(os.path.normpath(dataset_id)) if is_local(dataset_id) else dataset_id
    return _Source(dataset_id, f"{name}, split {split}", size, rows)


def _samples(n: int) -> str:
    return f"{n} sample" if n == 1 else f"{n} samples"


def _require(flag: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{flag} is {value}; it must be an integer of {at_least} or more")
