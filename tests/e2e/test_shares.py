"""Several clients of one gateway: shares, refusals, background work, cached prompts, and nodes that get slow."""

from __future__ import annotations

import json
import re
import signal
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytestmark = pytest.mark.slow  # whole meshes under load for minutes

PROMPT = "def read_file(path):\n"
LONG = "".join(f"value_{number} = {number * 7}\n" for number in range(110))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tools):
    """A gateway that hosts nothing before two nodes that hold the whole model each."""
    directory = tmp_path_factory.mktemp("pair")
    directory.joinpath("shoal").mkdir()
    directory.joinpath("shoal", "config.toml").write_text("avoid = 1.0\nconcurrency = 1\nrebalance = 3600\n")
    mesh = tools.Mesh(
        tools.Node(directory, "gateway", "--no-serve"),
        *(tools.Node(directory, name, "--memory", "20MiB") for name in "ab"),
    )
    try:
        assert mesh.nodes[0].add(copies=2)["state"] == "ready"
        mesh.until(lambda view: view["models"][0]["copies_min"] >= 2)
        yield mesh
    finally:
        mesh.end()


def call(api, body, **headers):
    """(status, headers, document) of a completion."""
    body = {
        "model": "embedded",
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
    } | body
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    request = urllib.request.Request(
        f"{api}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **named}
    )
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers, json.load(refused)


def metric(api, name):
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"{api}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@contextmanager
def flood(api, count, **body):
    """So many requests at once by one client, in the background; leaving the block waits for them."""
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(call, api, {"user": "flood", "max_tokens": 30, "prompt": f"{number} {PROMPT}"} | body)
            for number in range(count)
        ]
        yield jobs


def test_a_client_with_one_request_does_not_wait_for_all_of_anothers(pair, tools):
    api = pair.nodes[0].api
    with flood(api, 40) as jobs:
        tools.until(lambda: pair.nodes[0].view()["models"][0]["waiting"] > 20, "a queue")
        status, _, _ = call(api, {"user": "calm"})
        left = sum(not job.done() for job in jobs)
        assert status == 200
        assert left > 12, "the calm client's request came before many of the flood's, though it came last"
    assert {job.result()[0] for job in jobs} == {200}


def test_under_overload_who_cannot_wait_is_told_at_once_when_to_come_back(pair, tools):
    api = pair.nodes[0].api
    with flood(api, 40) as jobs:
        tools.until(lambda: pair.nodes[0].view()["models"][0]["waiting"] > 20, "a queue")
        status, headers, document = call(api, {"user": "hasty"}, x_shoal_first_token=0.05)
        assert (status, document["error"]["code"]) == (429, "overloaded"), document
        assert 1 <= int(headers["retry-after"]) <= 60
        assert any(not job.done() for job in jobs), "it was refused while the others still waited"
    assert call(api, {"user": "hasty"}, x_shoal_first_token=60)[0] == 200


def test_a_deadline_that_cannot_be_kept_is_refused_and_one_that_is_kept_changes_nothing(pair):
    api = pair.nodes[0].api
    status, headers, _ = call(api, {"max_tokens": 900}, x_shoal_deadline=0.01)
    assert (status, "retry-after" in headers) == (429, True)
    assert call(api, {}, x_shoal_deadline=30)[2]["choices"] == call(api, {})[2]["choices"]


def test_background_work_gives_way_and_is_done_in_the_end(pair, tools):
    api, gateway = pair.nodes[0].api, pair.nodes[0]
    before = metric(api, "shoal_num_preemptions_total")
    with flood(api, 8, max_tokens=200, service_tier="flex", user="batch") as jobs:
        tools.until(
            lambda: [r["priority"] for r in gateway.view()["requests"]].count("background") > 4, "a batch"
        )
        with flood(api, 8, max_tokens=24) as chats:
            pass
        assert {job.result()[0] for job in chats} == {200}
        assert any(not job.done() for job in jobs), "the batch was still at it"
    answers = [job.result() for job in jobs]
    assert [(status, document["usage"]["completion_tokens"]) for status, _, document in answers] == [
        (200, 200)
    ] * 8
    assert metric(api, "shoal_num_preemptions_total") > before


def test_a_prompt_that_begins_as_one_before_is_recomputed_in_part_and_answered_alike(pair, tools):
    api = pair.nodes[0].api
    plain = call(api, {"prompt": LONG + "x = ", "max_tokens": 12})[2]
    prompt_tokens = plain["usage"]["prompt_tokens"]

    def hit():
        """Whether one more request reused the prompt; a busy machine may make the other node look quicker."""
        before = metric(api, "shoal_prefix_cache_hits_total")
        again = call(api, {"prompt": LONG + "x = ", "max_tokens": 12})[2]
        assert again["choices"] == plain["choices"]
        reused = metric(api, "shoal_prefix_cache_hits_total") - before
        assert reused in (0, (prompt_tokens - 1) // 128 * 128)
        return reused

    tools.until(hit, "the prompt's beginning is taken from a cache", 30)


class Slow:
    """Stops and continues a daemon many times a second: it answers, but slowly."""

    def __init__(self, node):
        self._node, self._end = node, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._end.is_set():
            self._node.signal(signal.SIGSTOP)
            self._end.wait(0.1)
            self._node.signal(signal.SIGCONT)
            self._end.wait(0.04)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()
        self._node.signal(signal.SIGCONT)


def health(mesh, node):
    """What the gateway thinks of a node; None while it knows nothing of it."""
    seen = [n["health"] for n in mesh.nodes[0].view()["nodes"] if n["peer"] == node.peer]
    return seen[0]["state"] if seen and seen[0] else None


def chain_of(mesh, tools):
    """Who serves one request."""
    with tools.stream(mesh.nodes[0].api, PROMPT, max_tokens=60) as chunks:
        next(chunks)
        requests = tools.until(lambda: mesh.nodes[0].view()["requests"], "a request")
        return [stage["node"] for stage in requests[0]["chain"]]


def test_a_slow_node_is_avoided_and_used_again_when_it_got_better(pair, tools):
    api, slow = pair.nodes[0].api, pair.nodes[1]

    def ask():
        call(api, {"max_tokens": 20})

    tools.until(
        lambda: ask() or health(pair, slow) == health(pair, pair.nodes[2]) == "good", "both are known"
    )
    with Slow(slow):
        tools.until(lambda: ask() or health(pair, slow) == "slow", "the straggler is noticed")
        assert all(slow.peer not in chain_of(pair, tools) for _ in range(3))
        assert metric(api, "shoal_node_slowdown") > 2.0
    tools.until(lambda: ask() or health(pair, slow) == "good", "it is trusted again")
    tools.until(lambda: slow.peer in chain_of(pair, tools), "it is used again")


def test_a_stopped_node_is_out_then_on_probation_then_trusted(pair, tools):
    api, victim = pair.nodes[0].api, pair.nodes[2]
    victim.signal(signal.SIGSTOP)
    try:
        states = []
        tools.until(
            lambda: call(api, {"max_tokens": 20}) and health(pair, victim) == "out", "the loss is noticed", 20
        )
        assert call(api, {})[0] == 200
    finally:
        victim.signal(signal.SIGCONT)
    pair.heal()

    def settled():
        call(api, {"max_tokens": 20})
        states.append(health(pair, victim))
        return states[-1] == "good"

    tools.until(settled, "it is trusted again")
    assert states[0] in ("out", "probation", "slow"), states
