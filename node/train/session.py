"""One run at this node: it finds out with whom to go on and from which state, takes part, and keeps what it must.

Of several generations of a run the one with the lowest order that goes on counts. Where none does, whoever holds the
newest state begins the next one: its own, its checkpoint's, or one made from pieces that peers keep. It does not know
how rounds decide, nor what the command line says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trio

from collectives import CollectiveError, RunConfig, Settings, Snapshot, open_run
from collectives.checkpoint import CopyService, Keeper, Retention
from collectives.errors import CheckpointProblem, PiecesLost
from collectives.outer import Outer, OuterError
from collectives.state_rpc import aside
from model_shards import ModelError
from node.adverts import RunAdvert
from node.datadir import write_atomic
from node.errors import ConfigProblem, NodeError
from node.serve.faults import leaves
from node.train.driver import EPOCH_KEY, TOKENS_KEY, Driver, Orphaned, Progress, RoundDone
from node.train.export import export
from node.train.pack import Pack, empty_model, fresh_model, read_pack
from node.train.recipe import MemberRecipe
from node.train.worker import Worker
from p2p import Host, Identity, Links, P2pError, Rpc

log = logging.getLogger("shoal.train")
SETTLE_S = 3.0
PATIENCE_S = 12.0
ASK_S = 5.0
LINGER_S = 20.0
LEAVE_S = 2.0
TELL_S = 1.0
PIECES = "state"
SETTINGS = Settings(grace_min_s=0.25)
"""Workers end a round's training a step apart; that long, nobody who lives is left out for it."""
HOLDERS_MAX = 8


@dataclass(frozen=True, slots=True)
class Ground:
    """What a session stands on. `others()`: what live peers say of the run, by peer; `say` tells the mesh, None takes
    it back; `fetch` brings a run's files; `change` waits for news."""

    host: Host
    rpc: Rpc
    links: Links
    identity: Identity
    copies: CopyService
    others: Callable[[str], dict[str, RunAdvert]]
    say: Callable[[str, RunAdvert | None], None]
    fetch: Callable[[str], Any]
    change: Callable[[], Any]
    admits: Callable[[MemberRecipe], bool] = lambda members: True


@dataclass(frozen=True, slots=True)
class Life:
    """A generation of the run, and whether this node begins it."""

    number: int
    founder: str
    mine: bool

    @property
    def order(self) -> tuple[int, str]:
        return self.number, self.founder


@dataclass(slots=True)
class Memory:
    """What is kept of a session in `session.json`: enough to go on after a restart."""

    manifest_id: str
    name: str
    active: bool = True
    generation: int = 0
    serve: str = ""
    founded: bool = False
    ended: bool = False


