"""The owner's orders: what they do, and who may not give them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from node.api import ApiConfig
from node.errors import ControlProblem


class FakeControl:
    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.problem: Exception | None = None
        self.progress: list = [
            {"stage": "hash", "done": 1, "total": 2},
            {"stage": "hash", "done": 2, "total": 2},
        ]

    async def invite(self, ttl_s, single_use=False) -> str:
        self.calls.append(("invite", ttl_s, single_use))
        return "shoal1-abc"

    async def expel(self, peer, branch):
        self.calls.append(("expel", peer, branch))
        if self.problem is not None:
            raise self.problem
        return "12D3peer", ("12D3other",)

    async def rotate(self, overlap_s):
        self.calls.append(("rotate", overlap_s))

    async def doctor(self):
        self.calls.append(("doctor",))
        return {"findings": []}

    async def join(self, invite: str) -> None:
        self.calls.append(("join", invite))
        if self.problem is not None:
            raise self.problem

    async def stop(self) -> None:
        self.calls.append(("stop",))

    async def plan(self, model, copies):
        self.calls.append(("plan", model, copies))
        if self.problem is not None:
            raise self.problem
        return {"model": model, "spans": []}

    async def drop(self, model):
        self.calls.append(("drop", model))
        if self.problem is not None:
            raise self.problem
        return model, "ab" * 32

    async def limits(self, upload_mbps, disk_bytes, *, unlimited):
        self.calls.append(("limits", upload_mbps, disk_bytes, unlimited))
        return {"upload_mbps": upload_mbps, "disk": {"limit_bytes": disk_bytes}}

    async def train(self, recipe, serve):
        self.calls.append(("train", recipe, serve))
        if self.problem is not None:
            raise self.problem
        for line in self.progress:
            yield line

    async def train_join(self, run, serve):
        self.calls.append(("train_join", run, serve))
        for line in self.progress:
            yield line

    async def train_status(self, run):
        self.calls.append(("train_status", run))
        return [{"name": "tiny"}]

    async def train_stop(self, run):
        self.calls.append(("train_stop", run))
        return run

    async def train_export(self, run, directory, serve):
        self.calls.append(("train_export", run, directory, serve))
        return directory

    async def tags(self, add, remove):
        self.calls.append(("tags", tuple(add), tuple(remove)))
        return tuple(add)

    async def add(self, directory: Path, name: str, copies: int, require=(), ends_require=(), base=""):
        self.calls.append(("add", directory, name, copies, *require, *ends_require, *filter(None, [base])))
        for line in self.progress:
            if isinstance(line, Exception):
                raise line
            yield line


ORDERS = [
    "/shoal/invite",
    "/shoal/expel",
    "/shoal/rotate",
    "/shoal/doctor",
    "/shoal/join",
    "/shoal/models",
    "/shoal/drop",
    "/shoal/plan",
    "/shoal/limits",
    "/shoal/tags",
    "/shoal/stop",
]
BODIES = {
    "/shoal/invite": {"ttl_s": 60},
    "/shoal/expel": {"peer": "12D3peer"},
    "/shoal/rotate": {"overlap_s": 60},
    "/shoal/doctor": {},
    "/shoal/join": {"invite": "shoal1-x"},
    "/shoal/models": {"directory": "/models/a", "name": "a"},
    "/shoal/drop": {"model": "a"},
    "/shoal/plan": {"model": "a"},
    "/shoal/limits": {"upload_mbps": 10},
    "/shoal/tags": {"add": ["metered"]},
    "/shoal/train": {"recipe": "/runs/tiny.toml"},
    "/shoal/train/join": {"run": "tiny"},
    "/shoal/train/status": {},
    "/shoal/train/stop": {"run": "tiny"},
    "/shoal/train/export": {"run": "tiny", "directory": "/models/tiny"},
    "/shoal/stop": {},
}


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ({}, ("invite", None, False)),
        ({"ttl_s": None}, ("invite", None, False)),
        ({"ttl_s": 3600, "single_use": True}, ("invite", 3600.0, True)),
    ],
)
async def test_an_invite_is_made(body, call, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/invite", json=body)
    assert answer.json() == {"invite": "shoal1-abc"}
    assert control.calls == [call]


async def test_a_model_is_added_with_progress_line_by_line(make_gateway, serving) -> None:
    control = FakeControl()
    body = {"directory": "/models/a b", "name": "a", "copies": 3}
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/models", json=body)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines == [*control.progress, {"done": True}]
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert control.calls == [("add", Path("/models/a b"), "a", 3)]


async def test_a_model_may_ask_for_hosts_with_tags(make_gateway, serving) -> None:
    control = FakeControl()
    body = {"directory": "/a", "name": "a", "require": ["x"], "ends_require": ["trusted"]}
    async with serving(make_gateway(), control=control) as site:
        await site.http.post("/shoal/models", json=body)
    assert control.calls == [("add", Path("/a"), "a", 1, "x", "trusted")]


async def test_a_plan_is_asked_for_and_what_cannot_be_planned_says_why(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/plan", json={"model": "/models/a", "copies": 2})
        assert answer.json() == {"model": "/models/a", "spans": []}
        control.problem = ControlProblem("/models/a holds no config.json")
        answer = await site.http.post("/shoal/plan", json={"model": "/models/a"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "/models/a holds no config.json")
    assert control.calls == [("plan", "/models/a", 2), ("plan", "/models/a", None)]


async def test_a_model_is_dropped_and_what_cannot_be_says_why(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/drop", json={"model": "org/a"})
        assert answer.json() == {"dropped": "org/a", "manifest": "ab" * 32}
        control.problem = ControlProblem("there is no model 'b' in this mesh")
        answer = await site.http.post("/shoal/drop", json={"model": "b"})
        nameless = await site.http.post("/shoal/drop", json={})
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "there is no model 'b' in this mesh",
    )
    assert nameless.status_code == 400
    assert control.calls == [("drop", "org/a"), ("drop", "b")]


async def test_limits_are_changed(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/limits", json={"upload_mbps": 0, "disk_bytes": 5})
        await site.http.post("/shoal/limits", json={"unlimited": True})
        refused = await site.http.post("/shoal/limits", json={"upload_mbps": -1})
    assert answer.json() == {"upload_mbps": 0, "disk": {"limit_bytes": 5}}
    assert control.calls == [("limits", 0, 5, False), ("limits", None, None, True)]
    assert refused.status_code == 400


async def test_tags_are_changed(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/tags", json={"add": ["metered"], "remove": ["trusted"]})
    assert answer.json() == {"tags": ["metered"]}
    assert control.calls == [("tags", ("metered",), ("trusted",))]


@pytest.mark.parametrize("before", [0, 1])
async def test_a_model_that_cannot_be_added_says_why(before, make_gateway, serving) -> None:
    control = FakeControl()
    control.progress = [*control.progress[:before], ControlProblem("config.json is missing")]
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/models", json=BODIES["/shoal/models"])
    assert answer.status_code == (200 if before else 400)
    last = json.loads(answer.text.splitlines()[-1])
    assert last["error"]["message"] == "config.json is missing"


async def test_join_and_stop_are_passed_on(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        assert (await site.http.post("/shoal/join", json={"invite": "shoal1-x"})).json() == {"joined": True}
        assert (await site.http.post("/shoal/stop", json={})).json() == {"stopping": True}
    assert control.calls == [("join", "shoal1-x"), ("stop",)]


async def test_an_order_that_cannot_be_carried_out_is_a_400_with_the_reason(make_gateway, serving) -> None:
    control = FakeControl()
    control.problem = ControlProblem("the invite expired on Monday")
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/join", json={"invite": "shoal1-x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "the invite expired on Monday"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/shoal/invite", {"ttl_s": "soon"}, "ttl_s"),
        ("/shoal/invite", {"ttl_s": 0}, "ttl_s"),
        ("/shoal/invite", {"single_use": 1}, "single_use"),
        ("/shoal/join", {}, "invite"),
        ("/shoal/join", {"invite": 5}, "invite"),
        ("/shoal/join", {"invite": "x" * 20_000}, "invite"),
        ("/shoal/models", {"name": "a"}, "directory"),
        ("/shoal/models", {"directory": "models/a", "name": "a"}, "directory"),
        ("/shoal/models", {"directory": "/models/a"}, "name"),
        ("/shoal/models", {"directory": "/models/a", "name": "a", "copies": 0}, "copies"),
        ("/shoal/models", {"directory": "/models/a", "name": "a", "require": "trusted"}, "require"),
        ("/shoal/plan", {}, "model"),
        ("/shoal/plan", {"model": "a", "copies": 0}, "copies"),
        ("/shoal/tags", {"add": "metered"}, "add"),
        ("/shoal/tags", {"add": ["x"] * 65}, "add"),
        ("/shoal/tags", {"remove": [3]}, "remove[0]"),
        ("/shoal/models", {"directory": "/models/a", "name": "a", "copies": "2"}, "copies"),
    ],
)
async def test_a_wrong_order_names_the_field(path, body, param, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert control.calls == []


async def test_the_embedded_model_may_be_named_instead_of_a_directory(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        await site.http.post("/shoal/models", json={"directory": "embedded", "name": "small"})
    assert control.calls == [("add", Path("embedded"), "small", 1)]


WEB_PAGES = [
    {"origin": "https://evil.example"},
    {"origin": "http://127.0.0.1:1"},
    {"origin": "null"},
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example:8080"},
    {"host": "192.168.1.5"},
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "application/jsonx"},
    {"x-forwarded-for": "203.0.113.9"},
    {"forwarded": "for=203.0.113.9"},
]


@pytest.mark.parametrize("headers", WEB_PAGES, ids=lambda headers: "-".join(next(iter(headers.items()))))
@pytest.mark.parametrize("path", ORDERS)
async def test_no_web_page_and_no_proxy_can_give_orders(path, headers, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        headers = {"content-type": "application/json"} | headers
        answer = await site.http.post(path, content=json.dumps(BODIES[path]), headers=headers)
    assert answer.status_code in (403, 415)
    assert control.calls == []


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_orders_are_posted_only(method, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        headers = {"content-type": "application/json"}
        answer = await site.http.request(method, "/shoal/stop", headers=headers)
    assert answer.status_code == 405
    assert control.calls == []


async def test_our_own_page_may_give_orders(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/stop", json={}, headers={"origin": site.url})
    assert answer.status_code == 200


async def test_with_keys_set_orders_need_one_too(make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control, config=ApiConfig(api_keys=("k",))) as site:
        assert (await site.http.post("/shoal/stop", json={})).status_code == 401
        headers = {"authorization": "Bearer k"}
        assert (await site.http.post("/shoal/stop", json={}, headers=headers)).status_code == 200


async def test_a_process_without_control_takes_no_orders(make_gateway, serving) -> None:
    async with serving(make_gateway()) as site:
        answer = await site.http.post("/shoal/stop", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_control")


@pytest.mark.parametrize(
    ("path", "body", "call", "document"),
    [
        ("", {"recipe": "/r.toml", "serve": "m"}, ("train", Path("/r.toml"), "m"), None),
        ("/join", {"run": "tiny"}, ("train_join", "tiny", ""), None),
        ("/status", {"run": "tiny"}, ("train_status", "tiny"), {"runs": [{"name": "tiny"}]}),
        ("/status", {}, ("train_status", ""), {"runs": [{"name": "tiny"}]}),
        ("/stop", {"run": "tiny"}, ("train_stop", "tiny"), {"stopped": "tiny"}),
        (
            "/export", {"run": "tiny", "directory": "/out", "serve": "m"},
            ("train_export", "tiny", Path("/out"), "m"), {"directory": "/out"},
        ),
    ],
)  # fmt: skip
async def test_orders_about_training_are_passed_on(path, body, call, document, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/train" + path, json=body)
    assert answer.status_code == 200
    if document is None:
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert lines == [*control.progress, {"done": True}]
    else:
        assert answer.json() == document
    assert control.calls == [call]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("", {}, "recipe"),
        ("", {"recipe": "r.toml"}, "recipe"),
        ("", {"recipe": "/r.toml", "serve": 3}, "serve"),
        ("/join", {}, "run"),
        ("/stop", {"run": "x" * 200}, "run"),
        ("/export", {"run": "tiny", "directory": "out"}, "directory"),
    ],
)
async def test_wrong_orders_about_training_name_the_field(path, body, field, make_gateway, serving) -> None:
    control = FakeControl()
    async with serving(make_gateway(), control=control) as site:
        answer = await site.http.post("/shoal/train" + path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert control.calls == []
