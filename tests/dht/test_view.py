"""The view: which version wins, what is refused and counted, and limits that hold whatever comes."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from dht import RecordRefused, View, ViewConfig, sign_record
from dht.digest import Detail, Digest
from dht.records import sign_tombstone

NOW_S = 1000.0


def state(view, now_s=NOW_S):
    return {r.key: r for signer in view.signers(now_s) for r in view.of_signer(signer)}


def merge_all(view, records, now_s=NOW_S):
    for item in records:
        view.merge(item, now_s)
        view.validate()


def test_a_new_record_is_held_and_found(record):
    view = View()
    made = record()
    assert view.merge(made, NOW_S)
    assert view.get("node", "self", made.signer) == made
    assert view.records("node", NOW_S) == (made,)
    assert view.records("host", NOW_S) == ()
    assert view.signers(NOW_S) == (made.signer,)


def test_the_same_record_again_changes_nothing(record):
    view = View()
    made = record()
    assert view.merge(made, NOW_S)
    assert not view.merge(made, NOW_S)
    assert len(view) == 1


def test_the_higher_seq_wins_in_any_order(record):
    versions = [record(seq=s, value=bytes([s])) for s in (1, 2, 3)]
    for order in itertools.permutations(versions):
        view = View()
        merge_all(view, order)
        assert view.get("node", "self", versions[0].signer) == versions[2]


def test_equal_seq_has_one_winner_in_any_order(record):
    versions = [record(seq=5, value=bytes([v])) for v in range(4)]
    winners = set()
    for order in itertools.permutations(versions):
        view = View()
        merge_all(view, order)
        winners.add(view.get("node", "self", versions[0].signer))
    assert len(winners) == 1


def test_a_tombstone_beats_a_value_of_equal_seq(record, identity):
    made = record(seq=5)
    tombstone = sign_tombstone(identity(0), "node", "self", 5, NOW_S, NOW_S + 60)
    for order in ((made, tombstone), (tombstone, made)):
        view = View()
        merge_all(view, order)
        assert view.get("node", "self", made.signer) is None
        assert view.records("node", NOW_S) == ()
        assert view.signers(NOW_S) == ()
        assert view.held(made.key) == tombstone


def test_an_expired_record_is_not_taken_in_nor_shown(record):
    view = View()
    made = record(ttl_s=20.0)
    assert not view.merge(made, NOW_S + 20.0)
    assert view.merge(made, NOW_S + 19.9)
    assert view.records("node", NOW_S + 20.0) == ()
    assert view.signers(NOW_S + 20.0) == ()
    assert view.expire(NOW_S + 20.0) == (made,)
    assert len(view) == 0
    assert view.bytes_held == 0
    view.validate()


def test_tombstones_expire_too(identity):
    view = View()
    view.merge(sign_tombstone(identity(0), "node", "self", 5, NOW_S, NOW_S + 60), NOW_S)
    assert view.expire(NOW_S + 59) == ()
    assert len(view.expire(NOW_S + 60)) == 1
    assert len(view) == 0


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("signature", lambda r, other: dataclasses.replace(r, value=b"forged")),
        ("signature", lambda r, other: dataclasses.replace(r, signer=other.peer_id)),
        ("future", lambda r, other: sign_record(other, "node", "self", 1, b"", NOW_S + 10.1, 20.0)),
        ("ttl", lambda r, other: sign_record(other, "node", "self", 1, b"", NOW_S, 100_000.0)),
    ],
)
def test_what_breaks_a_rule_is_refused_and_counted(record, identity, reason, spoil):
    view = View()
    with pytest.raises(RecordRefused) as caught:
        view.merge(spoil(record(), identity(1)), NOW_S)
    assert caught.value.reason == reason
    assert view.counts[reason] == 1
    assert len(view) == 0


def test_a_clock_a_little_ahead_is_tolerated(identity):
    view = View(ViewConfig(skew_max_s=10.0))
    assert view.merge(sign_record(identity(0), "node", "self", 1, b"", NOW_S + 9.9, 20.0), NOW_S)


def test_forgery_cannot_displace_the_real_one(record):
    view = View()
    made = record(seq=1)
    view.merge(made, NOW_S)
    with pytest.raises(RecordRefused):
        view.merge(dataclasses.replace(made, seq=9), NOW_S)
    assert view.get("node", "self", made.signer) == made


def test_old_and_repeated_versions_cost_no_signature_check(record):
    checked = []
    view = View(verify=lambda r: not checked.append(r))
    newer, older = record(seq=2), record(seq=1)
    for item in (newer, newer, older):
        view.merge(item, NOW_S)
    assert checked == [newer]


def test_a_signer_keeps_only_its_newest_records(record):
    config = ViewConfig(records_per_signer_max=3)
    items = [record(name=str(n), seq=n) for n in range(1, 7)]
    rng = random.Random(1)
    for _ in range(50):
        rng.shuffle(items)
        view = View(config)
        merge_all(view, items)
        assert [r.seq for r in view.records("node", NOW_S)] == [4, 5, 6]
    assert view.counts["over_share"] >= 3
    assert not view.merge(record(name="1", seq=1), NOW_S)


def test_a_signer_keeps_only_its_share_of_bytes(record):
    config = ViewConfig(bytes_per_signer_max=3000)
    items = [record(name=str(n), seq=n, value=bytes(1000)) for n in range(1, 6)]
    for order in itertools.permutations(items):
        view = View(config)
        view.merge_many(order, NOW_S)
        view.validate()
        assert [r.seq for r in view.records("node", NOW_S)] == [4, 5]


def test_nothing_older_stays_once_something_newer_did_not_fit(record):
    """Else what is kept would depend on the order of arrival."""
    view = View(ViewConfig(bytes_per_signer_max=3000))
    sizes = {1: 100, 2: 100, 3: 2800, 4: 100}
    items = [record(name=str(n), seq=n, value=bytes(size)) for n, size in sizes.items()]
    view.merge_many(items, NOW_S)
    assert [r.seq for r in view.records("node", NOW_S)] == [4]


def test_what_a_share_pushes_out_is_reported(record):
    view = View(ViewConfig(records_per_signer_max=1))
    first, second = record(name="a", seq=1), record(name="b", seq=2)
    view.merge(first, NOW_S)
    merged = view.merge_many([second], NOW_S)
    assert merged.changed == (second,)
    assert merged.evicted == (first,)


def test_one_greedy_signer_does_not_touch_another(record):
    view = View(ViewConfig(records_per_signer_max=2))
    modest = record(1)
    view.merge(modest, NOW_S)
    merge_all(view, [record(0, name=str(n), seq=n) for n in range(100)])
    assert view.get("node", "self", modest.signer) == modest
    assert len(view) == 3


def test_a_flood_of_signers_is_bounded_and_keeps_those_known(record):
    view = View(ViewConfig(signers_max=4))
    known = [record(n) for n in range(4)]
    merge_all(view, known)
    for n in range(4, 10):
        with pytest.raises(RecordRefused) as caught:
            view.merge(record(n), NOW_S)
        assert caught.value.reason == "signers_full"
    assert state(view) == {r.key: r for r in known}
    assert view.merge(record(0, seq=2), NOW_S)


def test_total_bytes_are_bounded(record):
    view = View(ViewConfig(bytes_max=5000))
    refused = view.merge_many([record(n, value=bytes(1000)) for n in range(10)], NOW_S).refused
    assert len(refused) == 6
    assert view.bytes_held <= 5000
    view.validate()


def test_a_refresh_is_told_from_a_change(record):
    view = View()
    view.merge(record(seq=1, value=b"same"), NOW_S)
    refresh, change = record(seq=2, value=b"same", now_s=1005.0), record(seq=3, value=b"other")
    assert view.merge_many([refresh], NOW_S).refreshed == (refresh,)
    merged = view.merge_many([change], NOW_S)
    assert merged.changed == (change,)
    assert merged.refreshed == ()


def test_a_forgotten_signer_is_gone_and_stays_out_until_readmitted(record):
    view = View()
    made, other = record(0), record(1)
    merge_all(view, [made, other])
    assert view.forget(made.signer) == (made,)
    view.validate()
    with pytest.raises(RecordRefused, match="forgotten"):
        view.merge(made, NOW_S)
    assert view.signers(NOW_S) == (other.signer,)
    view.readmit(made.signer)
    assert view.merge(made, NOW_S)


def test_nobody_sends_what_the_other_forgot(record):
    here, there = View(), View()
    made = record()
    there.merge(made, NOW_S)
    here.forget(made.signer)
    assert there.delta(here.digest(NOW_S), NOW_S) == ()
    assert here.differing(there.digest(NOW_S), NOW_S) == frozenset()


def test_a_delta_after_a_digest_makes_views_equal(record):
    here, there = View(), View()
    common = record(0)
    merge_all(here, [common, record(1, seq=2, value=b"new"), record(2)])
    merge_all(there, [common, record(1, seq=1, value=b"old"), record(3)])
    there_digest, here_digest = there.digest(NOW_S), here.digest(NOW_S)
    there.merge_many(here.delta(there_digest, NOW_S), NOW_S)
    here.merge_many(there.delta(here_digest, NOW_S), NOW_S)
    assert state(here) == state(there)
    assert here.digest(NOW_S) == there.digest(NOW_S)
    assert common not in here.delta(there_digest, NOW_S)


def test_the_detail_leaves_out_what_the_other_has(record):
    here, there = View(), View()
    shared = [record(0, name=str(n), seq=n) for n in range(5)]
    extra = record(0, name="extra", seq=9)
    merge_all(here, [*shared, extra])
    merge_all(there, shared)
    scope = here.differing(there.digest(NOW_S), NOW_S)
    assert here.missing(there.detail(scope, NOW_S), NOW_S) == (extra,)
    assert there.missing(here.detail(scope, NOW_S), NOW_S) == ()


def test_digests_do_not_depend_on_arrival_or_on_a_late_sweep(record):
    items = [record(n % 3, name=str(n), seq=n, ttl_s=20.0 + 30 * (n % 2)) for n in range(12)]
    here, there = View(), View()
    merge_all(here, items)
    merge_all(there, reversed(items))
    there.expire(NOW_S + 30)
    assert len(here) != len(there)
    assert here.digest(NOW_S + 30) == there.digest(NOW_S + 30)


def test_a_delta_is_cut_at_its_limit_and_every_signer_has_its_turn(record):
    view = View(ViewConfig(delta_bytes_max=3000))
    items = [record(n, value=bytes(1000)) for n in range(9)]
    merge_all(view, items)
    seen = set()
    rng = random.Random(3)
    for _ in range(60):
        part = view.delta(Digest({}), NOW_S, rng.getrandbits(64))
        assert 0 < len(part) <= 3
        seen.update(part)
    assert seen == set(items)


def test_digests_survive_the_wire_and_nonsense_is_refused(record):
    view = View()
    merge_all(view, [record(n, seq=n) for n in range(5)])
    digest = view.digest(NOW_S)
    assert Digest.decode(digest.encode()) == digest
    detail = view.detail(frozenset(digest.signers), NOW_S)
    assert len(detail.entries) == 5
    assert Detail.decode(*detail.encode()) == detail
    with pytest.raises(RecordRefused):
        Digest.decode(b"123")
    with pytest.raises(RecordRefused):
        Detail.decode(bytes(8), bytes(23))
    with pytest.raises(RecordRefused):
        Digest.decode(bytes(16 * 8193))


@pytest.mark.parametrize("field", ["skew_max_s", "signers_max"])
def test_a_limit_of_nothing_is_named(field):
    with pytest.raises(ValueError, match=field):
        ViewConfig(**{field: 0})
