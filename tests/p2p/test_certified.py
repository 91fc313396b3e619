"""The proof of membership by certificates, over real connections on loopback."""

import pytest
import trio

from p2p.certs import Cert, mesh_id_of
from p2p.errors import Unreachable
from p2p.host import HostConfig, open_host
from p2p.identity import Identity
from p2p.membership import CertifiedMembership
from p2p.roster import Roster

KEY = b"k" * 32
FOUNDING = Identity(b"\x01" * 32)
MESH = mesh_id_of(FOUNDING.peer_id)
CONFIG = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))


@pytest.fixture
def opened(nursery):
    """`await opened(roster, identity)` is a host of it that runs until the test ends."""

    async def run(roster, identity, task_status):
        async with open_host(identity, MESH, roster.swarm_key, CONFIG, roster=roster) as host:
            task_status.started(host)
            await trio.sleep_forever()

    async def start(roster, identity):
        return await nursery.start(run, roster, identity)

    return start


def founder(key=KEY):
    identity = Identity.generate()
    roster = Roster(identity, MESH, FOUNDING.peer_id, key, founding=FOUNDING)
    roster.certify_self(0.0)
    return roster, identity


def joiner(ticket=b"", key=KEY):
    identity = Identity.generate()
    return Roster(identity, MESH, FOUNDING.peer_id, key, ticket=ticket), identity


async def refused(host, other):
    with pytest.raises(Unreachable) as caught:
        await host.connect(other.addrs())
    return " ".join(caught.value.attempts.values())


@pytest.mark.parametrize("member_dials", [False, True])
async def test_an_invite_lets_a_device_in_whichever_side_dials(opened, member_dials):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=True))
    one, other = await opened(a, a_id), await opened(b, b_id)
    if member_dials:
        await one.connect(other.addrs())
    else:
        await other.connect(one.addrs())
    with trio.fail_after(5):
        while not (b.chain and one.peers() and other.peers()):
            await trio.lowlevel.checkpoint()
    assert a.problem(b.me) == b.problem(b.me) == ""
    assert b.ticket == b""


async def test_members_know_one_another_without_the_one_who_let_them_in(opened):
    a, _ = founder()
    ticket = a.invite(0.0, None, once=False)
    (b, b_id), (c, c_id) = joiner(ticket), joiner(ticket)
    b.admitted(a.admit(b.me, ticket, 1.0))
    c.admitted(a.admit(c.me, ticket, 1.0))
    one, other = await opened(b, b_id), await opened(c, c_id)
    assert await one.connect(other.addrs()) == c.me


async def test_the_swarm_key_alone_lets_nobody_in(opened):
    a, a_id = founder()
    b, b_id = joiner()
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert "no certificate" in await refused(other, one)
    assert not one.peers()


async def test_an_invite_without_the_swarm_key_lets_nobody_in(opened):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False), key=b"x" * 32)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert "swarm key that it was invited with" in await refused(other, one)
    assert not one.peers()
    assert not b.chain


@pytest.mark.parametrize("expired", [True, False])
async def test_who_is_refused_is_told_why(opened, expired):
    a, a_id = founder()
    ticket = a.invite(0.0, 1.0 if expired else None, once=not expired)
    if not expired:
        a.admit(Identity.generate().peer_id, ticket, 0.5)
    b, b_id = joiner(ticket)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert ("has expired" if expired else "another one has used it") in await refused(other, one)


async def test_an_expelled_peer_is_refused_in_both_directions(opened):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False))
    one, other = await opened(a, a_id), await opened(b, b_id)
    await other.connect(one.addrs())
    a.expel(b.me, 5.0)
    await one.disconnect(b.me)
    with trio.fail_after(5):
        while other.peers():
            await trio.lowlevel.checkpoint()
    assert "expelled" in await refused(other, one)
    assert "expelled" in await refused(one, other)
    assert not one.peers()


async def test_a_member_that_was_away_while_the_key_changed_is_known_by_its_certificate(opened):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False))
    b.admitted(a.admit(b.me, b.ticket, 1.0))
    a.rotate(1.0, 0.0)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert await other.connect(one.addrs()) == a.me
    stranger, stranger_id = joiner()
    third = await opened(stranger, stranger_id)
    assert "no certificate" in await refused(third, one)


async def test_an_invite_of_before_the_key_changed_ends_with_the_old_key(opened):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False))
    a.rotate(1.0, 0.0)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert "no longer, this mesh's" in await refused(other, one)


async def test_both_keys_count_while_the_change_goes_on(opened):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False))
    a.rotate(trio.current_time() + 4e9, 60.0)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert await other.connect(one.addrs()) == a.me
    assert b.chain


async def test_a_stolen_chain_is_no_use_to_another_key(opened):
    a, a_id = founder()
    b, _ = joiner(a.invite(0.0, None, once=False))
    chain = a.admit(b.me, b.ticket, 1.0)
    thief, thief_id = joiner()
    thief.chain = chain
    one, other = await opened(a, a_id), await opened(thief, thief_id)
    assert "another device's" in await refused(other, one)


async def test_an_impostor_that_listens_is_not_believed(opened):
    a, a_id = founder()
    fake, fake_id = joiner()
    fake.chain = (Cert.sign(Identity.generate(), MESH, fake.me, 0.0),)
    one, other = await opened(a, a_id), await opened(fake, fake_id)
    assert "founding key" in await refused(one, other)
    assert not one.peers()


async def test_anybody_may_join_a_public_mesh_but_the_expelled(opened):
    a, a_id = founder(None)
    b, b_id = joiner(key=None)
    one, other = await opened(a, a_id), await opened(b, b_id)
    assert await other.connect(one.addrs()) == a.me
    a.expel(b.me, 1.0)
    await one.disconnect(b.me)
    with trio.fail_after(5):
        while other.peers():
            await trio.lowlevel.checkpoint()
    assert "expelled" in await refused(other, one)


async def test_a_ticket_shown_without_the_swarm_key_is_not_taken(opened, monkeypatch):
    a, a_id = founder()
    b, b_id = joiner(a.invite(0.0, None, once=False), key=b"x" * 32)
    one, other = await opened(a, a_id), await opened(b, b_id)
    shown = CertifiedMembership._shown
    monkeypatch.setattr(CertifiedMembership, "_shown", lambda self, keyed: shown(self, True))
    assert "neither a certificate nor an invite" in await refused(other, one)
    assert not one.peers()
