"""Protocol negotiation and the proof of membership: total over bytes."""

import logging
import random
from functools import partial

import pytest
import trio
import trio.testing
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError, MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from p2p.compat import LIBP2P_VERSION, apply, patches
from p2p.compat.negotiate import MULTISTREAM, NegotiationError, answer, ask, encode_message, read_message
from p2p.errors import LocalFault
from p2p.membership import Membership, MembershipRefused


class Pipe:
    def __init__(self, stream):
        self.stream = stream

    async def read(self, n=None):
        return await self.stream.receive_some(n)

    async def write(self, data):
        await self.stream.send_all(data)


class Bytes:
    """A pipe whose peer sends fixed bytes and then hangs up."""

    def __init__(self, data):
        self.data = data

    async def read(self, n=None):
        piece, self.data = self.data[:n], self.data[n:]
        return piece

    async def write(self, data):
        pass


@pytest.fixture
def pipes():
    return tuple(Pipe(stream) for stream in trio.testing.memory_stream_pair())


def both(known):
    return partial(answer, known=lambda name: name in known, names=lambda: list(known))


async def test_a_known_protocol_is_agreed_on_and_an_unknown_one_refused(pipes):
    client, server = pipes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(both({"/a/1"}), server)
        with pytest.raises(NegotiationError, match="does not speak /b/1"):
            await ask(client, "/b/1")
        await client.write(encode_message("/a/1"))
        assert await read_message(client) == "/a/1"


async def test_the_librarys_client_and_server_understand_ours(pipes):
    apply()
    client, server = pipes
    async with trio.open_nursery() as nursery:
        nursery.start_soon(both({"/a/1"}), server)
        chosen = await MultiselectClient().select_one_of(["/x", "/a/1"], MultiselectCommunicator(client))
    assert chosen == "/a/1"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Multiselect({"/b/1": None}).negotiate, MultiselectCommunicator(server))
        await ask(client, "/b/1")


GREETING = encode_message(MULTISTREAM)
GARBAGE = {
    "nothing": b"",
    "not UTF-8": b"\x05\xff\xfe\xfd\xfc\n",
    "not UTF-8 after a greeting": GREETING + b"\x05\xff\xfe\xfd\xfc\n",
    "no line feed": b"\x05hello",
    "an empty message": b"\x00",
    "a length of 2 KiB": b"\x80\x10" + b"a" * 2048,
    "a length of three bytes": b"\xff\xff\x01",
    "cut short": GREETING[:7],
    "another greeting": encode_message("/multistream/9.9.9"),
    "never a known name": GREETING + encode_message("/x") * 100,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_is_a_negotiation_error_on_both_sides(data):
    with pytest.raises(NegotiationError):
        await both({"/a/1"})(Bytes(data))
    with pytest.raises(NegotiationError):
        await ask(Bytes(data), "/a/1")


@pytest.mark.parametrize("seed", range(50))
async def test_random_bytes_are_a_negotiation_error(seed):
    with pytest.raises(NegotiationError):
        await both({"/a/1"})(Bytes(random.Random(seed).randbytes(300)))


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_the_librarys_own_negotiation_meets_garbage_with_its_own_error(data):
    apply()
    with pytest.raises((MultiselectError, MultiselectCommunicatorError)):
        await Multiselect({"/a/1": None}).negotiate(MultiselectCommunicator(Bytes(data)))


def test_the_mends_apply_any_number_of_times():
    apply()
    first = MultiselectCommunicator.read
    apply()
    assert MultiselectCommunicator.read is first


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (logging.WARNING, logging.CRITICAL),
        (logging.NOTSET, logging.CRITICAL),
        (logging.DEBUG, logging.DEBUG),
    ],
)
def test_the_library_logs_a_peers_faults_only_when_asked_to(before, after):
    library = logging.getLogger("libp2p")
    level = library.level
    try:
        library.setLevel(before)
        apply()
        assert library.level == after
    finally:
        library.setLevel(level)


def test_the_mends_refuse_another_version_of_the_library(monkeypatch):
    monkeypatch.setattr(patches.libp2p, "__version__", "0.9.0")
    with pytest.raises(LocalFault, match=rf"0\.9\.0 .* {LIBP2P_VERSION}"):
        apply()


async def listen(membership, pipe, dialler):
    try:
        answer = await membership.check_as_listener(pipe, dialler)
    except MembershipRefused:
        await pipe.stream.aclose()
        return
    await membership.accept(pipe, dialler, answer)


@pytest.mark.parametrize("key", [b"k" * 32, None])
async def test_two_members_prove_themselves_to_each_other(pipes, key):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, Membership("m", key, "B"), pipes[1], "A")
        await Membership("m", key, "A").prove_as_dialler(pipes[0], "B")


@pytest.mark.parametrize(
    ("dialler", "listener", "seen_dialler", "seen_listener"),
    [
        (Membership("m", b"x" * 32, "A"), Membership("m", b"k" * 32, "B"), "A", "B"),
        (Membership("m", None, "A"), Membership("m", b"k" * 32, "B"), "A", "B"),
        (Membership("n", b"k" * 32, "A"), Membership("m", b"k" * 32, "B"), "A", "B"),
        (Membership("m", b"k" * 32, "A"), Membership("m", b"k" * 32, "B"), "E", "B"),
        (Membership("m", b"k" * 32, "A"), Membership("m", b"k" * 32, "B"), "A", "E"),
    ],
    ids=["wrong key", "no key", "wrong mesh", "a proof passed on by another dialler", "by another listener"],
)
async def test_anything_but_the_same_key_mesh_and_peers_is_refused(
    pipes, dialler, listener, seen_dialler, seen_listener
):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, listener, pipes[1], seen_dialler)
        with pytest.raises(MembershipRefused):
            await dialler.prove_as_dialler(pipes[0], seen_listener)
        nursery.cancel_scope.cancel()


async def test_the_listener_refuses_a_dialler_that_replays_the_listeners_own_proof(pipes):
    listener = Membership("m", b"k" * 32, "B")
    async with trio.open_nursery() as nursery:

        async def mirror():
            await pipes[0].write(bytes(32))
            reply = await pipes[0].read(64)
            await pipes[0].write(reply[32:])

        nursery.start_soon(mirror)
        with pytest.raises(MembershipRefused):
            await listener.check_as_listener(pipes[1], "A")
