"""Every limit and choice of a run, in one frozen value that is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from collectives.agreement import Settings
from collectives.agreement.detector import DetectorSettings
from collectives.errors import LocalFault
from collectives.reduce import ExchangeSettings
from collectives.reduce.settings import DEFAULTS


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Times are in seconds. `codec` must be the same for all members of a round, and `reduce` (aggregator, caps, norms)
    for all of a run: members that differ are refused. `check_norms` makes every member state its contribution's
    length, which its owners then hold it to.

    With `reduce.audit` every member makes `audit_parts` of the parts that others made once more, on the average, before
    it votes. `audit_keep` keeps an encoded copy of what this node contributed until its next round, so that
    `Run.audit` finds it.

    `group` names the LAN this node is on ("" for none): members of one group reduce among themselves first.
    `dialable` False says that peers cannot open connections to this node: it then owns no part, and whoever owns one
    needs no more than the connections it has made. None, for both, is what the node has measured. `gossip` allows
    pairwise averaging while there is no quorum. `uplink_bps` is what this node may send, in bits a second, over all
    links of the run; 0 is no limit.
    """

    codec: str = "fp32"
    group: str | None = None
    dialable: bool | None = None
    gossip: bool = False
    check_norms: bool = False
    audit_parts: float = 1.0
    audit_keep: bool = False
    uplink_bps: float = 0.0
    round_deadline_s: float = 120.0
    tags_max: int = 64
    letters_waiting_max: int = 4096
    letter_bytes_max: int = 256 << 10
    resend_link_s: float = 0.2
    link_silence_s: float = 5.0
    states_kept_max: int = 3
    state_lease_s: float = 20.0
    missed_kept_max: int = 4
    agreement: Settings = field(default_factory=Settings)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    reduce: ExchangeSettings = DEFAULTS

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if (
                not math.isfinite(value)
                or value < 0
                or (value == 0 and one.name not in ("uplink_bps", "audit_parts"))
            ):
                raise LocalFault(f"RunConfig.{one.name} must be positive, got {value!r}")
        if self.group is not None and len(self.group) > 100:
            raise LocalFault(f"RunConfig.group must have at most 100 characters, got {len(self.group)}")
