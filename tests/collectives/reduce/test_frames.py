"""Frames that no honest member would send are refused with a typed error, before anything is allocated."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.errors import NonFinite
from collectives.reduce import HEADER_BYTES, ExchangeSettings, FrameRefused, Kind, header_of
from collectives.reduce.frames import frame_of, pack_wants, unpack_wants, want_bytes


def pair(tools, codec="fp32", elements=17_000):
    tensors = {name: [torch.randn(elements)] for name in "abc"}
    mesh = tools.Mesh(tensors, tools.declare(list("abc"), codec=codec))
    return mesh, mesh.nodes["a"]


def give(node, peer, header, payload=b""):
    buffer = node.buffer_for(peer, header, len(payload))
    buffer[:] = payload
    node.arrived(peer, header, buffer)


def test_the_header_has_the_bytes_it_always_had():
    frame = frame_of(Kind.RESULT, 258, 2**64 + 3, bytes(range(32)), [memoryview(b"xyz")])
    assert frame.header.hex() == "01030000020100000300000000000000000102030405060708090a0b0c0d0e0f"
    assert frame.payload_bytes == 3
    head = header_of("p", frame.header)
    assert (head.kind, head.chunk, head.ident, head.key) == (Kind.RESULT, 258, 3, bytes(range(16)))


@given(st.binary(max_size=64))
@settings(max_examples=200)
def test_any_bytes_are_a_header_or_refused(data):
    try:
        head = header_of("p", data)
    except FrameRefused as error:
        refusal = error
    else:
        refusal = None
        assert len(data) == HEADER_BYTES
        assert head.kind in Kind
    assert refusal is None or (refusal.peer, refusal.why) == ("p", "malformed")


@given(st.integers(1, 200), st.data())
def test_wants_come_back_as_they_were(chunks, data):
    sets = [data.draw(st.sets(st.integers(0, chunks - 1))) for _ in range(3)]
    packed = pack_wants(chunks, *sets)
    assert len(packed) == want_bytes(chunks)
    assert [set(found) for found in unpack_wants(chunks, packed)] == sets


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk"])
@pytest.mark.parametrize("kind", [Kind.LEAF, Kind.RESULT, Kind.WANT, Kind.PARTIAL])
@pytest.mark.parametrize("change", [1, 1 << 40])
def test_oversized_payloads_are_refused_before_anything_is_allocated(tools, codec, kind, change):
    _, node = pair(tools, codec)
    right = want_bytes(node.layout.chunks)
    if kind != Kind.WANT:
        right = (node.codec if kind == Kind.LEAF else node.codec.result).bytes_for(node.layout.size(0))
    header = frame_of(kind, 0, 0, node.declaration.key).header
    with pytest.raises(FrameRefused, match="size"):
        node.buffer_for("b", header, right + change)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", [Kind.LEAF, Kind.RESULT, Kind.WANT])
def test_truncated_payloads_are_refused(tools, codec, kind):
    _, node = pair(tools, codec)
    right = want_bytes(node.layout.chunks)
    if kind != Kind.WANT:
        right = node.codec.bytes_for(node.layout.size(0))
    header = frame_of(kind, 0, 0, node.declaration.key).header
    for size in (0, right - 1):
        with pytest.raises(FrameRefused, match="size"):
            give(node, "b", header, bytes(size))


def test_strangers_and_chunks_that_do_not_exist_are_refused(tools):
    _, node = pair(tools)
    header = frame_of(Kind.LEAF, 0, 0, node.declaration.key).header
    with pytest.raises(FrameRefused, match="stranger"):
        node.buffer_for("mallory", header, node.codec.bytes_for(node.layout.size(0)))
    with pytest.raises(FrameRefused, match="malformed"):
        node.buffer_for("b", frame_of(Kind.LEAF, node.layout.chunks, 0, b"").header, 4)
    with pytest.raises(KeyError):
        node.next_frame("mallory")


def test_results_from_others_than_the_root_are_refused(tools):
    _, node = pair(tools)
    chunk = next(c for c in range(node.layout.chunks) if node.plan.members[node.plan.root(c)].peer != "b")
    header = frame_of(Kind.RESULT, chunk, 0, node.declaration.key).header
    with pytest.raises(FrameRefused, match="unwanted"):
        give(node, "b", header, bytes(node.codec.bytes_for(node.layout.size(chunk))))
    assert not node.result.has(chunk)


def test_doubled_frames_change_nothing(tools):
    mesh, _ = pair(tools)
    mesh.rng = random.Random(5)

    def twice(a, b, frame, item):
        if frame.kind != Kind.WANT:
            mesh.queues[a, b].append(item)
        return item

    mesh.tamper = twice
    mesh.run()
    for node in mesh.nodes.values():
        assert node.done
        assert torch.equal(node.result.tensors[0], tools.expected(mesh.tensors, node.declaration)[0])


def test_a_flood_of_names_and_of_requests_is_refused(tools):
    _, node = pair(tools, elements=64 * 4096)
    payload = bytes(node.codec.bytes_for(node.layout.size(0)))

    def names(count):
        for name in range(count):
            give(node, "b", frame_of(Kind.LEAF, 0, 1000 + name, node.declaration.key).header, payload)

    def requests(count):
        wants = pack_wants(node.layout.chunks, {0}, set(), set())
        for _ in range(count):
            give(node, "b", frame_of(Kind.WANT, 0, 0, node.declaration.key).header, wants)

    with pytest.raises(FrameRefused, match="flood"):
        names(100)
    assert node.held_bytes < node.layout.tensor_bytes / 2
    with pytest.raises(FrameRefused, match="flood"):
        requests(1000)


def test_a_member_that_was_left_out_is_ignored_and_not_an_error(tools):
    mesh, node = pair(tools)
    late = frame_of(Kind.LEAF, 0, 0, node.declaration.key).header
    mesh.kill("b")
    mesh.rebase(tools.without(node.declaration, "b"))
    give(node, "b", late, bytes(node.codec.bytes_for(node.layout.size(0))))
    mesh.run()
    assert node.done


@given(
    st.binary(min_size=HEADER_BYTES - 6, max_size=HEADER_BYTES - 6),
    st.integers(1, 4),
    st.integers(0, 6),
    st.binary(max_size=50),
)
@settings(max_examples=200, deadline=None)
def test_any_frame_from_a_member_is_taken_or_refused(tools, rest, kind, chunk, payload):
    mesh, node = pair(tools, "topk", 9000)
    header = bytes([1, kind, 0, 0, chunk, 0]) + rest
    refusal = None
    try:
        give(node, "b", header, payload)
    except FrameRefused as error:
        refusal = error.peer, error.why
    assert refusal is None or refusal in [("b", why) for why in ("malformed", "size", "unwanted", "flood")]
    assert node.held_bytes <= len(payload)
    assert set(node.refused) <= {"b"}
    mesh.run()
    assert mesh.nodes["c"].done or node.refused, "whatever came, the honest frames that follow are understood"


@pytest.mark.parametrize(("bad", "why"), [(float("nan"), "nonfinite"), (float("inf"), "nonfinite")])
@pytest.mark.parametrize("aggregator", ["mean", "clip", "median"])
def test_a_member_that_sends_no_numbers_is_named_and_the_others_go_on_without(tools, bad, why, aggregator):
    tensors = {name: [torch.randn(17_000)] for name in "abc"}
    tensors["b"][0][:] = bad
    mesh = tools.Mesh(tensors, tools.declare(list("abc")), ExchangeSettings(aggregator=aggregator), seed=1)
    mesh.dead.add(
        "b"
    )  # b's own exchange would refuse its own values: hand its frames over without delivering to it
    node_b = mesh.nodes["b"]
    for other in "ac":
        while (frame := node_b.next_frame(other)) is not None:
            give(mesh.nodes[other], "b", frame.header, bytes(frame.payload[0]))
    mesh.run()
    for other in "ac":
        assert mesh.nodes[other].refused == {"b": why}
        assert not mesh.nodes[other].done
    smaller = tools.without(mesh.nodes["a"].declaration, "b")
    mesh.rebase(smaller)
    mesh.run()
    for other in "ac":
        assert mesh.nodes[other].done
        assert torch.isfinite(mesh.nodes[other].result.tensors[0]).all()
    with pytest.raises(NonFinite):
        node_b.rebase(tools.without(node_b.declaration, "a", "c"))


def test_a_payload_that_does_not_decode_names_its_sender(tools):
    mesh, _ = pair(tools, "topk")

    def spoil(a, b, frame, item):
        header, payload = item
        return (header, bytes(len(payload) - 1)) if a == "b" and frame.kind == Kind.LEAF else item

    mesh.tamper = spoil
    mesh.run()
    assert "b" in mesh.nodes["a"].refused or "b" in mesh.nodes["c"].refused
    assert {why for node in mesh.nodes.values() for why in node.refused.values()} == {"mismatch"}


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_values_that_make_a_sum_too_long_are_named_though_each_is_finite(tools, codec):
    tensors = {name: [torch.randn(17_000)] for name in "abc"}
    tensors["b"][0][5] = 3e37
    mesh = tools.Mesh(tensors, tools.declare(list("abc"), codec=codec), seed=1)
    with pytest.raises(NonFinite):
        mesh.run()  # at b, of its own chunk, or nobody meets it
    assert all(mesh.nodes[name].refused in ({}, {"b": "norm"}) for name in "ac")
    assert not all(mesh.nodes[name].done for name in "ac")
