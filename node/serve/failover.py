"""What to do when a stream stalls or breaks: whom to suspect, ask, replace, and when to give up. A pure core.

`handle(event, now_s)` gives instructions; whoever performs them reports back as events, and a `Tick` comes when
`wake_s` has passed. A lost connection is told at once. Silence is measured against the stream's own past: beyond that
the stages are asked how far they are, and the first one that does not answer, sits on its work, or was not reached by
the one before it is replaced. Every chain has an epoch, and what older chains still say is not heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import TypeAlias

from node.serve.protocol import StageRef, StageReport


@dataclass(frozen=True, slots=True)
class Patience:
    """Limits. A stream is asked about after `least_s` to `most_s` without a token. A stage has `probe_s` to answer, and
    is given up after `stuck_s` at one piece of work, or `stuck_factor` times what a token usually takes. After
    `strikes` suspicions in `forgotten_after` tokens a slow stage is replaced, if there is another. Where nobody can
    take a lost stage's place, `mend_s` pass before the stream ends; somebody is looked for each `retry_s`."""

    least_s: float = 0.25
    most_s: float = 10.0
    probe_s: float = 0.5
    stuck_s: float = 2.0
    stuck_factor: float = 40.0
    strikes: int = 3
    forgotten_after: int = 16
    mend_s: float = 15.0
    retry_s: float = 0.1
    epochs_max: int = 1000


@dataclass(frozen=True, slots=True)
class Began:
    """The first chain is opened; it should take `first_s` until the first token and `token_s` for each."""

    chain: tuple[StageRef, ...]
    first_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Waiting:
    """The reader wants a token, and there is none yet."""


@dataclass(frozen=True, slots=True)
class Came:
    """The gateway has so many `tokens` of the answer now."""

    tokens: int


@dataclass(frozen=True, slots=True)
class Broke:
    """`peer` was lost to the chain of `epoch`."""

    epoch: int
    peer: str


@dataclass(frozen=True, slots=True)
class Reported:
    """What the stages of the chain of `epoch` said, by the number of the stage; None: nothing within the time."""

    epoch: int
    reports: Mapping[int, StageReport | None]


