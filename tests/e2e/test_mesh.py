"""Four processes that together serve one model: who holds what, what they answer, and what a client leaves behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPTS = [
    "def read_file(path):\n",
    "import os\n\nclass Thread:\n    def __init__(self",
    "for",
    "    return " * 60,
]


@pytest.fixture(scope="module")
def expected(alone, tools):
    """Greedy text of each prompt from one process."""
    return {prompt: tools.complete(alone.api, prompt) for prompt in PROMPTS}


def test_the_layers_spread_over_all_nodes_and_none_holds_the_model(four):
    spans = four.spans()
    assert len(spans) == 4
    assert sorted(layer for start, end in spans.values() for layer in range(start, end)) == list(range(8))


def test_all_nodes_hold_to_one_plan(four):
    models = [node.view()["models"][0] for node in four.nodes]
    assert len({(m["manifest"], m["epoch"], m["planner"]) for m in models}) == 1
    assert models[0]["planner"] in {node.peer for node in four.nodes}


def test_each_node_pulls_only_the_bytes_of_its_own_layers(four):
    spans = {node["peer"]: node["spans"][0] for node in four.nodes[0].view()["nodes"]}
    total = sum(span["bytes_wanted"] for span in spans.values())
    for node in four.nodes:
        wanted = spans[node.peer]["bytes_wanted"]
        files = [f for f in (node.data_dir / "blobs").rglob("*.safetensors") if f.is_file()]
        held = sum(f.stat().st_blocks * 512 for f in files)
        if node is four.nodes[0]:
            assert held == 0, "the publisher serves from the directory it was given"
        else:
            assert 0 < wanted < total / 2
            assert 0 < held <= wanted + 256 * 1024


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_of_four_processes_is_that_of_one(four, expected, tools, prompt):
    assert len(expected[prompt]) > 10
    assert [tools.complete(api, prompt) for api in four.apis] == [expected[prompt]] * 4


def test_seeded_sampling_of_four_processes_is_that_of_one(four, alone, tools):
    wish = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 7}
    expected = tools.complete(alone.api, PROMPTS[0], **wish)
    assert tools.complete(four.apis[2], PROMPTS[0], **wish) == expected
    assert tools.complete(four.apis[1], PROMPTS[0], **(wish | {"seed": 8})) != expected


def test_a_node_without_the_first_layer_streams_the_same_text(four, expected, tools):
    gateway = next(four.of(peer) for peer, (start, _) in four.spans().items() if start != 0)
    with tools.stream(gateway.api, PROMPTS[0]) as chunks:
        pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert len(pieces) > 10
    assert "".join(pieces) == expected[PROMPTS[0]]


def test_many_requests_at_once_all_get_their_own_text(four, expected, tools):
    jobs = [(four.apis[i % 4], PROMPTS[i % len(PROMPTS)]) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda job: tools.complete(*job), jobs))
    assert texts == [expected[prompt] for _, prompt in jobs]


def test_a_client_that_leaves_frees_its_room_on_every_stage(four, tools):
    def spans(view):
        return [span for node in view["nodes"] for span in node["spans"]]

    quiet = four.until(lambda view: all(span["sessions"] == 0 for span in spans(view)), wait_s=10)
    free = [span["kv_tokens_free"] for span in spans(quiet)]
    with tools.stream(four.apis[3], PROMPTS[0], max_tokens=900) as chunks:
        next(chunks)
        four.until(lambda view: all(span["sessions"] == 1 for span in spans(view)), wait_s=10)
        busy = four.nodes[0].view()
        assert all(span["kv_tokens_free"] < before for span, before in zip(spans(busy), free, strict=True))
    four.until(lambda view: all(span["sessions"] == 0 for span in spans(view)), wait_s=10)
    four.until(lambda view: [span["kv_tokens_free"] for span in spans(view)] == free, wait_s=10)
    assert four.nodes[3].view()["requests"] == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "nobody", "prompt": "x"}, 404, "model_not_found"),
        ({"model": "embedded", "prompt": "x " * 4000, "max_tokens": 5}, 400, "context_length_exceeded"),
        ({"model": "embedded", "prompt": "x", "max_tokens": 10**9}, 400, None),
        ({"model": "embedded", "prompt": 7}, 400, None),
        ({"model": "embedded", "prompt": {"a": [1]}}, 400, None),
        ({"model": "embedded", "prompt": [[1.5]]}, 400, None),
        ({"model": "embedded", "prompt": [-1]}, 400, None),
        ({"model": "embedded", "prompt": [10**12]}, 400, None),
        ({"model": "embedded", "prompt": "x", "temperature": "hot"}, 400, None),
        ({"model": "embedded", "prompt": "x", "temperature": 1e308}, 400, None),
        ({"model": "embedded", "prompt": "x", "max_tokens": -1}, 400, None),
        ({"model": "embedded", "prompt": "x", "stop": 5}, 400, None),
        ({"model": "embedded", "prompt": "x", "stream": "yes"}, 400, None),
        ({"model": ["embedded"], "prompt": "x"}, 400, None),
        ([], 400, None),
        (b"{", 400, None),
        (b"[" * 100_000, 400, None),
        (b"\xff\xfe", 400, None),
        (b'{"model": "embedded", "prompt": "' + b"x" * (40 << 20) + b'"}', 413, None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_answered_is_refused_in_the_openai_shape(four, tools, body, status, code):
    got, document = tools.post(f"{four.apis[1]}/v1/completions", body)
    assert (got, set(document["error"]) >= {"message", "type", "param", "code"}) == (status, True), document
    assert code is None or document["error"]["code"] == code
