"""`/shoal/...`: what only the node's owner may order, from a program on this computer.

Who may call is the guard's business; here bodies are read, orders passed on, and progress written as one
JSON object a line. It knows nothing of how an order is carried out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from node.api.answers import dump
from node.api.config import ApiConfig
from node.api.fields import Fields, parse_json
from node.api.problems import ApiProblem, from_error, invalid
from node.errors import NodeError
from node.gateway import Control

INVITE_CHARS_MAX = 16384
PATH_CHARS_MAX = 4096
NAME_CHARS_MAX = 128
TTL_S_MAX = 10 * 365 * 86400.0
OVERLAP_S_MAX = 90 * 86400.0
COPIES_MAX = 64
TAGS_MAX = 64


class ControlApi:
    """The owner's endpoints over one `Control`; None means that this process takes no orders."""

    def __init__(self, control: Control | None, config: ApiConfig) -> None:
        self._control = control
        self._config = config

    async def invite(self, request: Request) -> Response:
        """POST /shoal/invite {"ttl_s": seconds or null, "single_use": false} -> {"invite": text}."""
        fields = await self.fields(request)
        ttl_s = None if fields.raw("ttl_s") is None else fields.number("ttl_s", 0.0, 1.0, TTL_S_MAX)
        text = await self.orders().invite(ttl_s, fields.flag("single_use", False))
        return json_response({"invite": text})

    async def expel(self, request: Request) -> Response:
        """POST /shoal/expel {"peer": id or name, "branch": false} -> {"expelled": id, "kept": [ids]}."""
        fields = await self.fields(request)
        peer = fields.text("peer", chars_max=NAME_CHARS_MAX)
        expelled, kept = await self.orders().expel(peer, fields.flag("branch", False))
        return json_response({"expelled": expelled, "kept": list(kept)})

    async def rotate(self, request: Request) -> Response:
        """POST /shoal/rotate {"overlap_s": seconds} -> {"overlap_s": seconds}: a new swarm key from now on."""
        fields = await self.fields(request)
        overlap_s = fields.number("overlap_s", 86400.0, 0.0, OVERLAP_S_MAX)
        await self.orders().rotate(overlap_s)
        return json_response({"overlap_s": overlap_s})

    async def doctor(self, request: Request) -> Response:
        """POST /shoal/doctor {} -> how this node is: see `node.doctor`."""
        await self.fields(request)
        return json_response(await self.orders().doctor())

    async def join(self, request: Request) -> Response:
        """POST /shoal/join {"invite": text} -> {"joined": true}."""
        fields = await self.fields(request)
        await self.orders().join(fields.text("invite", chars_max=INVITE_CHARS_MAX))
        return json_response({"joined": True})

    async def plan(self, request: Request) -> Response:
        """POST /shoal/plan {"model": a name or an absolute path, "copies": n or null} -> where it would go."""
        fields = await self.fields(request)
        copies = fields.integer("copies", None, 1, COPIES_MAX)
        return json_response(await self.orders().plan(fields.text("model", chars_max=PATH_CHARS_MAX), copies))

    async def tags(self, request: Request) -> Response:
        """POST /shoal/tags {"add": [tags], "remove": [tags]} -> {"tags": [tags]}."""
        fields = await self.fields(request)
        tags = await self.orders().tags(_texts(fields, "add"), _texts(fields, "remove"))
        return json_response({"tags": list(tags)})

    async def limits(self, request: Request) -> Response:
        """POST /shoal/limits {"upload_mbps": n, "disk_bytes": n, "unlimited": false} -> the limits from now on."""
        fields = await self.fields(request)
        mbps = None if fields.raw("upload_mbps") is None else fields.number("upload_mbps", 0.0, 0.0, 1e6)
        disk_bytes = fields.integer("disk_bytes", None, 1, 1 << 60)
        found = await self.orders().limits(mbps, disk_bytes, unlimited=fields.flag("unlimited", False))
        return json_response(found)

    async def stop(self, request: Request) -> Response:
        """POST /shoal/stop {} -> {"stopping": true}."""
        await self.fields(request)
        await self.orders().stop()
        return json_response({"stopping": True})

    async def add(self, request: Request) -> Response:
        """POST /shoal/models {"directory", "name", "copies", "require", "ends_require", "base"} -> progress.

        One JSON object a line. The last one is `{"done": true}` or, where it fails after the first, `{"error": {...}}`.
        """
        fields = await self.fields(request)
        directory = Path(fields.text("directory", chars_max=PATH_CHARS_MAX))
        if not directory.is_absolute() and not str(directory).startswith(("embedded", "hf:")):
            raise invalid(
                "directory", str(directory), "an absolute path on this computer, hf:ORG/REPO or embedded"
            )
        name = fields.text("name", chars_max=NAME_CHARS_MAX)
        copies = fields.integer("copies", 1, 1, COPIES_MAX) or 1
        require, ends_require = _texts(fields, "require"), _texts(fields, "ends_require")
        base = "" if fields.raw("base") is None else fields.text("base", chars_max=NAME_CHARS_MAX)
        return Progress(self.orders().add(directory, name, copies, require, ends_require, base))

    async def drop(self, request: Request) -> Response:
        """POST /shoal/drop {"model": a name or a manifest's id} -> {"dropped": name, "manifest": id}."""
        fields = await self.fields(request)
        name, manifest = await self.orders().drop(fields.text("model", chars_max=NAME_CHARS_MAX))
        return json_response({"dropped": name, "manifest": manifest})

    async def fields(self, request: Request) -> Fields:
        """What the body says. Raises ApiProblem."""
        return Fields(parse_json(await request.body() or b"{}", self._config.json_depth_max))

    def orders(self) -> Control:
        """Who carries them out. Raises ApiProblem where nobody does."""
        if self._control is None:
            raise ApiProblem(404, "this process takes no orders", code="no_control")
        return self._control


def _texts(fields: Fields, field: str) -> tuple[str, ...]:
    """A list of short texts, empty when absent."""
    value = fields.raw(field)
    value = [] if value is None else value
    if not isinstance(value, list) or len(value) > TAGS_MAX:
        raise invalid(fields.name(field), value, f"a list of at most {TAGS_MAX} texts")
    return tuple(
        fields.text(f"{field}[{k}]", "" if item is None else item, chars_max=NAME_CHARS_MAX)
        for k, item in enumerate(value)
    )


def json_response(document: dict[str, Any]) -> Response:
    """An answer of one JSON object."""
    return Response(dump(document), media_type="application/json")


class Progress(Response):
    """NDJSON as it comes. What fails before the first line keeps its own status."""

    def __init__(self, progress: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache"}, "application/x-ndjson")
        del self.headers["content-length"]
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        last: dict[str, Any] = {"done": True}
        try:
            async for line in self._progress:
                if not started:
                    await self._start(send)
                    started = True
                await _line(send, line)
        except NodeError as problem:
            if not started:
                raise
            last = from_error(problem).body()
        finally:
            # A client that leaves while a line is written leaves the generator in the middle.
            if isinstance(self._progress, AsyncGenerator):
                await self._progress.aclose()
        if not started:
            await self._start(send)
        await _line(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})


async def _line(send: Send, document: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": dump(document) + b"\n", "more_body": True})
