"""The path of least delay through servers of layers, each left only where it ends, as Petals' clients search it.

It knows delays as numbers; what they are made of is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.routing import Stage

Way = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Server:
    """Layers [start, end), seconds a layer, and seconds more to enter it."""

    name: str
    start: int
    end: int
    layer_s: float
    enter_s: float


def fastest_path(
    servers: Sequence[Server], span: tuple[int, int], client: str, delay_s: Callable[[str, str], float]
) -> list[Stage] | None:
    """The quickest way from the client through the layers of `span` and back to it; None if some layer has no server.

    Once entered, a server is used to its end, or to the end of the span.
    """
    first, last = span
    # A server's cost at layer b is base + layer_s * b from wherever it was entered.
    base: dict[str, tuple[float, Way]] = {}
    for s in servers:
        if s.start <= first < s.end:
            base[s.name] = (delay_s(client, s.name) + s.enter_s - s.layer_s * first, ((s.name, first),))
    for b in sorted({s.end for s in servers if first < s.end < last}):
        leaving = [
            (base[s.name][0] + s.layer_s * b, base[s.name][1], s.name)
            for s in servers
            if s.end == b and s.name in base
        ]
        if not leaving:
            continue
        for s in servers:
            if s.start <= b < s.end:
                cost, way = min((c + delay_s(name, s.name), w) for c, w, name in leaving)
                offer = cost + s.enter_s - s.layer_s * b
                if s.name not in base or offer < base[s.name][0]:
                    base[s.name] = (offer, (*way, (s.name, b)))
    done = [
        (base[s.name][0] + s.layer_s * last + delay_s(s.name, client), base[s.name][1])
        for s in servers
        if s.end >= last and s.name in base
    ]
    if not done:
        return None
    way = min(done)[1]
    ends = [at for _, at in way[1:]] + [last]
    return [Stage(name, at, end) for (name, at), end in zip(way, ends, strict=True)]
