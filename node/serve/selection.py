"""Which chain a request takes: phase 2 over what the mesh says, what this gateway did since, and whom it trusts.

It joins the scheduler's cores: routing over cached loads, health scores from times and failures that this gateway saw,
and chains whose caches hold the prompt's beginning. Pure but for the random seeds that it is given; it sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from node.adverts import HostAdvert, ModelAdvert
from node.atlas import Atlas
from node.serve.forecast import room_tokens
from node.serve.prefixes import Finder, Holding, Teller, read_summary
from node.serve.protocol import BACKGROUND, PIECE_TOKENS, Priority, StageRef
from scheduler import ChainRequest, Health, Hosted, Links, NoChain, NoRoom, Rejected, Stage, bridge, node_of
from scheduler.ledger import Ledger
from scheduler.outlook import Aims, Offer, Outlook, Surveyor
from scheduler.parting import GAIN, Holder, Parted, part
from scheduler.routing import prefill_s

HOLDINGS_TRIED_MAX = 3
SLACK_S = 0.01
"""What a stage may take beyond the expected before it counts: a busy computer's tasks wait for one another."""
BOUNDLESS = 1 << 50
SPLIT_PAUSE_S = 30.0
"""After a handover that failed no request is split for so long: nodes may not reach one another."""
NO_AIMS = Aims()


@dataclass(frozen=True, slots=True)
class Wish:
    """A request as phase 2 sees it, with what it should keep from now on. `likely_tokens` of its `new_tokens` are
    probably made."""

    prompt_tokens: int
    new_tokens: int
    marks: tuple[bytes, ...] = ()
    priority: Priority = 1
    exclude: frozenset[str] = frozenset()
    seed: int = 0
    likely_tokens: int = 0
    aims: Aims = NO_AIMS


@dataclass(frozen=True, slots=True)
class Expected:
    """What a stage should take, in seconds: for a new token, for a token of the prompt, for the hop to it and back."""

    token_s: float
    prompt_token_s: float
    hop_s: float

    def seconds(self, tokens: int) -> float:
        """For `tokens` positions at once."""
        return self.hop_s + (self.token_s if tokens == 1 else max(self.token_s, tokens * self.prompt_token_s))


