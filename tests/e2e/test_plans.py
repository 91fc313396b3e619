"""Plans of real daemons: said before anything is loaded, over several devices, by tags and by demand."""

from __future__ import annotations

import json
import subprocess
import threading

import pytest

pytestmark = pytest.mark.slow  # whole meshes under load for minutes

PROMPT = "def read_file(path):\n"


def run(tools, mesh_node, *arguments):
    """One command line against a daemon: (exit status, stdout, stderr)."""
    done = subprocess.run(
        tools.shoal(*arguments, "--api", mesh_node.api),
        capture_output=True, text=True, timeout=60, env=tools.environment(mesh_node.directory), check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def plan(tools, node, *arguments):
    status, out, err = run(tools, node, "plan", *arguments, "--json")
    return status, json.loads(out), err


def spans_of(document):
    return sorted((span["start"], span["end"], span["node"]) for span in document["spans"])


def test_a_plan_is_said_before_loading_and_holds_over_two_devices_of_one_node(tmp_path, tools, alone):
    twin = tools.Node(tmp_path, "twin", "--device", "cpu,cpu", "--memory", "16MiB").start().ready()
    nodes = [twin]
    try:
        status, short, err = plan(tools, twin, "embedded")
        assert status == 1
        assert "short" in err
        missing = short["shortage"]["missing_bytes"]
        assert 0 < missing < 16 << 20
        more = tools.Node(tmp_path, "more", "--memory", missing).start("--join", twin.invite()).ready()
        nodes.append(more)
        status, found, _ = tools.until(
            lambda: (said := plan(tools, twin, "embedded"))[0] == 0 and said, "room for the model"
        )
        assert {span["node"] for span in found["spans"]} == {twin.peer, f"{twin.peer}#1", more.peer}
        assert found["published"] is False
        assert twin.view()["models"] == []
        assert all(node["spans"] == [] for node in twin.view()["nodes"])
        assert twin.add()["state"] == "ready"
        hosted = [
            (span["start"], span["end"], span["host"])
            for node in more.view()["nodes"]
            for span in node["spans"]
        ]
        assert sorted(hosted) == spans_of(found)
        expected = tools.complete(alone.api, PROMPT)
        assert [tools.complete(node.api, PROMPT) for node in nodes] == [expected] * 2
        status, again, _ = plan(tools, more, "embedded")
        assert spans_of(again) == spans_of(found)
        assert all(span["serves"] and span["fetch_bytes"] == 0 for span in again["spans"])
    finally:
        for node in nodes:
            node.end()


@pytest.fixture(scope="module")
def three(tmp_path_factory, tools):
    """Three nodes that hold one model each; two are trusted; plans are weighed every second."""
    directory = tmp_path_factory.mktemp("three")
    settings = directory / "settings.toml"
    settings.write_text("rebalance = 1.0\n")
    flags = ["--config", settings, "--memory", "20MiB"]
    tags = {"a": ["--tag", "trusted"], "b": ["--tag", "trusted"], "c": ["--tag", "metered"]}
    mesh = tools.Mesh(*(tools.Node(directory, name, *flags, *tags[name]) for name in "abc"))
    try:
        yield mesh
    finally:
        mesh.end()


def hosts(view, model):
    return {
        node["name"]
        for node in view["nodes"]
        for span in node["spans"]
        if span["model"] == model and span["state"] == "ready"
    }


class Load:
    """Six clients that ask one model without a pause while the block lasts; all must be answered."""

    def __init__(self, tools, api, model):
        self._ask = lambda: tools.ask(api, PROMPT, model=model, max_tokens=24)
        self._stop = threading.Event()
        self._refused: list[object] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(6)]

    def _run(self):
        while not self._stop.is_set():
            status, document = self._ask()
            if status != 200:
                self._refused.append(document)
                return

    def __enter__(self):
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._refused, self._refused[:1]


def test_two_models_share_three_nodes_by_demand_and_the_spare_copy_goes_to_who_is_asked(three, tools):
    first, second = "one", "two"
    for name in (first, second):
        assert three.nodes[0].add(name=name)["state"] == "ready"
    assert len({m["planner"] for m in three.nodes[0].view()["models"]}) == 1
    for asked, other in ((first, second), (second, first)):
        with Load(tools, three.apis[2], asked):
            view = three.until(
                lambda v, asked=asked, other=other: len(hosts(v, asked)) == 2 and len(hosts(v, other)) == 1
            )
        assert not hosts(view, asked) & hosts(view, other)


def test_a_model_that_asks_for_trusted_hosts_leaves_a_node_that_is_trusted_no_longer(three, tools):
    last = {}
    body = {"directory": "embedded", "name": "guarded", "copies": 1, "require": ["trusted"]}
    for line in tools.lines(three.apis[2] + "/shoal/models", body):
        last = last if line.get("done") else line
    assert last["state"] == "ready", last
    view = three.until(lambda v: len(hosts(v, "guarded")) == 1)
    (host,) = hosts(view, "guarded")
    assert host in ("a", "b")
    index = "ab".index(host)
    expected = tools.complete(three.apis[2], PROMPT, model="guarded")
    assert run(tools, three.nodes[index], "tags", "--remove", "trusted", "--add", "metered")[1] == "metered\n"
    other = "ba"[index]
    three.until(lambda v: hosts(v, "guarded") == {other}, 2)
    assert tools.complete(three.apis[index], PROMPT, model="guarded") == expected
    assert run(tools, three.nodes[1 - index], "tags", "--remove", "trusted")[1] == "no tags\n"
    three.until(
        lambda v: any(m["name"] == "guarded" and not m["ready"] and m["shortage"] for m in v["models"]), 2
    )
