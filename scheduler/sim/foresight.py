"""What others have probably sent since a shared view was announced, so that gateways do not all pick one chain.

All gateways hold the same old view and choose by the same rule; so each can play the requests that have come since,
one after another, and see the mesh as they leave it. How many came follows from the rate that is announced with
the loads. It keeps one view's play; it sends nothing and probes nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def __init__(
        self, hosted: Sequence[Hosted], links: Links, asked: ChainRequest, usual: Usual, wait_weight: float
    ) -> None:
        self._links, self._asked, self._usual, self._weight = links, asked, usual, wait_weight
        self._hosts = {h.node: h for h in hosted}
        self._states: list[Router] = [self._router()]

    def after(self, elapsed_s: float) -> Router:
        """The mesh as it probably is so long after the view was announced."""
        wanted = min(PLAYED_MAX, int(elapsed_s * self._usual.requests_per_s))
        while len(self._states) <= wanted:
            self._play(len(self._states))
        return self._states[wanted]

    def _play(self, number: int) -> None:
        """One usual request more, and the time until it came."""
        usual = self._usual
        try:
            chain = self._states[-1].choose(
                replace(self._asked, prompt_tokens=usual.prompt_tokens, tokens=usual.tokens, seed=number),
                alternates=0,
            )
            stages: tuple[Stage, ...] = chain.stages
        except (NoChain, NoRoom, Rejected):
            stages = ()
        passed_s = 1.0 / max(1e-9, usual.requests_per_s)
        for name, h in self._hosts.items():
            if h.queue_s > 0:
                self._hosts[name] = replace(h, queue_s=max(0.0, h.queue_s - passed_s))
        for stage in stages:
            h = self._hosts[stage.node]
            work_s = usual.prompt_tokens * (stage.end - stage.start) * h.prefill_s_per_token_per_layer
            kv_free = h.kv_tokens_free - usual.tokens * (stage.end - stage.start) // (h.end - h.start)
            self._hosts[stage.node] = replace(h, queue_s=h.queue_s + work_s, kv_tokens_free=max(0, kv_free))
        self._states.append(self._router())

    def _router(self) -> Router:
        weight = self._weight
        return Router(
            [
                replace(
                    h,
                    queue_s=weight * h.queue_s,
                    prefill_s_per_token_per_layer=weight * h.prefill_s_per_token_per_layer,
                )
                for h in self._hosts.values()
            ],
            self._links,
        )
