"""What a node reads out of the records of others, whatever they wrote into them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import Record, View
from node import adverts
from node.adverts import HostAdvert, LinksAdvert, ModelAdvert, NodeAdvert, PlanAdvert, PlanSpan
from node.atlas import EPOCH_AHEAD_MS, MODELS_MAX, MODELS_PER_SIGNER_MAX, read_atlas
from node.meshjson import mesh_document
from node.planning import Planning
from p2p import PeerId, pack_value
from scheduler import planner_rank
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


ABSURD_NODES = [
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
