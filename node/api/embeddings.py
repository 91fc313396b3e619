"""`/v1/embeddings`: texts or tokens in, one vector of unit length each, as OpenAI has it.

`pooling`, a field of our own, says what of the last layer's rows makes the vector: the `last_hidden` one, as most
decoders that embed are trained for, or the `mean` of all.
"""

from __future__ import annotations

import base64
import math
import secrets
import struct
from collections.abc import Sequence
from typing import Any, Literal, cast

import trio

from node.api.config import ApiConfig
from node.api.fields import Fields
from node.api.problems import invalid
from node.api.requests import MODEL_CHARS_MAX, Options, prompts_of, user_of
from node.api.terms import Terms
from node.errors import GatewayError, ModelNotReady, StageLost
from node.gateway import Gateway, GenerateRequest
from node.metrics import Metrics

AT_ONCE = 8
Pooling = Literal["last_hidden", "mean"]


class EmbeddingRequest:
    """A parsed body. Raises ApiProblem (400)."""

    def __init__(self, body: dict[str, Any], config: ApiConfig) -> None:
        fields = Fields(body)
        self.options = Options(
            model=fields.text("model", chars_max=MODEL_CHARS_MAX),
            max_tokens=1,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            seed=0,
            stops=(),
            choices=1,
            ignore_eos=True,
            stream=False,
            include_usage=False,
            user=user_of(fields),
        )
        self.inputs = prompts_of(fields, "input", config.inputs_max)
        self.base64 = fields.choice("encoding_format", "float", ("base64", "float")) == "base64"
        self.pooling = cast(Pooling, fields.choice("pooling", "last_hidden", ("last_hidden", "mean")))
        self.dimensions = fields.integer("dimensions", None, 1, 1 << 20)

    def document(self, model: str, rows: Sequence[Sequence[float]], tokens: int) -> dict[str, Any]:
        """The answer. Raises ApiProblem where another number of dimensions was asked for."""
        if self.dimensions is not None and self.dimensions != len(rows[0]):
            raise invalid("dimensions", self.dimensions, f"{len(rows[0])}, which this model has, or none")
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(_unit(row))}
            for index, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def _written(self, row: list[float]) -> str | list[float]:
        if not self.base64:
            return row
        return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


def _unit(row: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(value * value for value in row))
    return [value / length for value in row] if length else list(row)


async def embed(
    gateway: Gateway,
    metrics: Metrics,
    stopping: trio.Event,
    asked: EmbeddingRequest,
    prompts: Sequence[tuple[int, ...]],
    terms: Terms,
) -> list[tuple[float, ...]]:
    """The prompts' vectors, not scaled. Raises the first GatewayError."""
    name, identity = asked.options.model, f"embd-{secrets.token_hex(12)}"
    found: dict[int, tuple[float, ...]] = {}
    problems: list[GatewayError] = []
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(index: int) -> None:
        request = GenerateRequest(
            request_id=f"{identity}-{index}",
            model=name,
            prompt=prompts[index],
            max_tokens=1,
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            seed=0,
            ignore_eos=True,
            deadline_s=terms.deadline_s,
            client=terms.client,
            priority=terms.priority,
            first_token_s=terms.first_token_s,
            pool=asked.pooling,
        )
        async with limiter:
            with metrics.track(name, len(request.prompt)) as running:
                try:
                    async with gateway.generate(request) as events:
                        running.entered()
                        async for event in events:
                            running.token()
                            if event.embedding is not None:
                                found[index] = event.embedding
                    if index not in found:
                        raise StageLost("at the end of the chain", "no embedding came")
                    running.finished("stop")
                except GatewayError as problem:
                    metrics.count_failure(name, type(problem).__name__)
                    problems.append(problem)
                    nursery.cancel_scope.cancel()
                except trio.Cancelled:
                    metrics.count_failure(name, "cancelled")
                    raise
        if len(found) == len(prompts):
            nursery.cancel_scope.cancel()

    async def watch() -> None:
        await stopping.wait()
        problems.append(ModelNotReady("this node is stopping"))
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for index in range(len(prompts)):
            nursery.start_soon(one, index)
    if problems:
        raise problems[0]
    return [found[index] for index in range(len(prompts))]
