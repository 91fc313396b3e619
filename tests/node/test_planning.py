"""Who plans when, which plan holds, and what is planned: several planning cores over one made-up mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.adverts import DeviceAdvert, HostAdvert, ModelAdvert, NodeAdvert, PlanAdvert, PlanSpan
from node.atlas import Atlas
from node.planning import Planning, Publish
from node.preview import preview_document
from scheduler import Assignment, memory_needed, planner_rank
from scheduler.planner import MESH

MIB = 1 << 20
MODEL_ID = "ab" * 32
OTHER_ID = "cd" * 32


def card(memory_bytes=10 * MIB, **more):
    return NodeAdvert("n", "0", (), None, **({"serves": True} | more), memory_bytes=memory_bytes,
                      flops_per_s=1e11, read_bytes_per_s=1e10, device="cpu")  # fmt: skip


def toy(manifest_id=MODEL_ID, name="toy", **more):
    fields = {
        "created_s": 1, "dtype": "bfloat16", "quant": "none", "copies": 1, "concurrency": 1,
        "context_tokens": 16, "layers": 8, "layer_bytes": MIB, "embed_bytes": 0, "head_bytes": 0, "tied": False,
        "layer_flops_per_token": 1e6, "hidden_bytes": 64, "kv_bytes_per_token_per_layer": 64,
    }  # fmt: skip
    return ModelAdvert(name=name, manifest_id=manifest_id, **(fields | more))


class Mesh:
    """A view that all share (but for whom each takes for gone) and a planning core for each member."""

    def __init__(self, *names, memory_bytes=5 * MIB, models=None):
        self.cards = {name: card(memory_bytes) for name in names}
        self.cores = {name: Planning(name) for name in names}
        self.models = {model.name: model for model in models or [toy()]}
        self.plans: dict[str, dict[str, PlanAdvert]] = {}
        self.hosts: dict[str, dict[str, HostAdvert]] = {}
        self.gone: dict[str, set[str]] = {}
        self.offers: dict[str, int] = {}

    def atlas(self, at=None):
        plans = {model: sorted(said.items()) for model, said in self.plans.items()}
        gone = frozenset(self.gone.get(at, ()))
        return Atlas(self.cards, gone, self.models, self.hosts, plans, {}, self.offers)

    def tick(self, *names, may_plan=True):
        """Each of `names` (all, when none are given) looks at the view once; what was published."""
        out = []
        for name in names or self.cores:
            for publish in self.cores[name].handle(self.atlas(name), may_plan=may_plan):
                self.say(name, publish)
                out.append((name, publish))
        return out

    def say(self, name, publish):
        self.plans.setdefault(publish.manifest_id, {})[name] = publish.advert

    def settle(self, rounds=4):
        """Look round and round; nobody may have anything left to say."""
        for _ in range(rounds):
            said = self.tick()
        assert said == []
        held = [core.plans.get(MODEL_ID) for core in self.cores.values()]
        assert len(set(held)) == 1, held
        return held[0]

    def leave(self, name):
        """`name` is dead: its records stay for a while, everyone takes it for gone."""
        del self.cores[name]
        for other in self.cores:
            self.gone.setdefault(other, set()).add(name)

    def first(self, *without):
        return next(name for name in planner_rank(MESH, self.cards) if name not in without)

    def serve(self):
        """All hosts are as the plan of the first core wishes."""
        for model in self.models.values():
            plan = next(iter(self.cores.values())).plans[model.manifest_id]
            self.hosts[model.manifest_id] = {
                a.node: HostAdvert(a.start, a.end, "ready", plan.epoch) for a in plan.assignments
            }


def coverage(plan, layers=8):
    return plan.coverage(layers)


def test_the_first_ranked_alone_plans_and_all_hold_its_plan():
    mesh = Mesh("a", "b", "c")
    said = mesh.tick()
    assert [name for name, _ in said] == [mesh.first()]
    plan = mesh.settle()
    assert plan.planner == mesh.first()
    assert min(coverage(plan)) == 1
    assert all(
        mesh.cores[n].span_of(MODEL_ID, a.node) == (a.start, a.end) for n in "abc" for a in plan.assignments
    )


def test_nobody_plans_before_its_view_is_that_of_the_mesh():
    mesh = Mesh("a", "b")
    assert mesh.tick(may_plan=False) == []
    assert len(mesh.tick(may_plan=True)) == 1


def test_the_next_ranked_takes_over_and_its_epoch_is_greater():
    mesh = Mesh("a", "b", "c", memory_bytes=9 * MIB)
    before = mesh.settle()
    planner = mesh.first()
    mesh.leave(planner)
    after = mesh.settle()
    assert after.planner == mesh.first(planner)
    assert after.epoch > before.epoch
    assert planner not in {a.node for a in after.assignments}
    assert min(coverage(after)) == 1


def test_a_plan_seen_by_one_only_before_its_planner_died_is_overruled():
    """The planner published and died; one member adopted, the others never will: the next planner goes above it."""
    mesh = Mesh("a", "b", "c", "d", memory_bytes=9 * MIB)
    first, second = planner_rank(MESH, mesh.cards)[:2]
    quick = next(name for name in mesh.cores if name not in (first, second))
    mesh.gone = {name: {first} for name in mesh.cores if name != first}
    old = [mesh.tick(second), mesh.tick()][0][0][1].advert
    assert {core.plans[MODEL_ID].planner for n, core in mesh.cores.items() if n != first} == {second}
    # `first` is back, plans anew, is seen by one, and dies.
    newer = PlanAdvert(old.epoch + 1, (PlanSpan(quick, 0, 8),))
    mesh.gone = {}
    mesh.say(first, Publish(MODEL_ID, newer))
    mesh.tick(quick)
    assert mesh.cores[quick].plans[MODEL_ID].epoch == newer.epoch
    mesh.leave(first)
    plan = mesh.settle()
    assert plan.planner == second
    assert plan.epoch > newer.epoch


def test_a_plan_of_a_lower_ranked_member_moves_nobody():
    mesh = Mesh("a", "b", "c", "d")
    plan = mesh.settle()
    last = planner_rank(MESH, mesh.cards)[-1]
    mesh.say(last, Publish(MODEL_ID, PlanAdvert(plan.epoch + 7, (PlanSpan(last, 0, 8),))))
    mesh.cores.pop(last)
    after = mesh.settle()
    assert after.assignments == plan.assignments
    assert after.planner == plan.planner
    assert after.epoch == plan.epoch + 8


def test_a_member_that_gives_all_to_itself_and_says_it_holds_it_moves_nobody():
    mesh = Mesh("a", "b", "c", "d")
    plan = mesh.settle()
    last = planner_rank(MESH, mesh.cards)[-1]
    mesh.say(last, Publish(MODEL_ID, PlanAdvert(plan.epoch + 7, (PlanSpan(last, 0, 8),))))
    mesh.hosts[MODEL_ID] = {last: HostAdvert(0, 8, "ready", plan.epoch + 7)}
    mesh.cores.pop(last)
    assert mesh.settle().assignments == plan.assignments


def test_two_halves_of_a_mesh_that_meet_hold_one_plan():
    mesh = Mesh("a", "b", "c", "d", memory_bytes=9 * MIB)
    halves = ("a", "b"), ("c", "d")
    for ours, theirs in (halves, halves[::-1]):
        for name in ours:
            mesh.gone[name] = set(theirs)
    shared = mesh.plans
    for half in halves:
        mesh.plans = {}
        for _ in range(3):
            mesh.tick(*half)
        for model, said in mesh.plans.items():
            shared.setdefault(model, {}).update(said)
    assert mesh.cores["a"].plans[MODEL_ID] != mesh.cores["c"].plans[MODEL_ID]
    mesh.plans, mesh.gone = shared, {}
    mesh.settle()


@pytest.mark.parametrize(
    "spans",
    [
        (PlanSpan("a", 0, 3),),
        (PlanSpan("a", 0, 9),),
        (PlanSpan("a", 0, 4), PlanSpan("b", 5, 8)),
    ],
)
def test_a_plan_that_leaves_layers_out_or_knows_too_many_is_nobody_s(spans):
    mesh = Mesh("a", "b", "c")
    mesh.say(mesh.first(), Publish(MODEL_ID, PlanAdvert(50, spans)))
    mesh.tick(may_plan=False)
    assert all(MODEL_ID not in core.plans for core in mesh.cores.values())


def test_a_newcomer_takes_the_plan_that_is_there():
    mesh = Mesh("a", "b", "c")
    before = mesh.settle()
    for name in ("d", "e", "f", "g"):
        mesh.cards[name] = card(5 * MIB)
        mesh.cores[name] = Planning(name)
    after = mesh.settle()
    assert after == before


def test_a_node_that_comes_back_with_an_empty_memory_moves_nothing():
    mesh = Mesh("a", "b", "c")
    before = mesh.settle()
    back = mesh.first()
    mesh.cores[back] = Planning(back)
    assert mesh.settle() == before


def test_a_shortage_is_told_in_plain_words_and_taken_back():
    mesh = Mesh("a", "b", memory_bytes=3 * MIB)
    mesh.settle()
    texts = {core.shortages[MODEL_ID] for core in mesh.cores.values()}
    assert len(texts) == 1
    assert "short" in texts.pop()
    mesh.cards["c"], mesh.cores["c"] = card(5 * MIB), Planning("c")
    plan = mesh.settle()
    assert min(coverage(plan)) == 1
    assert {core.shortages[MODEL_ID] for core in mesh.cores.values()} == {""}


def test_a_node_lost_for_good_is_a_shortage_until_it_or_another_comes():
    mesh = Mesh("a", "b", "c", memory_bytes=4 * MIB)
    plan = mesh.settle()
    lost = plan.assignments[0].node
    core = mesh.cores[lost]
    mesh.leave(lost)
    mesh.settle()
    assert all(c.shortages[MODEL_ID] for c in mesh.cores.values())
    mesh.gone, mesh.cores[lost] = {}, core
    after = mesh.settle()
    assert min(coverage(after)) == 1
    assert not any(c.shortages[MODEL_ID] for c in mesh.cores.values())


def test_several_models_share_the_memory_of_each_node():
    models = [toy(), toy(OTHER_ID, "other", created_s=2)]
    mesh = Mesh("a", "b", "c", "d", memory_bytes=5 * MIB, models=models)
    mesh.settle()
    core = mesh.cores["a"]
    used = dict.fromkeys(mesh.cards, 0)
    for model in models:
        assert min(coverage(core.plans[model.manifest_id])) == 1
        for a in core.plans[model.manifest_id].assignments:
            used[a.node] += memory_needed(model.shape(), a.start, a.end)
    assert all(amount <= 5 * MIB for amount in used.values())


def test_a_model_that_claims_to_be_older_takes_nothing_from_one_that_is_placed():
    mesh = Mesh("a", "b", "c", memory_bytes=3 * MIB + 4096 * 8, models=[toy(created_s=100)])
    before = mesh.settle()
    mesh.models["bogus"] = toy(OTHER_ID, "bogus", created_s=0)
    mesh.offers = {MODEL_ID: 3, OTHER_ID: 1}
    after = mesh.settle()
    assert after == before
    assert {core.shortages.get(OTHER_ID, "") != "" for core in mesh.cores.values()} == {True}


def test_a_model_that_left_the_mesh_is_forgotten():
    mesh = Mesh("a", "b")
    mesh.settle()
    mesh.models = {}
    mesh.tick()
    core = mesh.cores["a"]
    assert (core.plans, core.shortages, core.span_of(MODEL_ID, "a")) == ({}, {}, None)


def test_a_model_whose_shape_changes_under_a_plan_is_planned_anew():
    mesh = Mesh("a", "b", "c")
    mesh.settle()
    mesh.models = {"toy": toy(layers=4)}
    plan = mesh.settle()
    assert coverage(plan, 4) == [1] * 4


def test_pinned_spans_are_taken_as_they_are():
    mesh = Mesh("a", "b")
    mesh.cards = {"a": card(pinned=(0, 4)), "b": card(pinned=(4, 8))}
    assert set(mesh.settle().assignments) == {Assignment("a", 0, 4), Assignment("b", 4, 8)}


def test_what_pinned_spans_leave_short_is_placed_around_them():
    mesh = Mesh("a", "b", "c")
    mesh.cards["a"] = card(pinned=(0, 4))
    plan = mesh.settle()
    assert plan.span("a") == (0, 4)
    assert coverage(plan) == [1] * 8
    assert all(a.start >= 4 for a in plan.assignments if a.node != "a")


def test_pinned_spans_beyond_the_model_are_cut_and_empty_ones_left_out():
    mesh = Mesh("a", "b", "c", memory_bytes=9 * MIB)
    mesh.cards |= {"a": card(pinned=(6, 99)), "b": card(pinned=(8, 12))}
    plan = mesh.settle()
    assert plan.span("a") == (6, 8)
    assert plan.span("b") is None


def test_a_pinned_newcomer_relieves_nobody_before_it_serves():
    mesh = Mesh("a", "b", "c", memory_bytes=9 * MIB, models=[toy(copies=2)])
    before = mesh.settle()
    mesh.serve()
    mesh.cards["p"] = card(pinned=(0, 8))
    plan = mesh.settle()
    assert set(before.assignments) <= set(plan.assignments)
    assert plan.span("p") == (0, 8)


def test_a_node_that_does_not_serve_plans_but_hosts_nothing():
    mesh = Mesh("a", "b", "c", memory_bytes=9 * MIB)
    mesh.cards[mesh.first()] = card(9 * MIB, serves=False)
    plan = mesh.settle()
    assert plan.planner == mesh.first()
    assert plan.span(mesh.first()) is None


class Clocked(Mesh):
    """A mesh whose cores look once a minute."""

    now_s = 0.0

    def minutes(self, count, name=None):
        """What was published in so many minutes."""
        name = name or self.first()
        out = []
        for _ in range(count):
            self.now_s += 60.0
            for publish in self.cores[name].handle(self.atlas(name), may_plan=True, now_s=self.now_s):
                self.say(name, publish)
                out.append(publish)
        return out

    def said(self, manifest_id, busy, **more):
        """The ready hosts of a model report how busy they are."""
        plan = self.cores[self.first()].plans[manifest_id]
        self.hosts[manifest_id] = {
            a.node: HostAdvert(a.start, a.end, "ready", plan.epoch, busy=busy, **more)
            for a in plan.assignments
        }


def test_one_member_plans_all_models():
    models = [toy(f"{k:064x}", f"m{k}") for k in range(4)]
    mesh = Mesh(*"abcdef", memory_bytes=9 * MIB, models=models)
    assert {name for name, _ in mesh.tick()} == {mesh.first()}
    mesh.tick()
    assert all(len(core.plans) == 4 for core in mesh.cores.values())


def test_each_device_of_a_node_is_given_a_span_within_its_own_memory():
    mesh = Mesh("a", "b")
    two = (DeviceAdvert("cuda:0", 6 * MIB, 1e12, 1e11), DeviceAdvert("cuda:1", 4 * MIB, 1e12, 1e11))
    mesh.cards["a"] = card(10 * MIB, devices=two)
    mesh.cards["b"] = card(0)
    plan = mesh.settle()
    assert coverage(plan) == [1] * 8
    for host, most in (("a", 6), ("a#1", 4)):
        start, end = mesh.cores["b"].span_of(MODEL_ID, host)
        assert memory_needed(toy().shape(), start, end) <= most * MIB


def test_a_tag_that_a_host_loses_moves_its_span_at_once_and_nobody_else_s():
    model = toy(require=("trusted",))
    mesh = Mesh("a", "b", "c", "d", models=[model])
    for name in "abc":
        mesh.cards[name] = card(5 * MIB, tags=("trusted",))
    before = mesh.settle()
    hosts = {a.node for a in before.assignments}
    assert hosts < set("abc")
    lost = sorted(hosts)[0]
    mesh.cards[lost] = card(5 * MIB)
    after = mesh.settle()
    assert lost not in {a.node for a in after.assignments}
    assert {a for a in before.assignments if a.node != lost} <= set(after.assignments)
    for name in hosts - {lost}:
        mesh.cards[name] = card(5 * MIB)
    mesh.settle()
    assert all(core.shortages[MODEL_ID] for core in mesh.cores.values())


def test_the_first_and_last_layer_go_to_those_who_may_see_the_text():
    mesh = Mesh(*"abcd", models=[toy(ends_require=("trusted",), layers=12)])
    for name in "ad":
        mesh.cards[name] = card(5 * MIB, tags=("trusted",))
    plan = mesh.settle()
    assert {a.node for a in plan.assignments if a.start == 0 or a.end == 12} == {"a", "d"}


def test_a_node_whose_owner_starts_to_use_it_hands_its_work_over_at_leisure():
    mesh = Clocked("a", "b", memory_bytes=9 * MIB)
    mesh.minutes(1)
    ((host,),) = ([a.node for a in mesh.cores[mesh.first()].plans[MODEL_ID].assignments],)
    assert mesh.minutes(5) == []
    mesh.cards[host] = card(9 * MIB, tags=("owner-active",))
    said = mesh.minutes(5)
    assert [[span.node for span in publish.advert.spans] for publish in said] == [
        ["b" if host == "a" else "a"]
    ]


@pytest.mark.parametrize("seconds", [{}, {"sessions": 10}])
def test_open_sessions_hold_a_span_where_it_is(seconds):
    """A move that would pay if nobody was served is put off while sessions are open there."""
    mesh = Clocked("a", "b", memory_bytes=9 * MIB, models=[toy(concurrency=64)])
    mesh.minutes(1)
    host = mesh.cores[mesh.first()].plans[MODEL_ID].assignments[0].node
    other = "b" if host == "a" else "a"
    mesh.said(MODEL_ID, 0.0, **seconds)
    mesh.cards[other] = replace(card(9 * MIB), read_bytes_per_s=1.65e10)
    moved = [span.node for publish in mesh.minutes(5) for span in publish.advert.spans]
    assert moved == ([] if seconds else [other])


def test_measured_times_win_over_what_hardware_promises():
    mesh = Clocked("a", "b", "c", memory_bytes=9 * MIB)
    mesh.minutes(1)
    host = mesh.cores[mesh.first()].plans[MODEL_ID].assignments[0].node
    mesh.said(MODEL_ID, 0.0, plan_s_per_layer=5e-4)
    assert mesh.minutes(5) == [], "the others may be just as slow"
    mesh.hosts[MODEL_ID]["z"] = HostAdvert(0, 8, "ready", 1)
    for name in set("abc") - {host}:
        mesh.hosts[MODEL_ID][name] = HostAdvert(0, 8, "ready", 1, plan_s_per_layer=1e-4)
    (publish,) = mesh.minutes(5)
    assert host not in {span.node for span in publish.advert.spans}


def test_a_node_that_comes_and_goes_loses_its_work_to_one_that_stays():
    mesh = Clocked("a", "b", "c", memory_bytes=9 * MIB)
    mesh.minutes(1)
    planner = mesh.first()
    host = mesh.cores[planner].plans[MODEL_ID].assignments[0].node
    if host == planner:
        mesh.cards[planner] = card(0)
        mesh.minutes(3)
        host = mesh.cores[planner].plans[MODEL_ID].assignments[0].node
    for _ in range(90):
        mesh.gone = {planner: {host}}
        mesh.minutes(1)
        mesh.gone = {}
        mesh.minutes(1)
    assert mesh.cores[planner].shape(host).reliability < 0.8
    assert host not in {a.node for a in mesh.cores[planner].plans[MODEL_ID].assignments}


def test_copies_follow_what_is_asked_and_a_shift_moves_one_copy():
    models = [toy(), toy(OTHER_ID, "other", created_s=2)]
    mesh = Clocked("a", "b", "c", memory_bytes=9 * MIB, models=models)
    mesh.minutes(2)
    core = mesh.cores[mesh.first()]

    def copies():
        return [min(coverage(core.plans[m])) for m in (MODEL_ID, OTHER_ID)]

    assert copies() == [1, 1]
    for busy, expected in (((0.9, 0.0), [2, 1]), ((0.0, 0.9), [1, 2])):
        for _ in range(12):
            for model, share in zip((MODEL_ID, OTHER_ID), busy, strict=True):
                mesh.said(model, share)
            mesh.minutes(1)
        assert copies() == expected


def test_nobody_asks_so_no_copy_is_made_that_was_not_wanted():
    mesh = Clocked(*"abcdef", memory_bytes=9 * MIB)
    mesh.minutes(1)
    mesh.said(MODEL_ID, 0.1)
    assert mesh.minutes(20) == []


def test_a_restarted_node_does_not_go_back_behind_its_fences():
    mesh = Mesh("a", "b", "c")
    plan = mesh.settle()
    name = next(n for n in mesh.cores if n != mesh.first())
    back = Planning(name, fences=mesh.cores[name].fences)
    older = PlanAdvert.of(replace(plan, epoch=plan.epoch - 1))
    mesh.plans[MODEL_ID] = {mesh.first(): older}
    back.handle(mesh.atlas(name), may_plan=False)
    assert MODEL_ID not in back.plans
    mesh.plans[MODEL_ID] = {mesh.first(): PlanAdvert.of(plan)}
    back.handle(mesh.atlas(name), may_plan=False)
    assert back.plans[MODEL_ID] == plan


def test_a_newcomer_that_planned_before_it_saw_the_mesh_goes_on_from_what_is_hosted():
    mesh = Mesh(*"abcde", memory_bytes=5 * MIB)
    for _ in range(3):
        # Some moves, so that the plan is not the one that anybody would make from nothing.
        lost = mesh.settle().assignments[0].node
        mesh.cards[lost] = card(0)
        mesh.settle()
        mesh.cards[lost] = card(5 * MIB)
    before = mesh.settle()
    mesh.serve()
    name = next(n for n in (f"z{k}" for k in range(999)) if planner_rank(MESH, [*mesh.cards, n])[0] == n)
    mesh.cards[name], mesh.cores[name] = card(5 * MIB), Planning(name)
    seen, mesh.plans, mesh.hosts = (mesh.plans, mesh.hosts), {}, {}
    mesh.tick(name)
    blind = mesh.cores[name].plans[MODEL_ID]
    assert blind.assignments != before.assignments
    said, (mesh.plans, mesh.hosts) = mesh.plans, seen
    for model, by in said.items():
        mesh.plans.setdefault(model, {}).update(by)
    after = mesh.settle()
    assert (after.assignments, after.planner) == (before.assignments, name)


def test_when_a_whole_mesh_starts_again_each_goes_on_with_its_own_span():
    mesh = Mesh("a", "b", "c", memory_bytes=9 * MIB)
    lost = mesh.settle().assignments[0].node
    mesh.cards[lost] = card(0)
    before = mesh.settle()
    mesh.cards[lost] = card(9 * MIB)
    fresh = Mesh("a", "b", "c", memory_bytes=9 * MIB).settle()
    assert before.assignments != fresh.assignments
    mesh.plans, mesh.hosts = {}, {}
    for name, core in list(mesh.cores.items()):
        spans = {model: plan.assignments for model, plan in core.plans.items()}
        mesh.cores[name] = Planning(name, fences=core.fences, remembered=spans)
    after = mesh.settle()
    assert after.assignments == before.assignments
    assert after.epoch > before.epoch


def test_a_span_goes_to_who_held_it_once_and_has_its_weights_on_the_disk():
    mesh = Mesh(*"abcd", memory_bytes=0)

    def hosts():
        mesh.serve()
        return {a.node for a in mesh.settle().assignments}

    mesh.cards["c"] = card(9 * MIB)
    mesh.settle()
    assert hosts() == {"c"}
    mesh.cards |= {"c": card(0), "b": card(9 * MIB)}
    mesh.settle()
    assert hosts() == {"b"}
    mesh.cards |= {name: card(9 * MIB) for name in "acd"} | {"b": card(0)}
    mesh.settle()
    assert hosts() == {"c"}


def test_what_would_go_where_is_said_with_what_each_must_fetch():
    mesh = Mesh("a", "b", "c")
    mesh.settle()
    mesh.serve()
    core, atlas = mesh.cores["a"], mesh.atlas("a")
    here = preview_document(core, atlas, toy(), 1)
    assert [(s["node"], s["start"], s["end"]) for s in here["spans"]] == [
        (a.node, a.start, a.end) for a in sorted(core.plans[MODEL_ID].assignments, key=lambda a: a.start)
    ]
    assert all(s["serves"] and s["fetch_bytes"] == 0 for s in here["spans"])
    assert (here["published"], here["shortage"], len(here["replicas"])) == (True, None, 1)
    new = preview_document(core, atlas, toy(OTHER_ID, "other", layers=4), 1)
    assert new["published"] is False
    assert sum(s["fetch_bytes"] for s in new["spans"]) == 4 * MIB
    short = preview_document(core, atlas, toy(OTHER_ID, "other", layers=40), 1)
    assert short["spans"] == []
    assert short["shortage"]["missing_bytes"] > 20 * MIB
    assert mesh.settle() == core.plans[MODEL_ID]


INTS = st.integers(0, 1 << 60)
RATES = st.floats(0, 1e24)
PINS = st.none() | st.tuples(st.integers(0, 9), st.integers(1, 99))
CARDS = st.lists(st.tuples(INTS, RATES, RATES, PINS), min_size=1, max_size=4)
PLANS = st.lists(
    st.tuples(st.integers(0, 1 << 53), st.sampled_from("abcdz"), st.integers(0, 9), st.integers(1, 1024)),
    max_size=3,
)
SHAPES = st.fixed_dictionaries({
    "layers": st.integers(1, 1024), "copies": st.integers(1, 64), "layer_bytes": st.integers(1, 1 << 50),
    "kv_bytes_per_token_per_layer": st.integers(0, 1 << 40), "tied": st.booleans(),
})  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CARDS, SHAPES, PLANS)
def test_no_adverts_within_bounds_stop_the_planning(nodes, shape, plans):
    names = "abcd"[: len(nodes)]
    mesh = Mesh(*names, models=[toy(**shape)])
    for name, (memory, flops, read, pinned) in zip(names, nodes, strict=True):
        pinned = None if pinned is None or pinned[0] >= pinned[1] else pinned
        mesh.cards[name] = replace(card(memory), flops_per_s=flops, read_bytes_per_s=read, pinned=pinned)
    for epoch, node, start, end in plans:
        mesh.say(node, Publish(MODEL_ID, PlanAdvert(epoch, (PlanSpan(node, start, end),))))
    mesh.tick()
    if MODEL_ID in mesh.cores["a"].plans:
        mesh.serve()
    mesh.tick()
