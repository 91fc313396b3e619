"""Real daemons that serve a model with adapters: shared by one node, applied by all, asked for on any."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from adapters_made import edit_config, edit_weights, make_adapter, merge

from model_shards import CheckpointIndex, Engine, ModelConfig, Sampling, Step, Tokenizer, load_span
from node import embedded

pytestmark = pytest.mark.slow  # three daemons and the spreading of a model: most of half a minute

PROMPT = "def read_file(path):\n"
NEW = 16


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tools):
    """Three nodes of which none holds the whole model."""
    directory = tmp_path_factory.mktemp("adapters")
    mesh = tools.Mesh(*(tools.Node(directory, name, "--memory", "10MiB") for name in ("desk", "box", "rack")))
    try:
        assert mesh.nodes[0].add()["state"] == "ready"
        yield mesh
    finally:
        mesh.end()


def shoal(tools, node, *arguments):
    """(exit status, stdout, stderr) of a command at a node."""
    done = subprocess.run(
        tools.shoal(*arguments, "--api", node.api),
        capture_output=True, text=True, timeout=60, env=tools.environment(node.directory), check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def merged_text(made, directory):
    """What one engine says whose weights have the adapter merged."""
    found = merge(embedded.path(), made, directory)
    config, index, tokenizer = (
        ModelConfig.from_dir(found),
        CheckpointIndex.open(found),
        Tokenizer.from_dir(found),
    )
    torch.set_num_threads(1)
    engine = Engine(load_span(found, index, config, 0, config.layers, dtype="float32"), kv_bytes_max=8 << 20)
    tokens, out = list(tokenizer.encode(PROMPT)), []
    engine.open("s", 0, config.layers, 256)
    position = 0
    while len(out) < NEW:
        step = Step("s", position, tokens=tuple(tokens), sample=Sampling(temperature=0))
        position += len(tokens)
        tokens = [engine.run([step])[0].token]
        out += tokens
    return tokenizer.decode(out)


def test_an_adapter_is_shared_once_and_asked_for_by_its_name_on_any_node(shared, tools, tmp_path):
    desk, *_ = shared.nodes
    plain = tools.complete(desk.api, PROMPT, max_tokens=NEW)
    directory = tmp_path / "pirate"
    made = make_adapter(
        directory,
        embedded.path(),
        ["q_proj", "o_proj", "down_proj"],
        alpha=2.0,
        base_model_name_or_path="x/embedded",
    )
    status, out, err = shoal(tools, desk, "add", directory)
    assert (status, out) == (0, "pirate is served by whoever hosts its base\n"), err
    tools.until(
        lambda: all(any(a["name"] == "pirate" for a in node.view()["adapters"]) for node in shared.nodes),
        "the adapter is not known everywhere",
    )
    texts = {tools.complete(node.api, PROMPT, model="pirate", max_tokens=NEW) for node in shared.nodes}
    assert len(texts) == 1
    text = texts.pop()
    assert text != plain
    expected = merged_text(made, tmp_path / "merged")
    assert text[:8] == expected[:8]  # the mesh computes in bfloat16, what is compared with in float32
    assert tools.complete(shared.nodes[1].api, PROMPT, model="embedded:pirate", max_tokens=NEW) == text
    assert tools.complete(shared.nodes[2].api, PROMPT, max_tokens=NEW) == plain
    listed = {m["id"]: m for m in tools.get(shared.nodes[2].api + "/v1/models")["data"]}
    assert (listed["pirate"]["parent"], listed["pirate"]["ready"]) == ("embedded", True)

    status, _, err = shoal(tools, shared.nodes[1], "drop", "pirate")
    assert "can be dropped only on the node that added it: desk" in err
    assert shoal(tools, desk, "drop", "pirate")[0] == 0
    shared.until(lambda view: not view["adapters"], 1)
    with pytest.raises(AssertionError, match="404"):
        tools.complete(shared.nodes[1].api, PROMPT, model="pirate", max_tokens=NEW)
    assert tools.complete(shared.nodes[1].api, PROMPT, max_tokens=NEW) == plain


def test_a_bad_adapter_is_refused_in_one_line(shared, tools, tmp_path):
    desk = shared.nodes[0]
    directory = tmp_path / "bad"
    make_adapter(directory, embedded.path(), ["q_proj"], base_model_name_or_path="acme/other")
    status, _, err = shoal(tools, desk, "add", directory)
    assert status == 1
    assert "base_model_name_or_path" in err
    assert "--base NAME" in err
    edit_config(directory, r=9)
    status, _, err = shoal(tools, desk, "add", directory, "--base", "embedded")
    assert (status, "rank 9 imply [9, 192]" in err) == (1, True)
    edit_config(directory, r=4)
    name = "base_model.model.model.layers.5.self_attn.q_proj.lora_A.weight"
    edit_weights(directory, lambda tensors: tensors[name][0].fill_(float("nan")))
    status, _, err = shoal(tools, desk, "add", directory, "--base", "embedded")
    assert (status, f"{name}: contains nan" in err) == (1, True)
    assert json.loads(shoal(tools, desk, "models", "--json")[1])
    assert shoal(tools, desk, "add", directory, "--copies", "2")[0] == 2
    assert tools.complete(desk.api, PROMPT, max_tokens=4)
