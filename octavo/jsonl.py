"""JSONL files, read whole: an object a line, and every bad line named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import RequestError


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line, from 1; blank lines are skipped.

    Raises:
        RequestError: a file that cannot be read or is not UTF-8, or a line that is not a JSON
            object; it names the file and the line.
    """
    try:
        # Not splitlines(), which would cut a string in two at a U+2028 or U+0085 in it.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RequestError(f"{path}: cannot be read: {reason}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise RequestError(f"{path}: line {number} must be an object")
        records.append((number, record))
    return records
