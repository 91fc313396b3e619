"""Who is a member: chains, invites, expulsions, rotations, and everything that somebody may try against them."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2p.certs import (
    CHAIN_BYTES_MAX,
    CHAIN_MAX,
    DOCUMENT_BYTES_MAX,
    KEEP_MAX,
    Cert,
    Expulsion,
    Rotation,
    Ticket,
    decode_chain,
    decode_document,
    encode_chain,
    key_id_of,
    mesh_id_of,
)
from p2p.errors import LocalFault, ProtocolViolation
from p2p.identity import Identity
from p2p.roster import EXPULSIONS_PER_SIGNER_MAX, NotAdmitted, Roster

KEY = b"k" * 32
FOUNDING = Identity(b"\x01" * 32)
MESH = mesh_id_of(FOUNDING.peer_id)
DAY_S = 86400.0


def identity(name):
    return Identity(name.encode().ljust(32, b"\0"))


def fresh(name, key=KEY, **rest):
    return Roster(identity(name), MESH, FOUNDING.peer_id, key, **rest)


def founded(key=KEY):
    roster = fresh("founder", key, founding=FOUNDING)
    roster.certify_self(0.0)
    return roster


def join(member, name, *, once=False, at_s=1.0, ticket=None):
    """A new device with an invite of `member`, let in by it."""
    roster = fresh(name)
    ticket = ticket or member.invite(at_s, DAY_S, once=once)
    assert roster.admitted(member.admit(roster.me, ticket, at_s))
    return roster


def meet(*rosters):
    """Everybody sees everybody's chain and documents."""
    for one, other in itertools.permutations(rosters, 2):
        if not one.public:
            one.learn(other.me, other.chain)
        for document in other.documents():
            one.take(document)


def test_whoever_was_invited_is_a_member_for_everybody():
    a = founded()
    b = join(a, "b")
    c = join(b, "c")
    stranger = fresh("z")
    for roster in (a, b, c):
        assert roster.problem(c.me, c.chain) == ""
        assert "no certificate" in roster.problem(stranger.me, stranger.chain)


def test_a_chain_must_lead_from_the_founding_key_to_the_very_peer():
    a = founded()
    b = join(a, "b")
    assert "another device" in a.problem(identity("x").peer_id, b.chain)
    assert "founding key" in a.problem(b.me, b.chain[1:])
    forged = (*b.chain[:-1], replace(b.chain[-1], issued_at_s=7.0))
    assert "founding key" in a.problem(b.me, forged)
    elsewhere = Identity(b"\x02" * 32)
    own = (Cert.sign(elsewhere, MESH, b.me, 0.0),)
    assert "founding key" in a.problem(b.me, own)
    other_mesh = (Cert.sign(FOUNDING, "another", b.me, 0.0),)
    assert "founding key" in a.problem(b.me, other_mesh)


def test_an_invite_expires_and_says_so():
    a = founded()
    ticket = a.invite(100.0, 60.0, once=False)
    with pytest.raises(NotAdmitted, match="expired"):
        a.admit(identity("b").peer_id, ticket, 160.0)
    assert a.admit(identity("b").peer_id, ticket, 159.0)


def test_an_invite_cannot_be_made_up_or_changed():
    a, evil = founded(), identity("evil")
    made_up = Ticket.sign(evil, MESH, (), b"i" * 16, float("inf"), False).encode()
    with pytest.raises(NotAdmitted, match="void"):
        a.admit(evil.peer_id, made_up, 0.0)
    longer = replace(Ticket.decode(a.invite(0.0, 1.0, once=True)), expires_at_s=1e9, once=False).encode()
    with pytest.raises(NotAdmitted, match="void"):
        a.admit(evil.peer_id, longer, 0.0)
    with pytest.raises(NotAdmitted, match="malformed"):
        a.admit(evil.peer_id, b"\x90", 0.0)


def test_any_member_lets_in_by_anybodys_invite_also_twice():
    a = founded()
    b = join(a, "b")
    ticket = a.invite(1.0, DAY_S, once=True)
    chain = b.admit(identity("c").peer_id, ticket, 2.0)
    assert b.admit(identity("c").peer_id, ticket, 3.0) == chain  # the answer had been lost
    assert a.problem(identity("c").peer_id, chain) == ""


def test_a_node_that_is_no_member_lets_nobody_in():
    a = founded()
    with pytest.raises(NotAdmitted, match="neither"):
        fresh("b").admit(identity("c").peer_id, a.invite(0.0, 9.0, once=False), 1.0)


