"""What others have probably sent since a shared view was announced, so that gateways do not all pick one chain.

All gateways hold the same old view and choose by the same rule; so each can play the requests that have come since,
one after another, and see the mesh as they leave it. How many came follows from the rate that is announced with
the loads. It keeps one view's play; it sends nothing and probes nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.routing import ChainRequest, Hosted, Router, Stage
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

    __slots__ = ("_asked", "_links", "_states", "_usual", "_weight")

    def __init__(
        self, hosted: Sequence[Hosted], links: Links, asked: ChainRequest, usual: Usual, wait_weight: float
    ) -> None:
        self._links, self._asked, self._usual, self._weight = links, asked, usual, wait_weight
        self._states: list[State] = [State({h.node: h for h in hosted}, links)]

    def after(self, elapsed_s: float) -> State:
        """The mesh as it probably is so long after the view was announced."""
        wanted = min(PLAYED_MAX, int(elapsed_s * self._usual.requests_per_s))
        while len(self._states) <= wanted:
            self._play(len(self._states))
        return self._states[wanted]

    def _play(self, number: int) -> None:
        """One usual request more, and the time until it came."""
        usual, before = self._usual, self._states[-1]
        try:
            chain = before.router(self._weight).choose(
                replace(self._asked, prompt_tokens=usual.prompt_tokens, tokens=usual.tokens, seed=number),
                alternates=0,
            )
            stages: tuple[Stage, ...] = chain.stages
        except (NoChain, NoRoom, Rejected):
            stages = ()
        passed_s = 1.0 / max(1e-9, usual.requests_per_s)
        hosts = {
            name: replace(h, queue_s=max(0.0, h.queue_s - passed_s)) if h.queue_s > 0 else h
            for name, h in before.hosts.items()
        }
        for stage in stages:
            h = hosts[stage.node]
            work_s = usual.prompt_tokens * (stage.end - stage.start) * h.prefill_s_per_token_per_layer
            kv_free = h.kv_tokens_free - usual.tokens * (stage.end - stage.start) // (h.end - h.start)
            hosts[stage.node] = replace(h, queue_s=h.queue_s + work_s, kv_tokens_free=max(0, kv_free))
        self._states.append(State(hosts, self._links))


class State:
    """Hosts as they probably are, with routers over them by the weight given to waiting."""

    def __init__(self, hosts: dict[str, Hosted], links: Links) -> None:
        self.hosts, self._links = hosts, links
        self._routers: dict[float, Router] = {}

    def router(self, wait_weight: float) -> Router:
        """Phase 2 over these hosts, a second of waiting counted `wait_weight` times."""
        found = self._routers.get(wait_weight)
        if found is None:
            seen = [
                replace(
                    h,
                    queue_s=wait_weight * h.queue_s,
                    prefill_s_per_token_per_layer=wait_weight * h.prefill_s_per_token_per_layer,
                )
                for h in self.hosts.values()
            ]
            found = self._routers[wait_weight] = Router(seen, self._links)
        return found

    def first_token_s(
        self, stages: Sequence[Stage], request: ChainRequest, chunk_tokens: int, queued_s: Mapping[str, float]
    ) -> float:
        """Seconds until the chain would give its first token, its stages working on chunks one behind another.

        `queued_s` are queues heard of since the view. Queues empty while the stages before them work.
        """
        tokens, at, link_of = request.prompt_tokens, request.gateway, self._links
        chunk = min(chunk_tokens, tokens)
        first = link_of(at, stages[0].node)
        here_s, last_s = first.latency_s, first.latency_s
        for k, stage in enumerate(stages):
            h = self.hosts[stage.node]
            start_s = max(here_s, queued_s.get(stage.node, h.queue_s))
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
            total += self.hosts[stage.node].s_per_layer * (stage.end - stage.start)
            if len(stages) > 1:
                link = self._links(stage.node, stages[(k + 1) % len(stages)].node)
                total += link.seconds(request.hidden_bytes)
        return total
