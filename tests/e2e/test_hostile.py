"""A member that wishes the mesh ill, strangers without its key, and rude HTTP clients: the text stays the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

import pytest
import trio

from dht import Gossip, View
from node import adverts
from node.adverts import HostAdvert, LinksAdvert, ModelAdvert, NodeAdvert, PlanAdvert, PlanSpan
from node.serve.protocol import (
    RETURN,
    SESSION,
    Activations,
    Prompt,
    ReturnOpen,
    SamplingSpec,
    SessionInput,
    SessionOpen,
    StageRef,
    TokenOut,
)
from p2p import (
    EndOfChannel,
    HostConfig,
    Identity,
    Invite,
    Method,
    P2pError,
    Roster,
    Rpc,
    Tensor,
    Unreachable,
    open_host,
    pack_value,
)
from scheduler import planner_rank
from scheduler.planner import MESH

PROMPT = "def read_file(path):\n"
LISTEN = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
GROWTH_BYTES_MAX = 100 << 20
TRY_S_MAX = 2.0
TOKENS = 12


@pytest.fixture(scope="module")
def expected(alone, tools):
    return tools.complete(alone.api, PROMPT, max_tokens=TOKENS)


@pytest.fixture
def unharmed(four, tools, expected):
    """After the test every node serves the same text under the same plan, has logged no crash and has not swollen."""
    four.heal()

    def plan():
        return next(m["plan"] for m in four.nodes[0].view()["models"] if m["name"] == "embedded")

    before = plan(), [node.memory_bytes() for node in four.nodes]
    yield
    assert all(node.running() for node in four.nodes)
    assert [tools.complete(node.api, PROMPT, max_tokens=TOKENS) for node in four.nodes] == [expected] * 4
    assert plan() == before[0]
    for node, was in zip(four.nodes, before[1], strict=True):
        assert node.memory_bytes() - was < GROWTH_BYTES_MAX, node.name
        assert "Traceback" not in node.log(), node.log()[-5000:]
    four.until(lambda view: all(s["sessions"] == 0 for n in view["nodes"] for s in n["spans"]), wait_s=10)


class Villain:
    """A proven member, connected to all, with calls of its own."""

    def __init__(self, host, rpc, identity, mesh):
        self.host, self.rpc, self.identity, self.mesh = host, rpc, identity, mesh
        self.victims = [node.peer for node in mesh.nodes]
        view = mesh.nodes[0].view()
        self.model = view["models"][0]
        plan = sorted(self.model["plan"], key=lambda span: span["start"])
        self.stages = tuple(StageRef(span["node"], span["start"], span["end"]) for span in plan)


@asynccontextmanager
async def villain(mesh):
    invite = Invite.decode(mesh.nodes[0].invite())
    peers = [node.peer for node in mesh.nodes]
    identity = Identity.generate()
    while planner_rank(MESH, [*peers, identity.peer_id])[0] == identity.peer_id:
        identity = Identity.generate()  # whose turn it is to plan is trusted; a plan out of turn is not
    roster = Roster(identity, invite.mesh_id, invite.founder, invite.swarm_key, ticket=invite.ticket)
    async with open_host(identity, invite.mesh_id, invite.swarm_key, LISTEN, roster=roster) as host:
        for node in mesh.nodes[0].view()["nodes"]:
            if node["peer"] in peers:
                await host.connect(node["addrs"])
        rpc = Rpc(host)
        async with trio.open_nursery() as nursery:
            await nursery.start(rpc.run)
            yield Villain(host, rpc, identity, mesh)
            nursery.cancel_scope.cancel()


GARBAGE = {
    "noise": os.urandom(200_000),
    "zeros": bytes(200_000),
    "ones": b"\xff" * 200_000,
    "oversized claims": struct.pack("!BBHIQ", 2, 1, 0, 0xFFFFFFFF, 7) * 1000,
    "an open without end": struct.pack("!BBHIQ", 1, 0, 0, 0x7FFFFFFF, 1) + b"x" * 100_000,
    "data of no call": struct.pack("!BBHIQ", 2, 3, 0, 8, 99) + bytes(8),
    "a varint without end": b"\x80" * 10_000,
    "half a frame": struct.pack("!BBH", 1, 0, 0),
}


async def test_garbage_on_every_protocol(unharmed, four):
    for protocol in ("member/1", "rpc/1/small", "rpc/1/bulk", "kad/1"):
        async with villain(four) as bad, trio.open_nursery() as nursery:
            for peer in bad.victims:
                for data in GARBAGE.values():
                    nursery.start_soon(throw, bad.host, peer, protocol, data)


async def throw(host, peer, protocol, data):
    """Send `data` on a stream of its own and hang on to it for a while, reading nothing."""
    with contextlib.suppress(P2pError), trio.move_on_after(TRY_S_MAX):
        stream = await host.open_stream(peer, protocol, deadline_s=TRY_S_MAX)
        try:
            await stream.send_all(data)
            await stream.receive_some()
        finally:
            stream.reset()


async def test_protocols_that_are_not_served(unharmed, four):
    async with villain(four) as bad, trio.open_nursery() as nursery:
        for protocol in ("", "nothing/1", "../../rpc/1/small", "/ipfs/id/1.0.0", "x" * 500, "\n\n"):
            for peer in bad.victims:
                nursery.start_soon(throw, bad.host, peer, protocol, b"hello")


@dataclass(frozen=True, slots=True)
class Anything:
    a: bytes = b""
    b: tuple[int, ...] = ()


METHODS = [
    "dht.gossip",
    "blobs.manifest",
    "blobs.have",
    "blobs.chunks",
    "serve.session",
    "serve.return",
    "no.such",
]


async def test_calls_with_bodies_that_no_method_has(unharmed, four):
    bodies = [Anything(), Anything(b"\xff" * 60_000), Anything(b"", (1,) * 10_000), Anything(os.urandom(500))]
    refused = 0
    async with villain(four) as bad:
        for name, lane in itertools.product(METHODS, ("small", "bulk")):
            method = Method(name, Anything, Anything, body_bytes_max=1 << 20, deadline_s=TRY_S_MAX, lane=lane)
            for peer in bad.victims:
                for body in bodies:
                    try:
                        await bad.rpc.call(peer, method, body)
                    except P2pError:
                        refused += 1
        assert refused == len(METHODS) * 2 * 4 * len(bodies)


def absurdities(peer, manifest):
    """(kind, name, value) of records that no honest node publishes."""
    node = NodeAdvert("n", "0", (), None, True, 1 << 40, 1e15, 1e15, "cpu")
    model = ModelAdvert(
        "bogus", "ab" * 32, 0, "bfloat16", "none", 1, 4, 1024, 8, 1 << 20, 1, 1, False, 1e6, 64, 64
    )
    host = HostAdvert(0, 8, "fetching", 1)
    for i, card in enumerate(
        (replace(node, memory_bytes=-1), replace(node, flops_per_s=1e308), replace(node, pinned=(-5, 3)),
         replace(node, flops_per_s=math.inf), replace(node, memory_bytes=1 << 63)),
    ):  # fmt: skip
        yield adverts.NODE, f"x{i}", pack_value(card)
    for i, fake in enumerate(
        (replace(model, layers=10**9), replace(model, layers=-1), replace(model, layer_bytes=0),
         replace(model, copies=1 << 40), replace(model, concurrency=-1), replace(model, dtype="\x1b[2J"),
         replace(model, manifest_id="/etc/passwd"), replace(model, layer_flops_per_token=1e308), model),
    ):  # fmt: skip
        yield adverts.MODEL, f"bogus{i}", pack_value(replace(fake, name=f"bogus{i}"))
    stolen = replace(model, name="embedded", created_s=0)
    yield adverts.MODEL, "embedded", pack_value(stolen)
    yield adverts.MODEL, "red", pack_value(replace(model, name="\x1b[31mred"))
    for i, bad in enumerate(
        (replace(host, start=-3), replace(host, end=10**9), replace(host, progress=1e308),
         replace(host, s_per_layer=-1.0), replace(host, kv_tokens_free=-1), replace(host, detail="\x1b]0;x\x07" * 99)),
    ):  # fmt: skip
        yield adverts.HOST, f"{i:064x}", pack_value(bad)
    yield (
        adverts.HOST,
        manifest,
        pack_value(replace(host, state="ready", start=-1, end=1 << 40, s_per_layer=1e-300)),
    )
    yield adverts.PLAN, manifest, pack_value(PlanAdvert(1 << 60, (PlanSpan(peer, 0, 8),)))
    yield adverts.PLAN, "ab" * 32, pack_value(PlanAdvert(5, (PlanSpan(peer, -4, 2**40),)))
    yield adverts.LINKS, "", pack_value(LinksAdvert({peer: 1e308, "x": -1.0}))
    for i in range(120):
        yield "junk", f"{i}", os.urandom(2000)
    for i, kind in enumerate(
        (adverts.NODE, adverts.MODEL, adverts.HOST, adverts.PLAN, adverts.LINKS, "addr")
    ):
        yield kind, f"noise{i}", os.urandom(300)


async def test_absurd_records_change_nothing(unharmed, four):
    async with villain(four) as bad:
        gossip = Gossip(bad.rpc, View(), bad.identity)
        async with trio.open_nursery() as nursery:
            await nursery.start(gossip.run)
            for kind, name, value in absurdities(bad.host.peer_id, bad.model["manifest"]):
                gossip.publish(kind, name, value, 30.0)
            # The last is the card by which the others are seen to have arrived.
            marker = NodeAdvert("m\x1b[2Jarker", "0", (), None, True, 1 << 40, 1e15, 1e15, "cpu", (0, 8))
            gossip.publish(adverts.NODE, "", pack_value(marker), 30.0)
            for node in four.nodes:
                await on_thread(
                    four.until,
                    lambda view: any("arker" in n["name"] for n in view["nodes"]),
                    four.nodes.index(node),
                )
            for node in four.nodes:
                view = await on_thread(node.view)
                assert "\\u001b" not in json.dumps(view)
                models = {m["name"]: m for m in view["models"]}
                assert models["embedded"]["manifest"] == bad.model["manifest"]
                assert models["embedded"]["ready"] is True
            # A plan out of turn that would be sound otherwise, as one that moves everything to the villain.
            epoch = embedded_model(await on_thread(four.nodes[0].view))["epoch"] + 5
            sound = PlanAdvert(epoch, (PlanSpan(str(bad.host.peer_id), 0, 8),))
            gossip.publish(adverts.PLAN, bad.model["manifest"], pack_value(sound), 30.0)
            for i in range(4):
                await on_thread(four.until, lambda view: embedded_model(view)["epoch"] > epoch, i, 10.0)
            # The villain's pinned card is honoured, but nobody's layers are taken away for it.
            assert {(s["node"], s["start"], s["end"]) for s in bad.model["plan"]} <= {
                (s["node"], s["start"], s["end"]) for s in embedded_model(four.nodes[0].view())["plan"]
            }
            await gossip.withdraw_all(2.0)
            nursery.cancel_scope.cancel()
    await on_thread(four.until, lambda view: len(view["nodes"]) == 4)
    await on_thread(
        four.until,
        lambda view: all(
            s["node"] in {n["peer"] for n in view["nodes"]} for s in embedded_model(view)["plan"]
        ),
    )


def embedded_model(view):
    return next(m for m in view["models"] if m["name"] == "embedded")


async def on_thread(work, *arguments):
    return await trio.to_thread.run_sync(work, *arguments)


def opening(bad, **more):
    fields = {"session": "ab" * 12, "manifest_id": bad.model["manifest"], "stages": bad.stages, "index": 0,
              "gateway": str(bad.host.peer_id), "prompt_tokens": 4, "new_tokens_max": 4, "ignore_eos": True,
              "sampling": SamplingSpec(0.0, 1.0, 0, 0)}  # fmt: skip
    return SessionOpen(**(fields | more))


def ids(*tokens):
    return Tensor("int32", (len(tokens),), struct.pack(f"<{len(tokens)}i", *tokens))


def hidden(rows, width, dtype="float32", value=1.0):
    size = {"float32": "f", "bfloat16": "h"}[dtype]
    filled = value if size == "f" else (0x7FC0 if math.isnan(value) else 0x3F80)
    return Tensor(dtype, (rows, width), struct.pack(f"<{rows * width}{size}", *[filled] * (rows * width)))


WIDTH = 192
OPENINGS = [
    {"index": 99}, {"index": -1}, {"prompt_tokens": 0}, {"prompt_tokens": 1 << 40}, {"new_tokens_max": -5},
    {"prompt_tokens": 1 << 19, "new_tokens_max": 1 << 18}, {"stages": ()}, {"manifest_id": "ff" * 32},
    {"sampling": SamplingSpec(-1.0, 1.0, 0, 0)}, {"sampling": SamplingSpec(1e308, 1e-300, -7, 1 << 62)},
    {"gateway": "nobody"}, {"session": "x" * 60_000},
]  # fmt: skip
INPUTS = [
    SessionInput(),
    SessionInput(prompt=Prompt(3, ids(1, 2))),
    SessionInput(prompt=Prompt(-1, ids(1, 2))),
    SessionInput(prompt=Prompt(0, ids())),
    SessionInput(prompt=Prompt(0, ids(1, 2, 3, 4, 5, 6))),
    SessionInput(prompt=Prompt(0, ids(-1, 2**31 - 1, 5, 5))),
    SessionInput(prompt=Prompt(0, Tensor("float32", (4,), bytes(16)))),
    SessionInput(prompt=Prompt(0, Tensor("int32", (2, 2), bytes(16)))),
    SessionInput(activations=Activations(0, hidden(1, WIDTH), True)),
]
LATER_INPUTS = [
    SessionInput(),
    SessionInput(prompt=Prompt(0, ids(1, 2, 3, 4))),
    SessionInput(activations=Activations(3, hidden(1, WIDTH, "bfloat16"), True)),
    SessionInput(activations=Activations(-1, hidden(1, WIDTH, "bfloat16"), True)),
    SessionInput(activations=Activations(0, hidden(1, 7, "bfloat16"), True)),
    SessionInput(activations=Activations(0, hidden(99, WIDTH, "bfloat16"), True)),
    SessionInput(activations=Activations(0, hidden(4, WIDTH, "float32"), True)),
    SessionInput(activations=Activations(0, hidden(4, WIDTH, "bfloat16", math.nan), True)),
    SessionInput(activations=Activations(0, Tensor("bfloat16", (0, WIDTH), b""), True)),
]


async def session(bad, stage, request, message=None):
    """Open a session at a stage, say one thing, and stay until it is thrown out or a moment has passed."""
    with trio.move_on_after(TRY_S_MAX):
        try:
            async with bad.rpc.open(bad.stages[stage].peer, SESSION, request) as channel:
                if message is not None:
                    await channel.send(message)
                await channel.receive()
        except* (P2pError, EndOfChannel):
            pass


async def test_sessions_that_make_no_sense(unharmed, four):
    async with villain(four) as bad, trio.open_nursery() as nursery:
        for i, more in enumerate(OPENINGS):
            nursery.start_soon(session, bad, 0, opening(bad, **({"session": f"open-{i}"} | more)))
        for i, message in enumerate(INPUTS):
            nursery.start_soon(session, bad, 0, opening(bad, session=f"first-{i}"), message)
        for i, message in enumerate(LATER_INPUTS):
            for index in (1, len(bad.stages) - 1):
                nursery.start_soon(
                    session, bad, index, opening(bad, session=f"later-{index}-{i}", index=index), message
                )


async def test_tokens_that_nobody_asked_for(unharmed, four):
    async with villain(four) as bad:
        for peer in bad.victims:
            for role in ("gateway", "stage"):
                with contextlib.suppress(P2pError):
                    async with bad.rpc.open(peer, RETURN, ReturnOpen("ab" * 12, role)) as channel:
                        for index in range(1000):
                            await channel.send(TokenOut(index, 7))


async def test_a_member_that_promises_a_model_and_then_hangs_up_costs_a_request_nothing(
    unharmed, four, tools, expected
):
    """It says that it serves every layer in no time; requests that try it go on over the others."""
    async with villain(four) as bad:
        gossip = Gossip(bad.rpc, View(), bad.identity)
        async with trio.open_nursery() as nursery:
            await nursery.start(gossip.run)
            card = NodeAdvert("liar", "0", (), None, False, 1 << 40, 1e15, 1e15, "cpu")
            lie = HostAdvert(0, 8, "ready", 1, kv_tokens_free=1 << 40, s_per_layer=1e-300)
            gossip.publish(adverts.NODE, "", pack_value(card), 30.0)
            gossip.publish(adverts.HOST, bad.model["manifest"], pack_value(lie), 30.0)
            for index in range(4):
                await on_thread(
                    four.until,
                    lambda view: any(n["name"] == "liar" and n["spans"] for n in view["nodes"]),
                    index,
                )
            for node in four.nodes:
                text = await on_thread(partial(tools.complete, node.api, PROMPT, max_tokens=TOKENS))
                assert text == expected
            await gossip.withdraw_all(2.0)
            nursery.cancel_scope.cancel()


async def test_a_stranger_gets_nothing(unharmed, four):
    invite = Invite.decode(four.nodes[0].invite())
    strangers = [
        (invite.mesh_id, os.urandom(32), b""),
        (invite.mesh_id, None, b""),
        ("0123456789abcdef", invite.swarm_key, b""),
        (invite.mesh_id, invite.swarm_key, b""),
        (invite.mesh_id, os.urandom(32), invite.ticket),
    ]
    for mesh_id, key, ticket in strangers:
        identity = Identity.generate()
        roster = Roster(identity, mesh_id, invite.founder, key, ticket=ticket)
        async with open_host(identity, mesh_id, key, LISTEN, roster=roster) as host:
            for node in four.nodes[0].view()["nodes"]:
                with pytest.raises(Unreachable):
                    await host.connect(node["addrs"], deadline_s=6.0)
            assert host.peers() == ()
    assert all(len(node.view()["nodes"]) == 4 for node in four.nodes)


def test_sockets_that_say_nothing_or_nonsense(unharmed, four, tools):
    """To the peers' port and to the HTTP port, more of them than anyone needs."""
    ports = [int(n["addrs"][0].split("/")[4]) for n in four.nodes[0].view()["nodes"]]
    ports += [urlsplit(api).port for api in four.apis]
    says = [
        b"",
        b"\x00" * 100,
        os.urandom(5000),
        b"GET / HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
    ]
    with contextlib.ExitStack() as stack:
        for port in ports:
            for i in range(25):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
                with contextlib.suppress(OSError):
                    sock.sendall(says[i % len(says)])
        assert all(tools.ask(api, PROMPT, max_tokens=2)[0] == 200 for api in four.apis)
