"""The two queues of a link, without any path: whatever paths do to records, messages come whole, once, in order."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p import LocalFault, ProtocolViolation
from p2p.links.handshake import HELLO_SIZE, Hello, read_hello
from p2p.links.inbox import Inbox
from p2p.links.keys import Cipher, Exchange, LinkKeys, context_of
from p2p.links.meter import Pace
from p2p.links.outbox import RECORDS_AHEAD_MAX, Outbox, cut
from p2p.links.records import (
    BEGIN,
    DATA_KINDS,
    END,
    HEAD,
    HEAD_BYTES,
    OVERHEAD_BYTES,
    PART,
    TAG_BYTES,
    Head,
    RecordRefused,
    read_head,
    seal,
)

RECORD = 4096
WINDOW = 8 * RECORD
GOLDEN = "0200000300000014000000000000000916632be210fce2aac11bb15c5aa6557c0693658c"


def key_pair():
    one, other = Exchange(), Exchange()
    context = context_of(b"s" * 16, "service", "a", "b", (one.public, other.public))
    return (
        LinkKeys(one.finish(other.public, context), opener=True),
        LinkKeys(other.finish(one.public, context), opener=False),
    )


def queues(window=WINDOW):
    mine, theirs = key_pair()
    return Outbox(mine.outward, RECORD, window), Inbox(theirs.inward, RECORD, window, 1000, 1 << 20)


def deliver(inbox, views):
    for view in views:
        head = read_head(view, 0, RECORD)
        inbox.arrived(head, view)


def put(outbox, header, payload):
    outbox.begin(header, b"", len(payload), wants_echo=False)
    for part in cut([memoryview(payload)], RECORD):
        outbox.part(part)


def forged(inbox_keys, kind, plain, seq, message=1):
    """A record that the peer really sealed, whatever it says."""
    record = memoryview(bytearray(len(plain) + OVERHEAD_BYTES))
    seal(inbox_keys.outward, Head(kind, 0, message, len(plain) + TAG_BYTES, seq), plain, record)
    return record


def _said(data):
    """The beginning of a hello, whatever follows."""
    return (b"SHL1" + data).ljust(HELLO_SIZE, b"\0")[:HELLO_SIZE]


class World:
    """Two queues, several carriers between them, and a seeded fate."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.outbox, self.inbox = queues()
        count = self.random.randrange(3, 12)
        self.wanted = [self.message(number) for number in range(count)]
        self.aborted = {number for number in range(count) if self.random.random() < 0.2}
        self.got = []
        self.steps = self.sending()
        self.all_sent = False
        self.carriers = self.new_carriers()
        self.places = []

    def message(self, number):
        size = self.random.choice([0, 1, RECORD, RECORD + 1, 3 * RECORD - 1, 20 * RECORD + 7])
        return number.to_bytes(2, "big"), self.random.randbytes(size)

    def new_carriers(self):
        return [[] for _ in range(self.random.choice([1, 1, 2, 4]))]

    def sending(self):
        for number, (header, payload) in enumerate(self.wanted):
            while not self.outbox.room(100):
                yield
            self.outbox.begin(header, b"", len(payload), wants_echo=False)
            parts = list(cut([memoryview(payload)], RECORD))
            stop = self.random.randrange(len(parts)) if number in self.aborted and parts else None
            for index, part in enumerate(parts):
                if index == stop:
                    self.outbox.abort()
                    break
                while not self.outbox.room(len(part)):
                    yield
                self.outbox.part(part)
            yield
        while not self.outbox.room(100):
            yield
        self.outbox.end()
        self.all_sent = True

    def sink(self, header, size):
        return self.random.choice([None, memoryview(bytearray(size))])

    def step(self):
        what = self.random.random()
        if what < 0.3:
            next(self.steps, None)
        elif what < 0.5:
            carrier = self.random.choice(self.carriers)
            carrier.extend(bytes(view) for view in self.outbox.take(RECORD))
        elif what < 0.8:
            carrier = self.random.choice(self.carriers)
            if carrier:
                deliver(self.inbox, [memoryview(carrier.pop(0))])
        elif what < 0.9:
            if self.random.random() < 0.3:
                self.inbox.unpost()
            else:
                self.inbox.post(self.sink)
            ready = self.inbox.take()
            if ready is not None:
                self.got.append((ready[0], bytes(ready[1])))
        elif what < 0.98:
            self.outbox.acknowledged(self.inbox.received, self.inbox.consumed)
        else:
            self.carriers = self.new_carriers()
            self.outbox.rewind(self.inbox.received)
        self.outbox.validate()
        self.inbox.validate()
        assert self.outbox.unconsumed_bytes <= WINDOW + 64


