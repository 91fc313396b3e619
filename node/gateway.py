"""The face between whoever asks for text (the HTTP API) and whoever makes it (the mesh).

Requests carry token ids, not text: tokenising, stop strings and chat templates belong to the API's side. The
types are plain data; the protocols have one implementation over the mesh and one fake in the tests. `Control`
is what only the owner of the node may do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from node.errors import (
    ContextTooLong,
    ControlProblem,
    GatewayError,
    ModelNotReady,
    Overloaded,
    StageLost,
    UnknownModel,
)

if TYPE_CHECKING:
    from model_shards import Tokenizer

__all__ = [
    "ContextTooLong",
    "Control",
    "ControlProblem",
    "Gateway",
    "GatewayError",
    "GenerateRequest",
    "ModelInfo",
    "ModelNotReady",
    "Overloaded",
    "StageLost",
    "TokenEvent",
    "UnknownModel",
]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model of the mesh as a client sees it. `detail` says in plain words why it is not ready."""

    name: str
    manifest_id: str
    created_s: int
    context_tokens: int
    layers: int
    ready: bool
    detail: str


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One continuation of `prompt` (token ids). temperature 0: greedy; top_k 0, deadline_s None: no limit."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    deadline_s: float | None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """The token at `index` (0 is the first new one). An eos token has finish "stop" and is not shown."""

    token: int
    index: int
    logprob: float | None
    finish: Literal["stop", "length"] | None


class Gateway(Protocol):
    """Makes text anywhere in the mesh. Errors are GatewayErrors."""

    def models(self) -> list[ModelInfo]:
        """Every model that the mesh knows, ready or not."""
        ...

    async def tokenizer(self, model: str) -> Tokenizer:
        """The model's tokenizer. Raises UnknownModel, ModelNotReady."""
        ...

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[AsyncIterator[TokenEvent]]:
        """Run `request`; leaving the block cancels it on every stage.

        Entering or iterating raises UnknownModel, ModelNotReady, ContextTooLong, StageLost or Overloaded.
        """
        ...

    def mesh(self) -> dict[str, Any]:
        """This node's view of the mesh, JSON-able."""
        ...


class Control(Protocol):
    """What the node's owner may order. Raises ControlProblem with one plain line."""

    async def invite(self, ttl_s: float | None, single_use: bool = False) -> str:
        """An invite to this mesh, as text."""
        ...

    def add(self, directory: Path, name: str, copies: int) -> AsyncIterator[dict[str, Any]]:
        """Publish a model directory; yields JSON-able progress."""
        ...

    async def join(self, invite: str) -> None:
        """Join the mesh of an invite."""
        ...

    async def stop(self) -> None:
        """Begin a clean stop of the daemon; returns at once."""
        ...
