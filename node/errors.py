"""The errors of the node, on the three axes that cross the whole project.

    NodeError
        RemoteFault                 another node's doing
            StageLost               a stage of a running request vanished or failed (also a GatewayError)
        ResourceLimit               shed load; `retry_after_s` says when to come back
            Overloaded              no room for another request now, or not in time (also a GatewayError)
        LocalFault                  this node's doing: its files, its ports, its configuration
            ConfigProblem           a field of the configuration: its name, the value, and what would be right
            DataDirProblem          the data directory or a file in it cannot be used
            ListenProblem           the HTTP address cannot be bound
            HubProblem              a model cannot be had from the Hugging Face hub
        GatewayError                what a request for text can meet; the API answers each in OpenAI's shape
            UnknownModel            the mesh has no model of that name
            ModelNotReady           the mesh has it, but not every layer is served now
            ContextTooLong          prompt and answer do not fit the model's context
            DeadlinePassed          the time that the client gave it is over
        ControlProblem              an order of the owner (invite, add, join) that cannot be carried out

Every message is one line that a person can act on. It imports nothing, so that the command line can use
it cheaply.
"""

from __future__ import annotations


class NodeError(Exception):
    """Root of everything that the node raises on purpose."""


class RemoteFault(NodeError):
    """Another node's doing. Never a reason to stop this one."""


class ResourceLimit(NodeError):
    """A limit is reached. `retry_after_s` is a hint, in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LocalFault(NodeError):
    """This node's doing: its files, its ports or its configuration."""


class ConfigProblem(LocalFault):
    """A configuration field holds something unusable. `expected` says what would be right."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}: got {value!r}, expected {expected}")
        self.name = name
        self.value = value
        self.expected = expected


class HubProblem(LocalFault):
    """A model cannot be had from the Hugging Face hub, or not be kept."""


class DataDirProblem(LocalFault):
    """`path` cannot be used as (part of) the data directory."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


class ListenProblem(LocalFault):
    """The HTTP address `host:port` cannot be bound."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(f"cannot serve HTTP on {host}:{port}: {reason}")
        self.host = host
        self.port = port
        self.reason = reason


class GatewayError(NodeError):
    """What a request for text can meet."""


class UnknownModel(GatewayError):
    """The mesh has no model named `model`."""

    def __init__(self, model: str) -> None:
        super().__init__(f"the model {model!r} does not exist in this mesh")
        self.model = model


class ModelNotReady(GatewayError):
    """The model is known but cannot be served now; `detail` says why in plain words."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ContextTooLong(GatewayError):
    """The request needs `got` tokens where the model's context holds `limit`."""

    def __init__(self, limit: int, got: int) -> None:
        super().__init__(f"this model's context holds {limit} tokens, the request needs {got}")
        self.limit = limit
        self.got = got


class StageLost(GatewayError, RemoteFault):
    """The node `peer`, which ran a part of the request, vanished or failed."""

    def __init__(self, peer: str, detail: str = "") -> None:
        super().__init__(
            f"node {peer}, which ran a part of this request, was lost" + (f": {detail}" if detail else "")
        )
        self.peer = peer
        self.detail = detail


class DeadlinePassed(GatewayError):
    """The request took longer than its client gave it."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"the request's deadline of {deadline_s:g} s passed")
        self.deadline_s = deadline_s


class Overloaded(GatewayError, ResourceLimit):
    """No room for another request now, or not before its `reason`; come back after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float = 1.0, reason: str = "") -> None:
        message = "the mesh has no room for another request now" + (f": {reason}" if reason else "")
        super().__init__(message, retry_after_s)
        self.reason = reason


class ControlProblem(NodeError):
    """An order of the node's owner cannot be carried out; the message says why."""
