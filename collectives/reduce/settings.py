"""The settings of a reduction. All members must have the same ones: `fingerprint` goes into what they compare."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from collectives.agreement import Member
from collectives.reduce.robust import AGGREGATORS, capped


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """`extra_ratio`: memory beyond the tensors themselves, as a multiple of them, result included.
    `flat`: no LAN groups. `aggregator`: mean, clip, trimmed or median; the last three know no LAN groups.
    `norm_slack`: how much longer than claimed a contribution may be. `norm_factor`: who claims more than this many
    times the median of all norms is refused (None: nobody is). `weight_cap`, `weight_share_max`: no member weighs more
    than this, or than this share of all; `weight_caps` are (peer id, most) for single ones. `audit`: contributions are
    checked against what their members have signed, and results are signed and made again (collectives.audit).
    """

    extra_ratio: float = 1.5
    flat: bool = False
    aggregator: str = "mean"
    trim: float = 0.2
    clip_factor: float = 1.0
    norm_slack: float = 0.05
    norm_factor: float | None = None
    weight_cap: float | None = None
    weight_share_max: float | None = None
    weight_caps: tuple[tuple[str, float], ...] = ()
    audit: bool = False
    wants_max: int = 64  # times a peer may ask for things again

    def __post_init__(self) -> None:
        if not self.extra_ratio >= 1:
            raise ValueError(f"extra_ratio must be at least 1, got {self.extra_ratio}")
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"aggregator must be one of {', '.join(AGGREGATORS)}, got {self.aggregator!r}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim must be in [0, 0.5), got {self.trim}")
        if not (math.isfinite(self.norm_slack) and self.norm_slack >= 0):
            raise ValueError(f"norm_slack must not be negative, got {self.norm_slack}")
        for name in ("clip_factor", "norm_factor", "weight_cap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.weight_share_max is not None and not 0 < self.weight_share_max <= 1:
            raise ValueError(f"weight_share_max must be in (0, 1], got {self.weight_share_max}")
        for peer, cap in self.weight_caps:
            if not (math.isfinite(cap) and cap >= 0):
                raise ValueError(f"weight_caps must not be negative, got {cap} for {peer}")
        if self.wants_max < 1:
            raise ValueError(f"wants_max must be positive, got {self.wants_max}")

    @property
    def groups(self) -> bool:
        """Whether LAN groups add up first."""
        return not (self.flat or self.audit or self.aggregator != "mean")

    def weighed(self, members: Sequence[Member]) -> tuple[Member, ...]:
        """`members` with the weights that count."""
        return capped(members, self.weight_cap, self.weight_share_max, dict(self.weight_caps))

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that differ wherever results or plans would."""
        skipped = ("extra_ratio", "wants_max")
        text = repr([(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in skipped])
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


DEFAULTS = ExchangeSettings()
