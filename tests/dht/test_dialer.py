"""Whom to dial next, where addresses become known while a dial runs."""

from __future__ import annotations

import random

from dht.dialer import Dialer, DialerConfig
from p2p import Identity

ME, PEER = sorted(Identity(bytes([k]) * 32).peer_id for k in (1, 2))
OLD = f"/ip4/10.1.0.2/tcp/4001/p2p/{PEER}"
NEW = f"/ip4/45.0.0.10/tcp/4001/p2p/relay/p2p-circuit/p2p/{PEER}"


def dialler():
    made = Dialer(ME, random.Random(1), DialerConfig(backoff_first_s=1.0, backoff_max_s=120.0))
    made.found(PEER, [OLD], 0.0)
    return made


def test_a_dial_that_fails_makes_the_next_one_wait_ever_longer():
    made = dialler()
    waits, now_s = [], 0.0
    for _ in range(5):
        began_s = now_s
        while not made.take_due((), now_s):
            now_s += 0.1
        waits.append(now_s - began_s)
        made.ended(PEER, False, now_s)
    assert waits[1] >= 1.4
    assert waits[4] > 2 * waits[2]


def test_an_address_named_while_the_old_ones_are_dialled_is_tried_soon():
    made = dialler()
    for now_s in (0.0, 10.0, 30.0):
        assert made.take_due((), now_s) == [(PEER, (OLD,))]
        made.ended(PEER, False, now_s)
    assert made.take_due((), 60.0) == [(PEER, (OLD,))]
    made.found(PEER, [NEW], 62.0)
    made.ended(PEER, False, 65.0)
    assert made.take_due((), 66.3) == [(PEER, (NEW, OLD))]
    made.ended(PEER, False, 70.0)
    assert made.take_due((), 71.4) == [], "that one was dialled, and failed"
