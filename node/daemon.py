"""The daemon: locks its directory, measures the machine, lives in a mesh, serves HTTP, and stops cleanly.

`run_daemon` is what `shoal up` calls. Joining another mesh while running ends one life in a mesh and starts the next;
the process, its lock and its HTTP address stay.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from model_shards import ModelError
from node import embedded
from node.adverts import AdapterAdvert
from node.api import ApiConfig, build_app, serve_http
from node.config import EMBEDDED, DaemonConfig, ModelSource, describe, parse_tags
from node.console import Console, set_up_logging
from node.datadir import DataDir, Membership
from node.errors import ConfigProblem, ControlProblem, HubProblem, NodeError
from node.examine import examine
from node.hardware import Hardware, default_threads, measure
from node.hub import PREFIX
from node.library import Progress
from node.mesh import MeshNode, open_mesh
from node.metrics import Metrics
from node.serve.faults import leaves
from node.sharing import Asked
from node.train.runs import Training
from node.train.session import Session
from p2p import Identity, Invite, InviteError, P2pError

log = logging.getLogger("shoal.daemon")
STOP_S_MAX = 2.8
SERVED_WAIT_S = 600.0


def run_daemon(config: DaemonConfig, console: Console | None = None) -> int:
    """Run until SIGINT or SIGTERM. Returns the exit status; says in one clear line on stderr why it is 1."""
    console = console or Console()
    set_up_logging(config.log_level)
    try:
        with DataDir.open(config.data_dir) as data:
            return trio.run(partial(_main, config, data, console))
    except BaseExceptionGroup as group:
        for leaf in leaves(group):
            if isinstance(leaf, NodeError | P2pError | ModelError):
                console.failed(leaf)
                return 1
        raise
    except (NodeError, P2pError, ModelError) as problem:
        console.failed(problem)
        return 1


async def _main(config: DaemonConfig, data: DataDir, console: Console) -> int:
    daemon = Daemon(config, data, console)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_stop_on_signal, daemon)
        await daemon.run()
        nursery.cancel_scope.cancel()
    return 0


async def _stop_on_signal(daemon: Daemon) -> None:
    signals = [signal.SIGINT, signal.SIGTERM]
    with trio.open_signal_receiver(*signals) as received:
        async for number in received:
            log.info("stopping on %s", signal.Signals(number).name)
            if daemon.stopping.is_set():
                os._exit(0)
            await daemon.stop()


class Daemon:
    """node.gateway.Control and the outer loop around lives in meshes."""

    def __init__(self, config: DaemonConfig, data: DataDir, console: Console) -> None:
        self.config = config
        self.data = data
        self.console = console
        self.metrics = Metrics()
        self.stopping = trio.Event()
        self._api_port = config.api_port
        self._rejoin: Membership | None = None
        self._end_life = trio.Event()
        self._node: MeshNode | None = None

    async def run(self) -> None:
        """Measure, then live in a mesh, again after each change of mesh, until stopped."""
        log.debug("configuration: %s", describe(self.config))
        identity = Identity.load_or_create(self.data.identity_path)
        membership = self._first_membership()
        torch.set_num_threads(self.config.threads or default_threads())
        self.console.busy("measuring this computer")
        hardware = await trio.to_thread.run_sync(
            measure, self.config.device, self.config.dtype, self.config.memory_bytes, abandon_on_cancel=True
        )
        first = True
        while not self.stopping.is_set():
            self._end_life = trio.Event()
            await self._live(identity, membership, hardware, first)
            if self._rejoin is not None:
                membership, self._rejoin, first = self._rejoin, None, False
                self.data.remember(membership)

    # -- Control ---------------------------------------------------------------------------------------------------

    async def invite(self, ttl_s: float | None, single_use: bool = False) -> str:
        """An invite to this mesh, as text."""
        return self._living().invite(ttl_s, once=single_use)

    async def expel(self, peer: str, branch: bool) -> tuple[str, tuple[str, ...]]:
        """Put a member out of the mesh for good."""
        return await self._living().expel(peer, branch=branch)

    async def rotate(self, overlap_s: float) -> None:
        """Change the swarm key while the mesh runs."""
        await self._living().rotate(overlap_s)

    async def doctor(self) -> dict[str, Any]:
        """How this node is, with the next step for whatever is wrong."""
        return examine(self._living(), self.data.root)

    async def add(
        self,
        directory: Path,
        name: str,
        copies: int,
        require: Collection[str] = (),
        ends_require: Collection[str] = (),
        base: str = "",
    ) -> AsyncIterator[dict[str, Any]]:
        """Publish a directory of a model, or of an adapter of `base`; yields hashing progress, then how far it is
        served, then its end."""
        node = self._living()
        progress: dict[str, Any] = {"state": "hashing", "done": 0, "total": 0}

        def report(state: str, done: int, total: int) -> None:
            progress.update(state=state, done=done, total=total)

        source = ModelSource(directory.as_posix(), name)
        asked = Asked(copies, _tags(require, "require"), _tags(ends_require, "ends_require"), base)
        box: dict[str, Any] = {}

        async def publish() -> None:
            try:
                place = await _directory(node, source, partial(report, "fetching"))
                box["model"] = await node.sharing.add(place, name, asked, partial(report, "hashing"))
            except (ModelError, OSError, P2pError, NodeError) as problem:
                box["problem"] = problem

        node.start_soon(publish)
        while not box:
            yield dict(progress)
            await trio.sleep(0.2)
        if "problem" in box:
            raise ControlProblem(str(box["problem"]))
        manifest_id = box["model"].manifest_id
        tuned = isinstance(box["model"], AdapterAdvert)
        yield {"state": "published", "model": name, "manifest": manifest_id, "adapter": tuned}
        while True:
            ready, detail = node.sharing.state(manifest_id)
            yield {
                "state": "ready" if ready else "placing",
                "model": name,
                "manifest": manifest_id,
                "detail": detail,
            }
            if ready:
                return
            await node.change()

    async def drop(self, model: str) -> tuple[str, str]:
        """Take a model that this node added back from the mesh."""
        dropped = await self._living().sharing.drop(model)
        return dropped.name, dropped.manifest_id

    async def train(self, recipe: Path, serve: str) -> AsyncIterator[dict[str, Any]]:
        """Begin a training run; yields how it goes until it ends here. Who stops listening does not stop it."""
        training = self._living().training
        async for line in _told(training, partial(training.start, recipe, serve)):
            yield line

    async def train_join(self, run: str, serve: str) -> AsyncIterator[dict[str, Any]]:
        """Take part in a run; yields how it goes until it ends here."""
        training = self._living().training
        async for line in _told(training, partial(training.join, run, serve)):
            yield line

    async def train_status(self, run: str) -> list[dict[str, Any]]:
        """The runs of the mesh, or the one of that name or id."""
        found = self._living().training.status()
        named = [one for one in found if run in ("", one["name"], one["run"])]
        if run and not named:
            raise ControlProblem(f"the mesh has no run {run!r} now")
        return named

    async def train_stop(self, run: str) -> str:
        """Leave a run."""
        return await self._living().training.stop(run)

    async def train_export(self, run: str, directory: Path, serve: str) -> Path:
        """Write what a run has come to as a model directory."""
        try:
            return await self._living().training.export(run, directory, serve)
        except (ModelError, P2pError, ConfigProblem, OSError) as problem:
            raise ControlProblem(str(problem)) from None

    async def plan(self, model: str, copies: int | None) -> dict[str, Any]:
        """Where a model would go in the mesh as it is now, or what is missing."""
        source = str(embedded.path()) if model == EMBEDDED and not self._knows(model) else model
        try:
            return await self._living().preview(source, copies)
        except (ModelError, OSError, ConfigProblem) as problem:
            raise ControlProblem(f"{model} cannot be planned: {problem}") from None

    async def tags(self, add: Collection[str], remove: Collection[str]) -> tuple[str, ...]:
        """Change what this node says of itself, until it stops."""
        node = self._living()
        node.set_tags(_tags((set(node.tags) - set(remove)) | set(add), "tags"))
        return node.tags

    async def limits(
        self, upload_mbps: float | None, disk_bytes: int | None, *, unlimited: bool
    ) -> dict[str, Any]:
        """Change what is given of upload and disk, until the daemon stops."""
        stock = self._living().stock
        if unlimited or upload_mbps is not None:
            stock.set_upload(None if unlimited else upload_mbps)
            self.config = replace(self.config, upload_mbps=None if unlimited else upload_mbps)
        if disk_bytes is not None:
            self.config = replace(self.config, disk_bytes=disk_bytes)
            try:
                await stock.set_disk(disk_bytes)
            except P2pError as problem:
                raise ControlProblem(f"the limit holds for what would come, but {problem}") from None
        document = stock.document()
        return {"upload_mbps": document["upload_mbps"], "disk": document["disk"]}

    async def join(self, invite: str) -> None:
        """Leave this mesh for the invite's, if it is another; the connection that asked for it may be cut."""
        node = self._living()
        offered = self._invited(invite)
        if offered.mesh_id == node.membership.mesh_id:
            node.directory.add(offered.addrs)
            return
        self._rejoin = offered
        self._end_life.set()

    async def stop(self) -> None:
        """Begin a clean stop; returns at once."""
        if not self.stopping.is_set():
            self.stopping.set()
            self.console.stopping()
            self._end_life.set()
            _arm_watchdog()

    # -- life ------------------------------------------------------------------------------------------------------

    def _first_membership(self) -> Membership:
        if self.config.join is not None:
            membership = self._invited(self.config.join)
        else:
            membership = self.data.membership() or Membership.found(public=self.config.public)
        self.data.remember(membership)
        return membership

    def _invited(self, text: str) -> Membership:
        """What an invite offers. Whoever is in that mesh already needs its addresses only, however old it is."""
        known = self.data.membership()
        offered = membership_of(text, may_be_old=known.mesh_id if known else "")
        return replace(offered, founding=self.data.founding_key(offered.mesh_id))

    async def _live(
        self, identity: Identity, membership: Membership, hardware: Hardware, first: bool
    ) -> None:
        config = self.config
        async with open_mesh(config, self.data, identity, membership, hardware, self.metrics) as node:
            self._node = node
            async with trio.open_nursery() as nursery:
                app = build_app(node.gateway, self.metrics, self, api_config(config))
                url = await nursery.start(serve_http, app, config.api_host, self._api_port)
                self._api_port = int(url.rpartition(":")[2])  # kept where the system chose it
                node.announce_api(url)
                self.data.announce(url, node.me)
                nursery.start_soon(self._begin, node, membership, url, first)
                await self._end_life.wait()
                nursery.cancel_scope.cancel()
            self._node = None

    async def _begin(self, node: MeshNode, membership: Membership, url: str, first: bool) -> None:
        """Join, publish what was asked for, and say `ready` when it is served or cannot be."""
        if membership.addrs:
            self.console.busy("joining the mesh")
            await node.join(membership.addrs)
        offered = []
        for source in self._sources(node) if first else ():
            log.info("publishing %s as %s", source.directory, source.name)
            label = f"reading {source.name}"
            self.console.busy(label)
            report = partial(_report, self.console, label)
            try:
                place = await _directory(node, source, report)
                offered.append(await node.sharing.add(place, source.name, Asked(), report))
            except (ModelError, OSError, HubProblem) as problem:
                raise ControlProblem(f"{source.directory} cannot be shared: {problem}") from None
        with trio.move_on_after(SERVED_WAIT_S):
            while offered and not all(self._settled(node, model.manifest_id) for model in offered):
                for model in offered:
                    hosting = node.hosts.adverts.get(model.manifest_id)
                    self.console.busy(f"loading {model.name}", None if hosting is None else hosting.progress)
                await node.change()
        self.console.ready(url, node.me, node.gateway.models())

    def _settled(self, node: MeshNode, manifest_id: str) -> bool:
        try:
            ready, _ = node.sharing.state(manifest_id)
        except ConfigProblem as problem:
            log.warning("a model of this node is not served: %s", problem)
            return True
        return ready or bool(node.planning.shortages.get(manifest_id)) or not self.config.serve

    def _sources(self, node: MeshNode) -> tuple[ModelSource, ...]:
        """The models asked for; a node that founds a mesh and was told nothing offers the embedded one, until that is
        dropped."""
        if self.config.models:
            return tuple(source for source in self.config.models if source.directory != "none")
        alone = not node.membership.addrs and self.config.serve
        return (ModelSource(EMBEDDED, EMBEDDED),) if alone and not node.offering.took_back(EMBEDDED) else ()

    def _knows(self, model: str) -> bool:
        return self._living().atlas().model_named(model) is not None

    def _living(self) -> MeshNode:
        if self._node is None:
            raise ControlProblem("the node is just changing its mesh; try again in a moment")
        return self._node


