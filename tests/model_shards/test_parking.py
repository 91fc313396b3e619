"""What is parked comes back bit for bit, counts against a limit, and leaves nothing behind."""

from __future__ import annotations

import os

import pytest
import torch

from model_shards import NoRoom, ParkingLot, Step, StepError
from model_shards.engine import Engine


@pytest.fixture
def span(llama, tools):
    return tools.engines_of(llama.directory, (0, 4))[0].span


def test_parked_rows_come_back_and_free_their_blocks_meanwhile(span, tmp_path):
    engine = Engine(span, kv_bytes_max=1 << 17, parking=ParkingLot(1 << 20, tmp_path))
    for name in ("kept", "moved"):
        engine.open(name, 0, span.end, 40)
        engine.run([Step(name, 0, tuple(range(3, 30)))])
    free = engine.kv_blocks_free
    assert engine.park("moved") == span.end * 3
    assert engine.kv_blocks_free > free
    with pytest.raises(StepError, match="is parked"):
        engine.run([Step("moved", 27, (5,))])
    engine.open("between", 0, span.end, 64)
    engine.run([Step("between", 0, tuple(range(40, 90)))])
    engine.unpark("moved")
    kept, moved = (engine.logits([Step(name, 27, (5,))])[0] for name in ("kept", "moved"))
    assert torch.equal(kept, moved)
    for name in ("kept", "moved", "between"):
        engine.close(name)
    assert engine.kv_bytes_used() == 0


def test_who_is_closed_while_parked_leaves_nothing(span, tmp_path):
    lot = ParkingLot(1 << 20, tmp_path)
    engine = Engine(span, kv_bytes_max=1 << 16, parking=lot)
    engine.open("a", 0, span.end, 40)
    engine.run([Step("a", 0, tuple(range(20)))])
    engine.park("a")
    assert lot.used > 0
    engine.close("a")
    assert (lot.used, engine.kv_bytes_used(), os.listdir(tmp_path)) == (0, 0, [])
    with pytest.raises(StepError, match="not parked"):
        engine.unpark("a")


def test_beyond_the_limit_or_without_a_disk_a_session_stays_where_it_is(span, tmp_path):
    for lot in (ParkingLot(100, tmp_path), ParkingLot(1 << 20, tmp_path / "missing")):
        engine = Engine(span, kv_bytes_max=1 << 16, parking=lot)
        engine.open("a", 0, span.end, 40)
        engine.run([Step("a", 0, tuple(range(20)))])
        with pytest.raises(NoRoom):
            engine.park("a")
        assert len(engine.logits([Step("a", 20, (1,))])) == 1


def test_who_finds_no_room_to_come_back_stays_parked(span, tmp_path):
    engine = Engine(span, kv_bytes_max=4 * 4 * 2 * 2 * 8 * 16 * 4, parking=ParkingLot(1 << 20, tmp_path))
    engine.open("a", 0, span.end, 16)
    engine.run([Step("a", 0, (1, 2, 3))])
    engine.park("a")
    engine.open("all", 0, span.end, 64)
    with pytest.raises(NoRoom):
        engine.unpark("a")
    engine.close("all")
    engine.unpark("a")
    assert engine.position("a") == 3
