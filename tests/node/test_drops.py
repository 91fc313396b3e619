"""Orders to drop a model: whose word counts, for which offers, and how many are kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from node.adverts import ModelAdvert
from node.drops import DROPS_MAX, Drop, Drops, read_drops, write_drops
from p2p import Identity, pack_value

MESH = "mesh"
ID = "ab" * 32
OWNER = Identity(bytes([7]) * 32)
STRANGER = Identity(bytes([1]) * 32)
ORDER = Drop.sign(OWNER, MESH, ID, 100)
OFFER = ModelAdvert("toy", ID, 100, "bfloat16", "none", 1, 4, 64, 8, 1 << 20, 0, 0, False, 1e6, 64, 64)

GOLDEN_SIGNATURE = (
    "5ea0f5edc204b89c10f50c84258a4b0740543a87e49c9fd55d17c1e19facc61b"
    "38bc06356c7e2b2e08e4b0a3664e5f4b1de0657dafc7e38512d306d2890b3c04"
)
GOLDEN_VALUE = bytes.fromhex("919194d940" + "6162" * 32 + "a17007c40173")


def manifest_id(number):
    return f"{number:064x}"


def test_an_order_of_the_publisher_is_valid():
    assert ORDER.valid(MESH, str(OWNER.peer_id))


@pytest.mark.parametrize(
    ("order", "mesh_id", "publisher"),
    [
        (ORDER, MESH, STRANGER),
        (Drop.sign(STRANGER, MESH, ID, 100), MESH, OWNER),
        (replace(Drop.sign(STRANGER, MESH, ID, 100), publisher=str(OWNER.peer_id)), MESH, OWNER),
        (ORDER, "another mesh", OWNER),
        (replace(ORDER, until_s=101), MESH, OWNER),
        (replace(ORDER, manifest_id="cd" * 32), MESH, OWNER),
        (replace(ORDER, signature=b""), MESH, OWNER),
    ],
    ids=["not its model", "a stranger's", "in another's name", "mesh", "time", "model", "unsigned"],
)
def test_any_other_order_is_not(order, mesh_id, publisher):
    assert not order.valid(mesh_id, str(publisher.peer_id))


@pytest.mark.parametrize(("created_s", "counts"), [(0, True), (100, True), (101, False)])
def test_it_counts_for_offers_made_before_it(created_s, counts):
    offer = replace(OFFER, created_s=created_s)
    assert Drops().plus(ORDER).counts(offer) is counts
    assert not Drops().counts(offer)
    assert not Drops().plus(ORDER).counts(replace(offer, manifest_id="cd" * 32))


@pytest.mark.parametrize(("now_s", "created_s"), [(5000.7, 5000), (100.2, 101), (3.0, 101)])
def test_the_same_model_added_again_counts_whatever_the_clock_did(now_s, created_s):
    drops = Drops().plus(ORDER)
    assert drops.created_s(ID, now_s) == created_s
    assert not drops.counts(replace(OFFER, created_s=created_s))
    assert Drops().created_s(ID, now_s) == int(now_s)


def test_of_two_orders_the_later_counts_and_the_earlier_says_nothing_new():
    later = Drop.sign(OWNER, MESH, ID, 200)
    drops = Drops().plus(later)
    assert drops.plus(ORDER) is drops
    assert drops.plus(later) is drops
    assert Drops().plus(ORDER).plus(later) == drops


def test_the_newest_are_kept_in_whatever_order_they_came():
    orders = [Drop(manifest_id(k), "p", k // 2) for k in range(3 * DROPS_MAX)]
    expected = {order.manifest_id for order in orders[-DROPS_MAX:]}
    for seed in range(3):
        random.Random(seed).shuffle(orders)
        drops = Drops()
        for order in orders:
            drops = drops.plus(order)
        assert set(drops.held) == expected
    assert drops.plus(Drop("f" * 64, "p", 1)) is drops


def test_orders_travel():
    orders = (ORDER, Drop.sign(STRANGER, MESH, "cd" * 32, 0))
    assert read_drops(write_drops(orders)) == orders
    many = [Drop(manifest_id(k), "p" * 52, 1 << 40, bytes(64)) for k in range(DROPS_MAX)]
    value = write_drops(many)
    assert read_drops(value) == tuple(many)
    assert len(value) < 65_536


def test_the_bytes_of_this_version_stay_as_they_are():
    assert ORDER.signature.hex() == GOLDEN_SIGNATURE
    assert write_drops((Drop(ID, "p", 7, b"s"),)) == GOLDEN_VALUE


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\xff" * 40,
        pack_value(OFFER),
        write_drops([replace(ORDER, manifest_id="../../etc")]),
        write_drops([replace(ORDER, until_s=-1)]),
        write_drops([replace(ORDER, until_s=(1 << 40) + 1)]),
        write_drops([ORDER] * (DROPS_MAX + 1)),
    ],
    ids=["empty", "noise", "another document", "no manifest", "before time", "after time", "too many"],
)
def test_anything_else_orders_nothing(value):
    assert read_drops(value) == ()
