"""What others have probably sent since a shared view was announced, so that gateways do not all pick one chain.

All gateways hold the same old view and choose by the same rule; so each can play the requests that have come since,
one after another, and see the mesh as they leave it. How many came follows from the rate that is announced with
the loads. It keeps one view's play; it sends nothing and probes nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.routing import Chain, ChainRequest, Hosted, Router, Stage
from scheduler.shapes import Links

PLAYED_MAX = 64
"""Requests played for one view at most; beyond, the last state stands."""


@dataclass(frozen=True, slots=True)
class Usual:
    """The requests of the last while: how many a second in the whole mesh, and their mean lengths."""

    requests_per_s: float
    prompt_tokens: int
    tokens: int


class Foresight:
    """The states of one view after 0, 1, 2 ... usual requests. `wait_weight` multiplies queues and prefill."""

    __slots__ = ("_asked", "_routers", "_states", "_usual", "_weight", "hosts", "links")

    def __init__(
        self, hosted: Sequence[Hosted], links: Links, asked: ChainRequest, usual: Usual, wait_weight: float
    ) -> None:
        self.links, self._asked, self._usual, self._weight = links, asked, usual, wait_weight
        self.hosts = {h.node: h for h in hosted}
        self._routers: dict[float, Router] = {}
        self._states: list[State] = [State(self, {h.node: h.queue_s for h in hosted}, {})]

    def after(self, elapsed_s: float) -> State:
        """The mesh as it probably is so long after the view was announced."""
        wanted = min(PLAYED_MAX, int(elapsed_s * self._usual.requests_per_s))
        while len(self._states) <= wanted:
            self._play(len(self._states))
        return self._states[wanted]

    def router(self, wait_weight: float) -> Router:
        """Phase 2 over these hosts, a second of waiting counted `wait_weight` times."""
        found = self._routers.get(wait_weight)
        if found is None:
            seen = [
                replace(h, prefill_s_per_token_per_layer=wait_weight * h.prefill_s_per_token_per_layer)
                for h in self.hosts.values()
            ]
            found = self._routers[wait_weight] = Router(seen, self.links)
        return found

    def _play(self, number: int) -> None:
        """One usual request more, and the time until it came."""
        usual, before = self._usual, self._states[-1]
        asked = replace(self._asked, prompt_tokens=usual.prompt_tokens, tokens=usual.tokens, seed=number)
        try:
            stages = before.choose(asked, self._weight, alternates=0, draw=False).stages
        except (NoChain, NoRoom, Rejected):
            stages = ()
        passed_s = 1.0 / max(1e-9, usual.requests_per_s)
        queues_s = {
            name: queue_s - passed_s if queue_s > passed_s else 0.0
            for name, queue_s in before.queues_s.items()
        }
        taken = dict(before.taken_tokens)
        for stage in stages:
            h = self.hosts[stage.node]
            layers = stage.end - stage.start
            queues_s[stage.node] += usual.prompt_tokens * layers * h.prefill_s_per_token_per_layer
            taken[stage.node] = taken.get(stage.node, 0) + usual.tokens * layers // (h.end - h.start)
        self._states.append(State(self, queues_s, taken))


@dataclass(frozen=True, slots=True)
class State:
    """Hosts as they probably are: their queues, and the cache room taken since the view."""

    seen: Foresight
    queues_s: dict[str, float]
    taken_tokens: dict[str, int]

    def choose(self, asked: ChainRequest, wait_weight: float, *, alternates: int, draw: bool = True) -> Chain:
        """Phase 2 in this state, a second of waiting counted `wait_weight` times. Raises as `choose_chain`."""
        queued_s = {name: wait_weight * queue_s for name, queue_s in self.queues_s.items()}
        asked = replace(asked, queued_s=queued_s, taken_tokens=self.taken_tokens)
        return self.seen.router(wait_weight).choose(asked, alternates=alternates, draw=draw)

    def told(self, queued_s: Mapping[str, float]) -> State:
        """The state with queues that were heard of since the view in place of those foreseen."""
        known = {name: queue_s for name, queue_s in queued_s.items() if name in self.queues_s}
        return State(self.seen, {**self.queues_s, **known}, self.taken_tokens) if known else self

    def first_token_s(self, stages: Sequence[Stage], request: ChainRequest, chunk_tokens: int) -> float:
        """Seconds until the chain would give its first token, its stages working on chunks one behind another.

        Queues empty while the stages before them work.
        """
        tokens, at, link_of = request.prompt_tokens, request.gateway, self.seen.links
        if request.prefix_nodes.issuperset(stage.node for stage in stages):
            tokens = max(1, tokens - request.prefix_tokens)
        chunk = min(chunk_tokens, tokens)
        first = link_of(at, stages[0].node)
        here_s, last_s = first.latency_s, first.latency_s
        for k, stage in enumerate(stages):
            h = self.seen.hosts[stage.node]
            start_s = max(here_s, self.queues_s[stage.node])
            work_s = tokens * (stage.end - stage.start) * h.prefill_s_per_token_per_layer
            chunk_s = work_s * chunk / tokens
            end_s = max(start_s + work_s, last_s + chunk_s)
            link = link_of(stage.node, stages[k + 1].node if k + 1 < len(stages) else at)
            if k + 1 == len(stages):
                return end_s + link.latency_s
            hop_s = link.seconds(chunk * request.hidden_bytes)
            here_s = start_s + chunk_s + hop_s
            last_s = max(end_s + hop_s, start_s + chunk_s + link.seconds(tokens * request.hidden_bytes))
        return last_s

    def token_s(self, stages: Sequence[Stage], request: ChainRequest) -> float:
        """Seconds for each further token, at the loads of the view."""
        total = 0.0
        for k, stage in enumerate(stages):
            total += self.seen.hosts[stage.node].s_per_layer * (stage.end - stage.start)
            if len(stages) > 1:
                link = self.seen.links(stage.node, stages[(k + 1) % len(stages)].node)
                total += link.seconds(request.hidden_bytes)
        return total
