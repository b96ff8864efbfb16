"""What a quantisation has finished, kept beside its output so that a killed run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from octavo.checkpoint.json_file import JsonObject
from octavo.checkpoint.writer import write_json
from octavo.errors import ConfigError, QuantizeError
from octavo.evaluate.divergence import Divergence
from octavo.process import peak_rss_bytes
from octavo.quantize.linears import LinearReport

FILE = "progress.json"
# What the user can put back, by the key that differs.
_REMEDIES = {
    "model": "the model's files changed since",
    "samples": "the calibration texts changed since",
}


@dataclass
class Journal:
    """The state of one quantisation; saved after every step.

    Attributes:
        folder: where it is kept.
        settings: everything that decides the output's bytes.
        steps_done: of the run's steps: the embedding, each layer, the head.
        seconds: of work so far, in all runs.
        peak_rss_bytes: the largest resident memory of any run.
        linears: what rounding did to each linear so far.
        divergence: from the original, known once the head is done.
    """

    folder: Path
    settings: dict[str, Any]
    steps_done: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    linears: list[LinearReport] = field(default_factory=list)
    divergence: Divergence | None = None

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any]) -> Journal:
        """The journal of a run that was stopped here, or a new one.

        Raises:
            QuantizeError: the stopped run had other settings, or its journal cannot be read.
        """
        path = folder / FILE
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if not path.is_file():
            return cls(folder, settings)
        try:
            values = JsonObject(path).values
            begun_with = values["settings"]
            numbers = values["steps_done"], values["seconds"], values["peak_rss_bytes"]
            if not isinstance(begun_with, dict) or min(numbers) < 0:
                raise TypeError
            journal = cls(
                folder,
                settings,
                steps_done=values["steps_done"],
                seconds=values["seconds"],
                peak_rss_bytes=values["peak_rss_bytes"],
                linears=[LinearReport(**row) for row in values["linears"]],
                divergence=Divergence(**values["divergence"]) if values["divergence"] else None,
            )
        except (ConfigError, KeyError, TypeError):
            raise QuantizeError(f"{path}: damaged; remove {folder} and start again") from None
        for key, value in settings.items():
            if begun_with.get(key) != value:
                raise QuantizeError(_explain(folder, key, begun_with.get(key), value))
        return journal

    def save(self) -> None:
        """Write it; a run that is killed now goes on from here."""
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes())
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / FILE, values)


def _explain(folder: Path, key: str, before: Any, now: Any) -> str:
    change = _REMEDIES.get(key, f"it was begun with {key} {before!r}, not {now!r}")
    return (
        f"{folder}: an unfinished quantisation that cannot go on: {change}; "
        "put that back, remove the folder to start again, or give another --output_dir"
    )
