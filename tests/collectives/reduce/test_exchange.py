"""Exchanges among members that stay: exactness, any order of frames, any tensors."""

import numpy as np
import pytest
import torch

from collectives.reduce import Kind, weighted_mean
from collectives.reduce.frames import KEY_BYTES, frame_of


def tensors_for(names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: [torch.randn(*shape, generator=generator) for shape in ((100, 77), (3,), (50001,))]
        for name in names
    }


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_fp32_is_the_mean_in_the_declarations_order_to_the_last_bit(tools, count, seed):
    names = [f"peer{n}" for n in range(count)]
    tensors = tensors_for(names)
    before = {name: [t.clone() for t in tensors[name]] for name in names}
    declaration = tools.declare([(name, 1 + n * 1.7) for n, name in enumerate(names)])
    mesh = tools.Mesh(tensors, declaration, seed=seed)
    mesh.run()
    for name, node in mesh.nodes.items():
        assert node.done
        assert node.drained
        assert same(node.result.tensors, tools.expected(tensors, declaration))
        assert same(tensors[name], before[name])
    assert len({node.digest for node in mesh.nodes.values()}) == 1


def shares_memory(buffer, tensor):
    return np.shares_memory(np.frombuffer(buffer, np.uint8), tensor.numpy())


def test_results_that_are_the_values_themselves_come_straight_to_where_they_belong(tools):
    names = ["a", "b", "c"]
    tensors = {name: [torch.randn(16 * 4096)] for name in names}
    declaration = tools.declare(names)
    mesh = tools.Mesh(tensors, declaration)
    node = mesh.nodes["a"]
    given = {}

    def look(a, b, frame, item):
        if b == "a":
            buffer = node.buffer_for(a, frame.header, frame.payload_bytes)
            given.setdefault(frame.kind, []).append(shares_memory(buffer, node.result.tensors[0]))
        return item

    mesh.tamper = look
    mesh.run()
    assert set(given[Kind.RESULT]) == {True}
    assert set(given[Kind.LEAF]) == {False}
    assert same(node.result.tensors, tools.expected(tensors, declaration))


def test_only_the_result_that_is_lacking_and_comes_from_whom_it_should_is_placed(tools):
    names = ["a", "b", "c"]
    tensors = {name: [torch.randn(16 * 4096)] for name in names}
    declaration = tools.declare(names)
    node = tools.Mesh(tensors, declaration).nodes["a"]
    whole = node.result.tensors[0]
    chunk = node.roots()["b"][0]
    size = 4 * node.layout.size(chunk)

    def placed(peer, key):
        header = frame_of(Kind.RESULT, chunk, 0, key, [memoryview(bytes(size))]).header
        return shares_memory(node.buffer_for(peer, header, size), whole)

    key = declaration.key[:KEY_BYTES]
    assert placed("b", key)
    assert not placed("c", key)
    assert not placed("b", bytes(KEY_BYTES))
    header = frame_of(Kind.RESULT, chunk, 0, key, [memoryview(bytes(size))]).header
    values = np.arange(size // 4, dtype=np.float32)
    node.arrived("b", header, memoryview(values.tobytes()))  # a buffer that was taken back: of other memory
    start, end = node.layout.span(chunk)
    assert whole[start:end].numpy().tobytes() == values.tobytes()
    assert not placed("b", key)


def test_the_mean_of_nobody_is_zero_and_of_one_is_nearly_its_values():
    values = torch.randn(70_000).numpy()
    assert not weighted_mean([[(0.0, values)], [(0.0, values)]]).any()
    assert weighted_mean([[(1.0, values)]]).tobytes() == values.tobytes()
    assert np.abs(weighted_mean([[(3.3, values)]]) - values).max() < 1e-6
    assert weighted_mean([]).shape == (0,)