@dataclass(frozen=True, slots=True)
class Choice:
    """A chain, how many of the prompt's first positions its caches hold, and what it should take: `first_s` until the
    first token, `whole_s` until the last that is likely, `cost_s` until the last that there may be. Where the prompt is
    read on another chain, that is `prefill`, and `handover_s` what its cache takes from there to here."""

    stages: tuple[StageRef, ...]
    reuse: int
    cost_s: float
    first_s: float
    whole_s: float
    expected: tuple[Expected, ...]
    alternates: tuple[Choice, ...] = ()
    prefill: Choice | None = None
    handover_s: float = 0.0

    @property
    def reading(self) -> Choice:
        """The chain that reads the prompt."""
        return self.prefill or self

    def reusing(self, tokens: int) -> Choice:
        """The same where only the first `tokens` of the prompt are in the caches."""
        if self.prefill is None:
            return replace(self, reuse=tokens)
        return replace(self, prefill=replace(self.prefill, reuse=tokens))


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one atlas says of a model: its ready spans, the advert of each, and the distances."""

    atlas: Atlas
    model: ModelAdvert
    plain: list[Hosted]
    adverts: list[HostAdvert | None]
    links: Links


class Selector:
    """Chooses for one gateway. `ledger` and `finder` are told of its sessions, `health` of what they saw.

    An atlas is read once for each model, and what loads do not change is kept from one to the next.
    """

    def __init__(self, me: str, health: Health, split_gain: float = GAIN) -> None:
        self._me = me
        self.health = health
        self._split_gain = split_gain
        self._whole_until_s = -math.inf
        self.ledger = Ledger()
        self.finder = Finder()
        self._readings: dict[str, _Reading] = {}
        self._surveyors: dict[str, Surveyor] = {}

    def spans(
        self,
        atlas: Atlas,
        model: ModelAdvert,
        now_s: float,
        *,
        priority: int = 1,
        boundless: bool = False,
        without: str | None = None,
    ) -> list[Hosted]:
        """Ready spans with this gateway's knowledge worked in; room of background sessions counts for all others.

        `boundless`: as if there were room for everything; `without`: as if that session of ours were not.
        """
        read = self._read(atlas, model)
        adverts = read.adverts
        hosted = self.ledger.adjusted(model.manifest_id, read.plain, adverts, now_s, without=without)
        if boundless:
            hosted = [replace(h, kv_tokens_free=BOUNDLESS) for h in hosted]
        elif priority < BACKGROUND:
            hosted = [
                replace(h, kv_tokens_free=h.kv_tokens_free + a.kv_tokens_yielding) if a else h
                for h, a in zip(hosted, adverts, strict=True)
            ]
        return self.health.hosted(hosted, now_s)

    def _read(self, atlas: Atlas, model: ModelAdvert) -> _Reading:
        known = self._readings.get(model.manifest_id)
        if known is None or known.atlas is not atlas or known.model != model:
            for table in (self._readings, self._surveyors):
                for gone in [m for m in table if m not in atlas.hosts]:
                    del table[gone]
            plain = atlas.hosted(model)
            known = _Reading(atlas, model, plain, _adverts_of(atlas, model, plain), atlas.links())
            self._readings[model.manifest_id] = known
        return known

    def _outlook(
        self, atlas: Atlas, model: ModelAdvert, hosted: Sequence[Hosted], now_s: float
    ) -> tuple[Outlook, Links]:
        surveyor = self._surveyors.setdefault(model.manifest_id, Surveyor())
        links = self._read(atlas, model).links
        outlook = Outlook(hosted, links, chunk_tokens=PIECE_TOKENS, surveyor=surveyor, now_s=now_s)
        return outlook, links

    def room(self, atlas: Atlas, model: ModelAdvert, now_s: float) -> int:
        """Tokens for which every layer has room now, background sessions aside."""
        return room_tokens(self.spans(atlas, model, now_s, priority=BACKGROUND), model.layers)

    def cached_tokens(self, atlas: Atlas, model: ModelAdvert, marks: tuple[bytes, ...]) -> int:
        """How much of a prompt's beginning some chain holds."""
        found = self._holdings(atlas, model, marks)
        return found[0].tokens if found else 0

    def choose(
        self, atlas: Atlas, model: ModelAdvert, wish: Wish, now_s: float, *, boundless: bool = False
    ) -> Choice:
        """The chain to take: the better of what holds the prompt's beginning and what is quickest without.

        Raises NoChain and NoRoom, and Rejected where strict aims cannot be kept.
        """
        hosted = self.spans(atlas, model, now_s, priority=wish.priority, boundless=boundless)
        outlook, links = self._outlook(atlas, model, hosted, now_s)
        request = self._request(model, wish)
        best: Offer | None = None
        reuse, holders = 0, list[Holder]()
        problem: NoRoom | Rejected | None = None
        try:
            best = outlook.offer(request, wish.aims)
        except (NoRoom, Rejected) as why:
            problem = why
        for holding in self._holdings(atlas, model, wish.marks)[:HOLDINGS_TRIED_MAX]:
            held = self._through(holding, outlook, wish, request)
            if held is not None:
                holders.append(Holder(held.stages, holding.tokens))
            if held is not None and (best is None or held.rank <= best.rank or held.stages == best.stages):
                others = () if best is None else (replace(best, alternates=()), *best.alternates)
                best = replace(held, alternates=tuple(o for o in others if o.stages != held.stages))
                reuse = holding.tokens
        if best is None:
            raise problem if problem is not None else NoChain(range(model.layers))
        whole = self._choice(best, hosted, links, wish, reuse=reuse)
        if wish.priority == BACKGROUND or now_s < self._whole_until_s:
            return whole
        likely = min(wish.new_tokens, wish.likely_tokens or wish.new_tokens)
        parted = part(
            outlook, request, wish.aims, best,
            likely_tokens=likely, holders=holders, gain_least=self._split_gain,
        )  # fmt: skip
        return whole if parted is None else self._parted(parted, whole, hosted, links, wish)

    def split_failed(self, now_s: float) -> None:
        """A request that was split did not come to its answer."""
        self._whole_until_s = now_s + SPLIT_PAUSE_S

    def _parted(
        self, parted: Parted, whole: Choice, hosted: Sequence[Hosted], links: Links, wish: Wish
    ) -> Choice:
        """The two chains as a choice, with what one chain would do to fall back on."""
        reading = self._choice(parted.reading, hosted, links, wish, reuse=parted.reuse)
        answering = self._choice(parted.answering, hosted, links, wish, reuse=0)
        return replace(
            answering,
            cost_s=parted.first_s + wish.new_tokens * parted.answering.token_s,
            first_s=parted.first_s,
            whole_s=parted.whole_s,
            alternates=(replace(whole, alternates=()), *whole.alternates),
            prefill=reading,
            handover_s=parted.moved_s,
        )

    def instead(
        self,
        atlas: Atlas,
        model: ModelAdvert,
        wish: Wish,
        session: str,
        choice: Choice,
        now_s: float,
        tries: int,
    ) -> Choice | None:
        """Another chain for an open session, by what its stages said of their work; None to go on with this one.

        Raises Rejected where strict aims cannot be kept.
        """
        hosted = self.spans(atlas, model, now_s, priority=wish.priority, without=session)
        outlook, links = self._outlook(atlas, model, hosted, now_s)
        stages = as_stages(choice.stages)
        request = _held(self._request(model, wish), stages, choice.reuse)
        better = outlook.instead(stages, request, wish.aims, tries=tries)
        return None if better is None else self._choice(better, hosted, links, wish, reuse=0)

    def mend(
        self,
        atlas: Atlas,
        model: ModelAdvert,
        wish: Wish,
        kept: Sequence[StageRef],
        now_s: float,
    ) -> Choice:
        """A chain through the stages `kept`, as far as their nodes still host them, for a session that lost the others.
        Raises NoChain, NoRoom or Rejected."""
        there = [
            stage
            for stage in as_stages(kept)
            if any(
                h.node == stage.node and h.start <= stage.start < stage.end <= h.end
                for h in self._read(atlas, model).plain
            )
        ]
        hosted = self.spans(atlas, model, now_s, priority=wish.priority)
        links = self._read(atlas, model).links
        chain = bridge(hosted, links, self._request(model, wish), there)
        offer = Offer(chain.stages, chain.cost_s, 0.0, chain.cost_s, 0.0)
        return self._choice(offer, [*hosted, *self._read(atlas, model).plain], links, wish, reuse=0)

    def observe(self, choice: Choice, stage: int, tokens: int, seconds: float, now_s: float) -> None:
        """A stage took `seconds` for `tokens` positions, as the one before it saw it."""
        if 0 <= stage < len(choice.stages) and 0.0 <= seconds < 3600.0 and tokens > 0:
            expected_s = choice.expected[stage].seconds(tokens)
            self.health.succeeded(choice.stages[stage].peer, seconds + SLACK_S, expected_s + SLACK_S, now_s)

    def _request(self, model: ModelAdvert, wish: Wish) -> ChainRequest:
        return ChainRequest(
            layers=model.layers,
            tokens=wish.prompt_tokens + wish.new_tokens,
            prompt_tokens=wish.prompt_tokens,
            hidden_bytes=model.hidden_bytes,
            gateway=self._me,
            exclude=wish.exclude,
            seed=wish.seed,
            priority=wish.priority,
            kv_bytes_per_token_per_layer=model.kv_bytes_per_token_per_layer,
        )

    def _holdings(self, atlas: Atlas, model: ModelAdvert, marks: tuple[bytes, ...]) -> list[Holding]:
        if not marks:
            return []
        tellers = [
            (
                node_of(host),
                Teller(advert.start, min(advert.end, model.layers), read_summary(advert.prefixes)),
            )
            for host, advert in sorted(atlas.live_hosts(model.manifest_id).items())
            if advert.state == "ready"
        ]
        return self.finder.holdings(tellers, model.layers, marks)

    def _through(self, holding: Holding, outlook: Outlook, wish: Wish, request: ChainRequest) -> Offer | None:
        """The chain that holds a prompt's beginning, if it is there, has room, and is none to be avoided."""
        stages = as_stages(holding.stages)
        if any(stage.node in wish.exclude for stage in stages) or not outlook.has_room(stages, request):
            return None
        offer = outlook.weigh(stages, _held(request, stages, holding.tokens), wish.aims)
        return None if offer is None or wish.aims.refuse(offer.first_s, offer.token_s) else offer

    def _choice(
        self, offer: Offer, hosted: Sequence[Hosted], links: Links, wish: Wish, *, reuse: int
    ) -> Choice:
        stages = tuple(StageRef(s.node, s.start, s.end) for s in offer.stages)
        hosts = {stage: host for stage in stages if (host := _host_of(stage, hosted)) is not None}
        names = [self._me, *(stage.peer for stage in stages)]
        hops_s = [links(a, b).latency_s for a, b in zip(names, [*names[1:], self._me], strict=True)]
        likely = min(wish.new_tokens, wish.likely_tokens or wish.new_tokens)
        return Choice(
            stages,
            reuse,
            cost_s=offer.first_s + wish.new_tokens * offer.token_s,
            first_s=offer.first_s,
            whole_s=offer.first_s + likely * offer.token_s,
            expected=tuple(
                _expected(hosts[stage], stage, 2 * hop_s)
                for stage, hop_s in zip(stages, hops_s, strict=False)
            ),
            alternates=tuple(self._choice(o, hosted, links, wish, reuse=0) for o in offer.alternates),
        )


