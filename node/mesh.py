"""One node's life in one mesh: the composition root of everything that needs the network.

It opens the host, gossip, blobs, hosting and the gateway, and runs the few loops that join them: staying connected to
the members, adopting and making plans, publishing what this node is. Decisions sit in the pure cores it calls.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import trio

from collectives import Collectives, Place, lan_of
from dht import Directory, DirectoryConfig, Gossip, GossipConfig, OwnRecordsFull, RecordInvalid, View
from node import adverts
from node.adverts import DeviceAdvert, HostAdvert, LinksAdvert, ModelAdvert, NodeAdvert
from node.atlas import Atlas, read_atlas
from node.config import DaemonConfig
from node.datadir import DataDir, Membership
from node.errors import ConfigProblem, ControlProblem
from node.hardware import Hardware
from node.hosting import Host as Hosts
from node.library import Library, read_directory
from node.meshjson import mesh_document, model_detail
from node.metrics import Metrics
from node.offering import Offering
from node.offers import model_advert
from node.planning import Planning
from node.preview import preview_document
from node.probe import Probe
from node.reaching import Reaching
from node.serve.config import serve_config, shelf_of
from node.serve.gateway import MeshGateway
from node.serve.returns import Returns
from node.serve.stage import StageService
from node.settling import Settling
from node.sharing import Sharing
from node.standing import Standing, open_roster
from node.stock import Stock
from node.suspects import Suspects
from node.train.runs import Training
from p2p import (
    BlobExchange,
    BlobStore,
    Host,
    HostConfig,
    Identity,
    Invite,
    Links,
    LocalFault,
    P2pError,
    PeerEvent,
    PeerId,
    Roster,
    Rpc,
    RpcConfig,
    open_host,
)
from scheduler import Assignment, SchedulerError, device_id, node_of

log = logging.getLogger("shoal.mesh")
VERSION = "0.1.0"
TICK_S = 1.0
JOIN_WAIT_S = 8.0
LINKS_EVERY_S = 10.0
BYE_S = 0.8
ATLAS_AGE_S = 0.1
"""The view is read anew after every change, and after so long without one: records also expire."""
INLINE_NODES_MAX = 32
METERED = "metered"
NO_MANIFEST = "0" * 64
NAME_OTHER = re.compile(r"[^A-Za-z0-9._:/-]")


class MeshNode:
    """This node while it belongs to `membership`. Use `open_mesh`."""

    def __init__(
        self,
        config: DaemonConfig,
        data: DataDir,
        identity: Identity,
        membership: Membership,
        hardware: Hardware,
        metrics: Metrics,
        host: Host,
        roster: Roster | None = None,
    ) -> None:
        self.config = config
        self.membership = membership
        self.hardware = hardware
        self.me = str(identity.peer_id)
        self.host = host
        self.rpc = Rpc(host, RpcConfig(silence_s=config.rpc_silence_s))
        self.links = Links(host, self.rpc, identity)
        self.collectives = Collectives.of(host, self.rpc, self.links, identity)
        self.collectives.place = self._place
        self.view = View()
        self.gossip = Gossip(self.rpc, self.view, identity, GossipConfig())
        self.directory = Directory(
            host, self.gossip, identity, data.peers_path, DirectoryConfig(lan=config.mdns)
        )
        keep = partial(data.remember_roster, membership.mesh_id)
        self.standing = (
            None if roster is None else Standing(roster, keep, host, self.rpc, self.gossip, self.directory)
        )
        self._data = data
        self._store = BlobStore(data.blobs_path, quota_bytes=config.disk_bytes)
        self._life = secrets.token_hex(6)
        self.blobs = BlobExchange(self.rpc, self._store, links=self.links)
        self.library = Library(identity, self._store, self.blobs, self._sources)
        self.hosts = Hosts(self.library, hardware.devices, self._publish_host, scratch=data.scratch_path())
        self.offering = Offering(
            identity, membership.mesh_id, data, self._store, self.gossip,
            partial(self._say_value, ttl_s=config.model_ttl_s), self._wake,
        )  # fmt: skip
        self.stock = self._stock()
        self.sharing = Sharing(self.me, config, self.library, self.offering, self.atlas, self._detail)
        self.training = self._trainer(identity, data.training_path)
        self.tags = config.tags
        self.planning = Planning(
            self.me,
            rebalance_s=config.rebalance_s,
            fences=data.fences(membership.mesh_id),
            remembered={
                model: [Assignment(*span) for span in spans]
                for model, spans in data.planned(membership.mesh_id).items()
            },
        )
        self.suspects = Suspects(grace_s=config.suspect_grace_s)
        returns = Returns(self.rpc)
        self.stages = StageService(self.rpc, self.me, returns, self.hosts.compute, shelf_of(config, data))
        self.gateway = MeshGateway(
            self.rpc, self.me, returns, self.library, self.atlas, self._detail, self.mesh_json, metrics,
            serve_config(config),
        )  # fmt: skip
        self._metrics = metrics
        self._api: str | None = None
        self._changed = trio.Event()
        self._seen: Atlas | None = None
        self._seen_s = 0.0
        self._settling = Settling()
        self._seqs: dict[PeerId, int] = {}
        self.probe = Probe(self.rpc, lambda: METERED in self.tags)
        self.reaching = Reaching(host, self.rpc, self.gossip, self.view, config, self._publish_node)
        self._fences = self.planning.fences
        self._planning_turn = trio.Lock()

    def _trainer(self, identity: Identity, root: Path) -> Training:
        say = partial(self._say, ttl_s=self.config.node_ttl_s)
        return Training(
            self.host, self.rpc, self.links, identity, self.view, self.gossip, self.library, self.sharing,
            root, self.atlas, say, self.change,
        )  # fmt: skip

    def _stock(self) -> Stock:
        def dropped(manifest_id: str) -> bool:
            return manifest_id in self.offering.drops.held

        stock = Stock(
            self.me, self.blobs, self.library, self.atlas, self.hosts.spans, dropped, self._data.root
        )
        stock.set_upload(self.config.upload_mbps)
        return stock

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Belong to the mesh until cancelled; says goodbye on the way out."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.rpc.run)
            await nursery.start(self.stages.run)
            await nursery.start(self.gateway.run)
            await nursery.start(self.links.run)
            await nursery.start(self._watch_peers)
            await nursery.start(self._watch_records)
            await nursery.start(self.gossip.run)
            if self.standing is not None:
                await nursery.start(self.standing.run)
            await nursery.start(self.hosts.run)
            self._publish_node()
            self.offering.begin()
            await nursery.start(self.directory.run)
            await nursery.start(self.reaching.run)
            await nursery.start(self.training.run)
            nursery.start_soon(self._keep_planning)
            nursery.start_soon(self._keep_links)
            others = bool(self.membership.addrs or self.directory.remembered())
            self._settling.begin(trio.current_time(), others=others)
            task_status.started()
            await trio.sleep_forever()

    async def join(self, addrs: tuple[str, ...]) -> bool:
        """Connect to any of the addresses; False (and a log line) if none answers in time, then it is tried on."""
        self.directory.add(addrs)
        deadline_s = trio.current_time() + JOIN_WAIT_S
        problem: Exception | None = None
        while trio.current_time() < deadline_s:
            try:
                peer = await self.host.connect(addrs, deadline_s=3.0)
                log.info("joined the mesh through %s", peer)
                self._settling.joined(trio.current_time())
                return True
            except P2pError as failed:
                problem = failed
                await trio.sleep(0.3)
            if self.host.peers():
                return True  # the inviter is away, but remembered members are not
        log.warning("none of the invite's addresses answers yet: %s; trying on", problem)
        return False

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run `task` for as long as this life in the mesh lasts."""
        self._nursery.start_soon(task)

    def announce_api(self, url: str) -> None:
        """The HTTP address is known: tell the mesh."""
        self._api = url
        self._publish_node()

    async def goodbye(self) -> None:
        """Withdraw everything this node said, so that it vanishes from every view at once."""
        await self.gossip.withdraw_all(BYE_S)

    # -- models ----------------------------------------------------------------------------------------------------

    async def preview(self, model: str, copies: int | None) -> dict[str, Any]:
        """Where a model would go: one that the mesh knows by its name, or a directory of this computer. Raises
        ConfigProblem, and ModelError for a directory that no node could host."""
        known, here = self.atlas().model_named(model), None
        if known is None:
            here, directory = self.me, trio.Path(model)
            if not directory.is_absolute() or not await directory.is_dir():
                raise ConfigProblem("model", model, "a model of this mesh or the path of a model directory")
            files = await trio.to_thread.run_sync(read_directory, Path(directory), abandon_on_cancel=True)
            known = model_advert(
                *files, self.config,
                name=NAME_OTHER.sub("-", (await directory.resolve()).name)[:128].lstrip("-._:/") or "model",
                manifest_id=NO_MANIFEST, created_s=int(self.gossip.now_s()), copies=copies or self.config.copies,
            )  # fmt: skip
        async with self._planning_turn:
            said = partial(
                preview_document, self.planning, self.atlas(), known, copies or known.copies, here=here
            )
            return await trio.to_thread.run_sync(said)

    def set_tags(self, tags: tuple[str, ...]) -> None:
        """What this node says of itself from now on."""
        self.tags = tags
        self._publish_node()
        self._wake()

    # -- views -----------------------------------------------------------------------------------------------------

    def atlas(self) -> Atlas:
        """The mesh as requests see it: without suspects."""
        now = trio.current_time()
        if self._seen is None or now - self._seen_s > ATLAS_AGE_S:
            self._seen = self._read_atlas(self.suspects.suspects())
            self._seen_s = now
        return self._seen

    def _read_atlas(self, suspects: Collection[str]) -> Atlas:
        return read_atlas(self.view, self.gossip.now_s(), suspects, self.offering.drops.counts)

    def _place(self) -> Place:
        """For the runs of this node: the LAN, by the round trips that the mesh has measured; whether it listens."""
        return Place(lan_of(self.me, self.atlas().rtt_s), dialable=bool(self.host.addrs()))

    def mesh_json(self) -> dict[str, Any]:
        """The `/mesh` document."""
        live = [
            {
                "id": request.request_id,
                "model": request.model,
                "tokens": request.tokens,
                "age_s": round(time.time() - request.began_s, 3),
                "priority": request.priority,
                "reused_tokens": request.reused,
                "chain": [{"node": s.peer, "start": s.start, "end": s.end} for s in request.chain],
                "prefill_chain": [{"node": s.peer, "start": s.start, "end": s.end} for s in request.prefill],
            }
            for request in self.gateway.live.values()
        ]
        document = mesh_document(
            self.atlas(),
            self.planning,
            mesh_id=self.membership.mesh_id,
            me=self.me,
            connected=self.host.peers(),
            rtt_s=self.rpc.rtt_s,
            requests=live,
            standings=self.gateway.standings(),
            queues=self.gateway.queues(),
        )
        return {
            **document,
            "runs": self.collectives.report(),
            "training": self.training.status(),
            "reach": self.reaching.document(),
            "blobs": self.stock.document(),
        }

    def invite(self, ttl_s: float | None, *, once: bool = False) -> str:
        """An invite to this mesh with this node's addresses first. Raises ControlProblem where it cannot be made."""
        addrs = list(self.host.addrs())
        for node in self.atlas().nodes.values():
            addrs.extend(addr for addr in node.addrs if addr not in addrs)
        now_s = time.time()
        mesh_id, key, founder, ticket = self.membership.mesh_id, self.membership.swarm_key, None, b""
        if once and (self.standing is None or key is None):
            raise ControlProblem(
                "in this mesh invites cannot be limited to one use: it asks for no certificates"
            )
        if self.standing is not None:
            roster = self.standing.roster
            founder, key = roster.founder, roster.swarm_key
            try:
                ticket = b"" if roster.public else roster.invite(now_s, ttl_s, once=once)
            except LocalFault as problem:
                raise ControlProblem(str(problem)) from None
        expires_at_s = None if ttl_s is None else now_s + ttl_s
        return Invite(mesh_id, key, tuple(addrs[:12]), expires_at_s, founder, ticket).encode()

    async def expel(self, text: str, *, branch: bool) -> tuple[PeerId, tuple[PeerId, ...]]:
        """Put a member (peer id, the end of one, or node name) out; (its id, who of those it let in stays).

        Raises ControlProblem."""
        standing = self._certified()
        try:
            said = standing.roster.expel(self._member_named(text), time.time(), branch=branch)
        except LocalFault as problem:
            raise ControlProblem(str(problem)) from None
        await standing.look()
        return said.peer, said.keep

    async def rotate(self, overlap_s: float) -> None:
        """A new swarm key. Raises ControlProblem where this node cannot give one."""
        standing = self._certified()
        try:
            standing.roster.rotate(time.time(), overlap_s)
        except LocalFault as problem:
            raise ControlProblem(str(problem)) from None
        await standing.look()

    def _certified(self) -> Standing:
        if self.standing is None:
            raise ControlProblem(
                "this mesh was founded by an earlier version and has no founding key: found a new one for this"
            )
        return self.standing

    def _member_named(self, text: str) -> PeerId:
        names = {PeerId(peer): node.name for peer, node in self.atlas().nodes.items()}
        known = {*self._certified().roster.members, *names, *self.host.peers()} - {PeerId(self.me)}
        exact = [peer for peer in known if text in (peer, names.get(peer))]
        found = exact or [peer for peer in known if len(text) >= 6 and peer.endswith(text)]
        if len(found) != 1:
            raise ControlProblem(
                f"{text!r} names {len(found)} members; give a whole peer id (see `shoal status --json`)"
            )
        return found[0]

    def _detail(self, model: ModelAdvert) -> str:
        return model_detail(self.atlas(), self.planning, model)

    def _sources(self, manifest_id: str) -> list[PeerId]:
        """Connected peers that host or offer a model first, then the others."""
        atlas = self.atlas()
        offering = {
            record.signer
            for kind in (adverts.MODEL, adverts.ADAPTER)
            for record in self.view.records(kind, self.gossip.now_s())
            if (advert := adverts.read_offer(kind, record.value)) and advert.manifest_id == manifest_id
        }
        likely = {node_of(host) for host in atlas.hosts.get(manifest_id, {})} | offering
        connected = [peer for peer in self.host.peers() if peer != self.me]
        return sorted(connected, key=lambda peer: (peer not in likely, peer))

    # -- publishing ------------------------------------------------------------------------------------------------

    def _publish_node(self) -> None:
        advert = NodeAdvert(
            name=self.config.name,
            version=VERSION,
            addrs=self.host.addrs()[: adverts.ADDRS_MAX],
            api=self._api,
            serves=self.config.serve,
            memory_bytes=self.hardware.memory_bytes,
            flops_per_s=self.hardware.flops_per_s,
            read_bytes_per_s=self.hardware.read_bytes_per_s,
            device=self.hardware.device,
            pinned=self.config.layers,
            life=self._life,
            region=self.config.region,
            tags=self.tags,
            devices=tuple(
                DeviceAdvert(d.device, d.memory_bytes, d.flops_per_s, d.read_bytes_per_s)
                for d in self.hardware.devices
            )
            if len(self.hardware.devices) > 1
            else (),
        )
        self._say(adverts.NODE, "", advert, self.config.node_ttl_s)

    def _publish_host(self, name: str, advert: HostAdvert | None) -> None:
        if advert is None:
            self.gossip.withdraw(adverts.HOST, name)
        else:
            self._say(adverts.HOST, name, replace(advert, life=self._life), self.config.node_ttl_s)
        hosting = self.hosts.hostings.get(name)
        if hosting is not None:
            self._metrics.set_kv_usage(hosting.model.name, hosting.compute.kv_usage())

    def _say(self, kind: str, name: str, advert: object, ttl_s: float) -> None:
        self._say_value(kind, name, adverts.write(advert), ttl_s)

    def _say_value(self, kind: str, name: str, value: bytes, ttl_s: float) -> None:
        """Publish; what does not fit among this node's records is logged, and never ends what wanted to say it."""
        try:
            self.gossip.publish(kind, name, value, ttl_s)
            self._seen = None
        except (OwnRecordsFull, RecordInvalid) as problem:
            log.warning("%s %s cannot be told to the mesh: %s", kind, name, problem)

    # -- loops -----------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        """Wait until the view changed, or a moment passed."""
        with trio.move_on_after(TICK_S / 4):
            await self._changed.wait()
        await trio.sleep(0.02)

    def _wake(self) -> None:
        self._seen = None
        self._changed.set()

    async def _watch_peers(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.host.watch() as events:
            task_status.started()
            async for event in events:
                self._on_peer(event)

    def _on_peer(self, event: PeerEvent) -> None:
        if event.kind == "up":
            self.suspects.up(event.peer)
            self._settling.met(trio.current_time())
        elif event.kind == "down":
            self.suspects.down(event.peer, trio.current_time())
            self._settling.lost(trio.current_time())
            log.info("lost %s", event.peer)
            if any(node_of(host) == event.peer for hosts in self.atlas().hosts.values() for host in hosts):
                self.gateway.lost(event.peer)  # it did not say goodbye
        self._wake()

    async def _watch_records(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.gossip.watch() as changes:
            task_status.started()
            async for _ in changes:
                self._wake()

    async def _keep_planning(self) -> None:
        """Adopt, plan, host: after every change of the view, and now and then without one."""
        while True:
            self._changed = trio.Event()
            try:
                async with self._planning_turn:
                    await self._plan_once()
            except SchedulerError as problem:
                log.warning("what the mesh says cannot be planned with: %s", problem)
            with trio.move_on_after(TICK_S):
                await self._changed.wait()
            await trio.sleep(0.05)

    async def _plan_once(self) -> None:
        """One look at the mesh. A large one is planned on a thread, so that the connections stay alive meanwhile."""
        now = trio.current_time()
        settled = self._settling.look(now, self.gossip.now_s())
        self._note_renewals(now)
        self.offering.look()
        atlas = self._read_atlas(self.suspects.gone(now))
        self.suspects.forget(atlas.nodes_known)
        look = partial(self.planning.handle, atlas, may_plan=settled, now_s=now)
        large = len(atlas.nodes) > INLINE_NODES_MAX
        for publish in await trio.to_thread.run_sync(look) if large else look():
            self._say(adverts.PLAN, publish.manifest_id, publish.advert, self.config.model_ttl_s)
        self._settling.looked(self.gossip.now_s())
        if self.planning.fences != self._fences:
            self._fences = self.planning.fences
            spans = {
                model: [(a.node, a.start, a.end) for a in plan.assignments]
                for model, plan in self.planning.plans.items()
            }
            self._data.remember_plans(self.membership.mesh_id, self._fences, spans)
        if not self.config.serve:
            return
        if settled:
            self.hosts.keep_only({model.manifest_id for model in atlas.models.values()})
        for model in atlas.models.values():
            plan = self.planning.plans.get(model.manifest_id)
            for device in range(len(self.hardware.devices)):
                span = self.planning.span_of(model.manifest_id, device_id(self.me, device))
                self.hosts.want(model, device, span, 0 if plan is None else plan.epoch)
            if self.hosts.hosts(model.manifest_id):
                self.offering.keep(model)
        self.hosts.tune(atlas.adapters.values())
        for adapter in atlas.adapters.values():
            if self.hosts.hosts(adapter.base):
                self.offering.keep(adapter)

    def _note_renewals(self, now: float) -> None:
        """Records renewed since the last look, from whomever they came, tell that their signers live."""
        records = self.view.records(adverts.NODE, self.gossip.now_s())
        seqs = {record.signer: record.seq for record in records if record.signer != self.me}
        for peer, seq in seqs.items():
            if self._seqs.get(peer) != seq:
                self.suspects.heard(peer, now)
                self._settling.met(now)
        self._seqs = seqs

    def _to_probe(self, peers: Collection[PeerId], known: Collection[str]) -> list[str]:
        """Members from whom nothing large came yet, and who do not pay for every byte."""
        nodes = self.atlas().nodes
        others = [peer for peer in peers if peer in nodes and peer != self.me and peer not in known]
        return [peer for peer in others if METERED not in nodes[peer].tags]

    async def _keep_links(self) -> None:
        """Publish measured round trips and rates when some changed by more than a quarter."""
        said: dict[str, float] = {}
        while True:
            await trio.sleep(LINKS_EVERY_S)
            peers = self.host.peers()
            rtt_s = {str(peer): rtt for peer in peers if (rtt := self.rpc.rtt_s(peer)) is not None}
            seen = {str(peer): bps / 8 for peer in peers if (bps := self.rpc.bandwidth_bps(peer)) is not None}
            await self.probe.ask_one(self._to_probe(peers, seen))
            rates = {str(peer): self.probe.rates[peer] for peer in peers if peer in self.probe.rates} | seen
            figures = rtt_s | {f"{peer} rate": rate for peer, rate in rates.items()}
            moved = any(abs(figure - said.get(key, -1.0)) > 0.25 * figure for key, figure in figures.items())
            if moved or set(said) != set(figures):
                said = figures
                self._say(adverts.LINKS, "", LinksAdvert(rtt_s, rates), self.config.model_ttl_s)


@asynccontextmanager
async def open_mesh(
    config: DaemonConfig,
    data: DataDir,
    identity: Identity,
    membership: Membership,
    hardware: Hardware,
    metrics: Metrics,
) -> AsyncIterator[MeshNode]:
    """Open the host and run a MeshNode for as long as the block lasts."""
    host_config = HostConfig(listen=config.listen, port_wanted=data.port())
    roster = open_roster(identity, membership, data)
    async with open_host(
        identity, membership.mesh_id, membership.swarm_key, host_config, roster=roster
    ) as host:
        data.remember_port(host.port())
        node = MeshNode(config, data, identity, membership, hardware, metrics, host, roster)
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            try:
                yield node
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + BYE_S + 0.2):
                    await node.goodbye()
                nursery.cancel_scope.cancel()
