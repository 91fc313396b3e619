"""Remembered peers on disk, whom to dial when, and the DHT's rules for address records."""

from __future__ import annotations

import json
import os
import random

import pytest

from dht import sign_record
from dht.adverts import (
    ADDRS_MAX,
    advert_key,
    is_advert,
    mesh_key,
    newest_advert,
    own_addrs,
    read_addrs,
    write_addrs,
)
from dht.dialer import Dialer, DialerConfig
from dht.memory import PeerMemory
from dht.records import sign_tombstone


def addr(peer, port=4001):
    return f"/ip4/10.0.0.1/tcp/{port}/p2p/{peer}"


class TestMemory:
    def test_it_comes_back_from_disk(self, tmp_path):
        memory = PeerMemory(tmp_path / "peers.json")
        memory.remember("a", [addr("a", 1), addr("a", 2)], 100.0)
        memory.remember("b", [addr("b")], 200.0)
        memory.save()
        assert PeerMemory(tmp_path / "peers.json").peers() == memory.peers()
        assert [one.peer for one in memory.peers()] == ["b", "a"]
        assert os.listdir(tmp_path) == ["peers.json"]

    def test_it_keeps_those_seen_last(self, tmp_path):
        memory = PeerMemory(tmp_path / "peers.json", peers_max=3)
        for n in range(10):
            memory.remember(str(n), [addr(n)], float(n))
        memory.save()
        assert [one.peer for one in PeerMemory(tmp_path / "peers.json", 3).peers()] == ["9", "8", "7"]
        assert [one.peer for one in PeerMemory(tmp_path / "peers.json", 2).peers()] == ["9", "8"]

    def test_addresses_of_others_and_too_many_are_left_out(self, tmp_path):
        memory = PeerMemory(None)
        memory.remember("a", [addr("b"), "x" * 300 + "/p2p/a", *(addr("a", n) for n in range(50))], 1.0)
        (one,) = memory.peers()
        assert one.addrs == tuple(addr("a", n) for n in range(ADDRS_MAX))

    def test_known_addresses_survive_a_meeting_without_any(self):
        memory = PeerMemory(None)
        memory.remember("a", [addr("a")], 1.0)
        memory.remember("a", [], 2.0)
        assert memory.peers()[0].addrs == (addr("a"),)
        assert memory.peers()[0].seen_at_s == 2.0
        memory.forget("a")
        assert memory.peers() == ()

    def test_the_file_is_written_only_when_something_changed(self, tmp_path):
        path = tmp_path / "peers.json"
        memory = PeerMemory(path)
        memory.save()
        assert not path.exists()
        memory.remember("a", [addr("a")], 1.0)
        memory.save()
        path.unlink()
        memory.remember("a", [addr("a")], 5.0)
        memory.save()
        assert not path.exists()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff\xfe",
            b"[]",
            b"null",
            b'{"version": 1}',
            b'{"version": 9, "peers": []}',
            b'{"version": 1, "peers": 5}',
            b"[" * 100_000,
            b'{"version": 1, "peers": [' + b"1," * 600_000 + b"1]}",
        ],
    )
    def test_a_damaged_file_costs_only_the_memory(self, tmp_path, content, caplog):
        path = tmp_path / "peers.json"
        path.write_bytes(content)
        assert PeerMemory(path).peers() == ()
        assert "cannot be read" in caplog.text

    @pytest.mark.parametrize(
        "entry",
        [
            5,
            {},
            {"peer": 1, "addrs": [], "seen_at_s": 1},
            {"peer": "x", "addrs": [addr("y")], "seen_at_s": 1},
            {"peer": "x", "addrs": [5], "seen_at_s": 1},
            {"peer": "x", "addrs": [addr("x")], "seen_at_s": "now"},
            {"peer": "x", "addrs": [addr("x")], "seen_at_s": float("nan")},
            {"peer": "x", "addrs": [addr("x")], "seen_at_s": True},
        ],
    )
    def test_one_damaged_entry_does_not_cost_the_others(self, tmp_path, entry):
        path = tmp_path / "peers.json"
        good = {"peer": "a", "addrs": [addr("a")], "seen_at_s": 1}
        path.write_text(json.dumps({"version": 1, "peers": [entry, good]}))
        assert [one.peer for one in PeerMemory(path).peers()] == ["a"]

    def test_a_disk_that_cannot_be_written_is_logged_and_tried_again(self, tmp_path, caplog):
        path = tmp_path / "missing" / "peers.json"
        memory = PeerMemory(path)
        memory.remember("a", [addr("a")], 1.0)
        memory.save()
        assert "cannot write" in caplog.text
        path.parent.mkdir()
        memory.save()
        assert len(PeerMemory(path).peers()) == 1

    def test_a_crash_while_writing_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "peers.json"
        memory = PeerMemory(path)
        memory.remember("a", [addr("a")], 1.0)
        memory.save()
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("crash")))
        memory.remember("b", [addr("b")], 2.0)
        memory.save()
        assert [one.peer for one in PeerMemory(path).peers()] == ["a"]


