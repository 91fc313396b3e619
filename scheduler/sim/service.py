"""What happens to a request in the simulated mesh, from its arrival to its last token or its loss.

A prompt goes through the stages in chunks, each stage beginning when the first chunk arrives; then tokens go round the
ring, some at a time at the pace that the stages' loads of that moment allow. A lost stage is replaced for its layers
alone, from the history that its neighbour keeps; if there is nothing to replace it with, the request waits, and is
lost when its client's patience ends. Which chain is the policy's affair.
"""

from __future__ import annotations

from scheduler.errors import NoChain, NoRoom, Rejected
from scheduler.routing import Stage
from scheduler.sim.clock import Clock
from scheduler.sim.config import SimConfig
from scheduler.sim.fleet import Fleet
from scheduler.sim.machine import Machine
from scheduler.sim.policy import Policy
from scheduler.sim.request import Request, State
from scheduler.sim.trace import Ask
from scheduler.sim.world import World

TURNED_AWAY_S = 0.1
UNREACHED_S = 1.0


class Service:
    """All requests of a run. `messages` are those that opening, moving and closing sessions take."""

    def __init__(self, config: SimConfig, world: World, clock: Clock, policy: Policy) -> None:
        self.config, self.world, self.clock, self.policy = config, world, clock, policy
        self.fleet = Fleet(config, world, clock, self.broken)
        self.requests: list[Request] = []
        self.messages = 0
        self.retries = 0
        self.tokens_reused = 0
        self.chains: list[tuple[float, str, tuple[str, ...]]] = []

    def arrive(self, ask: Ask) -> None:
        """A client asks the gateway nearest to it; clients are spread evenly."""
        number = len(self.requests)
        request = Request(number, ask, self.world.gateways[number % len(self.world.gateways)])
        request.waits_since_s = self.clock.now_s
        self.requests.append(request)
        self._open(request, request.turn)

    # -- opening

    def _open(self, request: Request, turn: int) -> None:
        if request.turn != turn:
            return
        if self.clock.now_s - request.waits_since_s > self.config.patience_s:
            self._end(request, "refused" if request.breaks == 0 else "lost")
            return
        try:
            stages = self.policy.choose(self.fleet, request)
        except Rejected:
            self._end(request, "refused")
            return
        except (NoChain, NoRoom):
            request.excluded.clear()
            self._again(request, self.config.retry_s)
            return
        machines = self._admit(request, stages, [])
        if machines is None:
            return
        queues = {m.name: m.backlog_s(self.clock.now_s) for m in machines}
        request.hold(stages, machines)
        request.cached_tokens = min(m.cached_tokens(request.ask.blocks) for m in machines)
        request.promise(0, len(stages))
        request.state = "opening"
        there_s = max(self.world.link(request.gateway, stage.node).latency_s for stage in stages)
        self.clock.at(self.clock.now_s + 2 * there_s, self._opened, request, request.turn, queues)

    def _opened(self, request: Request, turn: int, queues: dict[str, float]) -> None:
        """Every stage has said yes, and how much work it had; the gateway may think again."""
        if request.turn != turn:
            return
        try:
            goes_on = self.policy.confirm(self.fleet, request, queues)
        except Rejected:
            self._end(request, "refused")
            return
        if not goes_on:
            self.messages += len(request.stages)
            self.retries += 1
            request.hold([], [])
            request.state = "waiting"
            self._open(request, turn)
            return
        request.waits = 0
        self.chains.append((self.clock.now_s, request.gateway, tuple(s.node for s in request.stages)))
        self._feed(request, 0, len(request.stages))

    def _again(self, request: Request, after_s: float) -> None:
        """Ask once more: soon where one node said no, at growing distances where the whole mesh had no room."""
        self.retries += 1
        if after_s == self.config.retry_s:
            after_s = min(self.config.retry_s_most, after_s * 2**request.waits)
            request.waits += 1
        what = self._mend if request.state == "broken" else self._open
        self.clock.at(self.clock.now_s + after_s, what, request, request.turn)

    def _admit(self, request: Request, stages: list[Stage], kept: list[Stage]) -> list[Machine] | None:
        """The machines, if each is up, hosts the layers and has room; else the request asks again without it."""
        machines = []
        self.messages += len(stages)
        for stage in stages:
            machine = self.fleet.up.get(stage.node)
            if stage in kept and machine is not None:
                machines.append(machine)
                continue
            reached = machine is not None and machine.serving and machine.span is not None
            if not reached or machine is None or machine.span is None:
                request.excluded.add(stage.node)
                self._again(request, UNREACHED_S)
                return None
            fits = machine.span[0] <= stage.start and stage.end <= machine.span[1]
            if not fits or machine.kv_bytes(request.tokens, stage.end - stage.start) > machine.kv_free_bytes:
                request.excluded.add(stage.node)
                self._again(request, TURNED_AWAY_S)
                return None
            machines.append(machine)
        return machines

    # -- prompt

    def _feed(self, request: Request, first: int, end: int) -> None:
        """Send the stages from `first` to before `end` what they have to read; decode goes on after that."""
        request.turn += 1
        request.state = "prompt"
        request.fed = True
        for index in range(first, end):
            request.fulfil(index)
        request.promise(first, end)
        origin = request.stages[first - 1].node if first else request.gateway
        size = self._chunk(request) * (self.config.model.hidden_bytes if first else 4)
        arrives_s = self.clock.now_s + self.world.link(origin, request.stages[first].node).seconds(size)
        self.clock.at(arrives_s, self._prompt, request, request.turn, first, end, 0.0)

    def _chunk(self, request: Request) -> int:
        return min(self.config.chunk_tokens, request.work_tokens)

    def _prompt(self, request: Request, turn: int, index: int, end: int, above_s: float) -> None:
        """The first chunk reached a stage; `above_s` is when the last one can at the soonest."""
        if request.turn != turn:
            return
        stage, machine = request.stages[index], request.machines[index]
        request.fulfil(index)
        tokens = request.work_tokens
        start_s, seconds = machine.take_prompt(tokens, stage.end - stage.start, self.clock.now_s)
        chunk_s = seconds * self._chunk(request) / tokens
        end_s = max(start_s + seconds, above_s + chunk_s)
        target = request.stages[index + 1].node if index + 1 < end else request.gateway
        link = self.world.link(stage.node, target)
        if index + 1 < end:
            hop_s = link.seconds(self._chunk(request) * self.config.model.hidden_bytes)
            whole_s = start_s + chunk_s + link.seconds(tokens * self.config.model.hidden_bytes)
            last_s = max(end_s + hop_s, whole_s)
            self.clock.at(start_s + chunk_s + hop_s, self._prompt, request, turn, index + 1, end, last_s)
        else:
            self.clock.at(end_s + link.latency_s, self._fed, request, turn)

    def _fed(self, request: Request, turn: int) -> None:
        if request.turn != turn:
            return
        if request.first_s is None:
            self.tokens_reused += request.cached_tokens
            for machine in request.machines if request.ask.blocks else ():
                machine.remember(request.ask.blocks)
            self.policy.served(request, self.clock.now_s)
            request.first_s = self.clock.now_s
            request.tokens_done = 1
        request.state = "decode"
        self._round(request, turn)

    # -- decode

    def _round(self, request: Request, turn: int) -> None:
        if request.turn != turn:
            return
        left = request.ask.answer_tokens - request.tokens_done
        if left <= 0:
            self._end(request, "done")
            return
        many = min(left, self.config.round_tokens)
        request.step_s = self._token_s(request)
        request.began_s = self.clock.now_s
        request.flow(1.0 / request.step_s)
        self.clock.at(self.clock.now_s + many * request.step_s, self._rounded, request, turn, many)

    def _rounded(self, request: Request, turn: int, many: int) -> None:
        if request.turn == turn:
            request.tokens_done += many
            self._round(request, turn)

    def _token_s(self, request: Request) -> float:
        """One token around the ring now."""
        now_s, layers = self.clock.now_s, self.config.model.layers
        hidden, stages = self.config.model.hidden_bytes, request.stages
        total = 0.0
        for k, (stage, machine) in enumerate(zip(stages, request.machines, strict=True)):
            total += machine.visit_s(stage.end - stage.start, stage.end == layers, now_s)
            if k + 1 < len(stages):
                total += self.world.link(stage.node, stages[k + 1].node).seconds(hidden)
        return total + self._back_s(request, hidden)

    def _back_s(self, request: Request, hidden: int) -> float:
        """From the last stage to the first: straight, or by way of the client where that is who keeps the session."""
        link, first, last = self.world.link, request.stages[0].node, request.stages[-1].node
        if self.policy.by_client:
            return link(last, request.gateway).seconds(hidden) + link(request.gateway, first).seconds(hidden)
        return link(last, first).seconds(hidden) if len(request.stages) > 1 else 0.0

    # -- losing a stage

    def broken(self, requests: list[Request], machine: Machine, notice_s: float) -> None:
        """These requests lost `machine` just now; they stand still until somebody notices."""
        for request in requests:
            request.credit(self.clock.now_s)
            request.flow(0.0)
            request.turn += 1
            request.breaks += 1
            request.cached_tokens = 0
            if request.state != "broken":
                request.state = "broken"
                request.waits_since_s = notice_s
            request.excluded.add(machine.name)
            self.clock.at(notice_s, self._mend, request, request.turn)

    def _mend(self, request: Request, turn: int) -> None:
        if request.turn != turn:
            return
        alive = [self.fleet.up.get(m.name) is m and request.number in m.sessions for m in request.machines]
        waited_s = self.clock.now_s - request.waits_since_s
        if not self.policy.mends or waited_s > self.config.patience_s:
            request.had_alternate = self.fleet.covered()
            self._end(request, "lost")
            return
        if not request.fed:
            self._restart(request)
            return
        lost = [k for k, lives in enumerate(alive) if not lives]
        first, last = lost[0], lost[-1]
        span = (request.stages[first].start, request.stages[last].end)
        others = {s.node for k, s in enumerate(request.stages) if not first <= k <= last}
        try:
            found = self.policy.splice(self.fleet, request, span, frozenset(request.excluded | others))
        except (NoChain, NoRoom):
            request.excluded.clear()
            self._restart(request)
            return
        stages = [*request.stages[:first], *found, *request.stages[last + 1 :]]
        # Before the first token the stages behind have read nothing yet; after it they lack nothing.
        self._take(request, stages, first, first + len(found) if request.first_s is not None else len(stages))

    def _restart(self, request: Request) -> None:
        """No node has the lost layers to spare: another chain altogether, or a little patience."""
        try:
            stages = self.policy.choose(self.fleet, request)
        except (NoChain, NoRoom, Rejected):
            self._again(request, self.config.retry_s)
            return
        self._take(request, stages, 0, len(stages))

    def _take(self, request: Request, stages: list[Stage], first: int, end: int) -> None:
        kept = [
            s for s, m in zip(request.stages, request.machines, strict=True) if request.number in m.sessions
        ]
        machines = self._admit(request, stages, kept)
        if machines is not None:
            request.hold(stages, machines)
            request.waits = 0
            self._feed(request, first, end)

    def _end(self, request: Request, state: State) -> None:
        self.policy.ended(request, self.clock.now_s)
        request.flow(0.0)
        request.turn += 1
        self.messages += len(request.stages)
        request.hold([], [])
        request.state, request.end_s = state, self.clock.now_s
