"""Where a node stands among the others, as far as a reduction cares: which LAN it is on, and whether it can be dialled.

Whoever measures tells it (`Collectives.place`). Members whose views differ name their LANs differently for a while:
then they reduce as strangers would, and the result is as exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LAN_RTT_S = 0.003


@dataclass(frozen=True, slots=True)
class Place:
    """`group` names the LAN, "" for none. `dialable` False: others cannot open connections to this node."""

    group: str = ""
    dialable: bool = True


def lan_of(me: str, rtt_s: Mapping[tuple[str, str], float], within_s: float = LAN_RTT_S) -> str:
    """The same name for all who are joined to `me` by round trips of at most `within_s` seconds, directly or through
    one another; "" for a node that is alone. `rtt_s` by (from, to)."""
    near: dict[str, set[str]] = {}
    for (one, other), rtt in rtt_s.items():
        if one != other and rtt <= within_s:
            near.setdefault(one, set()).add(other)
            near.setdefault(other, set()).add(one)
    lan, fresh = {me}, [me]
    while fresh:
        found = near.get(fresh.pop(), set()) - lan
        lan |= found
        fresh += sorted(found)
    return f"lan {min(lan)}" if len(lan) > 1 else ""
