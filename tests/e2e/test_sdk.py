"""Programs that use a mesh through the SDK, while its nodes live and die."""

from __future__ import annotations

import pytest

from shoal import Client
from shoal.errors import DaemonAbsent, ShoalError

ASK = ("embedded", "def read_file(path):\n")


def until_ready(tools, node):
    """Until it answers by itself: who has just met the mesh may know of a model before it can reach its hosts."""

    def answers():
        try:
            return Client(node.api).complete(*ASK, max_tokens=1, temperature=0).gateways == (node.api,)
        except ShoalError:
            return False

    tools.until(answers, "an answer")


@pytest.fixture(scope="module")
def gateways(four, tools, tmp_path_factory):
    """Two members of the mesh of four that host nothing; starting them again is `.start().ready()`."""
    directory = tmp_path_factory.mktemp("gateways")
    nodes = [tools.Node(directory, name, "--no-serve") for name in ("g1", "g2")]
    try:
        for node in nodes:
            node.start("--join", four.nodes[0].invite())
        for node in nodes:
            node.ready()
            until_ready(tools, node)
        yield nodes
    finally:
        for node in nodes:
            node.end()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8, "seed": 11}])
def test_an_answer_survives_its_gateway(options, gateways, tools, alone) -> None:
    options |= {"max_tokens": 60, "ignore_eos": True}
    with Client(alone.api) as shoal:
        expected = shoal.complete(*ASK, **options)
    victim, other = gateways
    died = victim.api
    with Client(victim.api, other.api) as shoal:
        stream = shoal.stream(*ASK, **options)
        pieces = iter(stream)
        shown = [next(pieces).text for _ in range(5)]
        victim.end()
        shown += [piece.text for piece in pieces]
        answer = stream.answer()
    victim.start().ready()
    until_ready(tools, victim)
    assert "".join(shown) == answer.text == expected.text
    assert answer.tokens == expected.tokens
    assert answer.gateways == (died, other.api)


def test_a_light_peer_joins_by_an_invite_and_leaves_with_the_program(four, tmp_path, alone) -> None:
    with Client(alone.api) as shoal:
        expected = shoal.complete(*ASK, max_tokens=8, temperature=0).text
    with Client.join(four.nodes[0].invite(), data_dir=str(tmp_path)) as shoal:
        assert shoal.complete(*ASK, max_tokens=8, temperature=0, timeout_s=60).text == expected
        assert len(shoal.mesh()["nodes"]) > len(four.nodes)
    with pytest.raises(DaemonAbsent):
        shoal.models()