def test_a_single_use_invite_serves_one_device():
    a = founded()
    ticket = a.invite(0.0, DAY_S, once=True)
    b = join(a, "b", ticket=ticket)
    with pytest.raises(NotAdmitted, match="another one has used it"):
        a.admit(identity("c").peer_id, ticket, 2.0)
    assert a.admit(b.me, ticket, 3.0) == b.chain


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_uses_in_a_partition_the_senior_one_stays_whatever_clocks_say(order):
    a = founded()
    b = join(a, "b")
    ticket = a.invite(0.0, DAY_S, once=True)
    near = join(a, "near", ticket=ticket, at_s=500.0)
    far = join(b, "far", ticket=ticket, at_s=5.0)
    witness = fresh("w")
    both = [near, far]
    for k in order:
        witness.learn(both[k].me, both[k].chain)
    assert witness.problem(near.me) == ""
    assert "another one had used it" in witness.problem(far.me)
    assert witness.lost() == (far.me,)
    below = (*far.chain, Cert.sign(identity("far"), MESH, identity("y").peer_id, 9.0))
    assert witness.problem(identity("y").peer_id, below)


def test_of_two_uses_equally_near_the_earlier_stays():
    a = founded()
    b, c = join(a, "b"), join(a, "c")
    ticket = a.invite(0.0, DAY_S, once=True)
    late, early = join(b, "late", ticket=ticket, at_s=9.0), join(c, "early", ticket=ticket, at_s=8.0)
    meet(a, b, c, late, early)
    assert [one.problem(early.me) for one in (a, b, c, late)] == [""] * 4
    assert all(one.problem(late.me) for one in (a, b, c, early, late))


def test_an_expelled_peer_is_out_for_all_who_know_and_cannot_come_back():
    a = founded()
    b, c = join(a, "b"), join(a, "c")
    meet(a, b, c)
    a.expel(c.me, 5.0)
    meet(a, b, c)
    for roster in (a, b, c):
        assert "expelled" in roster.problem(c.me, c.chain)
        assert roster.lost() == (c.me,)
    with pytest.raises(NotAdmitted, match="expelled"):
        b.admit(c.me, a.invite(6.0, 99.0, once=False), 7.0)
    with pytest.raises(LocalFault, match="cannot invite"):
        c.invite(6.0, 99.0, once=False)


def test_an_expulsion_survives_being_kept_and_read_back():
    a = founded()
    b = join(a, "b")
    a.learn(b.me, b.chain)
    a.expel(b.me, 5.0)
    again = fresh("founder", founding=FOUNDING)
    again.load(a.dump())
    assert again.chain == a.chain
    assert again.problem(b.me, b.chain) == "it was expelled from this mesh"
    assert again.documents() == a.documents()


@pytest.mark.parametrize("damage", [b"", b"\x80", b"\xc1", b"x" * 99])
def test_kept_bytes_that_cannot_be_read_are_this_nodes_fault(damage):
    with pytest.raises(LocalFault, match="cannot be read"):
        founded().load(damage)


def test_those_that_an_expelled_member_let_in_stay_but_nobody_new_comes_by_it():
    a = founded()
    b = join(a, "b")
    c = join(b, "c")
    meet(a, b, c)
    a.expel(b.me, 50.0)
    meet(a, c)
    assert a.problem(c.me) == ""
    assert c.problem(c.me) == ""
    dated_back = (*b.chain, Cert.sign(identity("b"), MESH, identity("sybil").peer_id, 2.0))
    assert "expelled let it in" in a.problem(identity("sybil").peer_id, dated_back)
    old = Ticket.sign(identity("b"), MESH, b.chain, b"i" * 16, float("inf"), False).encode()
    with pytest.raises(NotAdmitted, match="void"):
        c.admit(identity("sybil").peer_id, old, 51.0)


def test_a_whole_branch_goes_where_that_is_asked_for():
    a = founded()
    b = join(a, "b")
    c = join(b, "c")
    d = join(c, "d")
    meet(a, b, c, d)
    a.expel(b.me, 50.0, branch=True)
    assert set(a.lost()) == {b.me, c.me, d.me}


def test_a_member_expels_whom_it_let_in_and_nobody_else():
    a = founded()
    b, other = join(a, "b"), join(a, "other")
    c = join(b, "c")
    meet(a, b, other, c)
    for roster, target in ((other, c), (c, b), (b, a), (b, b)):
        with pytest.raises(LocalFault, match="only the node that founded"):
            roster.expel(target.me, 9.0)
    b.expel(c.me, 9.0)
    meet(a, b, other)
    assert "expelled" in other.problem(c.me)


