"""At most one and a half times the tensors beyond the tensors themselves, result included, whoever is slow or dies."""

import gc
import tracemalloc

import pytest
import torch

from collectives.reduce import Exchange, ExchangeSettings
from collectives.reduce.hold import BufferPool, Hold, Source

ELEMENTS = 2 * 2**20


def reduce_directly(tools, names, codec, slow=None, victim=None, dtype=torch.float32):
    """Frames go from hand to hand, one at a time, `slow` last; all of it in one thread. Peak of all members' memory,
    without the tensors, as a multiple of one member's tensors, for each member."""
    tensors = {name: [torch.randn(ELEMENTS).to(dtype)] for name in names}
    declaration = tools.declare(names, codec=codec)
    gc.collect()
    tracemalloc.start()
    try:
        nodes = {name: Exchange(name, tensors[name], declaration) for name in names}

        def move(a, b):
            if not nodes[b].wants_frames(a):
                return False
            frame = nodes[a].next_frame(b)
            if frame is None:
                return False
            buffer = nodes[b].buffer_for(a, frame.header, frame.payload_bytes)
            at = 0
            for part in frame.payload:
                buffer[at : at + part.nbytes] = part
                at += part.nbytes
            nodes[b].arrived(a, frame.header, buffer)
            return True

        def go_on(some):
            quick = [(a, b) for a in some for b in some if a != b and a != slow]
            late = [(slow, b) for b in some if slow in some and b != slow]
            while sum(move(a, b) for a, b in quick) or sum(move(a, b) for a, b in late):
                pass

        go_on(names)
        if victim is not None:
            left = [name for name in names if name != victim]
            nodes.pop(victim).close()
            smaller = tools.without(declaration, victim)
            for node in nodes.values():
                node.rebase(smaller)
            go_on(left)
        peak = tracemalloc.get_traced_memory()[1]
        assert all(node.done for node in nodes.values())
    finally:
        tracemalloc.stop()
    return peak / len(names) / nodes[names[0]].layout.tensor_bytes


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "topk"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_extra_memory_is_within_the_allowance(tools, codec, count):
    assert reduce_directly(tools, list("abcd")[:count], codec) <= 1.5


@pytest.mark.parametrize("slow", [None, "a", "c"])
def test_also_while_one_is_slow_and_another_dies(tools, slow):
    assert reduce_directly(tools, list("abcde"), "fp32", slow, "d") <= 1.5


def test_also_for_half_precision_tensors(tools):
    assert reduce_directly(tools, list("abcd"), "bf16", "b", "c", torch.bfloat16) <= 1.5


def test_a_tighter_allowance_is_kept_by_reading_less(tools):
    tensors = {name: [torch.randn(ELEMENTS)] for name in "abcdef"}
    declaration = tools.declare(list("abcdef"))
    node = Exchange("a", tensors["a"], declaration, ExchangeSettings(extra_ratio=1.4))
    others = {name: Exchange(name, tensors[name], declaration) for name in "bcdef"}
    most = 0
    stuck = False
    while not stuck:
        stuck = True
        for peer in "bcde":  # f is silent
            if node.wants_frames(peer) and (frame := others[peer].next_frame("a")) is not None:
                stuck = False
                buffer = node.buffer_for(peer, frame.header, frame.payload_bytes)
                buffer[:] = frame.payload[0]
                node.arrived(peer, frame.header, buffer)
                most = max(most, node.held_bytes)
    assert node.wants_frames("f")
    assert not node.wants_frames("b")
    assert most <= 0.4 * node.layout.tensor_bytes
    assert node.waiting_for() == {"f"}


def test_with_the_least_memory_that_there_is_it_still_ends(tools):
    names = list("abcdef")
    tensors = {name: [torch.randn(64 * 4096)] for name in names}
    declaration = tools.declare(names)
    mesh = tools.Mesh(tensors, declaration, ExchangeSettings(extra_ratio=1.0), seed=3)
    mesh.run()
    for node in mesh.nodes.values():
        assert node.done
        assert torch.equal(node.result.tensors[0], tools.expected(tensors, declaration)[0])


def test_closing_frees_everything_but_the_result(tools):
    names = list("abcd")
    mesh = tools.Mesh({name: [torch.randn(ELEMENTS // 4)] for name in names}, tools.declare(names))
    mesh.run()
    node = mesh.nodes["a"]
    assert node.held_bytes > 0
    node.close()
    assert node.held_bytes == 0
    assert node.result.done


def test_buffers_are_used_again_and_only_the_pools_own():
    pool = BufferPool(100, 2)
    first = pool.take(100)
    first[:] = b"x" * 100
    pool.give(first)
    second = pool.take(40)
    assert bytes(second) == b"x" * 40
    third = pool.take(100)
    assert len(third) == 100
    pool.give(memoryview(bytearray(100)))
    pool.give(memoryview(b""))
    pool.forget(second)
    pool.give(second)
    pool.give(third)
    assert pool.take(101).nbytes == 101


def test_what_is_needed_is_never_dropped_and_the_oldest_of_the_rest_goes_first():
    hold = Hold(BufferPool(10, 1), 35)
    sources = [Source(False, name, 0) for name in "abcdef"]
    for source in sources[:3]:
        assert hold.put((source, 0), memoryview(bytearray(10)), True)
    hold.release([(source, 0) for source in sources[:3]], keep=True)
    assert [(source, 0) in hold for source in sources[:3]] == [True] * 3
    assert hold.put((sources[3], 0), memoryview(bytearray(10)), True)
    assert [(source, 0) in hold for source in sources[:4]] == [False, True, True, True]
    assert not hold.put((sources[4], 0), memoryview(bytearray(20)), False)
    for source in sources[4:]:
        hold.put((source, 1), memoryview(bytearray(30)), True)
    assert [(source, 0) in hold for source in sources[:4]] == [False, False, False, True]
    assert hold.bytes == hold.needed_bytes == 70
    assert hold.need((sources[3], 0))
    assert not hold.need((sources[0], 0))
    hold.relax()
    hold.discard([sources[3]])
    assert hold.bytes == 10
