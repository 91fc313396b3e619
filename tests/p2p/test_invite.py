"""Invites: round trip, and one clear line for each way to be wrong."""

import base64
import random
import zlib

import msgpack
import pytest

from p2p.certs import mesh_id_of
from p2p.errors import InviteError
from p2p.identity import Identity, public_key_of
from p2p.invite import Invite, _checksum

PEER = Identity(b"i" * 32).peer_id
ADDR = f"/ip4/192.168.1.20/tcp/4001/p2p/{PEER}"


def wrap(body):
    return "shoal1-" + base64.urlsafe_b64encode(_checksum(body) + body).decode().rstrip("=")


@pytest.mark.parametrize(
    "invite",
    [
        Invite("home", None, ()),
        Invite("home", b"k" * 32, (ADDR,)),
        Invite("a.b-c_9", b"\x00" * 32, (ADDR, f"/dns4/box.example/tcp/1/p2p/{PEER}"), 1234.5),
    ],
)
def test_an_invite_survives_its_text_with_blanks_and_line_breaks(invite):
    text = invite.encode()
    assert Invite.decode(text) == invite
    assert Invite.decode(f"  {text[:20]}\n{text[20:]}\t") == invite


def test_a_typical_invite_is_short_enough_for_a_terminals_qr_code():
    addrs = tuple(f"/ip4/{ip}/tcp/4001/p2p/{PEER}" for ip in ("192.168.1.20", "10.8.0.3", "127.0.0.1"))
    assert len(Invite("mesh-1a2b3c4d", b"k" * 32, addrs).encode()) < 300


def test_expiry_is_judged_at_the_time_given():
    invite = Invite("home", None, (), 100.0)
    assert not invite.expired(99.9)
    assert invite.expired(100.0)
    assert not Invite("home", None, ()).expired(1e12)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "should start with"),
        ("hello", "should start with"),
        ("shoal1", "should start with"),
        ("shoal3-AAAA", "version 3"),
        ("shoal1-", "damaged"),
        ("shoal1-!!!!", "damaged"),
        ("shoal1-é", "damaged"),
        ("shoal1-AAAAAAAAAAAAAAAA", "damaged"),
        ("shoal1-" + "A" * 9000, "at most"),
        (wrap(b"not zlib"), "decompressed"),
        (wrap(zlib.compress(b"a" * 100_000)), "incomplete or over"),
        (wrap(zlib.compress(b"\xc1")), "not readable"),
        (wrap(zlib.compress(b"\x91" * 5000)), "not readable"),
        (wrap(zlib.compress(msgpack.packb([1, 2]))), "four fields"),
        (wrap(zlib.compress(msgpack.packb({"mesh": 1}))), "four fields"),
        (wrap(zlib.compress(msgpack.packb([1, None, [], None]))), "mesh id"),
        (wrap(zlib.compress(msgpack.packb(["m", b"short", [], None]))), "swarm key"),
        (wrap(zlib.compress(msgpack.packb(["m", None, [5], None]))), "multiaddress"),
        (wrap(zlib.compress(msgpack.packb(["m", None, ["/ip4/1.2.3.4/tcp/1"], None]))), "peer id"),
        (wrap(zlib.compress(msgpack.packb(["m", None, [ADDR] * 33, None]))), "at most 32"),
        (wrap(zlib.compress(msgpack.packb(["m", None, [], "soon"]))), "expiry"),
    ],
)
def test_each_malformed_invite_is_one_line_that_says_why(text, reason):
    with pytest.raises(InviteError, match=reason) as caught:
        Invite.decode(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(50))
def test_one_wrong_character_is_always_noticed(seed):
    text = Invite("home", b"k" * 32, (ADDR,)).encode()
    dice = random.Random(seed)
    at = dice.randrange(len("shoal1-"), len(text) - 1)
    wrong = dice.choice([one for one in "ABCDEFabcdef0189-_" if one != text[at]])
    with pytest.raises(InviteError):
        Invite.decode(text[:at] + wrong + text[at + 1 :])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (("no spaces", None, ()), "mesh id"),
        (("", None, ()), "mesh id"),
        (("m", "k" * 32, ()), "swarm key"),
        (("m", None, ("nonsense",)), "multiaddress"),
    ],
)
def test_an_invite_cannot_be_made_of_wrong_fields(fields, reason):
    with pytest.raises(InviteError, match=reason):
        Invite(*fields)


def test_an_invite_of_a_founded_mesh_carries_its_key_and_ticket_and_names_no_other_mesh():
    founder = Identity(b"f" * 32).peer_id
    invite = Invite(mesh_id_of(founder), b"k" * 32, (ADDR,), 9.0, founder, b"ticket")
    text = invite.encode()
    assert text.startswith("shoal2-")
    assert Invite.decode(text) == invite
    with pytest.raises(InviteError, match="founding key"):
        Invite("another", b"k" * 32, (ADDR,), 9.0, founder, b"ticket")
    with pytest.raises(InviteError, match="ticket"):
        Invite(mesh_id_of(founder), b"k" * 32, (ADDR,), 9.0, founder, b"t" * 9000)


def test_what_a_later_version_appends_to_an_invite_is_passed_over():
    founder = Identity(b"f" * 32)
    key = public_key_of(founder.peer_id)
    fields = [mesh_id_of(founder.peer_id), None, [], None, key, b"", "news"]
    text = wrap(zlib.compress(msgpack.packb(fields))).replace("shoal1-", "shoal2-")
    assert Invite.decode(text).founder == founder.peer_id
