"""Which chain a gateway takes, from adverts, from what it did itself, and from what it saw."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.adverts import HostAdvert, ModelAdvert, NodeAdvert
from node.atlas import Atlas
from node.serve.prefixes import marks_of, scope_of, told_mark
from node.serve.protocol import BACKGROUND, HIGH, NORMAL, PIECE_TOKENS, StageRef
from node.serve.selection import Selector, Wish, as_stages
from scheduler import Health, HealthConfig, NoChain, NoRoom, Rejected
from scheduler.outlook import TRIES_MAX, Aims

MANIFEST = "m" * 64
MODEL = ModelAdvert("toy", MANIFEST, 1, "bfloat16", "none", 1, 4, 4096, 8, 1, 1, 1, True, 1.0, 384, 256)
PROMPT = tuple(range(4 * PIECE_TOKENS + 1))
MARKS = marks_of(PROMPT)
HALVES = (StageRef("a1", 0, 4), StageRef("b1", 4, 8))


def host(start, end, free=10_000, **more):
    times = {"s_per_layer": 0.001, "prefill_s_per_token_per_layer": 0.0001}
    return HostAdvert(start, end, "ready", 1, kv_tokens_free=free, **(times | more))


def two_each(**more):
    """Two nodes for each half of the model, all alike."""
    return {name: host(*span, **more) for name, span in {
        "a1": (0, 4), "a2": (0, 4), "b1": (4, 8), "b2": (4, 8)}.items()}  # fmt: skip


def atlas(hosts):
    card = NodeAdvert("n", "0", (), None, True, 1, 1.0, 1.0, "cpu")
    nodes = dict.fromkeys([*hosts, "gateway"], card)
    return Atlas(nodes, frozenset(), {"toy": MODEL}, {MANIFEST: hosts}, {}, {})


def wish(**more):
    return replace(Wish(prompt_tokens=len(PROMPT), new_tokens=50, marks=MARKS), **more)


@pytest.fixture
def selector():
    return Selector("gateway", Health(HealthConfig()))


def peers(choice):
    return [stage.peer for stage in choice.stages]


def told(hosts, chain, pieces):
    """The hosts, those of a chain telling that they hold the prompt's first pieces."""
    held = dict(hosts)
    for index, stage in enumerate(chain):
        scope = scope_of(chain, index)
        marks = b"".join(told_mark(scope, stage.start, stage.end, mark) for mark in MARKS[:pieces])
        held[stage.peer] = replace(held[stage.peer], prefixes=marks)
    return held


def test_the_chain_that_holds_the_prompts_beginning_is_taken(selector):
    view = atlas(told(two_each(), HALVES, 3))
    for seed in range(1, 20):
        choice = selector.choose(view, MODEL, wish(seed=seed), 0.0)
        assert (choice.stages, choice.reuse) == (HALVES, 3 * PIECE_TOKENS)
    assert selector.cached_tokens(view, MODEL, MARKS) == 3 * PIECE_TOKENS
    assert choice.first_s < selector.choose(atlas(two_each()), MODEL, wish(), 0.0).first_s


def test_it_is_left_where_its_queue_is_longer_than_what_it_saves(selector):
    hosts = told(two_each(), HALVES, 3)
    hosts["b1"] = replace(hosts["b1"], queue_by_class_s=(0.0, 30.0, 0.0))
    choice = selector.choose(atlas(hosts), MODEL, wish(), 0.0)
    assert "b1" not in peers(choice)
    assert choice.reuse == 0


@pytest.mark.parametrize("lacks", ["room", "trust", "itself"])
def test_it_is_left_where_it_cannot_be_had(selector, lacks):
    hosts, more = told(two_each(), HALVES, 3), {}
    if lacks == "room":
        hosts["b1"] = replace(hosts["b1"], kv_tokens_free=10)
    elif lacks == "trust":
        selector.health.failed("b1", 0.0)
    else:
        more["exclude"] = frozenset({"b1"})
    choice = selector.choose(atlas(hosts), MODEL, wish(**more), 1.0)
    assert "b1" not in peers(choice)


