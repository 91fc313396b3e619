"""Models from the Hugging Face hub, against a stand-in on loopback that HF_ENDPOINT names; each fetch is a process of
its own, as the endpoint is read once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from node import embedded
from node.errors import HubProblem
from node.hub import parse
from testnet.hub import COMMIT, standing_in

ROOT = Path(__file__).resolve().parents[2]
PIECE_BYTES = 1 << 20
FETCH = f"""
import json, sys, trio
from pathlib import Path
from node import hub
from node.errors import NodeError
from model_shards import ModelError
from p2p import ResourceLimit
hub.PIECE_BYTES, hub.RETRY_S = {PIECE_BYTES}, 0.01
for line in sys.stdin:
    source, root, room = json.loads(line)
    def check(count):
        if count > room:
            raise ResourceLimit(f"no room for {{count}} bytes")
    def told(done, total):
        print(json.dumps([done, total]), flush=True)
    try:
        found = str(trio.run(hub.Hub(Path(root), check).fetch, source, told))
    except (NodeError, ModelError, ResourceLimit) as problem:
        found = f"{{type(problem).__name__}}: {{problem}}"
    print(json.dumps(found), flush=True)
"""


class Fetcher:
    """A process that fetches from one hub, again and again."""

    def __init__(self, hub, home):
        self.process = subprocess.Popen(
            [sys.executable, "-c", FETCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def order(self, source, root, room=1 << 40):
        self.process.stdin.write(json.dumps([source, str(root), room]) + "\n")
        self.process.stdin.flush()

    def line(self):
        return json.loads(self.process.stdout.readline())

    def fetch(self, source, root, room=1 << 40):
        """The directory, or the error."""
        self.order(source, root, room)
        while isinstance(said := self.line(), list):
            pass
        return said

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    repo = tmp_path_factory.mktemp("hub") / "repo"
    with standing_in({"org/tiny": repo}) as hub:
        fetcher = Fetcher(hub, repo.parent / "home")
        yield hub, fetcher
        fetcher.end()


@pytest.fixture
def hub(shared):
    """With the embedded model, and beside its weights what nobody needs."""
    hub, _ = shared
    repo = hub.repos["org/tiny"]
    shutil.rmtree(repo, ignore_errors=True)
    repo.mkdir()
    for path in embedded.path().iterdir():
        (repo / path.name).write_bytes(path.read_bytes())
    (repo / "pytorch_model.bin").write_bytes(b"never asked for" * 1000)
    hub.asked.clear()
    hub.spoil, hub.status, hub.ranges = (lambda file, data: data), (lambda file: 0), True
    return hub


@pytest.fixture
def fetch(shared, tmp_path):
    _, fetcher = shared
    return lambda source="hf:org/tiny", root="hub", room=1 << 40: fetcher.fetch(source, tmp_path / root, room)


@pytest.mark.parametrize("ranges", [True, False])
def test_what_is_needed_first_comes_first_and_nothing_else_comes(hub, fetch, tmp_path, ranges):
    hub.ranges = ranges
    said = fetch()
    assert said == str(tmp_path / "hub" / "org--tiny" / COMMIT)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (Path(said) / name).read_bytes() == (embedded.path() / name).read_bytes()
    order = [file for file, _, _ in hub.asked]
    weights = [(start, end) for file, start, end in hub.asked if file == "model.safetensors"]
    assert "pytorch_model.bin" not in order
    assert order.index("model.safetensors") > max(order.index("config.json"), order.index("tokenizer.json"))
    if ranges:
        assert weights[0] == (0, 8)
        assert all(end - start <= PIECE_BYTES for start, end in weights)
    before = len(hub.asked)
    assert fetch() == said
    assert len(hub.asked) == before + 1  # the list of files, to learn of a newer commit


def test_a_fetch_that_was_killed_goes_on_where_it_was(hub, fetch, tmp_path):
    doomed = Fetcher(hub, tmp_path / "home")
    doomed.order("hf:org/tiny", tmp_path / "hub")
    while doomed.line()[0] < 4 * PIECE_BYTES:
        pass
    doomed.end()
    hub.asked.clear()
    said, name = fetch(), "model.safetensors"
    assert (Path(said) / name).read_bytes() == (embedded.path() / name).read_bytes()
    again = sum(end - start for file, start, end in hub.asked if file == name)
    # A piece may have been on its way, and one that the dead asked for may be noted late.
    assert again <= (embedded.path() / name).stat().st_size - 2 * PIECE_BYTES


def test_wrong_weights_are_named_and_fetched_anew(hub, fetch):
    hub.spoil = lambda file, data: data[:-1] + b"?" if len(data) == PIECE_BYTES else data
    assert fetch().startswith("HubProblem: model.safetensors of org/tiny does not have the hash")
    hub.spoil = lambda file, data: data
    assert fetch().endswith(COMMIT)


def test_what_fails_for_a_moment_is_tried_again(hub, fetch):
    failures = iter([503, 429, 500])
    hub.status = lambda file: next(failures, 0) if file == "model.safetensors" else 0
    assert fetch().endswith(COMMIT)


def test_what_cannot_be_is_one_clear_line(hub, fetch):
    assert fetch("hf:org/nothing").startswith("HubProblem: http://127.0.0.1")
    assert fetch(room=1000).startswith("ResourceLimit: no room for")
    assert sum(end - start for file, start, end in hub.asked if file.endswith(".safetensors")) < 100_000
    repo = hub.repos["org/tiny"]
    config = json.loads((repo / "config.json").read_bytes())
    (repo / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 99}))
    assert "Error: " in fetch(root="second")
    (repo / "model.safetensors").unlink()
    said = fetch(root="third")
    assert said == "HubProblem: org/tiny has no model.safetensors: only safetensors can be served"


@pytest.mark.parametrize("source", ["hf:", "hf:one", "hf:a/b/c", "hf:../..", "hf:a/b@", "org/tiny"])
def test_other_sources_are_refused(source):
    with pytest.raises(HubProblem, match="hf:ORG/REPO"):
        parse(source)


def test_a_source_may_say_its_revision():
    assert parse("hf:Qwen/Qwen3-0.6B@refs/pr/1") == ("Qwen/Qwen3-0.6B", "refs/pr/1")
    assert parse("hf:Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
