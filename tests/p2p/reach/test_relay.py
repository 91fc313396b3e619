"""Circuits over real connections on loopback: all works through them, the relay is no man in the middle, and its faults
are noticed."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from p2p import (
    Call,
    CallFailed,
    Host,
    HostConfig,
    Identity,
    Links,
    LinksConfig,
    Method,
    Rpc,
    Unreachable,
    open_host,
)
from p2p.compat.tcp import Way
from p2p.errors import PeerLost
from p2p.reach.punch import Hole, punch
from p2p.reach.relay import HOP, Circuits
from p2p.reach.relay_core import Pace, RelayCore, RelayLimits
from p2p.reach.service import KNOCK, RESERVE, Knock, Reach, Wish

ON_LOOPBACK = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))
SECRET = b"a secret that nobody between the ends may read " * 40


@dataclass(frozen=True)
class Said:
    data: bytes


ECHO = Method("test/echo", Said, Said)
WAIT = Method("test/wait", Said, Said, upstream=Said, deadline_s=60.0)


class Between:
    """A stream as the relay has it, through which a test listens or meddles."""

    def __init__(self, stream, seen=None, change=bytes) -> None:
        self._stream, self._seen, self._change = stream, seen, change
        self.peer = stream.peer

    async def receive_some(self, count: int) -> bytes:
        data = await self._stream.receive_some(count)
        if self._seen is not None:
            self._seen.extend(data)
        return data

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(self._change(data))


class Peer:
    """A host with its calls and circuits."""

    def __init__(self, host: Host, rpc: Rpc, limits: RelayLimits) -> None:
        self.host, self.rpc, self.id = host, rpc, host.peer_id
        self.core = RelayCore(limits)
        self.circuits = Circuits(host, host.raw.get_network(), self.core)
        rpc.serve(ECHO, self._echo)
        rpc.serve_channel(WAIT, self._wait)

    async def _echo(self, call: Call, said: Said) -> Said:
        return said

    async def _wait(self, call, said, channel) -> None:
        async for message in channel:
            await channel.send(message)

    def behind(self, relay: Peer) -> str:
        return f"{relay.host.addrs()[0]}/p2p-circuit/p2p/{self.id}"

    async def says(self, other: Peer, data: bytes = b"hi") -> bytes:
        with trio.fail_after(5):
            return (await self.rpc.call(other.id, ECHO, Said(data))).data


@asynccontextmanager
async def peers(count, limits=RelayLimits(), config=ON_LOOPBACK):  # noqa: B008 - frozen
    """That many hosts that do not know each other, which live until the block ends."""
    async with trio.open_nursery() as nursery:

        async def live(*, task_status):
            async with open_host(Identity.generate(), "test", bytes(32), config) as host:
                rpc = Rpc(host)
                async with trio.open_nursery() as inner:
                    await inner.start(rpc.run)
                    task_status.started(Peer(host, rpc, limits))
                    await trio.sleep_forever()

        yield [await nursery.start(live) for _ in range(count)]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def relayed(count=2, limits=RelayLimits(mbps=1000.0)):  # noqa: B008 - frozen
    """(relay, ends): each end is connected to the relay, holds a reservation, and to the first end through it."""
    async with peers(count + 1, limits) as (relay, *ends):
        for end in ends:
            await end.host.connect(relay.host.addrs())
            relay.core.reserve(end.id, "", trio.current_time())
        for end in ends[1:]:
            await ends[0].host.connect([end.behind(relay)])
        yield relay, ends


async def test_calls_go_both_ways_through_a_relay():
    async with relayed() as (relay, (a, b)):
        assert [way.kind for way in a.host.ways(b.id)] == ["relayed"]
        assert await a.says(b) == await b.says(a) == b"hi"
        big = bytes(60_000)
        assert await b.says(a, big) == big
        assert relay.core.circuits == 1
        assert relay.core.carried_bytes > 100_000


async def test_the_relay_sees_ciphertext_only(monkeypatch):
    seen = bytearray()
    real = Circuits._carry

    async def listening(self, near, far):
        await real(self, Between(near, seen), Between(far, seen))

    monkeypatch.setattr(Circuits, "_carry", listening)
    async with relayed() as (_, (a, b)):
        assert await a.says(b, SECRET) == SECRET
    assert len(seen) > 2 * len(SECRET)
    assert SECRET[:40] not in seen
    assert b"multistream" in seen, "what is not secret is seen, so the tap is where it should be"


async def test_a_relay_that_joins_us_to_another_peer_is_found_out(monkeypatch):
    async with peers(4) as (relay, a, b, liar):
        for end in (a, b, liar):
            await end.host.connect(relay.host.addrs())
            relay.core.reserve(end.id, "", trio.current_time())
        real = relay.host.open_stream
        monkeypatch.setattr(
            relay.host, "open_stream", lambda peer, *rest: real(liar.id if peer == b.id else peer, *rest)
        )
        with pytest.raises(Unreachable):
            await a.host.connect([b.behind(relay)])
        assert not a.host.is_connected(b.id)
        assert not a.host.is_connected(liar.id)


async def test_a_relay_that_changes_a_byte_is_found_out(monkeypatch):
    real = Circuits._carry
    spoil = False

    def change(data):
        return bytes([data[0] ^ spoil]) + data[1:]

    async def spoiling(self, near, far):
        await real(self, near, Between(far, change=change))

    monkeypatch.setattr(Circuits, "_carry", spoiling)
    async with relayed() as (_, (a, b)):
        assert await a.says(b) == b"hi"
        spoil = True
        with pytest.raises(PeerLost):
            await a.says(b)


async def test_a_peer_that_asks_for_circuits_without_end_is_held_up():
    async with peers(2) as (relay, a):
        await a.host.connect(relay.host.addrs())
        relay.core.reserve(a.id, "", trio.current_time())
        relay.circuits._pace = Pace(2, 60.0)
        assert [await a.circuits.proven(relay.id) for _ in range(3)] == [True, True, False]


async def test_a_stream_that_breaks_while_the_relay_stops_is_no_fault_of_the_relay():
    class Broken:
        async def receive_some(self, count):
            raise PeerLost("b")

    class Silent:
        async def receive_some(self, count):
            await trio.sleep_forever()

    async with peers(1) as (relay,):
        with trio.CancelScope() as scope:
            scope.cancel()
            await relay.circuits._carry(Broken(), Silent())
        assert scope.cancelled_caught


@pytest.mark.parametrize("wrong", ["no reservation", "not connected"])
async def test_what_a_relay_refuses_is_said(wrong):
    async with peers(3) as (relay, a, b):
        await a.host.connect(relay.host.addrs())
        if wrong == "no reservation":
            await b.host.connect(relay.host.addrs())
        with pytest.raises(Unreachable, match=wrong):
            await a.host.connect([b.behind(relay)])


async def test_a_relay_behind_a_relay_is_none():
    async with relayed() as (_, (a, b)):
        b.core.reserve(a.id, "", trio.current_time())
        stream = await a.host.open_stream(b.id, HOP)
        await stream.send_all(bytes([len(a.id)]) + a.id.encode())
        assert (await stream.receive_some(1)) == b"\x00"
        with pytest.raises(Unreachable):
            await a.host.connect([f"{b.behind(a)}/p2p-circuit/p2p/{a.id}"])


async def test_one_circuit_that_ends_leaves_the_peers_others():
    async with relayed(3) as (relay, (a, b, c)):
        assert relay.core.circuits == 2
        await a.host.disconnect(b.id)
        assert await a.says(c) == b"hi"
        with trio.fail_after(3):
            while relay.core.circuits > 1:  # noqa: ASYNC110 - the core is synchronous and tells nobody
                await trio.sleep(0.01)


async def test_when_the_relay_dies_both_ends_hear_of_it():
    async with relayed() as (relay, (a, b)):
        with a.host.watch() as at_a, b.host.watch() as at_b:
            for link in list(relay.host._links):
                link.abort("killed")
            with trio.fail_after(3):
                assert {(await at_a.receive()).peer for _ in range(2)} == {b.id, relay.id}
                assert {(await at_b.receive()).peer for _ in range(2)} == {a.id, relay.id}


async def test_a_relay_that_promises_and_does_not_carry_is_seen_through(monkeypatch):
    async with peers(2) as (relay, a):
        await a.host.connect(relay.host.addrs())
        assert not await a.circuits.proven(relay.id), "no reservation"
        relay.core.reserve(a.id, "", trio.current_time())
        assert await a.circuits.proven(relay.id)

        async def swallow(self, near, far):
            await near.send_all(bytes(16))
            await trio.sleep_forever()

        monkeypatch.setattr(Circuits, "_carry", swallow)
        assert not await a.circuits.proven(relay.id)


async def test_a_direct_connection_takes_over_and_what_is_under_way_goes_on():
    async with relayed() as (relay, (a, b)):
        async with a.rpc.open(b.id, WAIT, Said(b"")) as channel:
            await channel.send(Said(b"1"))
            assert (await channel.receive()).data == b"1"
            with a.host.watch() as at_a, b.host.watch() as at_b:
                dialled = a.host.raw.get_network().dial_addr
                maddr, peer = _target(b)
                await dialled(maddr, peer)
                with trio.fail_after(3):
                    assert (await at_a.receive()).kind == (await at_b.receive()).kind == "moved"
            assert [way.kind for way in a.host.ways(b.id)] == ["direct", "relayed"]
            carried = relay.core.carried_bytes
            assert await a.says(b, SECRET) == SECRET
            assert relay.core.carried_bytes - carried < len(SECRET), "calls take the better way"
            a.host.shed_relayed(), b.host.shed_relayed()
            await channel.send(Said(b"2"))
            assert (await channel.receive()).data == b"2", "the open call ends where it began"
        with trio.fail_after(5):
            while relay.core.circuits:
                await trio.sleep(0.05)
                a.host.shed_relayed(), b.host.shed_relayed()
        assert [way.kind for way in b.host.ways(a.id)] == ["direct"]
        assert await b.says(a) == b"hi"


def _target(peer):
    from libp2p.peer.id import ID
    from multiaddr import Multiaddr

    address, _, _ = peer.host.addrs()[0].rpartition("/p2p/")
    return Multiaddr(address), ID.from_base58(peer.id)


async def test_a_tensor_link_works_through_a_relay_and_moves_to_the_better_way():
    async with relayed() as (relay, (a, b)), trio.open_nursery() as nursery:
        there, here = (
            Links(peer.host, peer.rpc, _Named(peer.id), LinksConfig(direct=False)) for peer in (b, a)
        )

        async def echo(link):
            while True:
                header, payload = await link.receive()
                await link.send(header, [bytes(payload)])

        there.serve("echo", echo)
        for links in (here, there):
            await nursery.start(links.run)

        async def through(link, count):
            await link.send(b"h", [bytes(count)])
            _, payload = await link.receive()
            return len(payload)

        with trio.fail_after(20):
            async with here.open(b.id, "echo") as link:
                assert await through(link, 3_000_000) == 3_000_000
                assert relay.core.carried_bytes > 6_000_000
                await a.host.raw.get_network().dial_addr(*_target(b))
                while relay.core.circuits:
                    await trio.sleep(0.05)
                    a.host.shed_relayed(), b.host.shed_relayed()
                assert await through(link, 3_000_000) == 3_000_000
        nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class _Named:
    peer_id: str


async def test_both_ends_that_punch_get_one_connection():
    async with relayed() as (_, (a, b)):
        (here,), (there,) = a.host.bound(), b.host.bound()
        made = []

        async def one(mine, other, source, target, begins):
            hole = Hole(other.id, source, [target], begins)
            made.append(await punch(mine.host.raw.get_network(), hole, 5.0))

        with a.host.watch() as at_a, b.host.watch() as at_b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, a, b, here, there, False)
                nursery.start_soon(one, b, a, there, here, True)
            assert made == [True, True]
            with trio.fail_after(3):
                assert (await at_a.receive()).kind == (await at_b.receive()).kind == "moved"
        assert a.host.ways(b.id)[0] == Way("punched", here, there)
        assert b.host.ways(a.id)[0] == Way("punched", there, here)
        assert await a.says(b) == await b.says(a) == b"hi"


async def test_a_hole_to_nobody_is_given_up():
    async with peers(1) as (a,):
        (here,) = a.host.bound()
        stranger = Identity.generate().peer_id
        with trio.fail_after(3):
            assert not await punch(
                a.host.raw.get_network(), Hole(stranger, here, [("127.0.0.1", 9)], True), 0.4
            )


async def test_a_second_node_on_the_port_is_refused_though_the_first_dials_from_it():
    async with peers(2) as (a, b):
        (here,), (there,) = a.host.bound(), b.host.bound()
        with trio.fail_after(5):
            pinned = await a.host.connect_from(here, there, b.id)
        assert pinned.alive
        assert [way.remote for way in b.host.ways(a.id)] == [here]
        taken = HostConfig(listen=(f"/ip4/127.0.0.1/tcp/{here[1]}",))
        with pytest.raises(Exception, match="already in use"):
            async with open_host(Identity.generate(), "test", bytes(32), taken):
                pass


async def test_who_comes_from_another_address_is_answered_there():
    async with peers(2) as (a, b):
        await a.host.connect(b.host.addrs())
        assert await b.says(a) == b"hi"
        with b.host.watch() as events:
            with trio.fail_after(5):
                pinned = await a.host.connect_from(("127.0.0.2", 0), b.host.bound()[0], b.id)
                assert (await events.receive()).kind == "moved"
        assert [way.remote[0] for way in b.host.ways(a.id)] == ["127.0.0.2", "127.0.0.1"]
        old = next(link for link in a.host._links if link is not pinned._link.mux)
        old._deliver = lambda stream, piece: None  # what still comes that way is heard by nobody
        assert await b.says(a) == b"hi"


async def test_a_connection_that_fell_silent_is_ended_though_another_lives():
    limits = HostConfig(listen=ON_LOOPBACK.listen, quiet_s=0.1, silence_s=0.6)
    async with peers(2, config=limits) as (a, b):
        await a.host.connect(b.host.addrs())
        with trio.fail_after(5):
            pinned = await a.host.connect_from(("127.0.0.2", 0), b.host.bound()[0], b.id)
        assert len(b.host.ways(a.id)) == 2
        pinned._link.mux.send_control = lambda *frame: None
        pinned._link.mux.schedule = lambda stream: None
        with b.host.watch() as events, trio.fail_after(5):
            while len(b.host.ways(a.id)) == 2:  # noqa: ASYNC110 - no event tells of single connections
                await trio.sleep(0.05)
            with trio.move_on_after(1.0):
                pytest.fail(f"{await events.receive()}, where the other connection is well")
        assert await b.says(a) == await a.says(b) == b"hi"


# ---- what members do for one another


@asynccontextmanager
async def reaching():
    """(asker, member): connected, both with Reach."""
    async with peers(2) as (a, b):
        await a.host.connect(b.host.addrs())
        yield a, b, Reach(a.host, a.rpc), Reach(b.host, b.rpc)


async def test_a_member_knocks_at_the_asker_and_says_what_answered():
    async with reaching() as (a, b, _, _):
        port = a.host.bound()[0][1]
        found = await a.rpc.call(b.id, KNOCK, Knock((port, 9)))
        assert (found.ip, found.answered) == ("127.0.0.1", (port,))


async def test_another_peer_at_the_port_is_no_answer():
    async with reaching() as (a, b, _, _):
        found = await a.rpc.call(b.id, KNOCK, Knock((b.host.bound()[0][1],)))
        assert found.answered == ()


async def test_nobody_can_have_a_member_knock_often_or_at_many_ports(monkeypatch):
    async with reaching() as (a, b, _, at_b):
        knocked = []

        async def count(where, peer):
            knocked.append(where)
            raise OSError("no")

        monkeypatch.setattr(at_b._swarm, "knock", count)
        await a.rpc.call(b.id, KNOCK, Knock(tuple(range(1, 60_000, 997))))
        assert len(knocked) == 2
        assert {ip for ip, _ in knocked} == {"127.0.0.1"}, "where the asker is, and nowhere else"
        for _ in range(3):
            await a.rpc.call(b.id, KNOCK, Knock((1,)))
        with pytest.raises(CallFailed, match="too often"):
            await a.rpc.call(b.id, KNOCK, Knock((1,)))
        assert len(knocked) <= 5


async def test_a_relayed_peer_is_neither_knocked_at_nor_relayed_for():
    async with relayed() as (_, (a, b)):
        Reach(b.host, b.rpc, None)
        with pytest.raises(CallFailed, match="no direct"):
            await a.rpc.call(b.id, KNOCK, Knock((4001,)))
        with pytest.raises(CallFailed, match="direct connections"):
            await a.rpc.call(b.id, RESERVE, Wish())
