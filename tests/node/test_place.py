"""What the mesh tells its runs of where this node stands."""

from types import SimpleNamespace

import pytest

from collectives import Place
from node.mesh import MeshNode


@pytest.mark.parametrize("listens", [True, False])
def test_the_lan_is_that_of_the_measured_round_trips_and_who_does_not_listen_cannot_be_dialled(listens):
    atlas = SimpleNamespace(rtt_s={("b", "c"): 0.0005, ("c", "d"): 0.050})
    host = SimpleNamespace(addrs=lambda: ("/ip4/10.0.0.1/tcp/1",) if listens else ())
    node = SimpleNamespace(me="c", atlas=lambda: atlas, host=host)
    assert MeshNode._place(node) == Place("lan b", dialable=listens)
