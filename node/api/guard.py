"""The outermost layer of every HTTP request: who may ask, how much, and until when.

It reads the body within its limits before anything runs, checks client, Host, Origin and key by the path's
policy, leaves the application's work the moment the client goes away, and stamps the request id. It knows
paths only by their prefix and nothing of what the endpoints do.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import trio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.api.answers import dump
from node.api.config import ApiConfig
from node.api.problems import ApiProblem

OPEN_PATHS = ("/", "/health")
PAGES = "/dashboard/"
CONTROL_PREFIX = "/shoal/"
REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
DISCARD_BYTES_MAX = 64 << 20


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this computer."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_of(authority: str) -> str:
    """The host in a Host header or an Origin's authority, without port; "" where it is malformed."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


def problem_response(problem: ApiProblem) -> Response:
    """An ApiProblem as an HTTP answer."""
    return Response(dump(problem.body()), problem.status, problem.headers(), "application/json")


@dataclass(slots=True)
class _Exchange:
    """One request's body, filled by the pump up to `keep_bytes`, and the event that all of it arrived."""

    keep_bytes: int
    refusal: ApiProblem | None
    body: bytearray = field(default_factory=bytearray)
    seen_bytes: int = 0
    arrived: trio.Event = field(default_factory=trio.Event)
    given: bool = False
    ending: bool = False


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: ApiConfig, stopping: trio.Event) -> None:
        self._app = app
        self._config = config
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        exchange = self._admit(scope, headers)

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                exchange.ending = True
            await send(message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, exchange, receive, nursery.cancel_scope)
            await self._answer(exchange, scope, stamped)
            nursery.cancel_scope.cancel()

    def _admit(self, scope: Scope, headers: Headers) -> _Exchange:
        """Decide by the headers alone; of a request that is refused no body is kept."""
        try:
            self._check_sender(scope, headers)
        except ApiProblem as problem:
            return _Exchange(0, problem)
        return _Exchange(self._config.body_bytes_max, None)

    async def _pump(self, exchange: _Exchange, receive: Receive, leave: trio.CancelScope) -> None:
        """Take every message of the client: the body, then its going away, which ends all work for it."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                # hypercorn also says so from within the last send of an answer, before it closes the connection
                # there: cancelling that would leave the connection open.
                if not exchange.ending:
                    leave.cancel()
                return
            chunk = message.get("body", b"")
            exchange.seen_bytes += len(chunk)
            if exchange.seen_bytes <= exchange.keep_bytes:
                exchange.body += chunk
            if exchange.seen_bytes > DISCARD_BYTES_MAX or not message.get("more_body", False):
                exchange.arrived.set()

    async def _answer(self, exchange: _Exchange, scope: Scope, send: Send) -> None:
        async def receive() -> Message:
            if exchange.given:
                await trio.sleep_forever()
            exchange.given = True
            return {"type": "http.request", "body": bytes(exchange.body), "more_body": False}

        try:
            # The whole body is taken (and dropped where it is too long) before an error is sent: a client that
            # is still sending when the connection closes would see a reset instead of the answer.
            with trio.move_on_after(self._config.body_deadline_s):
                await exchange.arrived.wait()
            self._check_body(exchange)
        except ApiProblem as problem:
            await problem_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_body(self, exchange: _Exchange) -> None:
        close = {"connection": "close"}
        if exchange.refusal is not None:
            raise exchange.refusal
        if not exchange.arrived.is_set():
            raise ApiProblem(408, "the request's body did not arrive in time", headers=close)
        if exchange.seen_bytes > self._config.body_bytes_max:
            message = f"the request's body is larger than {self._config.body_bytes_max} bytes"
            raise ApiProblem(413, message, code="body_too_large", headers=close)
        if self._stopping.is_set():
            raise ApiProblem(503, "this node is stopping", kind="server_error", retry_after_s=1.0)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(PAGES):
            return
        local = is_loopback((scope.get("client") or ("",))[0])
        if self._config.api_keys:
            self._check_key(headers)
        elif not local:
            message = "this node answers only its own computer; its owner can set api_keys to serve others"
            raise ApiProblem(403, message, kind="permission_error", code="loopback_only")
        if path.startswith(CONTROL_PREFIX):
            self._check_owner(headers, local)
        elif not self._config.api_keys:
            self._check_not_a_foreign_page(headers)

    def _check_key(self, headers: Headers) -> None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        offered = key.strip().encode() if kind.lower() == "bearer" else b""
        if not any(hmac.compare_digest(offered, known.encode()) for known in self._config.api_keys):
            message = "no valid API key: send one as 'Authorization: Bearer KEY'"
            raise ApiProblem(401, message, kind="authentication_error", code="invalid_api_key")

    def _check_owner(self, headers: Headers, local: bool) -> None:
        """Orders come from a program of the owner on this computer: not through a proxy, not from a web page."""
        if not local or any(name in headers for name in FORWARDED):
            raise _denied("orders to this node are taken only from its own computer", "loopback_only")
        if not is_loopback(host_of(headers.get("host", ""))):
            raise _denied("the Host header must name this computer, as in 127.0.0.1", "bad_host")
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers['host']}":
            raise _denied(f"orders are not taken from the web page {origin[:100]!r}", "bad_origin")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "orders need the header 'Content-Type: application/json'"
            raise ApiProblem(415, message, param="content-type", code="bad_content_type")

    def _check_not_a_foreign_page(self, headers: Headers) -> None:
        """Without a key, no page of the web may use this node through a browser on this computer."""
        host = host_of(headers.get("host", ""))
        if not is_loopback(host) and host not in self._config.hosts:
            raise _denied("the Host header must name this computer, as in 127.0.0.1", "bad_host")
        origin = headers.get("origin")
        if origin is not None and not is_loopback(host_of(origin.partition("://")[2])):
            raise _denied(f"requests are not taken from the web page {origin[:100]!r}", "bad_origin")


def _denied(message: str, code: str) -> ApiProblem:
    return ApiProblem(403, message, kind="permission_error", code=code)
