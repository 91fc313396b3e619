"""The block pool never lends more than it has and gets everything back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_shards import LocalFault, NoRoom
from model_shards.kv import KvPool


def pool_of(blocks):
    pool = KvPool(0, 1, 2, 2, torch.float32, torch.device("cpu"))
    return KvPool(blocks * pool.block_bytes, 1, 2, 2, torch.float32, torch.device("cpu"))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)) | st.integers(0, 50), max_size=40))
def test_blocks_are_lent_once_and_come_back(events):
    pool, lent = pool_of(40), []
    for event in events:
        if isinstance(event, int):
            if lent:
                for blocks in lent.pop(event % len(lent)):
                    pool.give(blocks)
        else:
            try:
                lent.append(pool.take(*event))
            except NoRoom:
                assert event[0] * event[1] > pool.free_blocks
        out = [block for taken in lent for blocks in taken for block in blocks]
        assert len(out) == len(set(out))
        assert pool.free_blocks == 40 - len(out)
        assert all(0 <= block < 40 for block in out)


def test_blocks_given_back_join_into_runs():
    pool = pool_of(10)
    first, second = pool.take(2, 5)
    pool.give(first)
    pool.give(second)
    assert pool.take(1, 10) == [list(range(10))]


def test_giving_a_block_back_twice_is_our_own_fault():
    pool = pool_of(4)
    (blocks,) = pool.take(1, 2)
    pool.give(blocks)
    with pytest.raises(LocalFault, match="twice"):
        pool.give(blocks)


def test_a_pool_of_nothing_admits_nobody():
    with pytest.raises(NoRoom):
        pool_of(0).take(1, 1)
