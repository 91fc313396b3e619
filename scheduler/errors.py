"""The errors of the scheduler, on the three axes that cross the whole project.

    SchedulerError
        RemoteFault                 another node's doing (nothing here talks to one; the root is kept for the axis)
        ResourceLimit               the mesh has not enough of something; `retry_after_s` says when to come back
            Shortage                the nodes cannot hold every layer once: how much is missing
            NoChain                 no node serves some of the layers now
            NoRoom                  every layer is served, but no chain has cache room for the request
            Rejected                admission refused a request: it would miss its target anyway
        LocalFault                  the caller's doing
            InputError              a field of the input: its name, the value, and what would be right
                PreviewError        the same, for the document that `preview` takes

It imports nothing of ours; messages are one line that a person can act on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def plain_bytes(count: float) -> str:
    """`9.1 GiB`: the largest unit that leaves at least one."""
    size = float(count)
    unit = 0
    while abs(size) >= 1024 and unit < len(UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} {UNITS[unit]}" if unit == 0 else f"{size:.1f} {UNITS[unit]}"


def plain_bytes_up(count: float) -> str:
    """As `plain_bytes`, never less than `count`: for what somebody must bring."""
    unit = 0
    while abs(count) >= 1024 ** (unit + 1) and unit < len(UNITS) - 1:
        unit += 1
    scale = 1024**unit
    return plain_bytes(count if unit == 0 else math.ceil(count * 10 / scale) * scale / 10)


def plain_layers(layers: Iterable[int]) -> str:
    """`0-3, 7`: runs of layer numbers, ends included, as a person reads them."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


class SchedulerError(Exception):
    """Root of everything that the scheduler raises on purpose."""


class RemoteFault(SchedulerError):
    """Another node's doing."""


class ResourceLimit(SchedulerError):
    """The mesh has not enough of something now."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Shortage(ResourceLimit):
    """The nodes cannot hold every layer once.

    `needed_bytes` is what the whole model needs (weights, cache, working space), `available_bytes` what the nodes
    offer, `layers_short` how many layers find no place. The bytes may seem enough while a layer still finds none:
    a layer is never cut. `missing_bytes` is exact: one more node that lends so much, and not a byte less, ends the
    shortage.
    """

    def __init__(
        self, needed_bytes: int, available_bytes: int, layers_short: int, layers: int, missing_bytes: int
    ) -> None:
        needed, offered = plain_bytes(needed_bytes), plain_bytes(available_bytes)
        if needed_bytes > available_bytes:
            missing = f"{plain_bytes(needed_bytes - available_bytes)} short"
        else:
            missing = "but in pieces too small"
        message = (
            f"needs {needed} for weights and cache, the mesh offers {offered}: {missing}"
            f" ({layers_short} of {layers} layers find no room); one more node that lends"
            f" {plain_bytes_up(missing_bytes)} would do"
        )
        super().__init__(message, retry_after_s=30.0)
        self._made_of = (needed_bytes, available_bytes, layers_short, layers, missing_bytes)
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.layers_short = layers_short
        self.missing_bytes = missing_bytes

    def __reduce__(self) -> tuple[type[Shortage], tuple[int, ...]]:
        """It may come from another process, as a simulation's outcome."""
        return type(self), self._made_of


class NoChain(ResourceLimit):
    """No node serves `missing` layers now."""

    def __init__(self, missing: Iterable[int]) -> None:
        self.missing = tuple(sorted(missing))
        super().__init__(f"no node serves layers {plain_layers(self.missing)} now", retry_after_s=5.0)


class NoRoom(ResourceLimit):
    """Every layer is served, but the caches are too full for `tokens` at `layers`."""

    def __init__(self, tokens: int, layers: Iterable[int], retry_after_s: float = 1.0) -> None:
        self.tokens = tokens
        self.layers = tuple(sorted(layers))
        super().__init__(
            f"no node has cache room for {tokens} tokens at layers {plain_layers(self.layers)}", retry_after_s
        )


class Rejected(ResourceLimit):
    """Admission refused a request early; `retry_after_s` says when it would fit."""


class LocalFault(SchedulerError):
    """The caller's doing."""


class InputError(LocalFault):
    """A field of the input cannot be used."""

    def __init__(self, field: str, value: object, right: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{field} is {shown}, it must be {right}")
        self.field = field
        self.value = value
        self.right = right


class PreviewError(InputError):
    """A field of the document given to `preview`."""