@pytest.mark.parametrize("seed", range(40))
def test_broken_reordered_and_repeated_paths_lose_and_double_nothing(seed):
    world = World(seed)
    for _ in range(60_000):
        world.step()
        if world.inbox.ended:
            break
    assert world.inbox.ended
    kept = [
        message
        for number, message in enumerate(world.wanted)
        if number not in world.aborted or not message[1]
    ]
    assert world.got == kept


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 100))
def test_cutting_keeps_all_bytes_in_pieces_of_one_size(pieces, size):
    parts = list(cut([memoryview(one) for one in pieces], size))
    assert b"".join(parts) == b"".join(pieces)
    assert all(len(part) == size for part in parts[:-1])
    assert all(0 < len(part) <= size for part in parts)


def test_a_sealed_record_is_decrypted_in_place():
    outbox, inbox = queues()
    payload = random.Random(1).randbytes(3 * RECORD)
    place = memoryview(bytearray(len(payload)))
    inbox.post(lambda header, size: place)
    put(outbox, b"h", payload)
    deliver(inbox, outbox.take(1 << 20))
    header, got = inbox.take()
    assert (header, got.obj is place.obj, bytes(place)) == (b"h", True, payload)


def test_while_nobody_receives_no_buffer_is_written_to():
    outbox, inbox = queues()
    place = bytearray(3 * RECORD)
    inbox.post(lambda header, size: memoryview(place))
    put(outbox, b"h", b"x" * len(place))
    records = outbox.take(1 << 20)
    deliver(inbox, records[:2])
    inbox.unpost()
    deliver(inbox, records[2:])
    assert place == b"x" * RECORD + bytes(2 * RECORD)
    inbox.post(None)
    assert inbox.take() == (b"h", memoryview(b"x" * len(place)))


def test_a_buffer_that_is_taken_back_is_not_written_to_and_the_message_comes_all_the_same():
    outbox, inbox = queues()
    payload = random.Random(3).randbytes(3 * RECORD)
    place = bytearray(len(payload))
    inbox.post(lambda header, size: memoryview(place))
    put(outbox, b"h", payload)
    records = outbox.take(1 << 20)
    deliver(inbox, records[:2])
    inbox.divert()
    deliver(inbox, records[2:])
    assert place == payload[:RECORD] + bytes(2 * RECORD)
    inbox.divert()
    header, got = inbox.take()
    assert (header, got) == (b"h", payload)
    assert got.obj is not place


def test_a_spoilt_copy_of_what_was_placed_does_not_spoil_it():
    outbox, inbox = queues()
    payload = random.Random(2).randbytes(3 * RECORD)
    inbox.post(None)
    put(outbox, b"h", payload)
    records = outbox.take(1 << 20)
    deliver(inbox, records[:3])
    bad = bytearray(records[1])
    bad[-1] ^= 1
    deliver(inbox, [memoryview(bad)])
    deliver(inbox, records[3:])
    assert inbox.take() == (b"h", memoryview(payload))
    inbox.validate()


def test_memory_that_a_new_path_may_be_sending_is_not_used_again():
    outbox, inbox = queues()
    put(outbox, b"h", b"x" * 2 * RECORD)
    sent_by_the_old_path = outbox.take(1 << 20)
    outbox.rewind(0)
    under_way = outbox.take(1 << 20)
    sealed = [bytes(view) for view in under_way]
    inbox.post(None)
    deliver(inbox, sent_by_the_old_path)
    outbox.acknowledged(inbox.received, inbox.consumed)
    put(outbox, b"h", b"y" * 2 * RECORD)
    assert [bytes(view) for view in under_way] == sealed


@pytest.mark.parametrize("at", [0, 3, 8, HEAD_BYTES, -1])
def test_a_changed_bit_is_refused_and_the_true_record_still_counts(at):
    outbox, inbox = queues()
    inbox.post(None)
    outbox.begin(b"h", b"payload", 7, wants_echo=False)
    (view,) = outbox.take(1 << 20)
    bad = bytearray(view)
    bad[at] ^= 1
    with pytest.raises(RecordRefused):
        deliver(inbox, [memoryview(bad)])
    deliver(inbox, [view])
    assert inbox.take() == (b"h", memoryview(b"payload"))


