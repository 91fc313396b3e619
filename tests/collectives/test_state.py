"""Snapshots of a state: immutable, named by hashes, put together from chunks in any order."""

import hashlib
import random

import pytest
import torch

from collectives.errors import BadContribution, LocalFault
from collectives.state import (
    CHUNK_BYTES,
    Assembly,
    Shelf,
    Snapshot,
    StateEntry,
    StateManifest,
    decode_manifest,
)
from p2p import pack_value

torch.set_num_threads(1)


def a_state(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "w.big": torch.randn(700, 1000, generator=g),
        "w.half": torch.randn(33, 7, generator=g).to(torch.bfloat16),
        "odd": torch.arange(3, dtype=torch.uint8),
        "step": torch.tensor(41),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(6, 8, generator=g).t(),
        "flags": torch.tensor([True, False]),
    }


def data_of(snapshot, index):
    return b"".join(snapshot.chunk(index))


def assemble(snapshot, order, buffer=None):
    whole = Assembly(snapshot.manifest, buffer)
    for index in order:
        assert whole.add(index, data_of(snapshot, index))
    return whole.finish(snapshot.epoch)


@pytest.mark.parametrize("seed", range(4))
def test_a_state_put_together_in_any_order_is_the_same(seed):
    state = a_state(seed)
    snapshot = Snapshot.take(state, 7)
    order = list(range(snapshot.manifest.chunk_count))
    assert len(order) == 3
    random.Random(seed).shuffle(order)
    for buffer in (None, memoryview(bytearray(snapshot.manifest.nbytes))):
        copy = assemble(snapshot, order, buffer)
        assert copy.digest == snapshot.digest
        assert copy.epoch == 7
        assert set(copy.tensors) == set(state)
        for key, tensor in state.items():
            assert copy.tensors[key].dtype == tensor.dtype
            assert copy.tensors[key].shape == tensor.shape
            assert torch.equal(copy.tensors[key], tensor)


def test_a_key_is_named_by_the_sha256_of_its_bytes():
    state = a_state()
    entries = {entry.key: entry for entry in Snapshot.take(state, 1).manifest.entries}
    assert entries["w.big"].sha256 == hashlib.sha256(state["w.big"].numpy().tobytes()).digest()
    assert (
        entries["strided"].sha256 == hashlib.sha256(state["strided"].contiguous().numpy().tobytes()).digest()
    )


def test_a_snapshot_stays_what_it_was_when_its_source_changes():
    state = a_state()
    snapshot = Snapshot.take(state, 1)
    before = data_of(snapshot, 0)
    state["w.big"].add_(1)
    assert data_of(snapshot, 0) == before
    assert Snapshot.take(state, 1).digest != snapshot.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(step=torch.tensor(42)),
        lambda state: state.update(odd=torch.arange(3, dtype=torch.int8)),
        lambda state: state.update({"w.big": state["w.big"].reshape(1000, 700)}),
        lambda state: state.update(more=torch.zeros(1)),
        lambda state: state.pop("empty"),
    ],
)
def test_the_digest_tells_any_two_states_apart(change):
    state = a_state()
    digest = Snapshot.take(state, 1).digest
    assert Snapshot.take(dict(reversed(state.items())), 9).digest == digest
    change(state)
    assert Snapshot.take(state, 1).digest != digest


def test_a_chunk_that_is_another_is_refused():
    snapshot = Snapshot.take(a_state(), 1)
    whole = Assembly(snapshot.manifest)
    good = data_of(snapshot, 0)
    assert not whole.add(0, good[:-1] + bytes([good[-1] ^ 1]))
    assert not whole.add(0, good[:-1])
    assert not whole.add(1, good)
    assert not whole.add(-1, good)
    assert not whole.add(99, good)
    assert len(whole.missing) == 3
    with pytest.raises(LocalFault):
        whole.finish(1)


def test_what_a_buffer_already_holds_is_recalled():
    snapshot = Snapshot.take(a_state(), 1)
    buffer = memoryview(bytearray(snapshot.manifest.nbytes))
    Assembly(snapshot.manifest, buffer).add(1, data_of(snapshot, 1))
    again = Assembly(snapshot.manifest, buffer)
    assert again.recall() == 1
    assert again.missing == {0, 2}


def manifest_of(*entries, chunks=None):
    total = sum(entry.nbytes for entry in entries)
    return StateManifest(entries, bytes(32 * -(-total // CHUNK_BYTES)) if chunks is None else chunks)


def entry(key="a", dtype="float32", shape=(4,), sha256=bytes(32)):
    return StateEntry(key, dtype, shape, sha256)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1 garbage",
        pack_value(StateManifest((StateEntry("a", "quantum", (1,), bytes(32)),), b"")),
        pack_value(manifest_of(entry(shape=(-4,)), chunks=bytes(32))),
        pack_value(manifest_of(entry(shape=(1 << 40, 1 << 40)), chunks=b"")),
        pack_value(manifest_of(entry(shape=(1,) * 17))),
        pack_value(manifest_of(entry(sha256=b"short"))),
        pack_value(manifest_of(entry("b"), entry("a"))),
        pack_value(manifest_of(entry("a"), entry("a"))),
        pack_value(manifest_of(entry(), chunks=bytes(64))),
        pack_value(manifest_of(entry("other"))),
    ],
)
def test_a_bad_manifest_is_its_senders_fault(data):
    wanted = manifest_of(entry())
    assert decode_manifest(wanted.encode(), wanted.digest(), "p") == wanted
    with pytest.raises(BadContribution) as caught:
        decode_manifest(data, wanted.digest(), "p")
    assert caught.value.peer == "p"


@pytest.mark.parametrize(
    "state", [{"": torch.zeros(1)}, {"x" * 513: torch.zeros(1)}, {"a": torch.zeros((1,) * 17)}]
)
def test_what_cannot_travel_is_refused(state):
    with pytest.raises(LocalFault):
        Snapshot.take(state, 1)


def test_the_shelf_keeps_the_newest_and_what_is_being_read():
    shelf = Shelf(kept_max=3, lease_s=20)
    shots = [Snapshot.take({"a": torch.full((2,), float(n))}, n) for n in range(6)]
    shelf.put(shots[0], 0)
    shelf.put(shots[1], 1)
    assert shelf.get(shots[0].digest, 1) is None, "nobody read it"
    assert shelf.get(shots[1].digest, 2) is shots[1]
    shelf.put(shots[2], 3)
    assert shelf.get(shots[2].digest, 3) is shots[2]
    shelf.put(shots[3], 4)
    assert shelf.get(shots[3].digest, 4) is shots[3]
    shelf.put(shots[4], 5)
    assert shelf.get(shots[1].digest, 5) is None, "the longest unread made room"
    assert shelf.get(shots[2].digest, 6) is shots[2]
    shelf.trim(27)
    assert shelf.get(shots[2].digest, 27) is None, "its lease is over"
    assert shelf.get(shots[4].digest, 99) is shelf.newest is shots[4]
