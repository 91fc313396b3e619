"""The checks of the simulated world can fail: each rule of the protocol, broken, is found out."""

import pytest

# name -> a seed at or before which it is found out
SEEN_BY = {
    "half_is_a_quorum": 0,
}


@pytest.mark.parametrize(("name", "seed"), SEEN_BY.items())
def test_a_broken_rule_is_found_out(world, mutations, monkeypatch, name, seed):
    def patch(owner, attribute, new):
        if callable(owner) and hasattr(owner, "__globals__"):
            monkeypatch.setitem(owner.__globals__, attribute, new)
        else:
            monkeypatch.setattr(owner, attribute, new)

    mutations[name](patch)
    with pytest.raises((world.Violation, RuntimeError)):
        world.World(seed).run()