@given(st.binary(min_size=HEAD_BYTES, max_size=200))
def test_any_bytes_are_a_head_or_refused(data):
    try:
        head = read_head(memoryview(data), 0, RECORD)
    except RecordRefused:
        return
    assert TAG_BYTES <= head.length <= RECORD + TAG_BYTES


def test_a_record_that_claims_too_much_is_refused_before_it_is_read():
    with pytest.raises(RecordRefused, match="claims"):
        read_head(memoryview(HEAD.pack(PART, 0, 1, 0xFFFFFFFF, 5)), 0, RECORD)


@pytest.mark.parametrize(
    ("plain", "match"),
    [
        ((1001).to_bytes(4, "big") + (0).to_bytes(8, "big"), "header of 1001"),
        ((1).to_bytes(4, "big") + (1 << 40).to_bytes(8, "big") + b"h", "payload of 1099511627776"),
        ((9).to_bytes(4, "big") + (0).to_bytes(8, "big") + b"h", "size that it says"),
        ((1).to_bytes(4, "big") + (5).to_bytes(8, "big") + b"hxx", "size that it says"),
        (b"short", "beginning of a message of 5"),
    ],
)
def test_the_beginning_of_a_message_is_checked_before_anything_is_allocated(plain, match):
    mine, theirs = key_pair()
    inbox = Inbox(theirs.inward, RECORD, WINDOW, 1000, 1 << 20)
    inbox.post(lambda header, size: pytest.fail("asked for a buffer"))
    with pytest.raises(ProtocolViolation, match=match):
        deliver(inbox, [forged(mine, BEGIN, plain, 0)])


@pytest.mark.parametrize("kind", [kind for kind in DATA_KINDS if kind not in (BEGIN, END)])
def test_a_message_must_begin_at_its_beginning(kind):
    mine, theirs = key_pair()
    inbox = Inbox(theirs.inward, RECORD, WINDOW, 1000, 1 << 20)
    inbox.post(None)
    with pytest.raises(ProtocolViolation):
        deliver(inbox, [forged(mine, kind, b"", 0)])


def test_a_piece_of_the_wrong_size_is_a_violation():
    mine, theirs = key_pair()
    inbox = Inbox(theirs.inward, RECORD, WINDOW, 1000, 1 << 20)
    inbox.post(None)
    beginning = (0).to_bytes(4, "big") + (2 * RECORD).to_bytes(8, "big")
    with pytest.raises(ProtocolViolation, match="piece of 10"):
        deliver(inbox, [forged(mine, BEGIN, beginning, 0), forged(mine, PART, bytes(10), 1)])


def test_more_than_the_window_is_a_violation():
    mine, theirs = key_pair()
    inbox = Inbox(theirs.inward, RECORD, WINDOW, 1000, 1 << 20)
    deliver(inbox, [forged(mine, PART, bytes(RECORD), seq) for seq in range(8)])
    with pytest.raises(ProtocolViolation, match="more than its window"):
        deliver(inbox, [forged(mine, PART, bytes(RECORD), seq) for seq in (8, 9)])


def test_more_small_records_than_allowed_are_a_violation():
    mine, theirs = key_pair()
    inbox = Inbox(theirs.inward, RECORD, 1 << 30, 1000, 1 << 20)
    with pytest.raises(ProtocolViolation, match="were taken"):
        deliver(inbox, [forged(mine, PART, b"", RECORDS_AHEAD_MAX + 4)])


def test_a_piece_that_overtakes_the_end_of_an_aborted_message_lands_in_its_own():
    outbox, inbox = queues()
    first, second = bytearray(6 * RECORD), bytearray(2 * RECORD)
    places = iter([memoryview(first), memoryview(second)])
    inbox.post(lambda header, size: next(places))
    outbox.begin(b"1", b"", len(first), wants_echo=False)
    outbox.abort()
    put(outbox, b"2", b"x" * len(second))
    begun, aborted, begun_second, *parts = outbox.take(1 << 20)
    deliver(inbox, [begun, parts[0], parts[1], begun_second, aborted])
    assert inbox.take() == (b"2", memoryview(b"x" * len(second)))
    assert first == bytes(len(first))


