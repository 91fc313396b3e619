"""The face between whoever asks for text (the HTTP API) and whoever makes it (the mesh).

Requests carry token ids, not text: tokenising, stop strings and chat templates belong to the API's side. The
types are plain data; the protocols have one implementation over the mesh and one fake in the tests. `Control`
is what only the owner of the node may do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from node.errors import (
    ContextTooLong,
    ControlProblem,
    DeadlinePassed,
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
    "DeadlinePassed",
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
    """A model of the mesh as a client sees it. `detail` says in plain words why it is not ready. An adapter's `parent`
    is its base; `aliases` are further names that requests may use."""

    name: str
    manifest_id: str
    created_s: int
    context_tokens: int
    layers: int
    ready: bool
    detail: str
    parent: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One continuation of `prompt` (token ids). temperature 0: greedy; top_k 0, deadline_s None: no limit.

    `client` is whom fairness counts it for. It is refused at once where it cannot be done within `deadline_s`, or not
    begin to answer within `first_token_s`. Background work runs where nobody else wants anything. `likely_tokens` of
    `max_tokens` are probably made (0: all). `form` and `form_text` keep the answer to a JSON schema, any
    object or a regular expression. The rest is as in model_shards.Sampling; `top_logprobs` asks each event for that
    many likeliest tokens. With a `pool` the one event is the prompt's embedding. `made` is the beginning of the
    answer where another gateway gave it: it counts among `max_tokens`, and the first event comes after it.
    """

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
    client: str = ""
    priority: Literal["high", "normal", "background"] = "normal"
    first_token_s: float | None = None
    likely_tokens: int = 0
    form: str = ""
    form_text: str = ""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    pool: Literal["", "last_hidden", "mean"] = ""
    made: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """The token at `index` (0 is the first new one). An eos token has finish "stop" and is not shown. `logprob` is the
    model's own (natural), `top` the (token, logprob) pairs asked for, likeliest first. `embedding` [hidden] is there
    where the request pools; it is not scaled."""

    token: int
    index: int
    logprob: float | None
    finish: Literal["stop", "length"] | None
    top: tuple[tuple[int, float], ...] = ()
    embedding: tuple[float, ...] | None = None


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

        It is entered when the request's turn has come. Entering or iterating raises UnknownModel, ModelNotReady,
        ContextTooLong, StageLost, DeadlinePassed or Overloaded.
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

    async def expel(self, peer: str, branch: bool) -> tuple[str, tuple[str, ...]]:
        """Put a member out for good, with `branch` also those it let in; (its peer id, who of those stays)."""
        ...

    async def rotate(self, overlap_s: float) -> None:
        """Change the swarm key; the old one counts for `overlap_s` seconds more."""
        ...

    async def doctor(self) -> dict[str, Any]:
        """How this node is, JSON-able."""
        ...

    def add(
        self,
        directory: Path,
        name: str,
        copies: int,
        require: Collection[str] = (),
        ends_require: Collection[str] = (),
        base: str = "",
    ) -> AsyncIterator[dict[str, Any]]:
        """Publish a model directory, for hosts with these tags, or that of an adapter of the model `base` ("": as its
        configuration says); yields JSON-able progress."""
        ...

    async def drop(self, model: str) -> tuple[str, str]:
        """Take a model that this node added (its name, or its manifest's id) back from the mesh; (name, id)."""
        ...

    async def plan(self, model: str, copies: int | None) -> dict[str, Any]:
        """Where a model of the mesh, or of a directory, would go, or what is missing; nothing is loaded."""
        ...

    def train(self, recipe: Path, serve: str) -> AsyncIterator[dict[str, Any]]:
        """Begin the training run that a TOML file describes; yields how it goes until it ends here. Once it is done,
        what it has come to is offered to the mesh as `serve`, unless that is ""."""
        ...

    def train_join(self, run: str, serve: str) -> AsyncIterator[dict[str, Any]]:
        """Take part in a run of the mesh; yields how it goes until it ends here."""
        ...

    async def train_status(self, run: str) -> list[dict[str, Any]]:
        """The runs of the mesh, or the one of that name or id."""
        ...

    async def train_stop(self, run: str) -> str:
        """Leave a run; its name."""
        ...

    async def train_export(self, run: str, directory: Path, serve: str) -> Path:
        """Write what a run has come to as a model directory, and offer it as `serve` unless that is ""."""
        ...

    async def tags(self, add: Collection[str], remove: Collection[str]) -> tuple[str, ...]:
        """Change what this node says of itself; its tags from now on."""
        ...

    async def limits(
        self, upload_mbps: float | None, disk_bytes: int | None, *, unlimited: bool
    ) -> dict[str, Any]:
        """Change what is given (None: as it is; `unlimited`: upload without a limit); the limits from now on."""
        ...

    async def join(self, invite: str) -> None:
        """Join the mesh of an invite."""
        ...

    async def stop(self) -> None:
        """Begin a clean stop of the daemon; returns at once."""
        ...