class TestDialer:
    @pytest.fixture
    def dialer(self):
        return Dialer("m", random.Random(1), DialerConfig(candidates_max=4, at_once_max=2))

    def test_a_found_peer_is_dialled_once(self, dialer):
        dialer.found("z", [addr("z")], 0.0)
        assert dialer.take_due((), 0.0) == [("z", (addr("z"),))]
        assert dialer.take_due((), 100.0) == []

    def test_of_two_that_find_one_another_one_dials_first(self, dialer):
        dialer.found("a", [addr("a")], 0.0)
        assert dialer.take_due((), 0.5) == []
        assert dialer.take_due(("a",), 1.0) == []
        assert len(dialer.take_due((), 1.0)) == 1

    def test_this_node_and_nonsense_are_no_candidates(self, dialer):
        dialer.found("m", [addr("m")], 0.0)
        dialer.found("z", [addr("y")], 0.0)
        dialer.found("z", [], 0.0)
        assert len(dialer) == 0

    def test_failures_are_tried_again_ever_more_rarely_but_for_ever(self, dialer):
        dialer.found("z", [addr("z")], 0.0)
        now_s, waits = 0.0, []
        for _ in range(14):
            began_s = now_s
            while not dialer.take_due((), now_s):
                now_s += 0.05
            waits.append(now_s - began_s)
            dialer.ended("z", False, now_s)
        assert all(0.7 * 2**n < waits[n] < 1.3 * 2**n for n in range(2, 7))
        assert all(80 < wait < 160 for wait in waits[8:])

    def test_waits_differ_between_nodes(self):
        def wait(seed):
            dialer = Dialer("m", random.Random(seed))
            dialer.found("z", [addr("z")], 0.0)
            dialer.take_due((), 0.0)
            dialer.ended("z", False, 0.0)
            return next(t / 100 for t in range(1000) if dialer.take_due((), t / 100))

        assert len({wait(seed) for seed in range(10)}) > 5

    def test_dials_at_once_are_bounded(self, dialer):
        for name in "wxyz":
            dialer.found(name, [addr(name)], 0.0)
        first = dialer.take_due((), 0.0)
        assert len(first) == 2
        assert dialer.take_due((), 0.0) == []
        dialer.ended(first[0][0], True, 0.0)
        assert len(dialer.take_due((first[0][0],), 0.0)) == 1

    def test_candidates_are_bounded_and_the_hopeless_go_first(self, dialer):
        for name in "stuv":
            dialer.found(name, [addr(name)], 0.0)
        dialer.take_due((), 0.0)
        dialer.ended("t", False, 0.0)
        dialer.found("z", [addr("z")], 0.0)
        assert len(dialer) == 4
        assert dialer.addrs("t") == ()
        assert dialer.addrs("z") == (addr("z"),)

    def test_a_new_address_ends_a_long_wait(self, dialer):
        dialer.found("z", [addr("z", 1)], 0.0)
        for _ in range(8):
            dialer.take_due((), 1e6)
            dialer.ended("z", False, 1e6)
        dialer.found("z", [addr("z", 1)], 1e6)
        assert dialer.take_due((), 1e6 + 2) == []
        dialer.found("z", [addr("z", 2)], 1e6)
        assert dialer.take_due((), 1e6 + 2) == [("z", (addr("z", 2), addr("z", 1)))]

    def test_a_lost_peer_is_dialled_again_soon_and_one_that_left_is_not(self, dialer):
        for name in "yz":
            dialer.found(name, [addr(name)], 0.0)
            dialer.take_due((), 0.0)
            dialer.ended(name, True, 0.0)
            dialer.lost(name, 100.0)
        dialer.drop("y")
        assert [peer for peer, _ in dialer.take_due((), 101.5)] == ["z"]


class TestAdverts:
    @pytest.fixture
    def advert(self, identity):
        def make(n=0, *, kind="addr", name="", seq=1, addrs=None):
            signer = identity(n)
            value = write_addrs([addr(signer.peer_id)] if addrs is None else addrs)
            return sign_record(signer, kind, name, seq, value, 1000.0, 60.0)

        return make

    def test_only_its_signer_s_record_is_valid_under_a_key(self, advert, identity):
        made = advert(0)
        assert is_advert(advert_key(made.signer), made.encode())
        assert not is_advert(advert_key(identity(1).peer_id), made.encode())
        forged = bytearray(made.encode())
        forged[-1] ^= 1
        assert not is_advert(advert_key(made.signer), bytes(forged))
        assert not is_advert(advert_key(made.signer), b"")
        for other in (
            advert(0, kind="node"),
            advert(0, name="x"),
            advert(0, addrs=[]),
            advert(0, addrs=[addr("z")]),
        ):
            assert not is_advert(advert_key(other.signer), other.encode())

    def test_a_withdrawal_is_valid_and_wins_over_what_it_withdraws(self, advert, identity):
        made = advert(0, seq=5)
        gone = sign_tombstone(identity(0), "addr", "", 5, 1000.0, 1060.0)
        assert is_advert(advert_key(made.signer), gone.encode())
        for values in ([made.encode(), gone.encode()], [gone.encode(), made.encode()]):
            assert values[newest_advert("", values)] == gone.encode()

    def test_the_newest_wins_wherever_it_stands(self, advert):
        values = [advert(0, seq=seq).encode() for seq in (3, 9, 4)]
        assert newest_advert("", values) == 1
        assert newest_advert("", [b"garbage", *values]) == 2

    def test_only_the_signer_s_own_addresses_are_read(self, advert, identity, record):
        peer = identity(0).peer_id
        made = advert(0, addrs=[addr("other"), addr(peer), addr(peer)])
        assert read_addrs(made) == (addr(peer),)
        assert read_addrs(record(value=b"\xff\x00garbage")) == ()
        assert len(own_addrs(peer, (addr(peer, n) for n in range(99)))) == ADDRS_MAX

    def test_keys_are_short_and_differ(self, identity):
        keys = {advert_key(identity(n).peer_id) for n in range(50)}
        assert len(keys) == 50
        assert all(len(key) <= 43 for key in keys)
        assert mesh_key("a") != mesh_key("b")
        assert len(mesh_key("a")) == 34
