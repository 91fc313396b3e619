"""What `shoal up` can be told about computing: pinned layers, precision, quantisation."""

from __future__ import annotations

import torch

from model_shards import CheckpointIndex, Engine, ModelConfig, Sampling, Step, Tokenizer, load_span
from node import embedded

PROMPT = "def read_file(path):\n"
TOKENS = 24


def reference(**how) -> str:
    """Greedy text of the whole model in this process."""
    torch.set_num_threads(1)
    directory = embedded.path()
    config, index = ModelConfig.from_dir(directory), CheckpointIndex.open(directory)
    engine = Engine(load_span(directory, index, config, 0, config.layers, **how), kv_bytes_max=64 << 20)
    tokenizer = Tokenizer.from_dir(directory)
    tokens = tuple(tokenizer.encode(PROMPT))
    engine.open("x", 0, config.layers, len(tokens) + TOKENS)
    position, made = 0, []
    for _ in range(TOKENS):
        (result,) = engine.run([Step("x", position, tokens, None, Sampling(temperature=0.0))])
        position += len(tokens)
        tokens = (result.token,)
        made.append(result.token)
    return tokenizer.decode(made)


def test_two_nodes_pinned_to_halves_serve_together_in_the_precision_asked_for(tmp_path, tools):
    first = tools.Node(tmp_path, "low", "--layers", "0:4", "--dtype", "float32", "--quant", "int8")
    mesh = tools.Mesh(first, tools.Node(tmp_path, "high", "--layers", "4:8"))
    try:
        assert mesh.nodes[0].add()["state"] == "ready"
        assert mesh.spans() == {mesh.nodes[0].peer: (0, 4), mesh.nodes[1].peer: (4, 8)}
        expected = reference(dtype="float32", quant="int8")
        assert [tools.complete(api, PROMPT, max_tokens=TOKENS) for api in mesh.apis] == [expected] * 2
        model = mesh.nodes[0].view()["models"][0]
        assert (model["dtype"], model["quant"]) == ("float32", "int8")
    finally:
        mesh.end()


def test_ready_is_said_once_and_only_when_the_model_is_served(alone):
    assert alone.log().count("ready api=") == 1
    assert alone.view()["models"][0]["ready"] is True
