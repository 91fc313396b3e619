"""What a model asks of the nodes that host it, by their tags, and how tags weigh.

Tags are plain words that owners set or the daemon observes. Known here: `trusted`, `metered` (its link is paid by the
byte), `owner-active` (its owner is using it). A policy may name any others.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.shapes import NodeShape

BUSY_SLOWDOWN = 4.0
"""A node whose owner is using it is reckoned this many times slower than it measured."""
METERED_FACTOR = 4.0
"""A byte that a metered node must fetch counts as so many."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Every host must have the tags of `require`, the hosts of the first and the last layer also those of
    `ends_require` (they see the tokens themselves); nodes with a tag of `avoid` host nothing."""

    require: frozenset[str] = frozenset()
    ends_require: frozenset[str] = frozenset()
    avoid: frozenset[str] = frozenset()

    def allows(self, node: NodeShape) -> bool:
        """Whether the node may host any layer."""
        return self.require <= node.tags and not self.avoid & node.tags

    def allows_ends(self, node: NodeShape) -> bool:
        """Whether it may host the first or the last one."""
        return self.allows(node) and self.ends_require <= node.tags


ANYONE = Policy()


def slowdown(node: NodeShape) -> float:
    """How much slower than measured the node is to be reckoned."""
    return BUSY_SLOWDOWN if "owner-active" in node.tags else 1.0


def fetch_factor(node: NodeShape) -> float:
    """How much a fetched byte counts there."""
    return METERED_FACTOR if "metered" in node.tags else 1.0
