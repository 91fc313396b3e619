"""Messages of agreement: golden bytes, total decoding, and a chain that no well-formed message can break."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives import agreement
from collectives.agreement import events as ev
from collectives.agreement import messages as ms
from collectives.agreement.chain import Chain
from collectives.agreement.types import (
    Ballot,
    Certificate,
    Decided,
    Declaration,
    LeftOut,
    Member,
    Offer,
    Resignation,
    Saved,
    Seat,
    Settings,
    Value,
    Vote,
    founding,
)
from p2p import ProtocolViolation, pack_value, unpack_value

CONFIG = founding("run", "outer", "ab")
BALLOT = Ballot(2, "a")
OFFER = Offer(0, 5, 3.0, b"l", b"s", "int8", 1e6, "lan", True, 2.5, b"c")
MEMBERS = (Member("a", 0, 5, 3.0, 1e6, "lan", True, 2.5, b"c"), Member("b", 4, 6, 1.0))
DECLARATION = Declaration("run", "outer", 1, BALLOT, MEMBERS, "int8", b"l", b"seed", (LeftOut("c", "late"),))
VALUE = Value(DECLARATION, b"digest")
DECIDED = Decided(DECLARATION.config(), VALUE, Certificate(BALLOT, ("a", "b"), ("c",)))
GONE = Resignation(Seat("c", 1), 1, BALLOT, Vote(BALLOT, VALUE, ("b", "a")))
EXAMPLES = [
    ms.Ready(1, 0, OFFER, BALLOT, (GONE,)),
    ms.Heard(1, BALLOT),
    ms.Gone(1, 5),
    ms.Decline(1, "b"),
    ms.Prepare(1, BALLOT),
    ms.Promise(1, BALLOT, 0, Vote(BALLOT, VALUE, ("b", "a")), (b"digest",), OFFER, (GONE,)),
    ms.Nack(1, BALLOT, BALLOT),
    ms.Declare(DECLARATION),
    ms.Trouble(1, BALLOT, ("b",), "silent"),
    ms.Accept(1, BALLOT, VALUE, ("a",), ("a",)),
    ms.Voted(1, BALLOT, 0, b"digest"),
    ms.Commit(DECIDED, ("c",), ("d",), (Decided(CONFIG),)),
    ms.Ask(-1),
    ms.Refused(1, 5, "diverged"),
    ms.Resign(GONE, Decided(CONFIG)),
]
GOLDEN = {
    "Ready": (
        "009501009b0005cb4008000000000000c4016cc40173a4696e7438cb412e848000000000a36c616ec3cb400400000000"
        "0000c401639202a161919492a16301019202a16191939202a1619299a372756ea56f75746572019202a1619299a16100"
        "05cb4008000000000000cb412e848000000000a36c616ec3cb4004000000000000c4016399a1620406cb3ff000000000"
        "0000cb0000000000000000a0c3cb0000000000000000c400a4696e7438c4016cc404736565649192a163a46c617465c4"
        "0664696765737492a162a161"
    ),
    "Heard": "0192019202a161",
    "Gone": "02920105",
    "Decline": "039201a162",
    "Prepare": "0492019202a161",
    "Promise": (
        "0597019202a1610091939202a1619299a372756ea56f75746572019202a1619299a1610005cb4008000000000000cb41"
        "2e848000000000a36c616ec3cb4004000000000000c4016399a1620406cb3ff0000000000000cb0000000000000000a0"
        "c3cb0000000000000000c400a4696e7438c4016cc404736565649192a163a46c617465c40664696765737492a162a161"
        "91c406646967657374919b0005cb4008000000000000c4016cc40173a4696e7438cb412e848000000000a36c616ec3cb"
        "4004000000000000c40163919492a16301019202a16191939202a1619299a372756ea56f75746572019202a1619299a1"
        "610005cb4008000000000000cb412e848000000000a36c616ec3cb4004000000000000c4016399a1620406cb3ff00000"
        "00000000cb0000000000000000a0c3cb0000000000000000c400a4696e7438c4016cc404736565649192a163a46c6174"
        "65c40664696765737492a162a161"
    ),
    "Nack": "0693019202a1619202a161",
    "Declare": (
        "079199a372756ea56f75746572019202a1619299a1610005cb4008000000000000cb412e848000000000a36c616ec3cb"
        "4004000000000000c4016399a1620406cb3ff0000000000000cb0000000000000000a0c3cb0000000000000000c400a4"
        "696e7438c4016cc404736565649192a163a46c617465"
    ),
    "Trouble": "0894019202a16191a162a673696c656e74",
    "Accept": (
        "0995019202a1619299a372756ea56f75746572019202a1619299a1610005cb4008000000000000cb412e848000000000"
        "a36c616ec3cb4004000000000000c4016399a1620406cb3ff0000000000000cb0000000000000000a0c3cb0000000000"
        "000000c400a4696e7438c4016cc404736565649192a163a46c617465c40664696765737491a16191a161"
    ),
    "Voted": "0a94019202a16100c406646967657374",
    "Commit": (
        "0b949392019292a1620492a16100919299a372756ea56f75746572019202a1619299a1610005cb4008000000000000cb"
        "412e848000000000a36c616ec3cb4004000000000000c4016399a1620406cb3ff0000000000000cb0000000000000000"
        "a0c3cb0000000000000000c400a4696e7438c4016cc404736565649192a163a46c617465c40664696765737491939202"
        "a16192a161a16291a16391a16391a164919392009292a1620092a161009090"
    ),
    "Ask": "0c91ff",
    "Refused": "0d930105a86469766572676564",
    "Resign": (
        "0e929492a16301019202a16191939202a1619299a372756ea56f75746572019202a1619299a1610005cb400800000000"
        "0000cb412e848000000000a36c616ec3cb4004000000000000c4016399a1620406cb3ff0000000000000cb0000000000"
        "000000a0c3cb0000000000000000c400a4696e7438c4016cc404736565649192a163a46c617465c40664696765737492"
        "a162a1619392009292a1620092a161009090"
    ),
}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda one: type(one).__name__)
def test_every_message_survives_the_wire_in_the_same_bytes(message):
    data = agreement.pack_message(message)
    assert agreement.unpack_message(data) == message
    assert data.hex() == GOLDEN[type(message).__name__]


def test_there_is_an_example_of_every_kind():
    assert [type(one) for one in EXAMPLES] == list(ms._KINDS)


def test_what_is_saved_survives_a_journal():
    saved = Saved(3, DECIDED, BALLOT, Vote(BALLOT, VALUE, ("b", "a")), True)
    assert unpack_value(Saved, pack_value(saved)) == saved


@given(st.binary(max_size=200))
@settings(deadline=None, derandomize=True)
def test_any_bytes_are_a_message_or_a_violation(data):
    try:
        message = agreement.unpack_message(data)
    except ProtocolViolation:
        return
    assert agreement.unpack_message(agreement.pack_message(message)) == message


@given(st.sampled_from(EXAMPLES), st.data())
@settings(deadline=None, derandomize=True)
def test_altered_bytes_are_a_message_or_a_violation(message, data):
    raw = bytearray(agreement.pack_message(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = agreement.unpack_message(raw)
    except ProtocolViolation:
        return
    assert agreement.unpack_message(agreement.pack_message(found)) == found


@pytest.mark.parametrize(
    "message",
    [
        ms.Heard(-1, BALLOT),
        ms.Heard(1, Ballot(1 << 40, "a")),
        ms.Trouble(1, BALLOT, tuple(f"n{k}" for k in range(300)), "silent"),
        ms.Ready(1, 0, Offer(0, 5, float("inf")), BALLOT),
        ms.Ready(1, 0, Offer(0, 5, -1.0), BALLOT),
        ms.Voted(1, BALLOT, 0, b"x" * 65),
        ms.Accept(1, BALLOT, VALUE, ("a",), ("b",)),
        ms.Promise(1, BALLOT, 0, Vote(BALLOT, VALUE, ()), (), None),
        ms.Declare(Declaration("run", "outer", 1, BALLOT, (), "fp32", b"", b"")),
        ms.Declare(Declaration("run", "outer", 1, BALLOT, (MEMBERS[0], MEMBERS[0]), "fp32", b"", b"")),
        ms.Commit(Decided(CONFIG, VALUE, Certificate(BALLOT, ()))),
        ms.Commit(DECIDED, (), tuple(f"n{k}" for k in range(65))),
        ms.Commit(DECIDED, earlier=(DECIDED,) * 5),
        ms.Commit(DECIDED, earlier=(Decided(DECLARATION.config(), None),)),
        ms.Commit(Decided(DECLARATION.config(), None)),
    ],
)
def test_the_absurd_is_refused(message):
    with pytest.raises(ProtocolViolation):
        agreement.unpack_message(agreement.pack_message(message))


names = st.sampled_from("abcd")
ballots = st.builds(Ballot, st.integers(0, 4), names)
offers = st.builds(
    Offer, st.integers(0, 2), st.integers(0, 4), st.just(1.0), st.just(b""), st.sampled_from([b"", b"s"])
)
members = st.lists(names, min_size=1, max_size=4, unique=True).map(
    lambda found: tuple(Member(name, 0, 1, 1.0) for name in found)
)
declarations = st.builds(
    Declaration, st.just("run"), st.just("outer"), st.integers(1, 2), ballots, members, st.just("fp32"), st.just(b""),
    st.sampled_from([b"1", b"2"]),
)  # fmt: skip
values = st.builds(Value, declarations, st.sampled_from([b"x", b"y"]))
holders = st.lists(names, max_size=3).map(tuple)
votes = st.none() | st.builds(Vote, ballots, values, holders)
gone = st.builds(Resignation, st.builds(Seat, names), st.integers(0, 2), ballots, votes)
decisions = values.flatmap(
    lambda value: st.builds(
        Decided, st.just(value.declaration.config()), st.just(value), st.builds(Certificate, ballots, holders)
    )
)
epochs = st.integers(0, 3)
resignations = st.lists(gone, max_size=2).map(tuple)
messages = st.one_of(
    st.builds(ms.Ready, epochs, st.integers(0, 1), offers, ballots, resignations),
    st.builds(ms.Heard, epochs, ballots),
    st.builds(ms.Gone, epochs, st.integers(0, 4)),
    st.builds(ms.Decline, epochs, names),
    st.builds(ms.Prepare, epochs, ballots),
    st.builds(
        ms.Promise, epochs, ballots, st.integers(0, 1), votes, st.just(()) | st.just((b"x",)), st.none() | offers,
        resignations,
    ),
    st.builds(ms.Nack, epochs, ballots, ballots),
    st.builds(ms.Declare, declarations),
    st.builds(ms.Trouble, epochs, ballots, holders, st.sampled_from(["silent", "norm", "mismatch"])),
    st.builds(ms.Accept, epochs, ballots, values, holders, holders),
    st.builds(ms.Voted, epochs, ballots, st.integers(0, 1), st.sampled_from([b"x", b"y"])),
    st.builds(ms.Commit, decisions, holders, holders, st.lists(decisions, max_size=2).map(tuple)),
    st.builds(ms.Ask, st.integers(-1, 3)),
    st.builds(ms.Refused, epochs, st.integers(0, 4), st.sampled_from(["diverged", "full", "late"])),
    st.builds(ms.Resign, gone, decisions),
)  # fmt: skip
events = st.one_of(
    st.builds(ev.Received, names, messages),
    st.builds(ev.Received, names, messages),
    st.builds(ev.Enter, offers, st.just(30.0)),
    st.builds(ev.Suspected, names),
    st.builds(ev.Alive, names),
    st.builds(ev.Coming, st.sampled_from([*"abcdxyz"]), st.sampled_from([0.01, 1.0, 1e9])),
    st.builds(ev.Reduced, ballots, st.sampled_from([b"x", b"y"])),
    st.builds(ev.Stuck, ballots, st.frozensets(names), st.sampled_from(["silent", "norm"])),
    st.builds(ev.Held, epochs, st.sampled_from([b"x", b"y"])),
    st.just(ev.Tick()),
    st.just(ev.Withdraw()),
)


@given(st.lists(events, max_size=40), st.sampled_from(["founder", "joiner"]))
@settings(deadline=None, derandomize=True, max_examples=120)
def test_no_sequence_of_messages_breaks_a_chain(told, kind):
    """Whatever peers say: no exception, no vote without bytes, sane bounds."""
    config = founding("run", "outer", "abc") if kind == "founder" else None
    chain = Chain("a", "run", "outer", config, Settings(members_max=4), incarnation=0)
    now = 0.0
    for event in told:
        now += 0.3
        for one in chain.handle(event, now):
            if isinstance(one, ev.Send):
                agreement.pack_message(one.message)
        chain.validate()


def test_the_face_is_pinned():
    assert set(agreement.__all__) == {
        "Abandon", "Alive", "Ballot", "Certificate", "Chain", "Coming", "Committed", "Config", "Decided",
        "Declaration", "Detector", "DetectorSettings", "Enter", "Event", "Failed", "Fetch", "Health",
        "Held", "Instruction", "Lagging", "Leave", "Left", "LeftOut", "Member", "Message", "Met", "Offer",
        "Persist", "Received", "Reduce", "Reduced", "Release", "Saved", "Seat", "Send", "Settings", "Stuck",
        "Suspected", "Tick", "Value", "Withdraw", "founding", "pack_message", "unpack_message",
    }  # fmt: skip
    assert all(hasattr(agreement, name) for name in agreement.__all__)
