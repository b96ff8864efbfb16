"""Reading a JSON object from a checkpoint's folder, with errors that name file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


class JsonObject:
    """A JSON object with typed access; every error names the file and the field."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}: not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
            ) from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not UTF-8 text, so no JSON") from None
        except ValueError as error:  # an integer of thousands of digits
            raise ConfigError(f"{path}: not JSON that can be read: {error}") from None
        except RecursionError:
            raise ConfigError(f"{path}: JSON nested too deeply") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds a {type(values).__name__}, not a JSON object")
        self.values: dict[str, Any] = values

    def integer(self, name: str, default: int | None = None) -> int:
        """The field as a positive int; missing (or null) takes the default, or is an error."""
        value = self._get(name, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or value <= 0:
            raise ConfigError(f"{self.path}: {name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """The field as a positive float; missing (or null) takes the default, or is an error."""
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self.path}: {name} must be a positive number, not {value!r}")
        return float(value)

    def blame(self, error: ConfigError) -> ConfigError:
        """The same error with this file named in front, unless it names one already."""
        text = str(error)
        named = text.startswith(str(self.path.parent))
        return error if named else ConfigError(f"{self.path}: {text}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(f"{self.path}: the field {name} is missing")
        return value
