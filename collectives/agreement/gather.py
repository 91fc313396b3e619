"""Who is ready for the next epoch, and until when the others are waited for.

The grace after a quorum is learnt from how long the last ones took in earlier rounds (mean and deviation, as TCP learns
its timeout: RFC 6298), between two bounds. It decides nothing about safety.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from collectives.agreement.types import Config, Member, Offer, Settings


class Ready(NamedTuple):
    incarnation: int
    offer: Offer


class Grace:
    """Learns across epochs."""

    def __init__(self, settings: Settings) -> None:
        self._least = settings.grace_min_s
        self._most = settings.grace_max_s
        self._first = settings.grace_first_s
        self._mean: float | None = None
        self._deviation = 0.0

    def learn(self, spread_s: float) -> None:
        """`spread_s`: how long after the quorum the last one, or one who was too late, came."""
        spread_s = min(max(spread_s, 0.0), self._most)
        if self._mean is None:
            self._mean, self._deviation = spread_s, spread_s / 2
            return
        self._deviation += 0.25 * (abs(spread_s - self._mean) - self._deviation)
        self._mean += 0.125 * (spread_s - self._mean)

    @property
    def seconds(self) -> float:
        if self._mean is None:
            return self._first
        return min(max(self._mean + 4 * self._deviation, self._least), self._most)


class Gather:
    """The offers for one epoch."""

    def __init__(
        self, config: Config, settings: Settings, grace: Grace, resigned: Collection[str] = ()
    ) -> None:
        self.config = config
        self.resigned = resigned  # the ledger's own, which grows
        self.offers: dict[str, Ready] = {}
        self.quorum_at: float | None = None
        self.declared = False  # from then on, late arrivals only teach
        self._settings = settings
        self._grace = grace

    def add(self, peer: str, incarnation: int, offer: Offer, now_s: float) -> bool:
        """False if there is no room."""
        known = self.offers.get(peer)
        if known is None and len(self.offers) >= self._settings.members_max:
            return False
        self.offers[peer] = Ready(incarnation, offer)
        if known is None and self.declared and self.quorum_at is not None:
            self._grace.learn(now_s - self.quorum_at)
        self.notice(now_s)
        return True

    def notice(self, now_s: float) -> None:
        """Also when somebody resigned."""
        if self.quorum_at is None and self.config.is_quorum(self.offers, self.resigned):
            self.quorum_at = now_s

    def drop(self, peer: str, nonce: int | None = None) -> bool:
        known = self.offers.get(peer)
        if known is None or (nonce is not None and known.offer.nonce != nonce):
            return False
        del self.offers[peer]
        if not self.config.is_quorum(self.offers, self.resigned):
            self.quorum_at = None
        return True

    def agreeing(self, without: Collection[str]) -> list[str] | None:
        """Those whose state, layout and codec are a quorum's, best-ranked first, then those who join; None if there
        is no such quorum. `without` are not counted."""
        kinds: dict[tuple[bytes, bytes, str], list[str]] = {}
        for peer, ready in self.offers.items():
            if peer not in without:
                offer = ready.offer
                kinds.setdefault((offer.state, offer.layout, offer.codec), []).append(peer)
        for peers in kinds.values():
            if self.config.is_quorum([peer for peer in peers if self._seated(peer)], self.resigned):
                order = {peer: place for place, peer in enumerate(self.config.peers)}
                return sorted(peers, key=lambda peer: (order.get(peer, len(order)), peer))
        return None

    def _seated(self, peer: str) -> bool:
        seat = self.config.seat(peer)
        return seat is not None and seat.incarnation == self.offers[peer].incarnation

    def due_s(self, agreeing: list[str] | None, waited_for: Iterable[str], hurry_at_s: float) -> float | None:
        """When to declare: 0.0 is at once, None is never as things are. `waited_for`: whoever of the configuration,
        and of those who came too late for the last one, is not known to be dead. Before `hurry_at_s` there must be
        `members_min`."""
        if agreeing is None or self.quorum_at is None:
            return None
        if len(agreeing) < self._settings.members_min:
            return hurry_at_s
        if all(peer in self.offers for peer in waited_for):
            return 0.0
        return min(self.quorum_at + self._grace.seconds, max(hurry_at_s, self.quorum_at))

    def close(self) -> None:
        """The declaration is made."""
        self.declared = True

    def everybody_came(self, now_s: float) -> None:
        if self.quorum_at is not None and not self.declared:
            self._grace.learn(now_s - self.quorum_at)

    def member(self, peer: str) -> Member:
        incarnation, offer = self.offers[peer]
        return Member(
            peer,
            incarnation,
            offer.nonce,
            offer.weight,
            offer.bandwidth_bps,
            offer.group,
            offer.dialable,
            offer.norm,
            offer.commit,
        )
