"""Real daemons of which one takes a model back: it goes everywhere and for good, the other model serves on."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from node import embedded

pytestmark = pytest.mark.slow  # a mesh of its own, two models and a restart: most of a minute

PROMPT = "def read_file(path):\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tools):
    """A publisher that hosts nothing before one host, and a second model beside the embedded one."""
    directory = tmp_path_factory.mktemp("drop")
    mesh = tools.Mesh(
        tools.Node(directory, "desk", "--no-serve"), tools.Node(directory, "box", "--memory", "64MiB")
    )
    try:
        second = directory / "second"
        shutil.copytree(embedded.path(), second)
        assert mesh.nodes[0].add()["state"] == "ready"
        assert mesh.nodes[0].add(second, "second")["state"] == "ready"
        yield mesh
    finally:
        mesh.end()


def drop(tools, node, *arguments):
    """(exit status, stdout, stderr) of the command at a node."""
    done = subprocess.run(
        tools.shoal("drop", *arguments, "--api", node.api),
        capture_output=True, text=True, timeout=60, env=tools.environment(node.directory), check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def names(view):
    return {model["name"] for model in view["models"]}


def hosted(view):
    return {span["model"] for node in view["nodes"] for span in node["spans"]}


def test_a_dropped_model_is_gone_everywhere_and_after_a_restart(shared, tools):
    desk, box = shared.nodes
    shared.until(lambda view: names(view) == {"embedded", "second"}, 1)
    expected = tools.complete(box.api, PROMPT)
    assert tools.complete(desk.api, PROMPT, model="second") == expected
    manifest = next(m["manifest"] for m in desk.view()["models"] if m["name"] == "second")

    status, out, err = drop(tools, box, "second")
    said = f"shoal: second can be dropped only on the node that added it: desk ({desk.peer})\n"
    assert (status, out, err) == (1, "", said)
    assert drop(tools, desk, "third")[0::2] == (1, "shoal: there is no model 'third' in this mesh\n")

    status, out, _ = drop(tools, desk, "second", "--json")
    assert (status, json.loads(out)) == (0, {"dropped": "second", "manifest": manifest})
    for index in range(2):
        shared.until(lambda view: names(view) == {"embedded"}, index, 5.0)
    refused, document = tools.ask(desk.api, PROMPT, model="second")
    assert (refused, document["error"]["code"]) == (404, "model_not_found")
    assert [tools.complete(api, PROMPT) for api in shared.apis] == [expected] * 2
    shared.until(lambda view: hosted(view) == {"embedded"}, wait_s=15.0)

    desk.end()
    box.end()
    box.start().ready()
    tools.until(lambda: tools.ask(box.api, PROMPT)[0] == 200, "the other model is served again")
    assert names(box.view()) == {"embedded"}
    assert tools.ask(box.api, PROMPT, model="second")[0] == 404
