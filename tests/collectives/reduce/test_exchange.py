"""Exchanges among members that stay: exactness, any order of frames, any tensors."""

import numpy as np
import pytest
import torch

from collectives.reduce import weighted_mean


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


def test_the_mean_of_nobody_is_zero_and_of_one_is_nearly_its_values():
    values = torch.randn(70_000).numpy()
    assert not weighted_mean([[(0.0, values)], [(0.0, values)]]).any()
    assert weighted_mean([[(1.0, values)]]).tobytes() == values.tobytes()
    assert np.abs(weighted_mean([[(3.3, values)]]) - values).max() < 1e-6
    assert weighted_mean([]).shape == (0,)
