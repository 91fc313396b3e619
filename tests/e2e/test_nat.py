"""Whole daemons in homes that nobody reaches from outside: they host layers, answer, and go on over a relay's death."""

from __future__ import annotations

import subprocess
import sys

import pytest

from testnet.nat import HostSpec, LinkSpec, NatLab, RouterSpec, why_not

REASON = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=f"no NAT laboratory: {REASON}"),
]
LINK = LinkSpec(delay_s=0.005)
ROUTERS = [RouterSpec("r1", "symmetric", "45.0.1.1"), RouterSpec("r2", "symmetric", "45.0.2.1")]
COMPUTERS = [
    HostSpec("p0", "45.0.0.10", None, LINK),
    HostSpec("p1", "45.0.0.11", None, LINK),
    HostSpec("h1", "10.1.0.2", "r1", LINK),
    HostSpec("h2", "10.2.0.2", "r2", LINK),
]
PROMPT = "def read_file(path):\n"


@pytest.fixture(scope="module")
def homes(tools, tmp_path_factory):
    """Two daemons in symmetric homes that must share the model's layers, and two in public that hold none."""
    directory = tmp_path_factory.mktemp("homes")

    class Homebound(tools.Node):
        """A daemon on a computer of the laboratory."""

        def start(self, *more):
            words = [sys.executable, "-m", "shoal", "up", "--data-dir", self.data_dir, "--name", self.name]
            words += ["--api", "127.0.0.1:8080", "--listen", "/ip4/0.0.0.0/tcp/4001", "--threads", "1"]
            words += ["--log-level", "info", "--model", "none", *self.flags, *more]
            with self.log_path.open("ab") as log:
                self.child = subprocess.Popen(
                    lab.command(self.name, *map(str, words)), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    env=tools.environment(directory), cwd=directory,
                )  # fmt: skip
            return self

        def view(self):
            with lab.inside(self.name):
                return super().view()

        def invite(self):
            with lab.inside(self.name):
                return super().invite()

        def add(self, *rest, **more):
            with lab.inside(self.name):
                return super().add(*rest, **more)

        def complete(self, prompt=PROMPT):
            with lab.inside(self.name):
                return tools.complete(self.api, prompt)

        def doctor(self):
            with lab.inside(self.name):
                return tools.post(f"{self.api}/shoal/doctor", {})[1]

        def paths(self):
            names = {node["peer"]: node["name"] for node in self.view()["nodes"]}
            return {names[p]: m["path"] for p, m in self.view()["reach"]["members"].items() if p in names}

    with NatLab(ROUTERS, COMPUTERS) as lab:
        nodes = {
            name: Homebound(directory, name, *(["--no-serve"] if name[0] == "p" else ["--memory", "9MiB"]))
            for name in lab.hosts
        }
        try:
            invite = nodes["p0"].start().ready().invite()
            for name in ("p1", "h1", "h2"):
                nodes[name].start("--join", invite)
            for name in ("p1", "h1", "h2"):
                nodes[name].ready()
            yield nodes
        finally:
            for node in nodes.values():
                node.end()


def test_peers_that_only_a_relay_reaches_host_layers_and_answer_as_one_computer(homes, alone, tools):
    h1, h2 = homes["h1"], homes["h2"]
    tools.until(lambda: h1.paths().get("h2") == h2.paths().get("h1") == "relayed", "the homes are joined")
    assert h1.add()["state"] == "ready"
    spans = [
        (node["name"], span["start"], span["end"])
        for node in homes["p0"].view()["nodes"]
        for span in node["spans"]
    ]
    assert {name for name, _, _ in spans} == {"h1", "h2"}, "no one of them holds it all"
    assert sorted(layer for _, start, end in spans for layer in range(start, end)) == list(range(8))
    expected = tools.complete(alone.api, PROMPT)
    assert [homes[name].complete() for name in ("h1", "h2", "p0")] == [expected] * 3


def test_the_doctor_says_how_a_home_is_reached(homes, tools):
    tools.until(lambda: len(homes["h1"].doctor()["relays"]) == 2, "two relays")
    answer = homes["h1"].doctor()
    assert answer["nat"].startswith("symmetric")
    assert "45.0.1.1:4001" in answer["reachability"]
    assert {peer["name"]: peer["path"] for peer in answer["peers"]} == {
        "p0": "direct",
        "p1": "direct",
        "h2": "relayed",
    }
    assert homes["p0"].doctor()["nat"].startswith("none")


def test_answers_come_again_after_the_relay_in_use_has_died(homes, alone, tools):
    h1, h2 = homes["h1"], homes["h2"]
    expected = tools.complete(alone.api, PROMPT)
    homes["p1"].end()
    tools.until(
        lambda: h1.paths().get("h2") == h2.paths().get("h1") == "relayed", "joined by the other relay"
    )

    def answers():
        try:
            return h1.complete() == expected
        except AssertionError:
            return False

    tools.until(answers, "the same answer as before")