@dataclass(frozen=True, slots=True)
class Joined:
    """Every stage of the chain of `epoch` has found its place."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Mended:
    """Phase 2 found a chain, which should have the next token after `join_s`."""

    chain: tuple[StageRef, ...]
    join_s: float


@dataclass(frozen=True, slots=True)
class Unmended:
    """Nobody can take the lost stages' place now."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event: TypeAlias = Began | Waiting | Came | Broke | Reported | Joined | Mended | Unmended | Tick


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask all stages of the chain how far they are, and wait `within_s`."""

    epoch: int
    within_s: float


@dataclass(frozen=True, slots=True)
class Choose:
    """Look for a chain through these stages that avoids these peers; answer with Mended or Unmended."""

    kept: tuple[StageRef, ...]
    avoid: frozenset[str]


@dataclass(frozen=True, slots=True)
class Join:
    """Join this chain under this epoch."""

    epoch: int
    chain: tuple[StageRef, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """The chains before this epoch are of no use any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The stream ends: `peer` was lost, and nobody took its place."""

    peer: str


Instruction: TypeAlias = Probe | Choose | Join | Close | GiveUp


@dataclass(slots=True)
class Failover:
    """One stream's chain, from its first to its last token. `prompt_tokens` positions come before the answer."""

    prompt_tokens: int
    patience: Patience = field(default_factory=Patience)
    epoch: int = 0
    chain: tuple[StageRef, ...] = ()
    tokens: int = 0
    wake_s: float = inf
    _since_s: float = 0.0
    _usual_s: float = 0.0
    _spread_s: float = 0.0
    _grace_s: float = 0.0
    _waits: int = 0
    _probing: bool = False
    _choosing: bool = False
    _gentle: bool = False
    _broken_s: float | None = None
    _last_blamed: str = ""
    _avoid: set[str] = field(default_factory=set)
    _missed: dict[str, int] = field(default_factory=dict)
    _slow: dict[str, int] = field(default_factory=dict)
    _smooth: int = 0

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """What to do now."""
        match event:
            case Began(chain, first_s, token_s):
                self.chain = chain
                self._usual_s = self._spread_s = token_s
                self._grace_s = 1.0 + 4.0 * first_s
                self._from_now(now_s)
            case Waiting():
                if not self._waits:
                    self._from_now(now_s)
            case Came(tokens):
                self._came(tokens, now_s)
            case Broke(epoch, peer):
                return self._blame([peer], now_s) if epoch == self.epoch else []
            case Reported(epoch, reports):
                return self._reported(reports, now_s) if epoch == self.epoch and self._probing else []
            case Joined(epoch):
                if epoch == self.epoch:
                    self._from_now(now_s)
                    return [Close(epoch)]
            case Mended(chain, join_s):
                return self._join(chain, join_s, now_s)
            case Unmended():
                return self._unmended(now_s)
            case Tick():
                return self._tick(now_s)
        return []

    def limit_s(self) -> float:
        """So long a token may take before the stages are asked."""
        limits = self.patience
        learnt = min(limits.most_s, max(limits.least_s, 4.0 * self._usual_s + 8.0 * self._spread_s))
        return max(learnt, self._grace_s)

    def stuck_s(self) -> float:
        """So long a stage may sit on one piece of work."""
        limits = self.patience
        return max(limits.stuck_s, limits.stuck_factor * self._usual_s, 2.0 * self._grace_s)

    def validate(self) -> None:
        """Raises ValueError where the state contradicts itself."""
        if self._probing and self._choosing:
            raise ValueError("it asks the stages of a chain that it gave up")
        if self._choosing and not self._gentle and self._broken_s is None:
            raise ValueError("it replaces a stage that nobody lost")
        if self.chain and self.wake_s == inf and not (self._probing or self._choosing):
            raise ValueError("nothing will ever wake it")

    def _from_now(self, now_s: float) -> None:
        self._since_s, self._waits = now_s, 0
        if not self._probing and not self._choosing:
            self.wake_s = now_s + self.limit_s()

    def _came(self, tokens: int, now_s: float) -> None:
        limit_s, took_s = self.limit_s(), now_s - self._since_s
        if not self._grace_s and self._broken_s is None:
            # What is beyond patience must not become the usual.
            took_s = min(took_s, limit_s)
            self._spread_s += (abs(took_s - self._usual_s) - self._spread_s) / 4
            self._usual_s += (took_s - self._usual_s) / 8
        self._smooth = 0 if self._waits else self._smooth + 1
        if self._smooth >= self.patience.forgotten_after:
            self._slow.clear()
        self.tokens = max(self.tokens, tokens)
        self._grace_s, self._broken_s = 0.0, None
        self._avoid.clear()
        self._missed.clear()
        self._from_now(now_s)

    def _tick(self, now_s: float) -> list[Instruction]:
        if self._probing or now_s < self.wake_s:
            return []
        if self._choosing:
            return self._choose()
        self._probing, self.wake_s = True, inf
        self._waits += 1
        return [Probe(self.epoch, self.patience.probe_s)]

    def _reported(self, reports: Mapping[int, StageReport | None], now_s: float) -> list[Instruction]:
        self._probing = False
        silent = [stage.peer for at, stage in enumerate(self.chain) if reports.get(at) is None]
        if silent:
            return self._blame(silent, now_s)
        said = [report for at in range(len(self.chain)) if (report := reports[at]) is not None]
        peer, sure = self._suspect(said)
        if peer:
            self._missed[peer] = self._missed.get(peer, 0) + 1
            # Reports are not of one moment: what was on its way then is not lost.
            if sure or self._missed[peer] >= 2:
                return self._blame([peer], now_s)
        slow = self._slowest(said)
        if slow:
            self._slow[slow] = self._slow.get(slow, 0) + 1
            if self._slow[slow] >= self.patience.strikes:
                self._slow.clear()
                self._gentle = True
                return self._choose({slow})
        self.wake_s = now_s + (
            self.patience.least_s if peer else min(self.patience.most_s, self.limit_s() * 2**self._waits)
        )
        return []

    def _suspect(self, said: list[StageReport]) -> tuple[str, bool]:
        """Whom the reports show to be at fault, if anybody, and whether that is sure."""
        for at, report in enumerate(said):
            if report.epoch != self.epoch:
                return self.chain[at].peer, False
            if report.busy_s > self.stuck_s():
                return self.chain[at].peer, True
        for at, (report, below) in enumerate(pairwise(said)):
            if report.done > below.given and not below.busy_s and not report.busy_s:
                return self.chain[at + 1].peer, False
        last, first = said[-1], said[0]
        if last.busy_s or first.busy_s:
            return "", False
        returned = last.done - self.prompt_tokens + 1
        if returned > self.tokens or first.given < last.done + (returned > 0):
            return self.chain[-1].peer, False
        return "", False

    def _slowest(self, said: list[StageReport]) -> str:
        """Who sits on work for much longer than a whole token usually takes."""
        at = max(range(len(said)), key=lambda n: said[n].busy_s)
        return self.chain[at].peer if said[at].busy_s > self.limit_s() and not self._grace_s else ""

    def _blame(self, peers: list[str], now_s: float) -> list[Instruction]:
        if self._choosing and not self._gentle:
            self._avoid.update(peers)
            return []
        self._gentle = False
        self._avoid.update(peers)
        self._last_blamed = peers[0]
        self._broken_s = now_s if self._broken_s is None else self._broken_s
        return self._choose()

    def _choose(self, gently: set[str] | None = None) -> list[Instruction]:
        self._probing, self._choosing, self.wake_s = False, True, inf
        avoid = self._avoid | (gently or set())
        return [Choose(tuple(s for s in self.chain if s.peer not in avoid), frozenset(avoid))]

    def _join(self, chain: tuple[StageRef, ...], join_s: float, now_s: float) -> list[Instruction]:
        if not self._choosing:
            return []
        self._choosing = self._gentle = False
        if self.epoch >= self.patience.epochs_max:
            return [GiveUp(self._last_blamed or chain[0].peer)]
        self.epoch += 1
        self.chain = chain
        self._grace_s = 1.0 + 4.0 * join_s
        self._missed.clear()
        self._from_now(now_s)
        return [Join(self.epoch, chain)]

    def _unmended(self, now_s: float) -> list[Instruction]:
        if not self._choosing:
            return []
        if self._gentle:
            self._choosing = self._gentle = False
            self._from_now(now_s)
            return []
        waited_s = now_s - (now_s if self._broken_s is None else self._broken_s)
        if waited_s >= self.patience.mend_s:
            self.wake_s = inf
            return [GiveUp(self._last_blamed)]
        if waited_s >= min(1.0, self.patience.mend_s / 2):
            # Nobody else has these layers: whoever failed may have come back meanwhile.
            self._avoid.clear()
        self.wake_s = now_s + self.patience.retry_s
        return []