def test_forged_expulsions_are_refused_and_counted():
    a = founded()
    b, c = join(a, "b"), join(a, "c")
    good = a.expel
    by_sister = Expulsion.sign(identity("c"), MESH, b.me, b.chain, (), 9.0)
    founder_signed_not = replace(Expulsion.sign(FOUNDING, MESH, b.me, b.chain, (), 9.0), issued_at_s=8.0)
    of_founder = Expulsion.sign(identity("c"), MESH, FOUNDING.peer_id, b.chain, (), 9.0)
    elsewhere = Expulsion.sign(FOUNDING, "another", b.me, b.chain, (), 9.0)
    foreign_chain = Expulsion.sign(identity("c"), MESH, b.me, c.chain, (), 9.0)
    own_chain = (Cert.sign(identity("c"), MESH, b.me, 0.0),)
    made_up = Expulsion.sign(identity("c"), MESH, b.me, own_chain, (), 9.0)
    forged = [by_sister, founder_signed_not, of_founder, elsewhere, foreign_chain, made_up]
    for document in forged:
        with pytest.raises(ProtocolViolation):
            a.take(document.encode())
    assert a.counts["documents_refused"] == len(forged)
    assert not a.expelled
    a.learn(b.me, b.chain)
    good(b.me, 9.0)
    assert a.expelled == {b.me}


def test_what_an_expelled_member_expelled_does_not_count_but_the_guilty_stay_out():
    a = founded()
    b = join(a, "b")
    good, bad = join(b, "good"), join(b, "bad")
    meet(a, b, good, bad)
    b.expel(bad.me, 5.0)
    meet(a, b, good)
    a.expel(b.me, 9.0)
    revenge = Expulsion.sign(identity("b"), MESH, good.me, good.chain, (), 1.0)
    a.take(revenge.encode())
    assert a.problem(good.me) == ""
    assert a.problem(bad.me)
    assert a.expelled == {b.me, bad.me}


def test_members_that_expel_one_another_are_judged_by_who_is_nearer_to_the_founding_key():
    a = founded()
    b, c = join(a, "b"), join(a, "c")
    d = join(c, "d")
    # d lets b in again below itself, so that each stands above the other by some chain.
    b_below = (*d.chain, Cert.sign(identity("d"), MESH, b.me, 4.0))
    d_below = (*b.chain, Cert.sign(identity("b"), MESH, d.me, 4.0))
    by_b = Expulsion.sign(identity("b"), MESH, d.me, d_below, (), 9.0)
    by_d = Expulsion.sign(identity("d"), MESH, b.me, b_below, (), 1.0)
    for order in itertools.permutations([by_b, by_d]):
        roster = fresh("w")
        for document in order:
            roster.take(document.encode())
        assert roster.expelled == {d.me}


def test_the_founders_device_can_be_expelled_by_the_founding_key_kept_elsewhere():
    a = founded()
    b = join(a, "b")
    spare = fresh("b", founding=FOUNDING)
    spare.load(b.dump())
    spare.learn(a.me, a.chain)
    spare.expel(a.me, 9.0)
    assert spare.problem(a.me)
    assert spare.problem(b.me) == ""  # it came in through that device and is named as one that stays


def test_any_order_of_learning_ends_in_equal_rosters():
    a = founded()
    members = [join(a, name) for name in "bcde"]
    deeper = [join(members[0], name) for name in "fgh"]
    meet(a, *members, *deeper)
    a.expel(members[1].me, 5.0)
    members[0].expel(deeper[0].me, 6.0)
    a.expel(members[0].me, 7.0, branch=False)
    a.rotate(8.0, 60.0)
    join(a, "x", once=True)
    meet(a, *members)
    documents = list(a.documents())
    assert len(documents) >= 5
    for seed in range(20):
        shuffled = random.Random(seed).choices(documents, k=3 * len(documents)) + documents
        random.Random(seed).shuffle(shuffled)
        roster = fresh("w")
        for document in shuffled:
            roster.take(document)
        assert roster.documents() == a.documents()
        assert roster.expelled == a.expelled
        assert roster.accepted_keys(9.0) == {key_id_of(KEY): KEY}