def api_config(config: DaemonConfig) -> ApiConfig:
    """What the daemon was told of its HTTP side."""
    return ApiConfig(
        api_keys=config.api_keys, request_deadline_s=config.deadline_s, first_token_s=config.first_token_s
    )


async def _directory(node: MeshNode, source: ModelSource, report: Progress) -> Path:
    """The directory of a source, fetched from the hub where it lies there. Raises ConfigProblem, HubProblem, ModelError
    and P2pError."""
    if source.directory.startswith(PREFIX):
        return await node.stock.hub.fetch(source.directory, report)
    return model_directory(source)


def model_directory(source: ModelSource) -> Path:
    """The directory of a source, the built-in one under its name. Raises ConfigProblem."""
    directory = embedded.path() if source.directory == EMBEDDED else Path(source.directory).expanduser()
    if not directory.is_dir():
        raise ConfigProblem("model", source.directory, "an existing Hugging Face model directory")
    return directory.resolve()


async def _told(training: Training, begin: Callable[[], Awaitable[Session]]) -> AsyncIterator[dict[str, Any]]:
    try:
        session = await begin()
    except (ModelError, P2pError, ConfigProblem, OSError) as problem:
        raise ControlProblem(str(problem)) from None
    async for document in training.watch(session):
        yield document


def _tags(tags: Collection[str], name: str) -> tuple[str, ...]:
    try:
        return parse_tags(sorted(tags), name)
    except ConfigProblem as problem:
        raise ControlProblem(str(problem)) from None


def membership_of(text: str, *, may_be_old: str = "") -> Membership:
    """The membership that an invite offers; one to the mesh `may_be_old` may have expired.

    Raises ControlProblem with one clear line."""
    try:
        invite = Invite.decode(text.strip())
    except InviteError as problem:
        raise ControlProblem(str(problem)) from None
    if invite.expired(time.time()) and invite.mesh_id != may_be_old:
        raise ControlProblem("this invite has expired; ask for a new one with `shoal invite`")
    return Membership(invite.mesh_id, invite.swarm_key, tuple(invite.addrs), invite.founder, invite.ticket)


def _report(console: Console, label: str, done: int, total: int) -> None:
    console.busy(label, done / max(total, 1))


def _arm_watchdog() -> None:
    """The contract is three seconds: where a library hangs on the way out, leave without it."""

    def leave() -> None:
        log.warning("still stopping after %.1f s: leaving now", STOP_S_MAX)
        os._exit(0)

    timer = threading.Timer(STOP_S_MAX, leave)
    timer.daemon = True
    timer.start()
