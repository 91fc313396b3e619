"""Every answer that is not a success, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

One exception carries status and fields; one table turns the gateway's errors into it. It knows nothing of
Starlette's routing or of streaming: both ask here what to say.
"""

from __future__ import annotations

import json
import math
from typing import Any

from node.errors import (
    ContextTooLong,
    ControlProblem,
    DeadlinePassed,
    GatewayError,
    ModelNotReady,
    NodeError,
    Overloaded,
    StageLost,
    UnknownModel,
)

SHOWN_CHARS_MAX = 80


class ApiProblem(Exception):
    """An HTTP answer of `status` in OpenAI's error shape. `retry_after_s` becomes a Retry-After header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.extra_headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers beside the content type."""
        headers = dict(self.extra_headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


def shown(value: object) -> str:
    """A client's value as it may appear in a message: one short line of ASCII."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= SHOWN_CHARS_MAX else text[:SHOWN_CHARS_MAX] + "..."


def invalid(param: str, value: object, expected: str) -> ApiProblem:
    """A 400 that names the parameter, what came, and what would be right."""
    message = f"'{param}': got {shown(value)}, expected {expected}"
    return ApiProblem(400, message, param=param, code="invalid_value")


def unsupported(param: str, value: object, instead: str) -> ApiProblem:
    """A 400 for what OpenAI knows and this node does not do: never silently ignored."""
    message = f"'{param}': {shown(value)} is not supported here; {instead}"
    return ApiProblem(400, message, param=param, code="unsupported_parameter")


def from_error(error: NodeError) -> ApiProblem:
    """What a client is told about an error of the gateway or of control."""
    message = str(error)
    if isinstance(error, UnknownModel):
        return ApiProblem(404, message, param="model", code="model_not_found")
    if isinstance(error, ContextTooLong):
        return ApiProblem(400, message, param="messages", code="context_length_exceeded")
    if isinstance(error, ControlProblem):
        return ApiProblem(400, message, code="refused")
    if isinstance(error, Overloaded):
        return ApiProblem(
            429,
            message,
            kind="rate_limit_exceeded",
            code="overloaded",
            retry_after_s=error.retry_after_s,
        )
    if isinstance(error, ModelNotReady):
        return ApiProblem(503, message, kind="server_error", code="model_not_ready", retry_after_s=2.0)
    if isinstance(error, DeadlinePassed):
        return ApiProblem(504, message, kind="server_error", code="deadline_exceeded")
    if isinstance(error, StageLost):
        return ApiProblem(502, message, kind="server_error", code="node_lost", retry_after_s=1.0)
    code = "generation_failed" if isinstance(error, GatewayError) else "node_error"
    return ApiProblem(500, message, kind="server_error", code=code)


def internal_problem() -> ApiProblem:
    """What a client is told about a bug of ours: nothing of its details."""
    message = "this node failed to answer; its log says why"
    return ApiProblem(500, message, kind="server_error", code="internal_error")
