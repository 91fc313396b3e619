"""The Starlette application of a node: routes, the small endpoints, and errors in OpenAI's shape.

It puts together what its siblings know (guard, generation, control) and knows itself only paths and status
documents.
"""

from __future__ import annotations

import logging

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from node.api.answers import dump
from node.api.config import ApiConfig
from node.api.control import ControlApi
from node.api.generation import Generation, model_document
from node.api.guard import PAGES, Guard, problem_response
from node.api.problems import ApiProblem, from_error, internal_problem
from node.api.training import TrainApi
from node.dashboard import HEADERS, KINDS, asset
from node.errors import NodeError, UnknownModel
from node.gateway import Control, Gateway
from node.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger("shoal.http")


class _Status:
    """The endpoints that only show."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        self._gateway = gateway
        self._metrics = metrics

    async def models(self, _: Request) -> Response:
        documents = [model_document(info) for info in self._gateway.models()]
        return _json({"object": "list", "data": documents})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for info in self._gateway.models():
            if name == info.name or name in info.aliases:
                return _json(model_document(info))
        raise UnknownModel(name)

    async def health(self, _: Request) -> Response:
        infos = self._gateway.models()
        ready = sum(info.ready for info in infos)
        return _json({"status": "ok", "models": len(infos), "models_ready": ready})

    async def metrics(self, _: Request) -> Response:
        self._metrics.observe_mesh(self._gateway.mesh())
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def mesh(self, _: Request) -> Response:
        return _json(self._gateway.mesh())


async def _page(request: Request) -> Response:
    """A file of the dashboard. It holds nothing of this mesh, so it is open to whoever reaches this address."""
    name = request.path_params.get("name", "index.html")
    if name not in KINDS:
        raise HTTPException(404)
    return Response(asset(name), media_type=KINDS[name], headers=HEADERS)


def _json(document: object) -> Response:
    return Response(dump(document), media_type="application/json")


async def _on_node_error(_: Request, error: Exception) -> Response:
    return problem_response(from_error(error)) if isinstance(error, NodeError) else _internal()


async def _on_api_problem(_: Request, error: Exception) -> Response:
    return problem_response(error) if isinstance(error, ApiProblem) else _internal()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return _internal()
    where = f"{request.method} {request.url.path}"[:200]
    messages = {
        404: f"there is nothing at {where}; see / for what there is",
        405: f"{where}: this path takes another method",
    }
    message = messages.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    headers = dict(error.headers or {})
    code = codes.get(error.status_code)
    return problem_response(ApiProblem(error.status_code, message, code=code, headers=headers))


async def _on_bug(_: Request, __: Exception) -> Response:
    return _internal()


def _internal() -> Response:
    return problem_response(internal_problem())


def build_app(
    gateway: Gateway, metrics: Metrics, control: Control | None, config: ApiConfig | None = None
) -> Starlette:
    """The whole HTTP application. `app.state.stopping` is a trio.Event that ends open requests when set."""
    config = config or ApiConfig()
    stopping = trio.Event()
    generation = Generation(gateway, metrics, config, stopping)
    status = _Status(gateway, metrics)
    orders = ControlApi(control, config)
    training = TrainApi(orders)
    app = Starlette(
        routes=[
            Route("/", _page, methods=["GET"]),
            Route(PAGES + "{name}", _page, methods=["GET"]),
            Route("/health", status.health, methods=["GET"]),
            Route("/metrics", status.metrics, methods=["GET"]),
            Route("/mesh", status.mesh, methods=["GET"]),
            Route("/v1/models", status.models, methods=["GET"]),
            Route("/v1/models/{name:path}", status.model, methods=["GET"]),
            Route("/v1/chat/completions", generation.chat, methods=["POST"]),
            Route("/v1/responses", generation.responses, methods=["POST"]),
            Route("/v1/completions", generation.completion, methods=["POST"]),
            Route("/v1/embeddings", generation.embeddings, methods=["POST"]),
            Route("/shoal/invite", orders.invite, methods=["POST"]),
            Route("/shoal/expel", orders.expel, methods=["POST"]),
            Route("/shoal/rotate", orders.rotate, methods=["POST"]),
            Route("/shoal/doctor", orders.doctor, methods=["POST"]),
            Route("/shoal/join", orders.join, methods=["POST"]),
            Route("/shoal/models", orders.add, methods=["POST"]),
            Route("/shoal/drop", orders.drop, methods=["POST"]),
            Route("/shoal/train", training.start, methods=["POST"]),
            Route("/shoal/train/join", training.join, methods=["POST"]),
            Route("/shoal/train/status", training.status, methods=["POST"]),
            Route("/shoal/train/stop", training.stop, methods=["POST"]),
            Route("/shoal/train/export", training.export, methods=["POST"]),
            Route("/shoal/plan", orders.plan, methods=["POST"]),
            Route("/shoal/limits", orders.limits, methods=["POST"]),
            Route("/shoal/tags", orders.tags, methods=["POST"]),
            Route("/shoal/stop", orders.stop, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, config=config, stopping=stopping)],
        exception_handlers={
            ApiProblem: _on_api_problem,
            NodeError: _on_node_error,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )
    app.state.stopping = stopping
    return app
