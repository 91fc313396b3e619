"""The mesh planner under joins, leaves, crashes, drift and models that come and go."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler import (
    Assignment,
    Link,
    ModelShape,
    NodeShape,
    Plan,
    Shortage,
    make_plan,
    planner_rank,
)
from scheduler.board import Facts
from scheduler.online import (
    Joined,
    Left,
    MeshPlanner,
    ModelAdded,
    ModelDropped,
    Observed,
    PlanSeen,
    Publish,
    ReportShortage,
    Tick,
)
from scheduler.pipeline import Seat
from scheduler.planner import MESH
from scheduler.relief import trim
from scheduler.shapes import coverage
from scheduler.sharing import Wanted, left_over

MIB = 1 << 20


def link(_a, _b):
    return Link(0.002, 1e8)


def shape(layers=8, layer=700_000):
    return ModelShape(layers, layer, 500_000, 0, True, 1.4e6, 512, 64, 1024)


def node(name, mib, speed=1.0):
    return NodeShape(name, int(mib * MIB), 1e11 * speed, 2e10 * speed)


def grown(*sizes, me="n0", copies=1):
    planner = MeshPlanner(me, link)
    out = []
    for k, size in enumerate(sizes):
        planner.handle(Joined(node(f"n{k}", size)), 0.0)
    out += planner.handle(ModelAdded("m", Wanted(shape(), copies=copies)), 0.0)
    return planner, out


def first_of(names):
    return planner_rank(MESH, names)[0]


def test_only_the_first_in_rank_plans():
    names = ["n0", "n1", "n2"]
    first = first_of(names)
    for me in names:
        _, out = grown(9, 9, 9, me=me)
        published = [i for i in out if isinstance(i, Publish)]
        assert bool(published) == (me == first)


def test_members_that_come_together_are_ranked_once(monkeypatch):
    ranked = []

    def counted(subject, members):
        ranked.append(len(members))
        return planner_rank(subject, members)

    monkeypatch.setattr("scheduler.online.planner_rank", counted)
    names = [f"n{k}" for k in range(30)]
    planner = MeshPlanner(first_of(names), link)
    planner.handle_all([Joined(node(name, 4)) for name in names], 0.0)
    assert planner.first == first_of(names)
    assert ranked == [30]
    planner.handle(Joined(node(names[0], 8)), 1.0)
    assert ranked == [30], "figures of a member changed, not who is one"
    gone = next(name for name in names if name != planner.first)
    planner.handle(Left(gone), 2.0)
    assert planner.first == first_of(names)
    assert ranked == [30, 29]


def test_the_next_in_rank_takes_over_with_a_higher_epoch_and_the_same_spans():
    names = ["n0", "n1", "n2", "n3"]
    first = first_of(names)
    second = first_of([n for n in names if n != first])
    leader, out = grown(3, 3, 3, 3, me=first)
    (publish,) = [i for i in out if isinstance(i, Publish)]
    heir, _ = grown(3, 3, 3, 3, me=second)
    heir.handle(PlanSeen(publish.plan), 1.0)
    assert heir.plans["m"] == publish.plan
    (taken,) = heir.handle(Left(first), 2.0)
    assert taken.plan.epoch > publish.plan.epoch
    assert taken.plan.planner == second
    kept = {a for a in publish.plan.assignments if a.node != first}
    assert kept <= set(taken.plan.assignments)
    assert leader.plans["m"] == publish.plan


def test_a_shortage_is_said_once_and_ends_when_a_node_comes():
    me = first_of(["n0", "n1"])
    planner = MeshPlanner(me, link)
    planner.handle(Joined(node(me, 2)), 0.0)
    (short,) = planner.handle(ModelAdded("m", Wanted(shape())), 0.0)
    assert isinstance(short, ReportShortage)
    other = "n1" if me == "n0" else "n0"
    assert planner.handle(Joined(node(me, 2)), 0.5) == []
    (less,) = planner.handle(Joined(node(me, 2.9)), 0.6)
    assert less.shortage.missing_bytes < short.shortage.missing_bytes
    assert less.plan.epoch > short.plan.epoch
    (publish,) = planner.handle(Joined(node(other, 9)), 1.0)
    assert isinstance(publish, Publish)


def test_small_drift_is_no_news_and_a_faster_node_is_weighed_at_leisure():
    me = first_of(["n0", "n1", "n2", "big"])
    planner = MeshPlanner(me, link)
    for name in ("n0", "n1", "n2"):
        planner.handle(Joined(node(name, 3)), 0.0)
    planner.handle(ModelAdded("m", Wanted(shape(), copies_max=1)), 0.0)
    before = planner.plans["m"]
    assert planner.handle(Joined(node("big", 64, 20)), 1.0) == []
    assert planner.plans["m"] == before
    assert planner.handle(Tick(), 10.0) == []
    assert planner.handle(Tick(), 100.0) == []
    (better,) = planner.handle(Tick(), 200.0)
    assert [a.node for a in better.plan.assignments] == ["big"]
    assert planner.handle(Tick(), 300.0) == []


def test_open_sessions_make_a_move_dearer():
    nodes = [node(f"n{k}", 3) for k in range(3)]
    before = make_plan("m", shape(), nodes, link, epoch=1, planner="n0")
    sessions = {f"n{k}": 5 for k in range(3)}

    def moves(speed, **more):
        mesh = [*nodes, node("big", 64, speed)]
        return make_plan("m", shape(), mesh, link, previous=before, epoch=2, planner="n0", **more) != replace(
            before, epoch=2
        )

    speeds = [0.01 * 1.1**k for k in range(80)]
    calm = [s for s in speeds if moves(s)]
    busy = [s for s in speeds if moves(s, sessions=sessions)]
    assert min(busy) > min(calm)
    assert set(busy) < set(calm)


def test_models_share_by_demand_within_memory():
    planner = MeshPlanner(ME, link)
    for k in range(8):
        planner.handle(Joined(node(f"n{k}", 6)), 0.0)
    wanted = {
        "a-hot": Wanted(shape(), demand=9.0, copies_max=6),
        "b-cold": Wanted(shape(), demand=1.0, copies_max=6),
        "huge": Wanted(shape(layers=4, layer=50 * MIB), demand=5.0),
    }
    said = [i for m, w in wanted.items() for i in planner.handle(ModelAdded(m, w), 0.0)]
    assert [i.model for i in said if isinstance(i, ReportShortage)] == ["huge"]
    planner.handle(ModelDropped("huge"), 1.0)
    at_leisure(planner, 10)
    hot, cold = copies_of(planner, "a-hot"), copies_of(planner, "b-cold")
    assert hot > cold >= 1


def test_a_dropped_models_memory_goes_to_who_is_short():
    me = first_of(["n0"])
    planner = MeshPlanner(me, link)
    planner.handle(Joined(node("n0", 7)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape())), 0.0)
    (short,) = planner.handle(ModelAdded("b", Wanted(shape())), 0.0)
    assert isinstance(short, ReportShortage)
    (publish,) = planner.handle(ModelDropped("a"), 1.0)
    assert publish.plan.model == "b"


def test_a_model_that_lost_its_place_leaves_its_memory_to_one_that_waits():
    planner = MeshPlanner(ME, link)
    planner.handle(Joined(node("n0", 2)), 0.0)
    planner.handle(Joined(node("n1", 5)), 0.0)
    planner.handle(ModelAdded("b", Wanted(shape())), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(1))), 0.0)
    assert set(planner.plans) == {"b"}
    planner.handle(Left("n0"), 1.0)
    assert set(planner.plans) == {"a"}


ME = next(
    name
    for name in (f"me{i}" for i in range(10_000))
    if planner_rank(MESH, [name, "big", *(f"n{k}" for k in range(8)), *(f"n{k:02d}" for k in range(80))])[0]
    == name
)
"""A member that outranks all others."""


def copies_of(planner, model, layers=8):
    plan = planner.plans.get(model)
    return min(plan.coverage(layers)) if plan else 0


def at_leisure(planner, minutes, start_s=0.0):
    for k in range(minutes):
        planner.handle(Tick(), start_s + 60.0 * (k + 1))
        planner.validate()


def test_copies_follow_demand_and_give_way_to_a_model_without_a_place():
    planner = MeshPlanner(ME, link)
    for k in range(8):
        planner.handle(Joined(node(f"n{k}", 7)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(), demand=1.0, copies_max=8)), 0.0)
    planner.handle(ModelAdded("b", Wanted(shape(), demand=3.0, copies_max=8)), 0.0)
    at_leisure(planner, 12)
    assert (copies_of(planner, "a"), copies_of(planner, "b")) == (2, 6)
    planner.handle(ModelAdded("c", Wanted(shape(), demand=0.1, copies_max=1)), 800.0)
    planner.validate()
    assert [copies_of(planner, m) for m in "abc"] == [1, 6, 1] or [copies_of(planner, m) for m in "abc"] == [
        2,
        5,
        1,
    ]
    at_leisure(planner, 12, 800.0)
    assert copies_of(planner, "c") == 1
    assert copies_of(planner, "a") >= 1


def test_a_model_that_cannot_grow_does_not_keep_others_from_it():
    planner = MeshPlanner(ME, link)
    planner.handle(Joined(node("big", 21)), 0.0)
    for k in range(2):
        planner.handle(Joined(node(f"n{k}", 7)), 0.0)
    planner.handle(ModelAdded("b", Wanted(shape(8, 2_500_000), demand=50.0)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(), demand=1.0)), 0.0)
    at_leisure(planner, 10)
    assert copies_of(planner, "b") == 1
    assert copies_of(planner, "a") == 2


def told(planner, model, demand, copies_max=8, **facts):
    return planner.handle(Observed(model, Facts(**facts), demand, copies_max), 0.0)


def full_mesh():
    """Eight nodes, a copy each: two of the hot model a, two of b, four for whoever is wanted most."""
    planner = MeshPlanner(ME, link)
    for k in range(8):
        planner.handle(Joined(node(f"n{k}", 7)), 0.0)
    for model, demand in (("a", 6.0), ("b", 1.0)):
        planner.handle(ModelAdded(model, Wanted(shape(), demand=demand, copies_max=8)), 0.0)
    at_leisure(planner, 12)
    return planner


def test_where_demand_shifts_copies_change_hands_one_at_a_time_and_nobody_else_moves():
    planner = full_mesh()
    assert (copies_of(planner, "a"), copies_of(planner, "b")) == (7, 1)
    told(planner, "a", 1.0)
    told(planner, "b", 6.0)
    shares = []
    for k in range(12):
        before = {m: set(p.assignments) for m, p in planner.plans.items()}
        out = planner.handle(Tick(), 1000.0 + 60 * k)
        planner.validate()
        moved = {m: set(p.assignments) ^ before[m] for m, p in planner.plans.items()}
        assert len(out) in (0, 2)
        assert all(len(spans) <= 1 for spans in moved.values())
        shares.append((copies_of(planner, "a"), copies_of(planner, "b")))
    assert shares[-1] == (2, 6) or shares[-1] == (1, 7)
    assert shares[-1] == shares[-3]


def test_a_small_shift_of_demand_moves_nothing():
    planner = full_mesh()
    told(planner, "a", 5.0)
    told(planner, "b", 1.4)
    assert planner.handle(Tick(), 2000.0) == []


def test_sessions_keep_a_copy_where_it_is_and_idle_copies_go_first():
    planner = full_mesh()
    hosts = sorted(a.node for a in planner.plans["a"].assignments)
    busy = dict.fromkeys(hosts[1:], 3)
    told(planner, "a", 1.0, sessions=busy)
    told(planner, "b", 6.0)
    planner.handle(Tick(), 2000.0)
    assert sorted(a.node for a in planner.plans["a"].assignments) == hosts[1:]


def test_the_cost_of_a_move_counts_against_a_trade():
    """The same shift of demand moves a copy where its weights lie on the disk already, and none where they do not."""

    def trades(demand, **facts):
        planner = full_mesh()
        told(planner, "b", demand, **facts)
        return bool(planner.handle(Tick(), 2000.0))

    held = {f"n{k}": [(0, 8)] for k in range(8)}
    demands = [1.7 + 0.05 * k for k in range(40)]
    dear = min(d for d in demands if trades(d))
    cheap = min(d for d in demands if trades(d, held=held))
    assert cheap < dear


def test_copies_beyond_those_wanted_go_when_demand_falls():
    planner = full_mesh()
    told(planner, "a", 0.0, copies_max=2)
    at_leisure(planner, 6, 2000.0)
    assert (copies_of(planner, "a"), copies_of(planner, "b")) == (2, 6)


def test_a_copy_that_demand_brought_is_replaced_at_once_when_its_host_goes():
    planner = MeshPlanner(ME, link)
    for k in range(5):
        planner.handle(Joined(node(f"n{k}", 7)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(), copies_max=2)), 0.0)
    at_leisure(planner, 4)
    assert copies_of(planner, "a") == 2
    lost = planner.plans["a"].assignments[0].node
    planner.handle(Left(lost), 1000.0)
    assert copies_of(planner, "a") == 2


def test_a_model_takes_at_once_the_copies_that_another_can_spare():
    planner = full_mesh()
    out = planner.handle(ModelAdded("c", Wanted(shape())), 2000.0)
    assert {i.plan.model for i in out} == {"a", "c"}
    assert [copies_of(planner, m) for m in "abc"] == [1, 1, 1] or copies_of(planner, "c") >= 1
    planner.validate()


def test_a_model_is_moved_where_only_that_makes_room_for_another():
    """`a` sits on the only node that could hold `b`: it goes elsewhere, and both are served."""
    planner = MeshPlanner(ME, link)
    planner.handle(Joined(node("big", 12)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(4))), 0.0)
    planner.handle(Joined(node("n0", 5)), 1.0)
    assert [a.node for a in planner.plans["a"].assignments] == ["big"]
    out = planner.handle(ModelAdded("b", Wanted(shape(2, 5_000_000))), 2.0)
    planner.validate()
    assert {i.plan.model for i in out} == {"a", "b"}
    assert [a.node for a in planner.plans["a"].assignments] == ["n0"]
    assert [a.node for a in planner.plans["b"].assignments] == ["big"]


def test_what_stands_of_a_model_stays_for_the_day_its_host_comes_back():
    planner = MeshPlanner(ME, link)
    for k in range(3):
        planner.handle(Joined(node(f"n{k}", 3)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape())), 0.0)
    before = planner.plans["a"].assignments
    lost = before[1].node
    (short,) = planner.handle(Left(lost), 1.0)
    assert isinstance(short, ReportShortage)
    assert set(short.plan.assignments) == set(before)
    assert planner.plans == {}
    assert planner.held["a"] == short.plan
    (back,) = planner.handle(Joined(node(lost, 3)), 2.0)
    assert back.plan.assignments == before
    assert back.plan.epoch > short.plan.epoch


def test_measured_times_move_work_to_who_is_really_quicker():
    planner = MeshPlanner(ME, link)
    for name in ("n0", "n1"):
        planner.handle(Joined(node(name, 9)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(), copies_max=1)), 0.0)
    ((host,),) = ([a.node for a in planner.plans["a"].assignments],)
    idle = "n1" if host == "n0" else "n0"
    roofline_s = 700_000 / 2e10
    # The host measured five times its roofline: so, it must be thought, would the other; no reason to move.
    told(planner, "a", 1.0, 1, decode_s={host: 5 * roofline_s})
    at_leisure(planner, 6, 1000.0)
    assert [a.node for a in planner.plans["a"].assignments] == [host]
    told(planner, "a", 1.0, 1, decode_s={host: 5 * roofline_s, idle: roofline_s})
    planner.handle(Tick(), 2000.0)
    assert [a.node for a in planner.plans["a"].assignments] == [host], "one reading may be a hiccup"
    planner.handle(Tick(), 2060.0)
    assert [a.node for a in planner.plans["a"].assignments] == [idle]


def test_what_would_go_where_is_said_without_doing_it():
    planner = full_mesh()
    before = planner.plans
    prospect = planner.preview("new", Wanted(shape()))
    assert min(coverage(prospect.spans, 8)) == 1
    assert [a.node for a in prospect.moved["a"]] != [a.node for a in before["a"].assignments]
    (chain,) = prospect.chains
    assert (chain.stages, chain.single_s > 0) == (prospect.spans, True)
    assert planner.plans == before
    with pytest.raises(Shortage):
        planner.preview("huge", Wanted(shape(8, 50 * MIB)))
    assert set(planner.preview("a", Wanted(shape())).spans) == set(before["a"].assignments)


def test_two_planners_that_do_not_see_each_other_do_not_outbid_each_other_without_end():
    planner, _ = grown(9, 9, me=first_of(["n0", "n1"]))
    held = planner.plans["m"]

    def seen(epoch, now_s):
        return planner.handle(PlanSeen(replace(held, epoch=epoch, planner="hidden")), now_s)

    (answer,) = seen(5, 1.0)
    assert (answer.plan.epoch, answer.plan.assignments) == (6, held.assignments)
    assert seen(6, 2.0) == []
    assert seen(7, 30.0) == []
    (answer,) = seen(7, 62.0)
    assert answer.plan.epoch == 8


def test_a_planner_does_not_go_back_behind_a_fence_of_an_earlier_life():
    me = first_of(["n0", "n1"])
    old = Plan("m", 7, me, (Assignment("n0", 0, 8),))
    planner = MeshPlanner(me, link, fences={"m": (7, me)}, remembered={"m": old.assignments})
    events = [Joined(node("n0", 9)), Joined(node("n1", 9)), ModelAdded("m", Wanted(shape()))]
    planner.handle_all(events, 0.0, may_plan=False)
    planner.handle_all([PlanSeen(replace(old, epoch=6))], 1.0, may_plan=False)
    assert planner.plans == {}
    (publish,) = planner.handle(Tick(), 2.0)
    assert (publish.plan.epoch, publish.plan.assignments) == (8, old.assignments)


def test_pinned_hosts_keep_their_span_and_their_loss_is_mended():
    planner = MeshPlanner(ME, link)
    planner.handle(Joined(replace(node("n0", 1), pinned=(0, 5))), 0.0)
    for k in (1, 2):
        planner.handle(Joined(node(f"n{k}", 9)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape())), 0.0)
    assert planner.plans["a"].span("n0") == (0, 5)
    assert planner.plans["a"].coverage(8) == [1] * 8
    planner.validate()
    planner.handle(Left("n0"), 1.0)
    assert planner.plans["a"].coverage(8) == [1] * 8


def test_only_what_no_layer_needs_is_let_go():
    seats = {
        n: Seat(n, s, 0.0, 4, 4, 4, 4)
        for n, s in (("a", 1.0), ("b", 1.0), ("c", 9.0), ("d", 2.0), ("e", 3.0))
    }
    spans = [
        Assignment("a", 0, 2),
        Assignment("b", 2, 4),
        Assignment("c", 1, 3),
        Assignment("d", 0, 2),
        Assignment("e", 3, 4),
    ]
    assert trim(spans, 1, seats, 4) == [spans[0], spans[1]]
    assert trim([spans[0], spans[2], spans[1]], 1, seats, 4) == [spans[0], spans[1]]
    assert trim([spans[0], Assignment("c", 1, 4)], 1, seats, 4) == [spans[0], Assignment("c", 1, 4)]
    assert trim(spans, 2, seats, 4) == spans


def test_in_a_large_mesh_a_slow_host_is_relieved_and_nobody_else_moves():
    planner = MeshPlanner(ME, link)
    for k in range(80):
        planner.handle(Joined(node(f"n{k:02d}", 3, 1.0 + k / 1000)), 0.0)
    planner.handle(ModelAdded("a", Wanted(shape(), copies=2, copies_max=2)), 0.0)
    before = set(planner.plans["a"].assignments)
    slow = min(before)
    old = planner.nodes[slow.node]
    planner.handle(Joined(replace(old, decode_s_per_layer=1.0)), 1.0)
    assert set(planner.plans["a"].assignments) == before
    at_leisure(planner, 1, 60.0)
    after = set(planner.plans["a"].assignments)
    assert before - after == {slow}
    ((fresh),) = after - before
    assert (fresh.start, fresh.end) == (slow.start, slow.end)
    at_leisure(planner, 3, 200.0)
    assert set(planner.plans["a"].assignments) == after


class Mesh(RuleBasedStateMachine):
    """One planner, any churn around it."""

    @initialize()
    def start(self):
        self.now = 0.0
        self.planner = MeshPlanner(ME, link)
        self.nodes = {}
        self.wanted = {}
        self.epochs = {}

    def tell(self, event):
        self.now += 1.0
        for instruction in self.planner.handle(event, self.now):
            if isinstance(instruction, Publish):
                plan = instruction.plan
                assert plan.epoch > self.epochs.get(plan.model, 0)
                self.epochs[plan.model] = plan.epoch

    @rule(k=st.integers(0, 7), mib=st.sampled_from([0.5, 2, 3, 5, 8, 20]), speed=st.sampled_from([0.2, 1, 5]))
    def join_or_change(self, k, mib, speed):
        self.nodes[f"n{k}"] = node(f"n{k}", mib, speed)
        self.tell(Joined(self.nodes[f"n{k}"]))

    @rule(k=st.integers(0, 7))
    def leave(self, k):
        self.nodes.pop(f"n{k}", None)
        self.tell(Left(f"n{k}"))

    @rule(ks=st.sets(st.integers(0, 7), max_size=4))
    def crash_together(self, ks):
        for k in sorted(ks):
            self.leave(k)

    @rule(k=st.integers(0, 7), seconds=st.floats(1e-6, 1e-1))
    def drift(self, k, seconds):
        old = self.nodes.get(f"n{k}")
        if old is not None:
            new = NodeShape(old.id, old.memory_bytes, old.flops_per_s, old.read_bytes_per_s, seconds)
            self.nodes[old.id] = new
            self.tell(Joined(new))

    @rule(model=st.sampled_from(["a", "b"]), copies=st.integers(1, 3), layers=st.sampled_from([1, 4, 8]))
    def add_model(self, model, copies, layers):
        if model not in self.wanted:
            self.wanted[model] = Wanted(shape(layers), copies=copies)
            self.tell(ModelAdded(model, self.wanted[model]))

    @rule(model=st.sampled_from(["a", "b"]))
    def drop_model(self, model):
        self.wanted.pop(model, None)
        self.tell(ModelDropped(model))

    @rule()
    def think(self):
        self.now += 100.0
        self.tell(Tick())

    @invariant()
    def every_plan_is_valid_and_every_layer_covered_where_possible(self):
        if not hasattr(self, "planner"):
            return
        plans = self.planner.plans
        self.planner.validate()
        for model, wanted in self.wanted.items():
            if model in plans:
                assert isinstance(plans[model], Plan)
                assert {a.node for a in plans[model].assignments} <= set(self.nodes)
                assert min(plans[model].coverage(wanted.shape.layers)) >= 1
            else:
                room = left_over(list(self.nodes.values()), plans, self.wanted, model)
                with pytest.raises(Shortage):
                    make_plan(model, wanted.shape, room, link, epoch=1, planner="me")


Mesh.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestChurn = Mesh.TestCase


@pytest.mark.slow
class TestLongChurn(Mesh.TestCase):
    settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
