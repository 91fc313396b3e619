"""Real daemons that train together while some are killed, stopped and started, and serve what they have trained."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess

import pytest

pytestmark = pytest.mark.slow  # meshes of their own that train for a while: minutes in all

RECIPE = """
name = "tiny"
[model]
layers = 2
hidden = 64
heads = 4
context = 64
[data]
files = "text.txt"
sequence = 32
[train]
steps = {steps}
batch = 4
warmup = 10
[outer]
strategy = "{strategy}"
inner_steps = 10
{outer}
[checkpoints]
every_rounds = 2
[evaluation]
every_rounds = 10
sequences = 16
[members]
minimum = {minimum}
"""


def a_run(directory, steps=600, minimum=1, strategy="diloco", outer="budget_s = 0.3"):
    words = ["a shoal of", "small fish", "swims", "through", "cold water", "and learns", "to turn as one"]
    text = " ".join(" ".join(p) for p in itertools.islice(itertools.permutations(words), 1500))
    (directory / "text.txt").write_text(text)
    path = directory / "run.toml"
    path.write_text(RECIPE.format(steps=steps, minimum=minimum, strategy=strategy, outer=outer))
    return path


@pytest.fixture
def mesh(tools, tmp_path):
    made = []

    def make(count):
        nodes = (tools.Node(tmp_path, f"node-{i}", "--no-mdns", "--memory", "64MiB") for i in range(count))
        made.append(tools.Mesh(*nodes))
        return made[0]

    yield make
    for one in made:
        one.end()


def train(tools, node, *words):
    """(exit status, stdout, stderr) of `shoal train` at a node."""
    done = subprocess.run(
        tools.shoal("train", *words, "--api", node.api),
        capture_output=True, text=True, timeout=120, env=tools.environment(node.directory), check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def ordered(tools, node, *words):
    status, out, err = train(tools, node, *words)
    assert status == 0, (out, err, node.log()[-3000:])
    return out


def status(tools, node):
    return tools.post(node.api + "/shoal/train/status", {"run": "tiny"})[1]["runs"][0]


def states(tools, node):
    return {one["node"]: one["state"] for one in status(tools, node)["members"]}


def rounds(node):
    """What a node wrote of its rounds, by (generation, epoch)."""
    found = {}
    for path in node.data_dir.glob("train/*/rounds.jsonl"):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found[entry["generation"], entry["tag"], entry["epoch"]] = entry
    return found


def at(tools, nodes, epoch, wait_s=60):
    for node in nodes:
        try:
            tools.until(lambda node=node: status(tools, node)["rounds"] >= epoch, "the round", wait_s)
        except pytest.fail.Exception:
            pytest.fail(f"{node.name} not at round {epoch}: {status(tools, node)}, {node.log()[-4000:]}")


def same_states(nodes):
    """How many rounds at least two saw; whoever saw one has the same state after it."""
    shared = 0
    logs = [rounds(node) for node in nodes]
    for key in set().union(*logs):
        digests = {log[key]["state_sha256"] for log in logs if key in log}
        assert len(digests) == 1, key
        shared += sum(key in log for log in logs) > 1
    return shared


def test_one_is_killed_and_one_joins_and_the_mesh_serves_what_they_trained(tools, mesh, tmp_path):
    four = mesh(4)
    first, second, third, late = four.nodes
    ordered(tools, first, a_run(tmp_path, steps=400, minimum=3), "--serve", "tiny-model", "--detach")
    for node in (second, third):
        ordered(tools, node, "--join", "tiny", "--detach")
    at(tools, (first, second, third), 4)
    third.end()
    began = status(tools, first)["rounds"]
    ordered(tools, late, "--join", "tiny", "--detach")
    tools.until(lambda: rounds(late), "the newcomer's first round")
    joined = min(epoch for _, _, epoch in rounds(late))
    at(tools, (first, second, late), 40, wait_s=90)
    assert joined - began <= 12  # it started a process, fetched data and state, and held nobody up
    assert same_states((first, second, third, late)) >= 30
    logs = [rounds(node) for node in (first, second, late)]
    assert all(log[1, "outer", 40]["members"] == logs[0][1, "outer", 40]["members"] for log in logs)
    assert late.peer in logs[0][1, "outer", 40]["members"]
    assert third.peer not in logs[0][1, "outer", 40]["members"]
    for node in (first, second, late):
        text = tools.until(lambda node=node: answer(tools, node), f"the model at {node.name}")
        assert isinstance(text, str)


def answer(tools, node):
    code, document = tools.ask(node.api, "small fish", model="tiny-model", max_tokens=4)
    return code == 200 and document["choices"][0]["text"] + " "


def test_the_last_survivor_goes_on_and_those_who_come_back_take_up_its_state(tools, mesh, tmp_path):
    two = mesh(2)
    nodes = two.nodes
    ordered(tools, nodes[0], a_run(tmp_path, steps=2000, minimum=2), "--detach")
    ordered(tools, nodes[1], "--join", "tiny", "--detach")
    at(tools, nodes, 3)
    nodes[0].end()
    epoch = status(tools, nodes[1])["rounds"]
    at(tools, nodes[1:], epoch + 5)
    nodes[0].start().ready()
    tools.until(lambda: states(tools, nodes[1]).get(nodes[0].peer) == "training", "back", 60)
    epoch = status(tools, nodes[1])["rounds"]
    at(tools, nodes, epoch + 3)
    assert same_states(nodes) >= 3
    assert len(max(rounds(nodes[1]).items())[1]["members"]) == 2


def test_a_run_whose_workers_all_died_goes_on_from_their_disks(tools, mesh, tmp_path):
    three = mesh(3)
    nodes = three.nodes
    ordered(tools, nodes[0], a_run(tmp_path, steps=2000, minimum=3), "--detach")
    for node in nodes[1:]:
        ordered(tools, node, "--join", "tiny", "--detach")
    at(tools, nodes, 6)
    for node in nodes:
        node.end()
    last = max(epoch for node in nodes for _, _, epoch in rounds(node))
    for node in nodes[1:]:  # one never comes back
        node.start()
    for node in nodes[1:]:
        node.ready()
    at(tools, nodes[1:], last + 3)
    tools.until(lambda: set(states(tools, nodes[1]).values()) == {"training"}, "both train")
    assert same_states(nodes) >= 3
    resumed = {key for node in nodes[1:] for key in rounds(node) if key[0] > 1}
    assert min(epoch for _, _, epoch in resumed) >= last - 2  # no older than the last checkpoints


def test_one_that_is_stopped_is_waited_for_by_nobody_and_comes_back(tools, mesh, tmp_path):
    three = mesh(3)
    nodes = three.nodes
    ordered(tools, nodes[0], a_run(tmp_path, steps=2000, minimum=3), "--detach")
    for node in nodes[1:]:
        ordered(tools, node, "--join", "tiny", "--detach")
    at(tools, nodes, 3)
    nodes[2].signal(signal.SIGSTOP)
    epoch = status(tools, nodes[0])["rounds"]
    at(tools, nodes[:2], epoch + 8)
    nodes[2].signal(signal.SIGCONT)
    tools.until(lambda: len(max(rounds(nodes[0]).items())[1]["members"]) == 3, "all three again")
    at(tools, nodes, status(tools, nodes[0])["rounds"] + 2)
    assert same_states(nodes) >= 3


@pytest.mark.parametrize(
    ("strategy", "outer"), [("streaming", "fragments = 2\nbudget_s = 0.4"), ("sparseloco", "")]
)
def test_other_strategies_keep_their_replicas_alike_through_a_death(tools, mesh, tmp_path, strategy, outer):
    three = mesh(3)
    nodes = three.nodes
    ordered(tools, nodes[0], a_run(tmp_path, 400, 3, strategy, outer), "--detach")
    for node in nodes[1:]:
        ordered(tools, node, "--join", "tiny", "--detach")
    at(tools, nodes, 4)
    nodes[2].end()
    at(tools, nodes[:2], 40, wait_s=90)
    assert same_states(nodes) >= 30


def test_who_leaves_says_so_and_the_other_goes_on_and_exports(tools, mesh, tmp_path):
    two = mesh(2)
    nodes = two.nodes
    ordered(tools, nodes[0], a_run(tmp_path, steps=2000, minimum=2), "--detach")
    ordered(tools, nodes[1], "--join", "tiny", "--detach")
    at(tools, nodes, 2)
    assert "has left tiny" in ordered(tools, nodes[0], "stop", "tiny")
    epoch = status(tools, nodes[1])["rounds"]
    at(tools, nodes[1:], epoch + 3)
    exported = tmp_path / "exported"
    ordered(tools, nodes[1], "export", "tiny", exported)
    assert (exported / "model.safetensors").is_file()
    assert same_states(nodes) >= 1
