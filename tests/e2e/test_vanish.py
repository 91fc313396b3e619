"""Nodes that die, freeze, come back or leave politely, while somebody waits for text."""

from __future__ import annotations

import signal
import time

import pytest

PROMPT = "def read_file(path):\n"
ERROR_S_MAX = 10.0
STOP_S_MAX = 3.0


@pytest.fixture
def whole(four):
    """The four as they should be, whatever the test before did to them."""
    four.heal()
    return four


@pytest.fixture(scope="module")
def expected(alone, tools):
    return tools.complete(alone.api, PROMPT)


@pytest.fixture(scope="module")
def spare(tmp_path_factory, tools):
    """A gateway that hosts nothing, before three nodes that each could serve the whole model; two copies wanted."""
    directory = tmp_path_factory.mktemp("spare")
    flags = ("--memory", "20MiB")
    mesh = tools.Mesh(
        tools.Node(directory, "gateway", "--no-serve"),
        *(tools.Node(directory, name, *flags) for name in "abc"),
    )
    try:
        assert mesh.nodes[0].add(copies=2)["state"] == "ready"
        mesh.until(lambda view: view["models"][0]["copies_min"] >= 2)
        yield mesh
    finally:
        mesh.end()


def lose_one(mesh, tools, how, gateway, max_tokens=1000):
    """Freeze or kill a stage of a running stream; the stage, the text, and the last chunk."""
    texts = []
    with tools.stream(gateway.api, PROMPT, max_tokens=max_tokens) as chunks:
        texts.append(next(chunks)["choices"][0]["text"])
        chain = tools.until(lambda: gateway.view()["requests"], "a request")[0]["chain"]
        victim = next(
            mesh.of(s["node"]) for s in chain if s["node"] not in (gateway.peer, mesh.nodes[0].peer)
        )
        victim.signal(how)
        began_s = time.monotonic()
        last = {}
        for chunk in chunks:
            last = chunk
            texts += [choice["text"] for choice in chunk.get("choices", ())]
        took_s = time.monotonic() - began_s
    assert took_s < ERROR_S_MAX
    return victim, "".join(texts), last


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_with_a_second_copy_nobody_notices(spare, tools, expected, alone, how):
    spare.heal()
    spare.until(lambda view: view["models"][0]["copies_min"] >= 2)
    gateway = spare.nodes[0]
    assert tools.complete(gateway.api, PROMPT) == expected
    _, text, last = lose_one(spare, tools, how, gateway, max_tokens=200)
    assert "error" not in last
    assert text == tools.complete(alone.api, PROMPT, max_tokens=200)
    assert tools.complete(gateway.api, PROMPT) == expected


def test_a_node_told_not_to_serve_hosts_nothing(spare):
    assert spare.nodes[0].peer not in spare.spans()
    card = next(n for n in spare.nodes[0].view()["nodes"] if n["self"])
    assert card["serves"] is False


def test_when_every_copy_is_lost_another_node_serves_the_model_from_its_publisher(spare, tools, expected):
    spare.heal()
    spare.until(lambda view: view["models"][0]["copies_min"] >= 2)
    gateway = spare.nodes[0]
    before = gateway.view()["models"][0]
    # A copy may lie on two nodes, when the nodes came back one after the other: no whole one is with who is left.
    whole = {span["node"] for span in before["plan"] if (span["start"], span["end"]) == (0, 8)}
    left = next(node for node in spare.nodes[1:] if node.peer not in whole)
    for node in spare.nodes[1:]:
        if node is not left:
            node.signal(signal.SIGKILL)
    tools.until(lambda: tools.ask(gateway.api, PROMPT)[0] == 200, "text", 30)
    assert tools.complete(gateway.api, PROMPT) == expected
    after = spare.until(lambda view: [a["node"] for a in view["models"][0]["plan"]] == [left.peer], wait_s=10)
    assert after["models"][0]["epoch"] > before["epoch"]


def test_a_full_mesh_that_loses_a_stage_says_what_it_lacks_until_the_node_is_back(whole, tools, expected):
    victim, _, last = lose_one(whole, tools, signal.SIGKILL, whole.nodes[0])
    assert last.get("error", {}).get("message"), last
    assert set(last["error"]) >= {"message", "type", "param", "code"}
    for node in (node for node in whole.nodes if node is not victim):
        status, document = tools.until(
            lambda node=node: (got := tools.ask(node.api, PROMPT))[0] == 503 and "needs" in str(got) and got,
            f"a shortage at {node.name}", 20,
        )  # fmt: skip
        assert status == 503
        assert "MiB" in document["error"]["message"]
    whole.heal()
    assert [tools.complete(api, PROMPT) for api in whole.apis] == [expected] * 4


def test_a_node_that_was_frozen_joins_again_by_itself(whole, tools, expected):
    victim = whole.nodes[2]
    victim.signal(signal.SIGSTOP)
    tools.until(
        lambda: not any(n["connected"] for n in whole.nodes[0].view()["nodes"] if n["peer"] == victim.peer),
        "the loss is noticed", 10,
    )  # fmt: skip
    whole.heal()
    assert tools.complete(victim.api, PROMPT) == expected


def test_the_founder_restarts_and_finds_its_mesh_from_memory(whole, tools, expected):
    founder = whole.nodes[0]
    mesh_id = founder.view()["mesh"]
    founder.end()
    whole.heal()
    assert founder.view()["mesh"] == mesh_id
    assert tools.complete(founder.api, PROMPT) == expected


def test_a_clean_stop_leaves_every_view_in_time(spare):
    spare.heal()
    leaving, others = spare.nodes[-1], spare.nodes[:-1]
    leaving.signal(signal.SIGINT)
    began_s = time.monotonic()
    assert leaving.wait(STOP_S_MAX) == 0
    while any(node["peer"] == leaving.peer for other in others for node in other.view()["nodes"]):
        assert time.monotonic() - began_s < STOP_S_MAX
    assert "Traceback" not in leaving.log()
    assert "leaving now" not in leaving.log(), "the watchdog had to end it"
    assert not (leaving.data_dir / "daemon.json").exists()


def test_a_clean_stop_in_the_middle_of_text_tells_the_client(spare, tools):
    spare.heal()
    gateway = spare.nodes[0]
    with tools.stream(gateway.api, PROMPT, max_tokens=1000) as chunks:
        next(chunks)
        gateway.signal(signal.SIGTERM)
        last = {}
        for chunk in chunks:
            last = chunk
        assert "error" in last
    assert gateway.wait(STOP_S_MAX) == 0
    assert "Traceback" not in gateway.log()
    assert "leaving now" not in gateway.log()


def test_a_mesh_whose_nodes_were_all_off_forms_again_from_memory(tools, tmp_path):
    """No invite, nobody who stayed: each remembers the others, and is found again where it was."""
    mesh = tools.Mesh(*(tools.Node(tmp_path, name) for name in "abc"))
    try:
        before = {node.peer for node in mesh.nodes}
        for node in mesh.nodes:
            node.signal(signal.SIGTERM)
        for node in mesh.nodes:
            assert node.wait(STOP_S_MAX) == 0
        for node in mesh.nodes:
            node.start()
        for node in mesh.nodes:
            node.ready()
        mesh.met()
        assert {node.peer for node in mesh.nodes} == before
        assert len({node.view()["mesh"] for node in mesh.nodes}) == 1
    finally:
        mesh.end()
