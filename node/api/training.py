"""`/shoal/train...`: the owner's orders about training runs, read and passed on. It knows nothing of training."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from node.api.control import NAME_CHARS_MAX, PATH_CHARS_MAX, ControlApi, Progress, json_response
from node.api.fields import Fields
from node.api.problems import invalid


class TrainApi:
    """Over the `Control` of `orders`."""

    def __init__(self, orders: ControlApi) -> None:
        self._orders = orders

    async def start(self, request: Request) -> Response:
        """POST /shoal/train {"recipe": an absolute path, "serve": name or ""} -> progress, one JSON object a line."""
        fields = await self._orders.fields(request)
        recipe = _path(fields, "recipe")
        return Progress(self._orders.orders().train(recipe, _name(fields, "serve")))

    async def join(self, request: Request) -> Response:
        """POST /shoal/train/join {"run": name or id, "serve": name or ""} -> progress."""
        fields = await self._orders.fields(request)
        run = fields.text("run", chars_max=NAME_CHARS_MAX)
        return Progress(self._orders.orders().train_join(run, _name(fields, "serve")))

    async def status(self, request: Request) -> Response:
        """POST /shoal/train/status {"run": name, id or ""} -> {"runs": [...]}."""
        fields = await self._orders.fields(request)
        return json_response({"runs": await self._orders.orders().train_status(_name(fields, "run"))})

    async def stop(self, request: Request) -> Response:
        """POST /shoal/train/stop {"run": name or id} -> {"stopped": name}."""
        fields = await self._orders.fields(request)
        run = fields.text("run", chars_max=NAME_CHARS_MAX)
        return json_response({"stopped": await self._orders.orders().train_stop(run)})

    async def export(self, request: Request) -> Response:
        """POST /shoal/train/export {"run", "directory": an absolute path, "serve": name or ""} -> {"directory"}."""
        fields = await self._orders.fields(request)
        run = fields.text("run", chars_max=NAME_CHARS_MAX)
        directory = _path(fields, "directory")
        found = await self._orders.orders().train_export(run, directory, _name(fields, "serve"))
        return json_response({"directory": str(found)})


def _name(fields: Fields, field: str) -> str:
    return fields.text(field, chars_max=NAME_CHARS_MAX) if fields.raw(field) else ""


def _path(fields: Fields, field: str) -> Path:
    path = Path(fields.text(field, chars_max=PATH_CHARS_MAX))
    if not path.is_absolute():
        raise invalid(field, str(path), "an absolute path on this computer")
    return path
