"""Typed reading of a JSON object from outside, field by field.

Every reader checks type and range and raises ConfigError with the field's full name, its value and what would
be right. Knows nothing of models: `config.py` and `families/` say which fields there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_shards.errors import ConfigError

JSON_BYTES_MAX = 64 << 20
_MISSING: Any = object()


def read_json_object(path: Path, bytes_max: int = JSON_BYTES_MAX) -> dict[str, Any]:
    """The JSON object in ``path``; raises ConfigError (naming the file) if it is absent, too large or
    malformed."""
    try:
        size = path.stat().st_size
        if size > bytes_max:
            raise ConfigError(path.name, f"{size} bytes", f"at most {bytes_max} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(path.name, error.strerror or str(error), f"a readable file at {path}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(path.name, str(error), "well-formed JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(path.name, value, "a JSON object")
    return value


class Fields:
    """Reads named values out of one JSON object. ``None`` counts as absent, as in Hugging Face configs."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "", file: str = "config.json") -> None:
        self._values = values
        self._prefix = prefix
        self._file = file

    def has(self, name: str) -> bool:
        """Whether there is a value other than null."""
        return self._values.get(name) is not None

    def present(self, name: str) -> bool:
        """Whether the key is there at all, null included."""
        return name in self._values

    def names(self) -> tuple[str, ...]:
        """Every key, null values included."""
        return tuple(self._values)

    def raw(self, name: str) -> Any:
        """The value as it stands, unchecked."""
        return self._values.get(name)

    def bad(self, name: str, expected: str) -> ConfigError:
        """The error that refuses this field's value."""
        return ConfigError(self._prefix + name, self._values.get(name), expected, self._file)

    def integer(self, name: str, low: int, high: int, default: int = _MISSING) -> int:
        """An integer in [low, high]."""
        value = self._values.get(name)
        if value is None and default is not _MISSING:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.bad(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float = _MISSING) -> float:
        """A finite number in [low, high]."""
        value: Any = self._values.get(name)
        if value is None and default is not _MISSING:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.bad(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        """A finite number in [low, high], or None if absent."""
        return self.number(name, low, high) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, default: str = _MISSING) -> str:
        """A string."""
        value = self._values.get(name)
        if value is None and default is not _MISSING:
            return default
        if type(value) is not str:
            raise self.bad(name, "a string")
        return value

    def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of them, as a tuple; absent gives an empty one."""
        value = self._values.get(name)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if any(type(item) is not int or not low <= item <= high for item in items):
            raise self.bad(name, f"an integer or a list of integers from {low} to {high}")
        return tuple(items)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of exactly ``count`` finite numbers."""
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != count:
            raise self.bad(name, f"a list of {count} numbers")
        if any(type(item) not in (int, float) or not math.isfinite(item) for item in value):
            raise self.bad(name, f"a list of {count} finite numbers")
        return tuple(float(item) for item in value)

    def object(self, name: str) -> Fields | None:
        """A nested object, or None if absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(name, "a JSON object")
        return Fields(value, f"{self._prefix}{name}.", self._file)
