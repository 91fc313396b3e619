"""Strict reading of a JSON body: every field has a type and a range, and a mistake names itself.

`parse_json` turns bytes into an object within depth limits; `Fields` reads one object. null counts as
absent, as in OpenAI's API. It knows types, not meanings: which fields there are stands in `requests`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from node.api.problems import ApiProblem, invalid


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _too_deep(value: Any, depth_max: int) -> bool:
    level = [value]
    for _ in range(depth_max):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def parse_json(body: bytes, depth_max: int) -> dict[str, Any]:
    """The JSON object in `body`, nested at most `depth_max` deep. Raises ApiProblem (400) otherwise."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiProblem(400, f"the body nests deeper than {depth_max} levels", code="invalid_json") from None
    except ValueError as problem:
        raise ApiProblem(400, f"the body is not valid JSON: {problem}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiProblem(
            400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json"
        )
    if _too_deep(value, depth_max):
        raise ApiProblem(400, f"the body nests deeper than {depth_max} levels", code="invalid_json")
    return value


class Fields:
    """One JSON object, read field by field. `path` is prefixed to names in messages."""

    def __init__(self, body: dict[str, Any], path: str = "") -> None:
        self._body = body
        self._path = path

    def name(self, field: str) -> str:
        """How a message names `field`."""
        return f"{self._path}{field}"

    def raw(self, field: str) -> Any:
        """The value as it came, None when absent."""
        return self._body.get(field)

    def require(self, field: str, expected: str) -> Any:
        """The value, which must be there."""
        value = self._body.get(field)
        if value is None:
            name = self.name(field)
            raise ApiProblem(
                400,
                f"'{name}' is required: expected {expected}",
                param=name,
                code="missing_required_parameter",
            )
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self._body.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise invalid(self.name(field), value, "true or false")
        return value

    def integer(self, field: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number in [low, high]."""
        value = self._body.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(self.name(field), value, f"a whole number from {low} to {high}")
        return value

    def number(self, field: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        value = self._body.get(field)
        if value is None:
            return default
        wrong = isinstance(value, bool) or not isinstance(value, int | float)
        if wrong or not low <= value <= high or math.isnan(value):
            raise invalid(self.name(field), value, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, field: str, value: Any = None, chars_max: int | None = None) -> str:
        """`value` (by default the field's, which must be there) as a text that can be encoded."""
        value = self.require(field, "a text") if value is None else value
        if not isinstance(value, str):
            raise invalid(self.name(field), value, "a text")
        if chars_max is not None and len(value) > chars_max:
            raise invalid(self.name(field), value, f"a text of at most {chars_max} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(self.name(field), value, "valid Unicode, without lone surrogates") from None
        return value

    def choice(self, field: str, default: str, allowed: Collection[str]) -> str:
        value = self._body.get(field)
        if value is None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise invalid(self.name(field), value, "one of " + ", ".join(sorted(allowed)))
        return value

    def objects(self, field: str, count_max: int) -> Sequence[Fields]:
        """A list of 1 to `count_max` objects."""
        expected = f"a list of 1 to {count_max} objects"
        value = self.require(field, expected)
        if not isinstance(value, list) or not 0 < len(value) <= count_max:
            raise invalid(self.name(field), value, expected)
        found = []
        for index, item in enumerate(value):
            name = f"{self.name(field)}[{index}]"
            if not isinstance(item, dict):
                raise invalid(name, item, "an object")
            found.append(Fields(item, f"{name}."))
        return found
