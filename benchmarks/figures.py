"""Figures in a file, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_figures(result: Mapping[str, Any], path: Path | None) -> None:
    """The figures, for programs, if they are wanted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_figures(path: Path) -> dict[str, Any]:
    """What a benchmark wrote."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures
