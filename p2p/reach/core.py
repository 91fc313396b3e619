"""What a node concludes about its own place in the network: can it be reached, what does its router do, is a hole worth
punching, which relays does it keep. Synchronous cores: time, chance and what was seen are arguments. They send nothing.

Terms are those of RFC 4787. `own_ips` are the addresses of this computer's interfaces.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from p2p.compat.tcp import Endpoint
from p2p.identity import PeerId

Verdict = Literal["public", "private", "unknown"]
NatKind = Literal["none", "port-preserving", "endpoint-independent", "symmetric", "unknown"]

PROBERS_MAX = 8
PROBE_FRESH_S = 1800.0
VOTES_LEAST = 2
CONTRARY_LEAST = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """What one member found when it knocked: where it sees this node, and whether this node answered there."""

    prober: PeerId
    at: Endpoint
    answered: bool


class Reachability:
    """Whether members can connect to this node. The verdict needs two members (or all that there are) that agree, and
    is turned only by two contrary probes in a row: a single lost packet, or liar, moves nothing."""

    def __init__(self) -> None:
        self.verdict: Verdict = "unknown"
        self.at: Endpoint | None = None
        self._votes: dict[PeerId, tuple[float, Probe]] = {}
        self._contrary = 0

    def noted(self, probe: Probe, own_ips: Collection[str], probers: int, now_s: float) -> bool:
        """One more result, where `probers` members could be asked; True where the verdict changed.

        Where a router was seen to stand before this node, what neighbours behind the same router found is no answer.
        """
        if self.at is not None and probe.answered and probe.at[0] != self.at[0] and _outer(probe.at, own_ips):
            self.forget()  # another address: nothing of old holds
        self._votes.pop(probe.prober, None)
        self._votes[probe.prober] = (now_s, probe)
        while len(self._votes) > PROBERS_MAX:
            del self._votes[next(iter(self._votes))]
        fresh = [one for at_s, one in self._votes.values() if now_s - at_s <= PROBE_FRESH_S]
        outside = [one for one in fresh if _outer(one.at, own_ips)]
        counted = outside or fresh
        if probe not in counted:
            return False
        return self._decided(probe, counted, max(1, min(VOTES_LEAST, probers)))

    def _decided(self, newest: Probe, counted: Sequence[Probe], least: int) -> bool:
        said: Verdict = "public" if newest.answered else "private"
        agree = [one for one in counted if one.answered == newest.answered]
        if said == self.verdict:
            self._contrary = 0
            self.at = newest.at
            return False
        self._contrary += 1
        enough = len(agree) >= least and 2 * len(agree) > len(counted)
        turned = self.verdict == "unknown" or self._contrary >= CONTRARY_LEAST
        if not (enough and turned):
            return False
        self.verdict, self.at, self._contrary = said, newest.at, 0
        return True

    def suspect(self) -> bool:
        """Whether something speaks for this node being out of reach, though it may not be decided yet."""
        votes = [probe.answered for _, probe in self._votes.values()]
        return self.verdict == "private" or (self.verdict == "unknown" and bool(votes) and not any(votes))

    def forget(self) -> None:
        """The network is another one now."""
        self.verdict, self.at, self._contrary = "unknown", None, 0
        self._votes.clear()


def _outer(at: Endpoint, own_ips: Collection[str]) -> bool:
    """Whether an address is seen from beyond a router, or is this computer's own in the public network."""
    return at[0] not in own_ips or ipaddress.ip_address(at[0]).is_global


def nat_kind(seen: Mapping[PeerId, Endpoint], port: int, own_ips: Collection[str]) -> NatKind:
    """What stands before this node, by where members see connections from its listening `port` come from."""
    ends = list(seen.values())
    if any(ip in own_ips for ip, _ in ends):
        return "none"
    if len(ends) < 2:
        return "unknown"
    if len(set(ends)) > 1:
        return "symmetric"
    return "port-preserving" if ends[0][1] == port else "endpoint-independent"


def worth_punching(mine: str, theirs: str) -> bool:
    """Whether both ends punching at once may lead through: not where one shows every peer another port."""
    return "symmetric" not in (mine, theirs)


def punch_targets(theirs: Sequence[Endpoint], own_ips: Collection[str], same_home: bool) -> list[Endpoint]:
    """Where to punch to, of what a peer names: never this computer, and private addresses only within one home."""
    found: dict[Endpoint, None] = {}
    for ip, port in theirs:
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:
            continue
        bad = address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local
        if bad or ip in own_ips or not 1024 <= port < 65536:
            continue
        if same_home or not address.is_private:
            found.setdefault((str(address), port))
    return list(found)[:4]


@dataclass(frozen=True, slots=True)
class RelayOffer:
    """A member that relays for others, and its distance."""

    peer: PeerId
    mbps: float
    rtt_s: float | None


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask `peer` for a reservation, or renew it."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Release:
    """Tell `peer` that its reservation is not needed any more."""

    peer: PeerId


@dataclass(slots=True)
class _Kept:
    renew_s: float
    ends_s: float


@dataclass(frozen=True, slots=True)
class RelaysConfig:
    """How many relays a private node keeps; how long one that failed is left alone, doubling."""

    wanted: int = 2
    avoid_s: float = 15.0
    avoid_max_s: float = 900.0
    renew_share: float = 0.5
    near_s: float = 0.02


class RelayKeeper:
    """Which members relay for this node. Times are any monotonic seconds."""

    def __init__(self, me: PeerId, config: RelaysConfig | None = None) -> None:
        self.config = config or RelaysConfig()
        self._me = me
        self._kept: dict[PeerId, _Kept] = {}
        self._asked: set[PeerId] = set()
        self._failures: dict[PeerId, int] = {}
        self._avoid_until_s: dict[PeerId, float] = {}

    def relays(self, now_s: float) -> tuple[PeerId, ...]:
        """Those whose reservations hold."""
        return tuple(peer for peer, kept in self._kept.items() if kept.ends_s > now_s)

    def decide(self, offers: Sequence[RelayOffer], needed: bool, now_s: float) -> list[Reserve | Release]:
        """What to do now. `offers` are members that are connected directly and relay."""
        offered = {offer.peer: offer for offer in offers}
        for peer in [p for p, kept in self._kept.items() if kept.ends_s <= now_s or p not in offered]:
            del self._kept[peer]  # gone, or it stopped relaying
        if not needed:
            out: list[Reserve | Release] = [Release(peer) for peer in self._kept]
            self._kept.clear()
            return out
        wishes = [p for p, kept in self._kept.items() if kept.renew_s <= now_s and p not in self._asked]
        missing = self.config.wanted - len(self._kept) - len(self._asked - self._kept.keys())
        free = [
            offer
            for offer in offers
            if offer.peer not in self._kept
            and offer.peer not in self._asked
            and self._avoid_until_s.get(offer.peer, 0.0) <= now_s
        ]
        wishes += [offer.peer for offer in sorted(free, key=self._rank)[: max(0, missing)]]
        self._asked.update(wishes)
        return [Reserve(peer) for peer in wishes]

    def granted(self, peer: PeerId, ttl_s: float, now_s: float) -> None:
        """`peer` relays for this node, and was seen to."""
        self._asked.discard(peer)
        self._failures.pop(peer, None)
        self._kept[peer] = _Kept(now_s + self.config.renew_share * ttl_s, now_s + ttl_s)

    def failed(self, peer: PeerId, now_s: float) -> None:
        """It refused, did not answer, or does not relay what it promised."""
        self._asked.discard(peer)
        self._kept.pop(peer, None)
        failures = self._failures[peer] = self._failures.get(peer, 0) + 1
        wait_s = min(self.config.avoid_s * 2 ** min(failures - 1, 20), self.config.avoid_max_s)
        self._avoid_until_s[peer] = now_s + wait_s
        for old in [p for p, until_s in self._avoid_until_s.items() if until_s <= now_s]:
            del self._avoid_until_s[old]
        if len(self._failures) > 1024:
            self._failures.clear()

    def lost(self, peer: PeerId) -> None:
        """The connection to it is gone, and with it the reservation."""
        self._kept.pop(peer, None)

    def _rank(self, offer: RelayOffer) -> tuple[int, bytes]:
        """The near before the far; among equals each node has an order of its own, so that relays share the load."""
        rtt_s = 1.0 if offer.rtt_s is None else offer.rtt_s
        step = max(0, int(rtt_s / self.config.near_s)).bit_length()
        return step, hashlib.blake2b(f"{self._me} {offer.peer}".encode(), digest_size=8).digest()