def test_room_is_a_hard_bound(selector):
    hosts = two_each(free=100)
    with pytest.raises(NoRoom):
        selector.choose(atlas(hosts), MODEL, wish(), 0.0)
    hosts["a2"], hosts["b2"] = host(0, 4), host(4, 8)
    assert peers(selector.choose(atlas(hosts), MODEL, wish(), 0.0)) == ["a2", "b2"]
    with pytest.raises(NoChain):
        selector.choose(atlas({"a1": host(0, 4)}), MODEL, wish(), 0.0)


def test_room_of_background_sessions_is_room_for_others(selector):
    view = atlas(two_each(free=100, kv_tokens_yielding=5000))
    assert selector.choose(view, MODEL, wish(priority=NORMAL), 0.0)
    with pytest.raises(NoRoom):
        selector.choose(view, MODEL, wish(priority=BACKGROUND), 0.0)
    assert selector.room(view, MODEL, 0.0) == 200


def test_urgent_requests_do_not_mind_queues_behind_them(selector):
    hosts = two_each()
    hosts["a1"] = replace(hosts["a1"], queue_by_class_s=(0.0, 5.0, 5.0))
    hosts["a2"] = replace(hosts["a2"], queue_by_class_s=(1.0, 0.0, 0.0))
    assert peers(selector.choose(atlas(hosts), MODEL, wish(priority=HIGH), 0.0))[0] == "a1"
    assert peers(selector.choose(atlas(hosts), MODEL, wish(priority=NORMAL), 0.0))[0] == "a2"


def test_one_gateways_burst_spreads_though_the_adverts_stay_the_same(selector):
    view = atlas(two_each(free=100_000))
    seen = []
    for k in range(40):
        choice = selector.choose(view, MODEL, wish(marks=()), 0.01 * k)
        seen.append(tuple(peers(choice)))
        selector.ledger.opened(
            str(k), MANIFEST, as_stages(choice.stages),
            tokens=500, prompt_tokens=513, priority=NORMAL, now_s=0.01 * k,
        )  # fmt: skip
    firsts = [chain[0] for chain in seen]
    assert firsts.count("a1") == 20, "without chance it is its own bookings that turn it elsewhere"


def test_one_atlas_is_read_once_and_a_new_one_at_once(selector, monkeypatch):
    read, plain = [], Atlas.hosted
    monkeypatch.setattr(Atlas, "hosted", lambda self, *more: read.append(self) or plain(self, *more))
    first, second = atlas(two_each()), atlas({name: h for name, h in two_each().items() if name != "a1"})
    for seed in range(1, 9):
        assert selector.choose(first, MODEL, wish(seed=seed), 0.0)
    assert read == [first]
    assert peers(selector.choose(second, MODEL, wish(seed=1), 0.1))[0] == "a2"
    assert selector.room(second, MODEL, 0.1) == 10_000
    assert read == [first, second]


def test_many_gateways_with_one_old_view_do_not_pick_one_chain():
    view = atlas(two_each())
    picked = []
    for number in range(32):
        gateway = Selector(f"g{number}", Health())
        picked.append(tuple(peers(gateway.choose(view, MODEL, wish(marks=(), seed=number + 1), 0.0))))
    assert max(picked.count(chain) for chain in set(picked)) <= 16


def test_alternates_share_as_little_as_possible(selector):
    choice = selector.choose(atlas(two_each()), MODEL, wish(marks=()), 0.0)
    assert choice.alternates
    assert not set(peers(choice)) & set(peers(choice.alternates[0]))


