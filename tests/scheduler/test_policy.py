import pytest

from scheduler import Assignment, Device, NodeShape, Plan, Policy, Shortage, make_plan, needs_replan
from scheduler.seating import seat_of


def place(build, nodes, **more):
    return make_plan("m", build.model(), nodes, build.links(), **{"epoch": 1, "planner": "n0", **more})


def test_required_tags_keep_all_others_out(build):
    nodes = [build.node(f"n{k}", 9, tags=frozenset({"trusted"} if k % 2 else set())) for k in range(6)]
    policy = Policy(require=frozenset({"trusted"}))
    plan = place(build, nodes, policy=policy)
    assert {a.node for a in plan.assignments} == {"n1", "n3", "n5"}
    with pytest.raises(Shortage):
        place(build, nodes[:2], policy=policy)


def test_first_and_last_stage_see_tokens_and_may_ask_for_more_trust(build):
    nodes = [build.node(f"n{k}", 5, tags=frozenset({"trusted"} if k in (2, 4) else set())) for k in range(6)]
    plan = place(build, nodes, policy=Policy(ends_require=frozenset({"trusted"})), copies=1)
    ends = {a.node for a in plan.assignments if a.start == 0 or a.end == 8}
    assert ends == {"n2", "n4"}
    assert min(plan.coverage(8)) >= 1


def test_an_avoided_tag_is_kept_out_and_one_that_appears_calls_for_a_new_plan(build):
    nodes = build.nodes(9, 9, 9, 9)
    policy = Policy(avoid=frozenset({"asleep"}))
    before = place(build, nodes, policy=policy)
    used = before.assignments[0].node
    changed = [build.node(n.id, 9, tags=frozenset({"asleep"})) if n.id == used else n for n in nodes]
    assert "tags" in (needs_replan(before, build.model(), changed, copies=1, policy=policy) or "")
    after = place(build, changed, policy=policy, previous=before, epoch=2)
    assert used not in {a.node for a in after.assignments}


def test_a_node_whose_owner_is_using_it_is_taken_last(build):
    busy = build.node("busy", 30, tags=frozenset({"owner-active"}))
    idle = build.node("idle", 30)
    assert [a.node for a in place(build, [busy, idle]).assignments] == ["idle"]
    assert [a.node for a in place(build, [busy]).assignments] == ["busy"]


def test_a_dead_nodes_span_is_not_fetched_over_a_metered_line_where_another_has_room(build):
    metered = build.node("a", 9, 2.0, tags=frozenset({"metered"}))
    nodes = [build.node("n0", 9), build.node("n1", 9), metered, build.node("z", 9, 0.9)]
    before = Plan("m", 1, "n0", (Assignment("n0", 0, 3), Assignment("n1", 3, 6), Assignment("gone", 6, 8)))
    after = place(build, nodes, previous=before, epoch=2)
    assert Assignment("z", 6, 8) in after.assignments


def test_devices_of_a_node_are_reckoned_by_the_layers_they_hold(build):
    model = build.model(layers=8, layer=1_000_000, embed=0, context=0)
    fast, slow = Device(6_000_000, 1e13, 4e10), Device(2_000_000, 1e13, 1e10)
    node = NodeShape("a", 8_000_000, 1e13, 1e9, devices=(fast, slow))
    assert seat_of(model, node).room == 8
    assert seat_of(model, node).layer_s == pytest.approx((6 / 4e10 + 2 / 1e10) / 8 * 1e6)
    shared = NodeShape("a", 3_500_000, 1e13, 1e9, devices=(fast, slow))
    assert seat_of(model, shared).room == 3