class Session:
    """`folder` is its own. `run` is its life; `stop` ends it early, as `finished` tells."""

    def __init__(self, ground: Ground, folder: Path, memory: Memory, made: Pack | None = None) -> None:
        self.ground = ground
        self.folder = folder
        self.memory = memory
        self.me = str(ground.identity.peer_id)
        self.state: Any = "starting"
        self.problem = ""
        self.progress = Progress()
        self.finished = trio.Event()
        self.life = Life(memory.generation, self.me, False)
        self.pack = made
        self.served = ""
        self._made = made
        self._new = made is not None
        self._worker: Worker | None = None
        self._outer: Outer | None = None
        self._driver: Driver | None = None
        self._tokens: dict[str, float] = {}
        self._has_state = False
        self._snapshots: dict[str, Snapshot] = {}
        self._keep = 3
        self._scope: trio.CancelScope | None = None
        self._part: trio.CancelScope | None = None
        self._stopping = False
        self._before: set[str] = set()
        self._keeper = Keeper(folder / "state")
        self._own = Keeper(folder / "own", Retention(last=1))

    # ---- life

    async def run(self) -> None:
        """Until the run is done here, stopped or failed; never raises what is only this run's trouble."""
        try:
            with trio.CancelScope() as self._scope:
                await self._run()
            if self._stopping:
                self.state = "resting"
        except BaseExceptionGroup as group:
            problem = next((leaf for leaf in leaves(group) if isinstance(leaf, _TROUBLE)), None)
            if problem is None:
                raise
            self._fail(problem)
        except _TROUBLE as problem:
            self._fail(problem)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.5):
                await self._save_now()
            if self.state != "done":
                self.ground.say(self.memory.manifest_id, None)
            self.finished.set()

    def _fail(self, problem: BaseException) -> None:
        log.error("the run %s ends here: %s", self.memory.name, problem)
        self.state, self.problem = "failed", str(problem)
        self.memory.active = False
        self.remember()

    def stop(self) -> None:
        """Leave the run cleanly; what was trained is kept for a return."""
        self._stopping = True
        self.memory.active = False
        self.remember()
        scope = self._part or self._scope
        if scope is not None:
            scope.cancel()

    def remember(self) -> None:
        """Write `session.json`. A disk that is full is told, and harms nothing but a later restart."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fields = {name: getattr(self.memory, name) for name in self.memory.__dataclass_fields__}
            write_atomic(self.folder / "session.json", json.dumps(fields, indent=1).encode())
        except OSError as problem:
            log.error("%s cannot be written: %s", self.folder / "session.json", problem)

    async def _run(self) -> None:
        await self.prepare()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._keeper.run)
            await nursery.start(self._own.run)
            nursery.start_soon(self._tell_on)
            while True:
                self.life = await self._settle()
                self.memory.generation = self.life.number
                self.remember()
                try:
                    await self._live()
                except Orphaned as problem:
                    log.warning("%s: this part of the run cannot go on: %s", self.memory.name, problem)
                    self.progress.problem = str(problem)
                    self._has_state = True
                    continue
                break
            await self._flush()
            nursery.cancel_scope.cancel()
        if self._stopping:
            return
        self.state = "done"
        self.memory.active, self.memory.ended = False, True
        self.remember()
        self.tell()

    async def prepare(self) -> None:
        """Files, model, and what this disk holds of the state."""
        if self.pack is None:
            directory = await self.ground.fetch(self.memory.manifest_id)
            self.pack = await trio.to_thread.run_sync(read_pack, Path(directory))
        pack, recipe = self.pack, self.pack.recipe
        if not self._new and not self.ground.admits(recipe.members):
            asked = ", ".join(recipe.members.allow or recipe.members.tags)
            raise ConfigProblem("members", self.me, f"one of those that the run allows: {asked}")
        self._keep = recipe.checkpoints.keep
        self._keeper = Keeper(self.folder / "state", Retention(last=self._keep))
        claims = {advert.claim for advert in self.ground.others(self.memory.manifest_id).values()}
        claim = next(number for number in range(len(claims) + 1) if number not in claims)
        # On a thread: the first optimizer of a process imports half of torch.
        self._worker, self._outer = await trio.to_thread.run_sync(_parts, pack, self._new, claim)
        self._has_state = self._new
        own = await trio.to_thread.run_sync(self._own.newest)
        if own is not None:
            try:
                self._parts()[0].load_own_state(own.snapshot.tensors)
            except (ValueError, KeyError) as problem:
                log.warning("the inner optimizer's state is left aside: %s", problem)
        if not self._new:
            loaded = await trio.to_thread.run_sync(self._keeper.newest)
            if loaded is not None:
                for refused in loaded.refused:
                    log.warning("the checkpoint %s is not whole (%s)", refused.path.name, refused.why)
                self._take_up(loaded.snapshot, loaded.meta)

    def _take_up(self, snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """A checkpoint's state, whatever number of members or strategy it is from."""
        outer = self._parts()[1]
        epochs = {str(tag): int(epoch) for tag, epoch in dict(meta.get("epochs", {})).items()}
        other = max(epochs.values(), default=0)
        for tag in outer.tags:
            outer.load(tag, snapshot.tensors, epochs.get(tag, other), keep=False)
            self._tokens[tag] = float(meta.get("tokens", 0.0))
        self._has_state = True

    def _parts(self) -> tuple[Worker, Outer]:
        if self._worker is None or self._outer is None:
            raise ConfigProblem("run", self.memory.name, "one whose files are here")
        return self._worker, self._outer

    @property
    def epoch(self) -> int:
        """Outer steps of the state here, over all fragments."""
        outer = self._outer
        return 0 if outer is None or not self._has_state else sum(outer.epoch(tag) for tag in outer.tags)

    @property
    def tokens(self) -> float:
        """That the state here has seen."""
        return self._driver.tokens if self._driver else max(self._tokens.values(), default=0.0)

    # ---- with whom, and from which state

    async def _settle(self) -> Life:
        """The generation to take part in: one that goes on, or the next one, which is begun here or elsewhere."""
        if self._new and self.memory.generation == 0:
            return Life(1, self.me, True)
        self.state = "resting"
        self.tell()
        began_s, asked_s = trio.current_time(), -math.inf
        while True:
            others = self.ground.others(self.memory.manifest_id)
            going = [advert for advert in others.values() if advert.state == "training"]
            if going:
                best = min(going, key=lambda advert: advert.order)
                return Life(best.generation, best.founder, False)
            waited_s = trio.current_time() - began_s
            if waited_s > SETTLE_S:
                if waited_s - asked_s > ASK_S:
                    asked_s = waited_s
                    await self._from_pieces()
                ahead = [
                    peer
                    for peer, advert in others.items()
                    if advert.state == "resting" and (-advert.epoch, peer) < (-self.epoch, self.me)
                ]
                if self._has_state and (not ahead or waited_s > PATIENCE_S):
                    number = max([self.memory.generation, *(a.generation for a in others.values())]) + 1
                    return Life(number, self.me, True)
            with trio.move_on_after(SETTLE_S / 10):
                await self.ground.change()

    async def _from_pieces(self) -> None:
        """Where peers' pieces make a newer state than any that is here, take that up."""
        peers = [str(peer) for peer in self.ground.host.peers()]
        try:
            found = await self.ground.copies.restore(
                self.memory.manifest_id, PIECES, peers, epoch_min=self.epoch + 1
            )
            self._take_up(found.snapshot, found.meta)
        except (PiecesLost, OuterError) as problem:
            log.debug("no newer state from pieces: %s", problem)
        else:
            for peer, why in found.bad.items():
                log.warning("%s was of no help in making the state whole: %s", peer, why)
            log.warning("the state of epoch %s was made from peers' pieces", found.snapshot.epoch)

    # ---- one generation

    async def _live(self) -> None:
        ground, life = self.ground, self.life
        worker, outer = self._parts()
        pack = self.pack
        if pack is None:
            return
        others = ground.others(self.memory.manifest_id)
        members = [peer for peer, advert in others.items() if advert.order == life.order]
        config = RunConfig(codec=outer.strategy.codec, agreement=SETTINGS)
        founder = hashlib.sha256(life.founder.encode()).hexdigest()[:12]
        run_id = f"{self.memory.manifest_id[:32]}.{life.number}.{founder}"
        async with open_run(
            ground.host, ground.rpc, ground.links, ground.identity, run_id, config,
            founders=(self.me,) if life.mine else (), contacts=members, journal_dir=self.folder / "rounds",
        ) as run:  # fmt: skip
            driver = Driver(run, worker, outer, pack.recipe, self.progress, self._mates, self._on_round)
            self._driver = driver
            try:
                with trio.CancelScope() as self._part:
                    await self._take_part(driver, self._part)
                if self._stopping:
                    await run.leave(LEAVE_S)
                elif self._part.cancelled_caught:
                    raise Orphaned("another part of the run goes on")
                else:
                    await self._linger()
            finally:
                self._part = None
                self._tokens = dict.fromkeys(outer.tags, driver.tokens)
                self._driver = None

    async def _take_part(self, driver: Driver, scope: trio.CancelScope) -> None:
        pack = self.pack
        if self.life.mine:
            await driver.found(self._tokens)
        else:
            await driver.join(keep=self._has_state)
        self._has_state = True
        self._snapshots = dict(driver.snapshots)
        await self._offer_checkpoint(driver)
        self.state = "training"
        self.tell()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, driver, scope)
                minimum = 1 if pack is None else pack.recipe.members.minimum
                while self.epoch == 0 and len(self._here()) + 1 < minimum:
                    await self.ground.change()
                await driver.train()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise next((one for one in leaves(group) if isinstance(one, _TROUBLE)), group) from None

    def _here(self) -> dict[str, RunAdvert]:
        others = self.ground.others(self.memory.manifest_id)
        return {peer: a for peer, a in others.items() if a.state in ("training", "stuck")}

    async def _watch(self, driver: Driver, scope: trio.CancelScope) -> None:
        """Whether another generation counts, and whether somebody else draws the same data."""
        while True:
            await trio.sleep(TELL_S)
            self.state = "stuck" if driver.stuck else "training"
            going = {p: a for p, a in self._here().items() if a.state == "training"}
            rivals = [a for a in going.values() if a.order != self.life.order]
            if any(driver.stuck or rival.order < self.life.order for rival in rivals):
                scope.cancel()
            worker = self._parts()[0]
            if any(a.claim == worker.claim and peer < self.me for peer, a in going.items()):
                taken = {a.claim for a in going.values()}
                worker.claim = next(number for number in range(len(taken) + 1) if number not in taken)

    def _mates(self) -> set[str]:
        return {peer for peer, advert in self._here().items() if advert.order == self.life.order}

    async def _linger(self) -> None:
        """Others may still need the last result, or the state."""
        self.state = "done"
        self.tell()
        with trio.move_on_after(LINGER_S):
            while any(advert.state in ("training", "stuck") for advert in self._here().values()):
                await self.ground.change()

    # ---- what is kept and told

    async def _on_round(self, done: RoundDone) -> None:
        pack, driver = self.pack, self._driver
        if pack is None or driver is None:
            return
        self._snapshots = dict(driver.snapshots)
        members = done.reduced.peers
        turn = members[done.epoch % len(members)] == self.me
        every = pack.recipe.evaluation.every_rounds
        ends = done.epoch >= driver.rounds
        if (every and done.epoch % every == 0 and turn) or (ends and turn):
            windows = pack.corpus.windows_held_out(pack.recipe.evaluation.sequences)
            await driver.evaluate(windows)
        await trio.to_thread.run_sync(self._write_line, done)
        if done.epoch % pack.recipe.checkpoints.every_rounds == 0 or ends:
            made = await self._offer_checkpoint(driver)
            if made is not None and turn:
                await self._place(members, *made)
        self.tell()

    def _write_line(self, done: RoundDone) -> None:
        reduced, progress = done.reduced, self.progress
        line = {
            "time": round(time.time(), 3),
            "tag": done.tag,
            "epoch": done.epoch,
            "generation": self.life.number,
            "members": list(reduced.peers),
            "came": sorted(set(reduced.peers) - self._before),
            "gone": sorted(self._before - set(reduced.peers)),
            "left_out": {one.peer: one.why for one in reduced.left_out},
            "loss": _figure(done.loss),
            "val_loss": _figure(progress.val_loss),
            "tokens": reduced.weight,
            "tokens_per_s": round(progress.tokens_per_s, 1),
            "computing": round(progress.computing, 4),
            "round_s": round(reduced.took_s, 4),
            "bytes_sent": reduced.bytes_sent,
            "bytes_received": reduced.bytes_received,
            "state_sha256": done.snapshot.digest.hex(),
        }
        self._before = set(reduced.peers)
        try:
            with (self.folder / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as problem:
            log.error("%s: %s", self.folder / "rounds.jsonl", problem)

    async def _checkpoint(self) -> tuple[Snapshot, dict[str, Any]] | None:
        """The state of all fragments as they were published last."""
        outer = self._outer
        if outer is None or set(self._snapshots) != set(outer.tags):
            return None
        tensors: dict[str, torch.Tensor] = {}
        epochs: dict[str, int] = {}
        tokens = 0.0
        for tag, snapshot in self._snapshots.items():
            epochs[tag] = int(snapshot.tensors[EPOCH_KEY])
            tokens = max(tokens, float(snapshot.tensors[TOKENS_KEY]))
            tensors |= {k: t for k, t in snapshot.tensors.items() if k not in (EPOCH_KEY, TOKENS_KEY)}
        meta = {
            "run": self.memory.manifest_id,
            "name": self.memory.name,
            "strategy": outer.strategy.name,
            "generation": self.life.number,
            "epochs": epochs,
            "tokens": tokens,
        }
        make = partial(Snapshot.of, tensors, sum(epochs.values()))
        return await aside(sum(snapshot.manifest.nbytes for snapshot in self._snapshots.values()), make), meta

    async def _offer_checkpoint(self, driver: Driver) -> tuple[Snapshot, dict[str, Any]] | None:
        """Have the state written, and beside it what is this worker's own."""
        made = await self._checkpoint()
        if made is not None:
            self._keeper.offer(*made)
            own = await driver.between(driver.worker.own_state)
            nbytes = sum(one.numel() * one.element_size() for one in own.values())
            self._own.offer(await aside(nbytes, partial(Snapshot.of, own, made[0].epoch)), {})
        return made

    async def _flush(self) -> None:
        try:
            await self._keeper.flush()
            await self._own.flush()
        except CheckpointProblem as problem:
            self.progress.problem = str(problem)

    async def _save_now(self) -> None:
        """On the way out, when the keepers have stopped: what is newer than the last checkpoint."""
        made = await self._checkpoint()
        if made is None or (self._keeper.saved and self._keeper.saved.epoch >= made[0].epoch):
            return
        keeper = Keeper(self._keeper.root, Retention(last=self._keep))
        own = Keeper(self._own.root, Retention(last=1))
        async with trio.open_nursery() as nursery:
            await nursery.start(keeper.run)
            await nursery.start(own.run)
            keeper.offer(*made)
            if self._worker is not None:
                own.offer(Snapshot.of(self._worker.own_state(), made[0].epoch), {})
            try:
                await keeper.flush()
                await own.flush()
            except CheckpointProblem as problem:
                log.error("%s", problem)
            nursery.cancel_scope.cancel()

    async def _place(self, members: tuple[str, ...], snapshot: Snapshot, meta: dict[str, Any]) -> None:
        """Pieces of the state to the members, and to others while there are few."""
        pack = self.pack
        if pack is None:
            return
        wanted = pack.recipe.checkpoints.erasure
        others = [str(p) for p in self.ground.host.peers() if str(p) not in members and str(p) != self.me]
        most = HOLDERS_MAX if wanted is None else wanted[1]
        holders = (*members, *sorted(others))[:most]
        if len(holders) < 2:
            return
        k = len(holders) // 2 if wanted is None else max(1, wanted[0] * len(holders) // wanted[1])
        placed = await self.ground.copies.place(self.memory.manifest_id, PIECES, snapshot, meta, holders, k)
        if not placed.enough:
            log.warning("too few peers took pieces of the state: %s", dict(placed.without))

    async def _tell_on(self) -> None:
        while True:
            self.tell()
            await trio.sleep(TELL_S)

    def tell(self) -> None:
        """Say to the mesh how the run fares here."""
        self.ground.say(self.memory.manifest_id, self.advert())

    def advert(self) -> RunAdvert:
        """What this node says of the run."""
        progress, outer, pack = self.progress, self._outer, self.pack
        whole = 0 if outer is None or pack is None else pack.recipe.inner.steps // outer.strategy.inner_steps
        return RunAdvert(
            name=self.memory.name,
            manifest_id=self.memory.manifest_id,
            state=self.state,
            generation=self.life.number,
            founder=self.life.founder,
            epoch=self.epoch,
            tokens=self.tokens,
            claim=0 if self._worker is None else self._worker.claim,
            members=len(progress.members),
            loss=_said(progress.loss),
            val_loss=_said(progress.val_loss),
            tokens_per_s=progress.tokens_per_s,
            computing=progress.computing,
            rounds=0 if outer is None else max(outer.epoch(tag) for tag in outer.tags),
            rounds_whole=whole,
            detail=(self.problem or progress.problem)[:200],
        )

    def export(self, directory: Path) -> Path:
        """The state here as a model directory; on a thread. Raises ConfigProblem."""
        pack = self.pack
        if pack is None or not self._has_state:
            raise ConfigProblem("run", self.memory.name, "one whose state is here already")
        outer = self._parts()[1]
        state = {key: value for snap in self._snapshots.values() for key, value in snap.tensors.items()}
        if set(self._snapshots) != set(outer.tags):
            state = {key: value.clone() for tag in outer.tags for key, value in outer.state(tag).items()}
        return export(state, pack.values, pack.corpus.tokenizer_json, directory, end_id=pack.corpus.end_id)


_TROUBLE = (
    NodeError, ModelError, P2pError, CollectiveError, OuterError, Orphaned, OSError,
    # A model or data that cannot be computed with: torch raises these, and the daemon serves others meanwhile.
    RuntimeError, ValueError, IndexError, KeyError, MemoryError,
)  # fmt: skip


def _parts(pack: Pack, new: bool, claim: int) -> tuple[Worker, Outer]:
    recipe = pack.recipe
    model = fresh_model(recipe, pack.corpus) if new else empty_model(pack)
    worker = Worker(model, pack.corpus, recipe.inner, claim)
    return worker, worker.outer(recipe.outer)


def _figure(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def _said(value: float) -> float:
    return min(value, 1e6) if math.isfinite(value) else -1.0