def test_keys_change_long_before_a_cipher_tires():
    mine, _ = key_pair()
    sealed = {
        mine.outward.data(seq).encrypt(bytes(12), b"same", None)
        for seq in (0, (1 << 18) - 1, 1 << 18, 2 << 18)
    }
    sealed |= {keys.encrypt(bytes(12), b"same", None) for keys in (mine.outward.control, mine.inward.control)}
    sealed.add(mine.inward.data(0).encrypt(bytes(12), b"same", None))
    assert len(sealed) == 6


def test_a_sink_that_fails_leaves_the_message_for_the_next_receiver():
    outbox, inbox = queues()
    put(outbox, b"h", bytes(100))

    def fail(header, size):
        raise ZeroDivisionError

    inbox.post(fail)
    deliver(inbox, outbox.take(1 << 20))
    assert isinstance(inbox.sink_failure, ZeroDivisionError)
    inbox.post(None)
    assert inbox.take() == (b"h", memoryview(bytes(100)))


@pytest.mark.parametrize("given_buffer", [bytearray(99), bytearray(101), bytes(100)])
def test_a_sink_must_give_a_writable_buffer_of_the_size(given_buffer):
    outbox, inbox = queues()
    put(outbox, b"h", bytes(100))
    inbox.post(lambda header, size: memoryview(given_buffer))
    deliver(inbox, outbox.take(1 << 20))
    assert isinstance(inbox.sink_failure, LocalFault)


@pytest.mark.parametrize(("received", "consumed"), [(3, 0), (1, 2), (2**60, 2**60)])
def test_acknowledging_what_was_not_sent_is_a_violation(received, consumed):
    outbox, _ = queues()
    put(outbox, b"h", bytes(10))
    assert outbox.next_seq == 2
    with pytest.raises(ProtocolViolation):
        outbox.acknowledged(received, consumed)
    with pytest.raises(ProtocolViolation):
        outbox.rewind(3)


def test_each_direction_and_epoch_has_a_key_of_its_own():
    mine, theirs = key_pair()
    plain, sealed = bytes(64), set()
    for keys, seq in ((mine, 0), (theirs, 0), (mine, 1 << 18), (mine, 1), (mine, 2 << 18)):
        sealed.add(bytes(forged(keys, PART, plain, seq)[HEAD_BYTES:]))
    assert len(sealed) == 5
    inbox = Inbox(theirs.inward, RECORD, 1 << 30, 1000, 1 << 20)
    inbox.consumed = inbox.received = 1 << 18
    deliver(inbox, [forged(mine, PART, plain, (1 << 18) + 1), forged(mine, PART, plain, 1 << 18)])
    assert inbox.received == (1 << 18) + 2


@pytest.mark.parametrize("public", [b"", bytes(31), bytes(32), bytes(33)])
def test_a_public_key_that_is_none_is_a_violation(public):
    with pytest.raises(ProtocolViolation):
        Exchange().finish(public, b"")


def test_another_context_gives_another_secret():
    one, other = Exchange(), Exchange()
    first = context_of(b"s" * 16, "service", "a", "b", (one.public, other.public))
    second = context_of(b"s" * 16, "servic", "ea", "b", (one.public, other.public))
    assert one.finish(other.public, first) != other.finish(one.public, second)


@given(st.binary(min_size=HELLO_SIZE, max_size=HELLO_SIZE) | st.binary(max_size=HELLO_SIZE).map(_said))
def test_any_bytes_are_a_hello_or_a_violation(data):
    try:
        hello, proof = read_hello(data)
    except ProtocolViolation:
        return
    assert hello.said() + proof == data
    assert hello.index < hello.count <= 16


def test_a_hello_has_the_bytes_that_it_always_had():
    said = Hello(bytes(range(16)), 7, 1, 4, 258).said()
    assert said.hex() == "53484c31000102030405060708090a0b0c0d0e0f0000000701040000000000000102"


def test_a_record_has_the_bytes_that_it_always_had():
    cipher = Cipher(bytes(32), b"opener")
    record = memoryview(bytearray(4 + OVERHEAD_BYTES))
    seal(cipher, Head(PART, 0, 3, 4 + TAG_BYTES, 9), b"data", record)
    assert bytes(record).hex() == GOLDEN


def test_the_pace_of_a_path_is_known_from_what_came_since_the_first_bytes():
    pace = Pace()
    pace.add(64 << 20, 100.0)  # had waited, nobody knows for how long
    assert not pace.quick
    for step in range(1, 9):
        pace.add(64 << 10, 100.0 + step * 0.001)
    assert pace.quick
    for step in range(1, 9):
        pace.add(64 << 10, 101.0 + step * 0.1)
    assert not pace.quick
