"""Measurements of one peer's links, from real traffic: round trip, rates out and in, totals. Pure; `now` in seconds."""

from __future__ import annotations

import math

_RTT_RISE = 0.02
_RATE_WEIGHT = 0.3
_SAMPLE_BYTES = 1 << 20
_IDLE_S = 0.1
_PACE_BYTES = 256 << 10
QUICK_BYTES_PER_S = 10e6


class Rate:
    """Bytes a second over stretches of traffic without a pause."""

    __slots__ = ("_began_s", "_bytes", "_last_s", "bytes_per_s")

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._bytes = 0
        self._began_s = -math.inf
        self._last_s = -math.inf

    def add(self, count: int, now: float) -> None:
        if now - self._last_s > _IDLE_S:  # a stretch begins; when its first bytes were sent is not known
            self._began_s, self._bytes, self._last_s = now, 0, now
            return
        self._last_s = now
        self._bytes += count
        took_s = now - self._began_s
        if self._bytes >= _SAMPLE_BYTES and took_s > 0:
            rate = self._bytes / took_s
            old = self.bytes_per_s
            self.bytes_per_s = rate if old is None else old + _RATE_WEIGHT * (rate - old)
            self._began_s, self._bytes = now, 0

    def pause(self) -> None:
        """There is nothing to send or receive: what follows is a new stretch."""
        self._last_s = -math.inf


class Pace:
    """Whether bytes come so quickly on a path that waiting for a whole record is no wait."""

    __slots__ = ("_began_s", "_bytes", "quick")

    def __init__(self) -> None:
        self.quick = False
        self._bytes = 0
        self._began_s = math.inf

    def add(self, count: int, now: float) -> None:
        """What was taken before the first time is not counted: when it was sent is not known."""
        self._bytes += count
        if self._bytes >= _PACE_BYTES:
            self.quick = self._bytes >= QUICK_BYTES_PER_S * (now - self._began_s) > 0
            self._began_s, self._bytes = now, 0
        elif self._began_s == math.inf:
            self._began_s, self._bytes = now, 0


class Meter:
    """What is known of the links to one peer."""

    __slots__ = ("bytes_received", "bytes_sent", "inward", "loss", "no_direct_until_s", "outward", "rtt_s")

    def __init__(self) -> None:
        self.rtt_s: float | None = None
        self.loss: float | None = None
        self.outward = Rate()
        self.inward = Rate()
        self.bytes_sent = 0
        self.bytes_received = 0
        self.no_direct_until_s = 0.0

    def add_rtt(self, took_s: float) -> None:
        """A sample, which may have waited behind bulk: lower ones count at once, higher ones slowly."""
        if self.rtt_s is None or took_s < self.rtt_s:
            self.rtt_s = took_s
        else:
            self.rtt_s += _RTT_RISE * (took_s - self.rtt_s)
