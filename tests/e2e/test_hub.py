"""A real daemon adds a model from a stand-in for the Hugging Face hub, by the command, and answers with it."""

from __future__ import annotations

import json
import subprocess

import pytest

from node import embedded
from testnet.hub import standing_in

pytestmark = pytest.mark.slow  # a daemon of its own


def test_a_model_of_the_hub_is_added_and_served(tmp_path, tools, monkeypatch):
    with standing_in({"org/tiny": embedded.path()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        mesh = tools.Mesh(tools.Node(tmp_path, "one", "--model", "none", "--upload-mbps", "50"))
        try:
            api = mesh.nodes[0].api

            def run(*arguments):
                done = subprocess.run(
                    tools.shoal(*arguments, "--api", api),
                    capture_output=True, text=True, timeout=120, env=tools.environment(tmp_path), check=False,
                )  # fmt: skip
                return done.returncode, done.stdout, done.stderr

            status, said, _ = run("add", "hf:org/tiny", "--json")
            assert status == 0
            assert json.loads(said)["model"] == "tiny"
            assert len(json.loads(said)["spans"]) == 1
            status, said, _ = run("run", "tiny", "def f(x):", "--json")
            assert status == 0
            status, said, problem = run("add", "hf:org/nothing")
            assert status == 1
            assert "hub" in problem or "127.0.0.1" in problem
            status, said, _ = run("limits", "--upload-mbps", "10", "--disk", "1GiB", "--json")
            assert json.loads(said)["upload_mbps"] == 10
            assert json.loads(said)["disk"]["limit_bytes"] == 1 << 30
            assert mesh.nodes[0].view()["blobs"]["upload_mbps"] == 10
        finally:
            mesh.end()