def test_a_straggler_is_avoided_then_tried_again_and_trusted_again(selector):
    view = atlas(two_each())
    slow_s = selector.health.config.slow_s

    def work(now_s, seconds):
        for name in ("a1", "a2"):
            choice = selector.choose(
                view, MODEL, wish(exclude=frozenset({"a2" if name == "a1" else "a1"})), now_s
            )
            for _ in range(6):
                took_s = seconds if name == "a1" else choice.expected[0].seconds(1)
                selector.observe(choice, 0, 1, took_s, now_s)

    def share(now_s):
        chains = [
            peers(selector.choose(view, MODEL, wish(marks=(), seed=seed), now_s)) for seed in range(1, 100)
        ]
        return sum(chain[0] == "a1" for chain in chains) / len(chains)

    assert share(0.0) > 0.3
    work(1.0, 5.0)
    assert selector.health.standing("a1", 2.0).state == "slow"
    assert share(2.0) == 0.0
    assert selector.health.standing("a1", 1.1 + slow_s).state == "probation"
    assert 0.0 < share(1.1 + slow_s) < 0.4
    work(2.0 + slow_s, 0.004)
    assert selector.health.standing("a1", 3.0 + slow_s).state == "good"
    assert share(3.0 + slow_s) > 0.3


@pytest.mark.parametrize(
    ("stage", "tokens", "seconds"), [(9, 1, 1.0), (-1, 1, 1.0), (0, 0, 1.0), (0, 1, -1.0), (0, 1, 1e9)]
)
def test_notes_that_cannot_be_count_for_nothing(selector, stage, tokens, seconds):
    choice = selector.choose(atlas(two_each()), MODEL, wish(), 0.0)
    selector.observe(choice, stage, tokens, seconds, 0.0)
    assert selector.health.standings(0.0) == {}


def test_an_answer_of_open_length_is_reckoned_as_it_likely_is(selector):
    view = atlas(two_each())
    whole = selector.choose(view, MODEL, wish(new_tokens=1000), 0.0)
    likely = selector.choose(view, MODEL, wish(new_tokens=1000, likely_tokens=100), 0.0)
    assert whole.whole_s == pytest.approx(whole.cost_s)
    assert likely.first_s == whole.first_s
    assert likely.whole_s < whole.whole_s / 4


def busy_chain(selector, view, asked, seconds):
    """A session over the chain that is chosen, whose first stage said that it has so much to do."""
    choice = selector.choose(view, MODEL, asked, 0.0)
    selector.ledger.opened(
        "s", MANIFEST, as_stages(choice.stages), tokens=600, prompt_tokens=513, priority=NORMAL, now_s=0.0
    )
    assert not selector.ledger.heard("s", 0, (0.0, seconds, 0.0))
    assert selector.ledger.heard("s", 1, (0.0, 0.0, 0.0))
    return choice


def test_a_chain_whose_stages_have_much_to_do_is_left_for_one_that_is_sooner(selector):
    view, asked = atlas(two_each()), wish(marks=(), aims=Aims(first_s=2.0))
    choice = busy_chain(selector, view, asked, 9.0)
    better = selector.instead(view, MODEL, asked, "s", choice, 0.1, 0)
    assert peers(better)[0] not in peers(choice)
    assert better.first_s < 2.0
    assert selector.instead(view, MODEL, asked, "s", choice, 0.1, TRIES_MAX) is None
    assert selector.instead(view, MODEL, asked, "s", choice, 8.9, 0) is None, "its queue is empty by then"


def test_own_work_is_no_reason_to_leave(selector):
    view, asked = atlas(two_each()), wish(marks=(), aims=Aims(first_s=0.4))
    choice = busy_chain(selector, view, asked, 0.0)
    assert selector.choose(view, MODEL, asked, 0.1).stages[0] != choice.stages[0]
    assert selector.instead(view, MODEL, asked, "s", choice, 0.1, 0) is None


def test_a_strict_request_that_nobody_serves_in_time_is_refused(selector):
    view = atlas({name: h for name, h in two_each().items() if name in ("a1", "b1")})
    strict = wish(marks=(), aims=Aims(first_s=2.0, strict=True))
    choice = busy_chain(selector, view, strict, 9.0)
    with pytest.raises(Rejected):
        selector.instead(view, MODEL, strict, "s", choice, 0.1, 0)
    with pytest.raises(Rejected):
        selector.choose(view, MODEL, strict, 0.1)