def test_two_expulsions_by_one_signer_keep_whom_both_would_in_any_order():
    a = founded()
    b = join(a, "b")
    c = join(b, "c")
    mild = Expulsion.sign(FOUNDING, MESH, b.me, b.chain, (c.me,), 5.0)
    strict = Expulsion.sign(FOUNDING, MESH, b.me, b.chain, (), 4.0)
    for order in itertools.permutations([mild, strict]):
        roster = fresh("w")
        for document in order:
            roster.take(document.encode())
        assert roster.problem(c.me, c.chain)


def test_a_rotation_lets_both_keys_count_for_its_time_and_only_the_founding_key_announces_one():
    a = founded()
    b = join(a, "b")
    a.rotate(100.0, 50.0)
    new = a.swarm_key
    assert new != KEY
    assert list(a.accepted_keys(149.0).values()) == [new, KEY]
    assert list(a.accepted_keys(150.0).values()) == [new]
    meet(a, b)
    assert b.wanted_keys() == (key_id_of(new),)
    assert list(b.accepted_keys(200.0).values()) == [KEY]  # it has nothing better yet
    assert not b.give_key(b"z" * 32)
    assert b.give_key(a.key(key_id_of(new)))
    assert b.swarm_key == new
    assert b.wanted_keys() == ()
    assert list(b.accepted_keys(200.0).values()) == [new]
    with pytest.raises(LocalFault, match="only the node that founded"):
        b.rotate(1.0, 1.0)
    forged = Rotation.sign(identity("b"), MESH, 99, b"i" * 8, 0.0, 0.0)
    with pytest.raises(ProtocolViolation, match="founding key"):
        a.take(forged.encode())


def test_the_founding_key_is_not_handed_out_as_a_swarm_key_nor_any_unannounced_one():
    a = founded()
    assert a.key(key_id_of(KEY)) is None
    assert a.key(b"x" * 8) is None


def test_a_public_mesh_asks_for_no_certificates_and_still_expels_by_its_founding_key():
    a = founded(key=None)
    peer = identity("guest").peer_id
    assert a.problem(peer, ()) == ""
    a.expel(peer, 1.0)
    assert "expelled" in a.problem(peer, ())
    other = fresh("o", None)
    meet(other, a)
    assert "expelled" in other.problem(peer, ())
    with pytest.raises(LocalFault, match="public"):
        a.rotate(1.0, 1.0)


def test_documents_are_bounded():
    a = founded()
    chain = a.chain
    signer = identity("founder")
    for k in range(CHAIN_MAX - 1):
        nxt = identity(f"n{k}")
        chain = (*chain, Cert.sign(signer, MESH, nxt.peer_id, 1.0, invite=b"i" * 16, once=False))
        signer = nxt
    assert a.problem(signer.peer_id, chain) == ""
    assert len(encode_chain(chain)) <= CHAIN_BYTES_MAX
    peers = tuple(identity(f"k{k}").peer_id for k in range(KEEP_MAX))
    assert (
        len(Expulsion.sign(FOUNDING, MESH, signer.peer_id, chain, peers, 1.0).encode()) <= DOCUMENT_BYTES_MAX
    )
    deeper = fresh("deep")
    deeper._identity, deeper.me, deeper.chain = signer, signer.peer_id, chain
    with pytest.raises(NotAdmitted, match="deep"):
        deeper.admit(identity("y").peer_id, deeper.invite(0.0, 9.0, once=False), 1.0)


def test_one_signer_cannot_fill_everybodys_roster():
    a = founded()
    b = join(a, "b")
    refused = 0
    for k in range(EXPULSIONS_PER_SIGNER_MAX + 3):
        peer = identity(f"s{k}").peer_id
        chain = (*b.chain, Cert.sign(identity("b"), MESH, peer, 1.0))
        try:
            a.take(Expulsion.sign(identity("b"), MESH, peer, chain, (), 1.0).encode())
        except ProtocolViolation:
            refused += 1
    assert refused == 3
    a.learn(b.me, b.chain)
    a.expel(b.me, 9.0)  # the founding key always has room
    assert b.me in a.expelled


@given(st.binary(max_size=400))
def test_any_bytes_are_a_document_or_the_remotes_fault(data):
    for decode in (decode_document, decode_chain, Ticket.decode):
        try:
            decoded = decode(data)
        except ProtocolViolation:
            continue
        assert decoded is not None


@given(st.data())
def test_a_changed_document_is_never_believed(data):
    a = founded()
    b = join(a, "b")
    raw = bytearray(Expulsion.sign(FOUNDING, MESH, b.me, b.chain, (), 9.0).encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolViolation):
        a.take(bytes(raw))
    assert not a.expelled
