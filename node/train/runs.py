"""The training runs of this node: begun, joined, resumed, shown, stopped and exported by its owner's order.

It knows where runs are kept and what the mesh says of them; how one goes is its session's.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from collectives.checkpoint import CopyService, Pantry
from dht import Gossip, View
from model_shards import ModelError
from node import adverts
from node.adverts import NodeAdvert, RunAdvert
from node.atlas import Atlas
from node.errors import ConfigProblem, ControlProblem, NodeError
from node.library import Library
from node.sharing import Asked, Sharing
from node.train.pack import Pack, read_pack, write_pack
from node.train.recipe import MemberRecipe, Recipe, load_recipe
from node.train.session import Ground, Memory, Session
from p2p import Host, Identity, Links, P2pError, Rpc

log = logging.getLogger("shoal.train")
SHOWN_S = 1.0
LOOK_S = 3.0
RUNS_MAX = 4
_FOLDER = re.compile(r"[0-9a-f]{24}")


class Training:
    """One life in a mesh. `say(kind, name, advert)` publishes a record, `change` waits for news of the mesh."""

    def __init__(
        self,
        host: Host,
        rpc: Rpc,
        links: Links,
        identity: Identity,
        view: View,
        gossip: Gossip,
        library: Library,
        sharing: Sharing,
        root: Path,
        atlas: Callable[[], Atlas],
        say: Callable[[str, str, object], None],
        change: Callable[[], Awaitable[None]],
    ) -> None:
        self.me = str(identity.peer_id)
        self._root = root
        self._view = view
        self._gossip = gossip
        self._library = library
        self._sharing = sharing
        self._atlas = atlas
        self._say = say
        self._change = change
        self.copies = CopyService(rpc, identity, Pantry(root / "pieces"))
        self._ground = Ground(
            host,
            rpc,
            links,
            identity,
            self.copies,
            self.others,
            self._tell,
            library.fetch_files,
            change,
            self._admitted,
        )
        self.sessions: dict[str, Session] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Go on with what this node took part in when it ended, and with what it is told to, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for memory in self._memories():
                if memory.active:
                    log.info("going on with the run %s", memory.name)
                    self._open(memory)
            task_status.started()
            await trio.sleep_forever()

    # ---- orders

    async def start(self, path: Path, serve: str) -> Session:
        """Begin the run that a TOML file describes. Raises ConfigProblem, ModelError."""
        recipe = await trio.to_thread.run_sync(load_recipe, path)
        known = {advert.name for _, advert in self._adverts() if advert.state != "done"}
        if recipe.name in known or self._named(recipe.name) is not None:
            raise ConfigProblem(
                "name",
                recipe.name,
                f"another name, or `shoal train --join {recipe.name}`: there is such a run",
            )
        self._room()
        new = self._root / f".new-{secrets.token_hex(6)}"
        try:
            manifest_id, pack = await self._publish(recipe, new)
        except OSError as error:
            raise ConfigProblem(
                "data directory", str(self._root), f"room for the run ({error.strerror})"
            ) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return self._open(Memory(manifest_id, recipe.name, serve=serve, founded=True), pack)

    async def _publish(self, recipe: Recipe, new: Path) -> tuple[str, Pack]:
        self._root.mkdir(parents=True, exist_ok=True)
        await trio.to_thread.run_sync(write_pack, recipe, self._root / "corpora", new)
        kept = self._root / f"pack-{secrets.token_hex(6)}"
        os.rename(new, kept)
        packed = await trio.to_thread.run_sync(read_pack, kept)
        # The founder makes the model by the recipe itself, from its checkpoint where it names one.
        packed = Pack(recipe, packed.values, packed.corpus)
        return await self._library.publish_files(kept, recipe.name), packed

    async def join(self, name: str, serve: str) -> Session:
        """Take part in a run that the mesh tells of, or that this node took part in before. Raises ConfigProblem."""
        going = await self._going(name)
        mine = next((m for m in self._memories() if name in (m.name, m.manifest_id) and not m.ended), None)
        if len(going) > 1:
            raise ConfigProblem("run", name, f"one of these ids: {', '.join(sorted(going))}")
        manifest_id = next(iter(going), None) or (mine.manifest_id if mine else None)
        if manifest_id is None:
            names = sorted({a.name for _, a in self._adverts() if a.state != "done"})
            told = f"this mesh has {', '.join(names)}" if names else "this mesh has none now"
            raise ConfigProblem("run", name, f"a run that is going on; {told}")
        open_now = self.sessions.get(manifest_id)
        if open_now is not None and not open_now.finished.is_set():
            return open_now
        self._room()
        memory = self._memory(manifest_id) or Memory(manifest_id, going[manifest_id].name)
        memory.active, memory.ended, memory.serve = True, False, serve or memory.serve
        return self._open(memory)

    async def _going(self, name: str) -> dict[str, RunAdvert]:
        """Runs of that name or id that others tell of; what was begun a moment ago may be on its way here."""
        found: dict[str, RunAdvert] = {}
        with trio.move_on_after(LOOK_S):
            while not found:
                found = {a.manifest_id: a for _, a in self._adverts() if name in (a.name, a.manifest_id)}
                if not found:
                    await self._change()
        return {m: a for m, a in found.items() if a.state != "done"} or found

    async def stop(self, name: str) -> str:
        """Leave a run; its name. Raises ControlProblem."""
        session = self._named(name)
        if session is None:
            raise ControlProblem(f"this node takes part in no run {name!r}")
        session.stop()
        await session.finished.wait()
        return session.memory.name

    async def export(self, name: str, directory: Path, serve: str) -> Path:
        """Write what a run has come to as a model directory, and offer it to the mesh as `serve` unless that is "".
        Raises ConfigProblem, ModelError."""
        session = self._named(name)
        if session is None:
            memory = next((m for m in self._memories() if name in (m.name, m.manifest_id)), None)
            if memory is None:
                raise ConfigProblem("run", name, "a run in which this node took part")
            session = Session(self._ground, self._folder(memory.manifest_id), memory)
            await session.prepare()
        found = await trio.to_thread.run_sync(session.export, directory)
        if serve:
            await self._sharing.add(found, serve, Asked())
        return found

    async def watch(self, session: Session) -> AsyncIterator[dict[str, Any]]:
        """What there is to see of a run, each second, until it has ended here."""
        while True:
            yield self.document(session.memory.manifest_id)
            if session.finished.is_set():
                return
            with trio.move_on_after(SHOWN_S):
                await session.finished.wait()

    # ---- what there is to see

    def status(self) -> list[dict[str, Any]]:
        """All runs that the mesh tells of, and those of this node."""
        ids = dict.fromkeys([*self.sessions, *(advert.manifest_id for _, advert in self._adverts())])
        return [self.document(manifest_id) for manifest_id in ids]

    def document(self, manifest_id: str) -> dict[str, Any]:
        """A run, JSON-able: its members as they tell of themselves, and this node's part."""
        nodes = self._atlas().nodes_known
        told = {peer: advert for peer, advert in self._adverts() if advert.manifest_id == manifest_id}
        session = self.sessions.get(manifest_id)
        if session is not None:
            told[self.me] = session.advert()
        training = [a for a in told.values() if a.state == "training"]
        best = max(told.values(), key=lambda a: (a.epoch, a.tokens), default=None)
        document: dict[str, Any] = {
            "run": manifest_id,
            "name": "" if best is None else best.name,
            "state": "" if best is None else (session.state if session else best.state),
            "generation": 0 if best is None else best.generation,
            "rounds": 0 if best is None else best.rounds,
            "rounds_whole": max((a.rounds_whole for a in told.values()), default=0),
            "tokens": 0.0 if best is None else best.tokens,
            "tokens_per_s": sum(a.tokens_per_s for a in training),
            "members": [_member(peer, advert, nodes) for peer, advert in sorted(told.items())],
        }
        if session is not None:
            document |= _own(session)
        return document

    # ---- within

    def _adverts(self) -> list[tuple[str, RunAdvert]]:
        """(peer, what it says) of live peers, this node left out."""
        live = self._atlas().nodes
        found = []
        for record in self._view.records(adverts.RUN, self._gossip.now_s()):
            peer, advert = str(record.signer), adverts.read(RunAdvert, record.value)
            if advert is not None and advert.manifest_id == record.name and peer != self.me and peer in live:
                found.append((peer, advert))
        return found

    def others(self, manifest_id: str) -> dict[str, RunAdvert]:
        """What other live members say of a run, by peer."""
        return {peer: advert for peer, advert in self._adverts() if advert.manifest_id == manifest_id}

    def _tell(self, manifest_id: str, advert: RunAdvert | None) -> None:
        if advert is None:
            self._gossip.withdraw(adverts.RUN, manifest_id)
        else:
            self._say(adverts.RUN, manifest_id, advert)

    def _admitted(self, members: MemberRecipe) -> bool:
        node = self._atlas().nodes_known.get(self.me)
        if members.allow and not {self.me, "" if node is None else node.name} & set(members.allow):
            return False
        return set(members.tags) <= set(() if node is None else node.tags)

    def _named(self, name: str) -> Session | None:
        return next(
            (
                session
                for session in self.sessions.values()
                if name in (session.memory.name, session.memory.manifest_id) and not session.finished.is_set()
            ),
            None,
        )

    def _room(self) -> None:
        if sum(not session.finished.is_set() for session in self.sessions.values()) >= RUNS_MAX:
            raise ConfigProblem("run", f"{RUNS_MAX} runs", "fewer of them on this node: stop one")

    def _open(self, memory: Memory, made: Pack | None = None) -> Session:
        if self._nursery is None:
            raise ControlProblem("the node is just changing its mesh; try again in a moment")
        session = Session(self._ground, self._folder(memory.manifest_id), memory, made)
        self.sessions[memory.manifest_id] = session
        session.remember()
        session.tell()
        self._nursery.start_soon(self._live, session)
        return session

    async def _live(self, session: Session) -> None:
        await session.run()
        if session.state != "done" or not session.memory.serve:
            return
        directory = session.folder / "exports" / f"{session.epoch:09d}"
        try:
            if not directory.exists():
                await trio.to_thread.run_sync(session.export, directory)
            await self._sharing.add(directory, session.memory.serve, Asked())
            session.served = session.memory.serve
        except (NodeError, ModelError, P2pError, OSError) as problem:
            log.error("what %s has come to cannot be served: %s", session.memory.name, problem)
            session.problem = str(problem)

    def _folder(self, manifest_id: str) -> Path:
        return self._root / manifest_id[:24]

    def _memories(self) -> list[Memory]:
        names = sorted(self._root.iterdir()) if self._root.is_dir() else []
        found = (self._memory(path.name) for path in names if _FOLDER.fullmatch(path.name))
        return [memory for memory in found if memory is not None]

    def _memory(self, manifest_id: str) -> Memory | None:
        try:
            values = json.loads((self._folder(manifest_id) / "session.json").read_bytes())
            memory = Memory(**values)
        except (OSError, ValueError, TypeError):
            return None
        sane = isinstance(memory.manifest_id, str) and adverts.MANIFEST_ID.fullmatch(memory.manifest_id)
        return memory if sane and type(memory.generation) is int else None


def _member(peer: str, advert: RunAdvert, nodes: dict[str, NodeAdvert]) -> dict[str, Any]:
    return {
        "node": peer,
        "name": nodes[peer].name if peer in nodes else "",
        "state": advert.state,
        "generation": advert.generation,
        "epoch": advert.epoch,
        "loss": None if advert.loss < 0 else round(advert.loss, 5),
        "val_loss": None if advert.val_loss < 0 else round(advert.val_loss, 5),
        "tokens_per_s": round(advert.tokens_per_s, 1),
        "computing": round(advert.computing, 4),
        "detail": advert.detail,
    }


def _own(session: Session) -> dict[str, Any]:
    progress = session.progress
    return {
        "loss": None if progress.loss != progress.loss else round(progress.loss, 5),
        "val_loss": None if progress.val_loss != progress.val_loss else round(progress.val_loss, 5),
        "bytes_sent": progress.bytes_sent,
        "bytes_received": progress.bytes_received,
        "rounds_failed": progress.failed,
        "computing": round(progress.computing, 4),
        "log": str(session.folder / "rounds.jsonl"),
        "served": session.served,
        "problem": session.problem or progress.problem,
    }
