"""Addresses through relays: what can be dialled, and what is refused before anything is dialled."""

from __future__ import annotations

import pytest

from p2p import Identity
from p2p.addresses import dial_target
from p2p.compat.swarm import split_circuit

RELAY, PEER = (Identity(bytes([k]) * 32).peer_id for k in (1, 2))
AT = f"/ip4/45.0.0.10/tcp/4001/p2p/{RELAY}"


def test_an_address_through_a_relay_names_both_peers():
    maddr, peer = dial_target(f"{AT}/p2p-circuit/p2p/{PEER}")
    assert peer == PEER
    assert split_circuit(str(maddr)) == ("/ip4/45.0.0.10/tcp/4001", RELAY)


def test_other_addresses_lead_through_no_relay():
    maddr, peer = dial_target(AT)
    assert (str(maddr), peer) == ("/ip4/45.0.0.10/tcp/4001", RELAY)
    assert split_circuit(str(maddr)) is None
    assert split_circuit(f"{AT}/p2p-circuit/p2p/{PEER}") is None, "the peer is named beside it"


@pytest.mark.parametrize(
    "wrong",
    [
        f"/p2p-circuit/p2p/{PEER}",
        f"/ip4/45.0.0.10/tcp/4001/p2p-circuit/p2p/{PEER}",
        f"{AT}/p2p-circuit/p2p/{RELAY}",
        f"{AT}/p2p-circuit/p2p/{PEER}/p2p-circuit/p2p/{Identity(bytes(32)).peer_id}",
        f"/ip4/45.0.0.10/udp/4001/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        f"{AT}/p2p-circuit",
        f"{AT}/p2p-circuit/p2p/nobody",
    ],
)
def test_addresses_that_lead_nowhere_are_refused(wrong):
    with pytest.raises(ValueError):
        dial_target(wrong)
