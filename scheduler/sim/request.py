"""One simulated request: the stages it holds, how far it is, and what became of it. Data, and its own book-keeping.

`turn` is raised whenever its course changes; events of an older turn are void. It knows no policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scheduler.routing import Stage
from scheduler.sim.machine import Machine
from scheduler.sim.trace import Ask

State = Literal["waiting", "opening", "prompt", "decode", "broken", "done", "lost", "refused"]


@dataclass(slots=True, eq=False)
class Request:
    """`tokens_done` counts answer tokens; `began_s` and `step_s` are of the decode round under way.

    `promises` are seconds of prompt announced, by stage, to those that it has not reached.
    """

    number: int
    ask: Ask
    gateway: str
    state: State = "waiting"
    stages: list[Stage] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    turn: int = 0
    tokens_done: int = 0
    began_s: float = 0.0
    step_s: float = 0.0
    rate: float = 0.0
    first_s: float | None = None
    end_s: float | None = None
    waits_since_s: float = 0.0
    excluded: set[str] = field(default_factory=set)
    waits: int = 0
    breaks: int = 0
    had_alternate: bool = False
    fed: bool = False
    cached_tokens: int = 0
    tries: int = 0
    promises: dict[int, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Cache it needs at every layer, in tokens."""
        return self.ask.prompt_tokens + self.ask.answer_tokens

    @property
    def context(self) -> int:
        """Tokens that a replacement stage has to be fed."""
        return self.ask.prompt_tokens + self.tokens_done

    @property
    def work_tokens(self) -> int:
        """Tokens that stages have yet to read: those whose cache they all kept from another prompt are not."""
        return max(1, self.context - self.cached_tokens)

    def hold(self, stages: list[Stage], machines: list[Machine]) -> None:
        """Reserve cache at stages that are new to it, and give up those it no longer uses."""
        for index in list(self.promises):
            self.fulfil(index)
        # A machine that was unloaded since has forgotten the session, and its cache room with it.
        held = [
            (stage, machine)
            for stage, machine in zip(self.stages, self.machines, strict=True)
            if machine.sessions.pop(self.number, None) is self
        ]
        for stage, machine in held:
            machine.kv_free_bytes += machine.kv_bytes(self.tokens, stage.end - stage.start)
        for stage, machine in zip(stages, machines, strict=True):
            machine.kv_free_bytes -= machine.kv_bytes(self.tokens, stage.end - stage.start)
            machine.sessions[self.number] = self
        self.stages, self.machines = stages, machines

    def promise(self, first: int, end: int) -> None:
        """Tell the stages from `first` to before `end` that a prompt will come."""
        for index in range(first, end):
            stage, machine = self.stages[index], self.machines[index]
            self.promises[index] = machine.prompt_work_s(self.work_tokens, stage.end - stage.start)
            machine.promised_s += self.promises[index]

    def fulfil(self, index: int) -> None:
        """The prompt reached that stage, or never will."""
        promised_s = self.promises.pop(index, 0.0)
        if promised_s:
            machine = self.machines[index]
            machine.promised_s = max(0.0, machine.promised_s - promised_s)

    def flow(self, rate: float) -> None:
        """Ask `rate` tokens a second of every stage from now on; 0 stops."""
        joined = (rate > 0) - (self.rate > 0)
        for machine in self.machines:
            machine.rate = max(0.0, machine.rate + rate - self.rate)
            machine.streams += joined
        self.rate = rate

    def credit(self, now_s: float) -> None:
        """Count the tokens of a round that is cut short."""
        if self.state == "decode" and self.step_s > 0:
            more = int((now_s - self.began_s) / self.step_s)
            self.tokens_done = min(self.ask.answer_tokens - 1, self.tokens_done + max(0, more))
