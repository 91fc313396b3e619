"""Several members' planners over views that differ: who plans, and which plans are ever adopted."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler import Link, MeshPlanner, ModelShape, NodeShape, planner_rank
from scheduler.online import Joined, Left, ModelAdded, PlanSeen, Tick
from scheduler.planner import MESH
from scheduler.sharing import Wanted

NAMES = ["a", "b", "c", "d"]
MODELS = ["m1", "m2"]
MIB = 1 << 20


def link(_a, _b):
    return Link(0.002, 1e8)


def node(name, mib=5):
    return NodeShape(name, mib * MIB, 1e11, 2e10)


class Gossip(RuleBasedStateMachine):
    """Members that see each other or not, and plans that reach some of them, late, out of order and again."""

    @initialize()
    def start(self):
        self.now = 0.0
        self.sees = {name: set(NAMES) for name in NAMES}
        self.published = {}
        self.history = {name: {model: [] for model in MODELS} for name in NAMES}
        self.planners = {}
        for name in NAMES:
            self.planners[name] = MeshPlanner(name, link)
            self.restart(name)

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name):
        """The daemon starts again with nothing remembered but its fences."""
        self.planners[name] = planner = MeshPlanner(name, link, fences=self.planners[name].fences)
        wanted = Wanted(ModelShape(8, 700_000, 500_000, 0, True, 1.4e6, 512, 64, 1024))
        events = [
            *(Joined(node(n)) for n in sorted(self.sees[name])),
            *(ModelAdded(m, wanted) for m in MODELS),
        ]
        planner.handle_all(events, self.now, may_plan=False)

    def tell(self, name, *events):
        self.now += 1.0
        for instruction in self.planners[name].handle_all(events, self.now):
            assert self.planners[name].first == name
            key = (name, instruction.plan.model)
            # A signer's record replaces the one before it.
            assert instruction.plan.epoch > max([0, *(p.epoch for p in self.published.get(key, [])[-1:])])
            self.published.setdefault(key, []).append(instruction.plan)

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def lose(self, name, other):
        if other != name:
            self.sees[name].discard(other)
            self.tell(name, Left(other))

    @rule(name=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def find(self, name, other):
        self.sees[name].add(other)
        self.tell(name, Joined(node(other)))

    @rule(name=st.sampled_from(NAMES), mib=st.sampled_from([0, 3, 9]))
    def change(self, name, mib):
        for other in NAMES:
            if name in self.sees[other]:
                self.tell(other, Joined(node(name, mib)))

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 3))
    def gossip(self, name, back):
        """Some plan of each signer, not always the newest, reaches a member."""
        for plans in list(self.published.values()):
            self.tell(name, PlanSeen(plans[max(0, len(plans) - 1 - back)]))

    @rule(name=st.sampled_from(NAMES))
    def think(self, name):
        self.now += 100.0
        self.tell(name, Tick())

    @rule(dead=st.sampled_from([None, *NAMES]))
    def settle(self, dead):
        """Once all who live see each other and every newest plan, all hold to one plan of each model."""
        living = [name for name in NAMES if name != dead]
        for name in living:
            self.sees[name] = set(living)
            self.tell(name, *(Joined(node(other)) for other in living), *([Left(dead)] if dead else []))
        for _ in range(5):
            self.now += 100.0
            for name in living:
                self.tell(name, *(PlanSeen(plans[-1]) for plans in self.published.values()))
                self.watch()
        assert {self.planners[name].first for name in living} == {planner_rank(MESH, living)[0]}
        for model in MODELS:
            held = {self.planners[name].held.get(model) for name in living}
            assert len(held) == 1
            assert dead is None or dead not in {a.node for plan in held for a in plan.assignments}

    @invariant()
    def watch(self):
        """No member goes back to an older epoch, and none takes two plans of one epoch."""
        for name, planner in getattr(self, "planners", {}).items():
            for model, plan in planner.held.items():
                seen = self.history[name][model]
                if not seen or seen[-1] != plan:
                    assert not seen or plan.epoch > seen[-1].epoch, (name, seen[-1], plan)
                    seen.append(plan)


Gossip.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestGossip = Gossip.TestCase
