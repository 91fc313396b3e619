"""Gossip's messages: every byte string is one message or a remote fault; the queue of what waits is bounded."""

from __future__ import annotations

import random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from dht import RecordRefused
from dht.digest import Detail, Digest
from dht.meshclock import MeshClock
from dht.messages import MESSAGE_BYTES_MAX, Exchange, Inventory, Parcel, Push, Summary, batches
from dht.outbox import Outbox

DETAIL = Detail(frozenset({1, 5}), {7: (3, 2**64 - 1)})
MESSAGES = [
    Push(()),
    Push((b"a", b"", bytes(1000))),
    Summary(Digest({})),
    Summary(Digest({1: 2, 2**64 - 1: 0})),
    Inventory(DETAIL),
    Exchange((b"record",), DETAIL),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_encoding_and_decoding_are_inverse(message):
    parcel = Parcel(1234.5, message)
    assert Parcel.decode(parcel.encode()) == parcel


def _decodes_or_refuses(data):
    try:
        parcel = Parcel.decode(data)
    except RecordRefused:
        return
    assert Parcel.decode(parcel.encode()) == parcel


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_remote_fault(data):
    _decodes_or_refuses(data)


@pytest.mark.parametrize("message", MESSAGES)
def test_any_damage_gives_a_message_or_a_remote_fault(message):
    rng = random.Random(5)
    whole = Parcel(1.0, message).encode()
    for length in range(min(len(whole), 200)):
        with pytest.raises(RecordRefused):
            Parcel.decode(whole[:length])
    with pytest.raises(RecordRefused):
        Parcel.decode(whole + b"\0")
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 60))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        _decodes_or_refuses(bytes(data))


@pytest.mark.parametrize("sent_at_s", [float("nan"), float("inf"), -1.0, 2.0**39 + 1, 1e30])
def test_an_impossible_clock_is_refused(sent_at_s):
    with pytest.raises(RecordRefused):
        Parcel.decode(Parcel(sent_at_s, Push(())).encode())


def test_a_message_over_its_limit_is_refused():
    with pytest.raises(RecordRefused):
        Parcel.decode(bytes(MESSAGE_BYTES_MAX + 1))


def test_the_bytes_of_version_one_do_not_change():
    parcel = Parcel(2.0, Exchange((b"r",), DETAIL))
    assert (
        parcel.encode().hex()
        == (
            "0103" + "4000000000000000" + "00000000" + "00000010" + "00000018" + "0001"
            "00000000000000010000000000000005" + "0000000000000007" + "0000000000000003" + "f" * 16
        )
        + "00000001"
        + b"r".hex()
    )


def test_batches_hold_every_record_within_their_limits():
    records = [bytes([n % 256]) * 60_000 for n in range(20)]
    pushes = batches(records)
    assert [record for push in pushes for record in push.records] == records
    assert all(len(Parcel(0.0, push).encode()) <= MESSAGE_BYTES_MAX for push in pushes)
    assert batches([]) == ()


async def test_waiting_pushes_leave_as_one_before_anything_else():
    outbox = Outbox(8, 10_000)
    outbox.put(Summary(Digest({1: 1})))
    outbox.put(Push((b"a",)))
    outbox.put(Push((b"b", b"a")))
    outbox.put(Summary(Digest({2: 2})))
    assert await outbox.take() == Push((b"a", b"b"))
    assert await outbox.take() == Summary(Digest({2: 2}))
    assert outbox.idle


async def test_an_outbox_drops_the_oldest_when_full():
    outbox = Outbox(2, 100)
    for n in range(10):
        outbox.put(Push((bytes([n]) * 40,)))
        outbox.put(Inventory(Detail(frozenset({n}), {})))
    assert outbox.dropped == 16
    assert await outbox.take() == Push((bytes([8]) * 40, bytes([9]) * 40))
    assert [(await outbox.take()).detail.scope for _ in range(2)] == [{8}, {9}]
    with trio.move_on_after(0):
        await outbox.take()
        pytest.fail("an empty outbox gave something")


@pytest.mark.parametrize(
    ("offsets", "median"),
    [
        ([], 0.0),
        ([1.9], 0.0),
        ([60.0], 30.0),
        ([60.0, 61.0], 60.0),
        ([0.1, -0.1, 9999.0], 0.0),
        ([-100.0, -100.0, 1e9], -50.0),
    ],
)
def test_the_mesh_s_time_is_the_median_of_clocks(offsets, median):
    clock = MeshClock()
    for n, offset in enumerate(offsets):
        clock.heard(f"peer{n}", 500.0 + offset, 500.0)
    assert clock.offset_s == pytest.approx(median)


def test_those_who_left_no_longer_count():
    clock = MeshClock()
    clock.heard("a", 100.0, 0.0)
    assert clock.peer_offset_s("a") == 100.0
    clock.lost("a")
    assert clock.offset_s == 0.0
