"""What a node reads out of the records of others, whatever they wrote into them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import Record, View
from node import adverts
from node.adverts import (
    AdapterAdvert,
    DeviceAdvert,
    HostAdvert,
    LinksAdvert,
    ModelAdvert,
    NodeAdvert,
    PlanAdvert,
    PlanSpan,
)
from node.atlas import (
    ADAPTERS_PER_SIGNER_MAX,
    EPOCH_AHEAD_MS,
    LINK_DEFAULT_S,
    MODELS_MAX,
    MODELS_PER_SIGNER_MAX,
    device_shapes,
    read_atlas,
)
from node.meshjson import mesh_document
from node.planning import Planning
from p2p import PeerId, pack_value
from scheduler import Link, planner_rank
from scheduler.planner import MESH

NOW = 1_790_000_000.0
ID = "ab" * 32
OTHER_ID = "cd" * 32
CARD = NodeAdvert("n", "0", (), None, True, 1 << 30, 1e11, 1e10, "cpu")
HOST = HostAdvert(0, 8, "ready", 1, kv_tokens_free=100, s_per_layer=1e-3)
MODEL = ModelAdvert("toy", ID, 5, "bfloat16", "none", 1, 4, 64, 8, 1 << 20, 0, 0, False, 1e6, 64, 64)


class Said:
    """A view with records of made-up signers, whose signatures nobody checks."""

    def __init__(self):
        self.view = View(verify=lambda record: True)
        self._seq = 0

    def say(self, signer, kind, name, advert, *, age_s=0.0, ttl_s=60.0):
        self._seq += 1
        value = advert if isinstance(advert, bytes) else pack_value(advert)
        issued = NOW - age_s
        record = Record(kind, name, PeerId(signer), self._seq, issued, issued + ttl_s, value, bytes(64))
        assert self.view.merge(record, NOW)
        return self

    def node(self, signer, card=CARD, **more):
        return self.say(signer, adverts.NODE, "", card, **more)

    def model(self, signer, model=MODEL, **more):
        return self.say(signer, adverts.MODEL, model.name, model, **more)

    def atlas(self, now_s=NOW, suspects=()):
        return read_atlas(self.view, now_s, suspects)


def test_adapters_are_found_by_their_names_under_their_base():
    def tuned(name, number, base=ID):
        return AdapterAdvert(name, f"{number:064x}", 1, base)

    said = Said().node("A").model("A")
    for adapter in (tuned("pirate", 1), tuned("toy", 2), tuned("lost", 3, base="f" * 64)):
        said.say("A", adverts.ADAPTER, adapter.name, adapter)
    said.say("A", adverts.ADAPTER, "other", tuned("misnamed", 4))
    said.say("B", adverts.ADAPTER, "pirate", tuned("pirate", 5))
    said.say("C", adverts.ADAPTER, "pirate", tuned("pirate", 1))
    atlas = said.atlas()
    pirate = tuned("pirate", 1)
    assert atlas.adapters == {"pirate": pirate, "lost": tuned("lost", 3, base="f" * 64)}
    for name in ("pirate", "toy:pirate", pirate.manifest_id):
        assert atlas.served_as(name) == (MODEL, pirate)
    assert atlas.served_as("toy") == (MODEL, None)
    assert [atlas.served_as(name) for name in ("lost", "toy:lost", "pirate:toy", "toy:", "")] == [None] * 5
    many = Said()
    for number in range(adverts_max := 70):
        many.say("A", adverts.ADAPTER, f"a{number:02}", tuned(f"a{number:02}", number + 1))
    assert len(many.atlas().adapters) == ADAPTERS_PER_SIGNER_MAX < adverts_max
    dropped = read_atlas(said.view, NOW, dropped=lambda offer: offer == pirate)
    assert dropped.adapters["pirate"].manifest_id == f"{5:064x}"


def test_every_kind_of_record_is_read():
    said = Said().node("A").model("A").say("A", adverts.HOST, ID, HOST)
    said.say("A", adverts.PLAN, ID, PlanAdvert(3, (PlanSpan("A", 0, 8),)))
    said.say("A", adverts.LINKS, "", LinksAdvert({"B": 0.02}))
    atlas = said.atlas()
    assert atlas.nodes == {"A": CARD}
    assert atlas.models == {"toy": MODEL}
    assert atlas.hosts == {ID: {"A": HOST}}
    assert atlas.plans[ID] == [("A", PlanAdvert(3, (PlanSpan("A", 0, 8),)))]
    assert atlas.links()("B", "A").latency_s == 0.01
    assert atlas.copies(MODEL) == [1] * 8
    assert [h.node for h in atlas.hosted(MODEL)] == ["A"]


def test_suspects_are_known_but_neither_live_nor_hosts():
    atlas = Said().node("A").node("B").model("A").say("A", adverts.HOST, ID, HOST).atlas(suspects={"A"})
    assert set(atlas.nodes_known) == {"A", "B"}
    assert set(atlas.nodes) == {"B"}
    assert atlas.copies(MODEL) == [0] * 8
    assert atlas.hosted(MODEL) == []


def test_what_a_node_hosted_in_an_earlier_life_does_not_count():
    said = Said().node("A", replace(CARD, life="one")).model("A")
    said.say("A", adverts.HOST, ID, replace(HOST, life="one"))
    assert said.atlas().copies(MODEL) == [1] * 8
    said.node("A", replace(CARD, life="two"))
    assert said.atlas().copies(MODEL) == [0] * 8
    said.say("A", adverts.HOST, ID, replace(HOST, life="two"))
    assert said.atlas().copies(MODEL) == [1] * 8


def test_a_host_that_is_no_node_counts_for_nothing():
    atlas = Said().model("A").say("Z", adverts.HOST, ID, HOST).atlas()
    assert atlas.copies(MODEL) == [0] * 8


def test_records_are_judged_by_the_mesh_s_time_and_not_by_this_computer_s():
    """A newcomer whose clock is an hour ahead would see a mesh in which everything has expired."""
    said = Said().node("A", ttl_s=20.0)
    assert set(said.atlas(NOW).nodes) == {"A"}
    assert said.atlas(NOW + 3600).nodes == {}


def test_each_device_of_a_node_hosts_a_span_of_its_own():
    two = replace(
        CARD,
        devices=(DeviceAdvert("cuda:0", 1 << 30, 2e13, 1e12), DeviceAdvert("cuda:1", 1 << 29, 1e13, 5e11)),
    )
    said = Said().node("A", two).model("A")
    said.say("A", adverts.HOST, ID, replace(HOST, end=5)).say(
        "A", adverts.HOST, f"{ID}#1", replace(HOST, start=5)
    )
    atlas = said.atlas()
    assert set(atlas.hosts[ID]) == {"A", "A#1"}
    assert atlas.copies(MODEL) == [1] * 8
    assert [(h.node, h.start, h.end) for h in atlas.hosted(MODEL)] == [("A", 0, 5), ("A", 5, 8)]
    assert atlas.links()("A", "A#1").latency_s == 0.0
    assert atlas.links()("A#1", "B") == atlas.links()("A", "B")
    shapes = device_shapes("A", two)
    assert [(s.id, s.memory_bytes, s.read_bytes_per_s) for s in shapes] == [
        ("A", 1 << 30, 1e12),
        ("A#1", 1 << 29, 5e11),
    ]
    assert atlas.live_hosts(ID).keys() == {"A", "A#1"}
    assert said.atlas(suspects={"A"}).live_hosts(ID) == {}


@pytest.mark.parametrize("name", [f"{ID}#0", f"{ID}#x", f"{ID}#64", f"{ID}#", f"{ID}#\u00b2", f"{ID}##1"])
def test_a_record_of_a_device_that_cannot_be_is_not_there(name):
    assert Said().node("A").model("A").say("A", adverts.HOST, name, HOST).atlas().hosts.get(ID, {}) == {}


def test_links_have_latency_and_bandwidth_as_either_end_measured():
    said = Said().say("A", adverts.LINKS, "", LinksAdvert({"B": 0.04}, {"B": 5e6}))
    link = said.atlas().links()
    assert link("B", "A") == Link(0.02, 5e6)
    assert link("A", "B") == Link(0.02, 5e6)
    said.say("B", adverts.LINKS, "", LinksAdvert({"A": 0.06}, {"A": 1e6}))
    assert said.atlas().links()("A", "B") == Link(0.02, 1e6)
    assert said.atlas().links()("B", "A") == Link(0.03, 5e6)


def test_what_nobody_measured_is_guessed_from_the_regions():
    said = Said()
    for name, region in (("A", "east"), ("B", "east"), ("C", "west"), ("D", "west"), ("E", "")):
        said.node(name, replace(CARD, region=region))
    said.say("A", adverts.LINKS, "", LinksAdvert({"B": 0.004, "C": 0.08}))
    link = said.atlas().links()
    assert link("A", "C").latency_s == 0.04
    assert link("B", "D").latency_s == 0.04
    assert link("D", "A").latency_s == 0.04
    assert link("C", "D").latency_s == LINK_DEFAULT_S
    assert link("A", "E").latency_s == LINK_DEFAULT_S
    said.say("C", adverts.LINKS, "", LinksAdvert({"D": 0.01}))
    assert said.atlas().links()("C", "D").latency_s == 0.005


@pytest.mark.parametrize(
    ("tags", "policy", "spans"),
    [
        ((), {}, [(0, 8)]),
        ((), {"require": ("trusted",)}, []),
        (("trusted",), {"require": ("trusted",)}, [(0, 8)]),
        ((), {"ends_require": ("trusted",)}, [(1, 7)]),
        (("trusted",), {"ends_require": ("trusted",)}, [(0, 8)]),
        (("metered",), {"avoid": ("metered",)}, []),
    ],
)
def test_requests_go_only_where_the_model_s_policy_allows(tags, policy, spans):
    model = replace(MODEL, **policy)
    atlas = (
        Said().node("A", replace(CARD, tags=tags)).model("A", model).say("A", adverts.HOST, ID, HOST).atlas()
    )
    assert [(h.start, h.end) for h in atlas.hosted(model)] == spans
    assert sum(atlas.copies(model)) == sum(end - start for start, end in spans)


def test_requests_see_a_node_whose_owner_is_using_it_slower_than_it_measured():
    host = replace(
        HOST, s_per_layer=2e-3, prefill_s_per_token_per_layer=1e-4, queue_by_class_s=(0.1, 0.2, 0.3)
    )
    said = Said().node("A").model("A").say("A", adverts.HOST, ID, host)
    (idle,) = said.atlas().hosted(MODEL)
    assert (idle.s_per_layer, idle.prefill_s_per_token_per_layer) == (2e-3, 1e-4)
    assert idle.queue_by_class_s == (0.1, 0.2, 0.3)
    (busy,) = said.node("A", replace(CARD, tags=("owner-active",))).atlas().hosted(MODEL)
    assert busy.s_per_layer == 4 * idle.s_per_layer
    assert busy.prefill_s_per_token_per_layer == 4 * idle.prefill_s_per_token_per_layer


ABSURD_NODES = [
    replace(CARD, tags=("Trusted",)),
    replace(CARD, tags=("x" * 33,)),
    replace(CARD, tags=tuple(f"t{k}" for k in range(33))),
    replace(CARD, devices=(DeviceAdvert("cpu", -1, 1.0, 1.0),)),
    replace(CARD, devices=(DeviceAdvert("cpu", 1, float("inf"), 1.0),)),
    replace(CARD, devices=(DeviceAdvert("cpu", 1, 1.0, 1.0),) * 65),
    replace(CARD, memory_bytes=-1),
    replace(CARD, memory_bytes=1 << 62),
    replace(CARD, flops_per_s=float("inf")),
    replace(CARD, flops_per_s=-1.0),
    replace(CARD, read_bytes_per_s=1e308),
    replace(CARD, addrs=("/ip4/1.2.3.4/tcp/1",) * 1000),
    replace(CARD, pinned=(4, 2)),
    replace(CARD, pinned=(-1, 2)),
    replace(CARD, pinned=(0, 2**40)),
    replace(CARD, pinned=(1, 2, 3)),
]
ABSURD_MODELS = [
    replace(MODEL, working_bytes=-1),
    replace(MODEL, experts=8, experts_per_token=9, expert_bytes=1),
    replace(MODEL, experts=8, experts_per_token=2, expert_bytes=1 << 20),
    replace(MODEL, expert_bytes=-1),
    replace(MODEL, require=("a b",)),
    replace(MODEL, ends_require=tuple(f"t{k}" for k in range(33))),
    replace(MODEL, layers=10**9),
    replace(MODEL, layers=-1),
    replace(MODEL, layers=0),
    replace(MODEL, layer_bytes=0),
    replace(MODEL, layer_bytes=-5),
    replace(MODEL, embed_bytes=1 << 62),
    replace(MODEL, copies=10**6),
    replace(MODEL, copies=0),
    replace(MODEL, concurrency=0),
    replace(MODEL, context_tokens=-1),
    replace(MODEL, layer_flops_per_token=1e308),
    replace(MODEL, hidden_bytes=0),
    replace(MODEL, dtype="auto"),
    replace(MODEL, dtype="complex"),
    replace(MODEL, quant="int3"),
    replace(MODEL, name="\x1b[31mred"),
    replace(MODEL, name=""),
    replace(MODEL, manifest_id="../../etc/passwd"),
    replace(MODEL, created_s=-1),
]
ABSURD_HOSTS = [
    replace(HOST, busy=1.5),
    replace(HOST, plan_s_per_layer=-1.0),
    replace(HOST, queue_by_class_s=(0.0,) * 9),
    replace(HOST, queue_by_class_s=(-1.0,)),
    replace(HOST, kv_tokens_yielding=-1),
    replace(HOST, prefixes=b"x" * 5000),
    replace(HOST, start=-4),
    replace(HOST, start=5, end=5),
    replace(HOST, end=10**9),
    replace(HOST, progress=1e308),
    replace(HOST, s_per_layer=-1.0),
    replace(HOST, queue_s=float("inf")),
    replace(HOST, tokens_per_s=-1.0),
    replace(HOST, kv_tokens_free=1 << 62),
    replace(HOST, sessions=-1),
    replace(HOST, epoch=1 << 60),
]
ABSURD_PLANS = [
    PlanAdvert(1, (PlanSpan("A#0", 0, 8),)),
    PlanAdvert(1, (PlanSpan("A#x", 0, 8),)),
    PlanAdvert(1 << 60, (PlanSpan("A", 0, 8),)),
    PlanAdvert(-1, ()),
    PlanAdvert(1, (PlanSpan("A", 4, 2),)),
    PlanAdvert(1, (PlanSpan("A", -2, 2),)),
    PlanAdvert(1, (PlanSpan("A", 0, 10**9),)),
    PlanAdvert(1, (PlanSpan("A", 0, 4), PlanSpan("A", 4, 8))),
    PlanAdvert(1, (PlanSpan("\x1b[2J", 0, 8),)),
]


@pytest.mark.parametrize("advert", [*ABSURD_NODES, *ABSURD_MODELS, *ABSURD_HOSTS, *ABSURD_PLANS])
def test_a_record_out_of_bounds_is_not_there(advert):
    assert adverts.read(type(advert), pack_value(advert)) is None


@pytest.mark.parametrize("kind", [NodeAdvert, ModelAdvert, HostAdvert, PlanAdvert, LinksAdvert])
@pytest.mark.parametrize(
    "value", [b"", b"\xc1", b"\x90", b"{}", bytes(64), pack_value(CARD)[:-1], b"\xff" * 1000]
)
def test_what_is_no_advert_of_its_kind_is_not_there(kind, value):
    assert adverts.read(kind, value) is None


def test_texts_lose_what_a_terminal_would_act_on():
    advert = adverts.read(NodeAdvert, pack_value(replace(CARD, name="a\x1b[2Jb\nc\u202ed", version="1\r2")))
    assert advert is not None
    assert advert.name.isprintable()
    assert advert.version == "1 2"
    host = adverts.read(HostAdvert, pack_value(replace(HOST, detail="\x07" + "x" * 10_000)))
    assert host is not None
    assert host.detail.isprintable()
    assert len(host.detail) == adverts.TEXT_CHARS_MAX


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "http://a b", "file:///etc/passwd", "http://" + "x" * 999]
)
def test_an_address_that_is_no_web_address_is_dropped(url):
    advert = adverts.read(NodeAdvert, pack_value(replace(CARD, api=url)))
    assert advert is not None
    assert advert.api is None


def test_a_node_speaks_only_for_its_own_addresses():
    addrs = ("/ip4/10.0.0.1/tcp/1/p2p/A", "/ip4/10.0.0.1/tcp/1/p2p/B", "/ip4/10.0.0.1/tcp/1", "")
    assert Said().node("A", replace(CARD, addrs=addrs)).atlas().nodes["A"].addrs == addrs[:1]


def test_records_under_names_that_their_kind_has_not_are_not_there():
    said = Said().say("A", adverts.NODE, "x", CARD).say("A", adverts.LINKS, "x", LinksAdvert({"B": 1.0}))
    said.say("A", adverts.MODEL, "other", MODEL)
    atlas = said.atlas()
    assert (atlas.nodes, atlas.rtt_s, atlas.models) == ({}, {}, {})


def test_rates_that_cannot_be_are_left_out():
    rates = {"B": -1.0, "C": 1e308, "D": float("inf"), "E": 0.0, "F": 1e6}
    atlas = Said().say("A", adverts.LINKS, "", LinksAdvert({}, rates)).atlas()
    assert atlas.bytes_per_s == {("F", "A"): 1e6}


def test_round_trips_that_cannot_be_are_left_out():
    rtts = {"B": -1.0, "C": 1e308, "D": float("inf"), "E": 0.5}
    assert Said().say("A", adverts.LINKS, "", LinksAdvert(rtts)).atlas().rtt_s == {("A", "E"): 0.5}


@pytest.mark.parametrize(
    ("ahead_ms", "seen"), [(0, True), (EPOCH_AHEAD_MS, True), (EPOCH_AHEAD_MS + 1, False)]
)
def test_no_epoch_is_far_ahead_of_the_clock_so_that_a_greater_one_is_always_left(ahead_ms, seen):
    plan = PlanAdvert(int(NOW * 1000) + ahead_ms, (PlanSpan("A", 0, 8),))
    assert bool(Said().say("A", adverts.PLAN, ID, plan).atlas().plans) is seen


def test_of_two_models_of_one_name_the_older_holds_it():
    later = replace(MODEL, manifest_id=OTHER_ID, created_s=9)
    assert Said().model("A", later).model("B").atlas().models == {"toy": MODEL}


def test_a_name_belongs_to_the_model_that_most_members_offer():
    forged = replace(MODEL, manifest_id=OTHER_ID, created_s=0)
    atlas = Said().model("A").model("B").model("Z", forged).atlas()
    assert atlas.models == {"toy": MODEL}
    assert atlas.offers == {ID: 2}


def test_one_member_cannot_change_the_figures_of_a_model_that_others_offer():
    forged = replace(MODEL, layers=3, created_s=0)
    assert Said().model("A").model("B").model("Z", forged).atlas().models == {"toy": MODEL}


def test_two_names_of_one_manifest_are_one_model():
    again = replace(MODEL, name="alias", created_s=6)
    assert list(Said().model("A").model("B", again).atlas().models) == ["toy"]


def test_one_member_brings_only_so_many_models_and_the_mesh_holds_only_so_many():
    said = Said()
    for i in range(MODELS_PER_SIGNER_MAX + 5):
        said.model("Z", replace(MODEL, name=f"m{i:02}", manifest_id=f"{i:064x}"))
    assert len(said.atlas().models) == MODELS_PER_SIGNER_MAX
    for j in range(MODELS_MAX):
        said.model(f"Y{j % 9 + 1}", replace(MODEL, name=f"n{j:02}", manifest_id=f"{j + 999:064x}"))
    assert len(said.atlas().models) == MODELS_MAX


def test_spans_beyond_the_model_are_cut():
    said = Said().node("A").node("B").model("A").say("A", adverts.HOST, ID, replace(HOST, start=6, end=1000))
    said.say("B", adverts.HOST, ID, replace(HOST, start=8, end=12))
    atlas = said.atlas()
    assert atlas.copies(MODEL) == [0] * 6 + [1] * 2
    assert [(h.start, h.end) for h in atlas.hosted(MODEL)] == [(6, 8)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from([*ABSURD_NODES, *ABSURD_MODELS, *ABSURD_HOSTS, *ABSURD_PLANS]) | st.binary(),
        max_size=12,
    )
)
def test_nothing_that_peers_publish_stops_the_planning_or_the_view(values):
    said = Said().node("A").node("B").model("A").say("A", adverts.HOST, ID, HOST)
    for i, value in enumerate(values):
        for kind, name in (
            (adverts.NODE, ""),
            (adverts.MODEL, "toy"),
            (adverts.HOST, ID),
            (adverts.PLAN, ID),
        ):
            said.say("Z" + "abcdefghijkm"[i], kind, name, value)
    atlas = said.atlas()
    core = Planning(planner_rank(MESH, ["A", "B"])[0])
    core.handle(atlas, may_plan=True)
    document = mesh_document(atlas, core, mesh_id="m", me="A", connected=(), rtt_s=lambda peer: None)
    assert document["models"][0]["name"] == "toy"
    assert min(core.plans[ID].coverage(8)) == 1