def as_stages(chain: Sequence[StageRef]) -> tuple[Stage, ...]:
    """A chain as the scheduler's cores take it."""
    return tuple(Stage(stage.peer, stage.start, stage.end) for stage in chain)


def _held(request: ChainRequest, stages: Sequence[Stage], tokens: int) -> ChainRequest:
    """The request where these stages hold the prompt's first `tokens`."""
    nodes = frozenset(stage.node for stage in stages)
    return replace(request, prefix_nodes=nodes, prefix_tokens=tokens) if tokens else request


def _expected(host: Hosted, stage: StageRef, hop_s: float) -> Expected:
    layers = stage.end - stage.start
    return Expected(host.s_per_layer * layers, prefill_s(host) * layers, hop_s)


def _host_of(stage: StageRef, hosted: Sequence[Hosted]) -> Hosted | None:
    for h in hosted:
        if h.node == stage.peer and h.start <= stage.start < stage.end <= h.end:
            return h
    return None


def _adverts_of(atlas: Atlas, model: ModelAdvert, hosted: Sequence[Hosted]) -> list[HostAdvert | None]:
    """What each span's host said. A node of several devices says it of each."""
    said: dict[str, list[HostAdvert]] = {}
    for host, advert in atlas.live_hosts(model.manifest_id).items():
        said.setdefault(node_of(host), []).append(advert)
    return [
        next((a for a in said.get(h.node, ()) if a.start <= h.start < h.end <= a.end), None) for h in hosted
    ]
