"""Membership at work: what the roster knows is kept on disk, told to the mesh and enforced on connections and views.

Documents and certificates travel as records of the replicated view, so that its anti-entropy brings them
everywhere, also after a partition. A swarm key is handed out by a call, to members in good standing only. It
decides nothing: who belongs to the mesh is `p2p.Roster`'s to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from dht import Directory, Gossip, OwnRecordsFull, RecordRefused
from node.datadir import DataDir, Membership
from node.errors import DataDirProblem
from p2p import (
    Call,
    Host,
    Identity,
    LocalFault,
    Method,
    P2pError,
    PeerId,
    RemoteFault,
    Roster,
    Rpc,
    RpcRefusal,
    pack_value,
    unpack_value,
)

log = logging.getLogger("shoal.standing")
DOCUMENTS, MEMBER = "membership", "member"
TTL_S = 3600.0
LOOK_EVERY_S = 1.0
PART_BYTES_MAX = 48_000
PARTS_MAX = 6


@dataclass(frozen=True, slots=True)
class Documents:
    """Signed documents of membership."""

    documents: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class KeyAsked:
    """Id of an announced swarm key."""

    key_id: bytes


@dataclass(frozen=True, slots=True)
class KeyGiven:
    """The swarm key."""

    key: bytes


SWARM_KEY = Method("mesh.key", KeyAsked, KeyGiven, body_bytes_max=512, deadline_s=5.0)


def read_roster(identity: Identity, membership: Membership, data: DataDir) -> Roster | None:
    """The roster of a mesh as this node last knew it; None in a mesh without a founding key.

    Raises DataDirProblem where what was kept cannot be read: who was expelled must not come back by that.
    """
    if membership.founder is None:
        return None
    roster = Roster(
        identity,
        membership.mesh_id,
        membership.founder,
        membership.swarm_key,
        ticket=membership.ticket,
        founding=membership.founding,
    )
    kept = data.roster(membership.mesh_id)
    if kept is not None:
        try:
            roster.load(kept)
        except LocalFault as problem:
            raise DataDirProblem(
                data.root / "meshes", f"is damaged: {problem}; restore it from a backup"
            ) from None
    return roster


def open_roster(identity: Identity, membership: Membership, data: DataDir) -> Roster | None:
    """As `read_roster`, certified where this node founded the mesh, and kept."""
    roster = read_roster(identity, membership, data)
    if roster is not None:
        roster.certify_self(time.time())
        data.remember_roster(membership.mesh_id, roster.dump())
    return roster


class Standing:
    """Keeps one roster, the view and the connections in line. `run` for as long as the node is in the mesh."""

    def __init__(
        self,
        roster: Roster,
        keep: Callable[[bytes], None],
        host: Host,
        rpc: Rpc,
        gossip: Gossip,
        directory: Directory,
    ) -> None:
        self.roster = roster
        self._keep = keep
        self._host = host
        self._rpc = rpc
        self._gossip = gossip
        self._directory = directory
        self._kept = roster.version
        self._said = -1
        self._parts = 0
        self._read: dict[tuple[str, str, PeerId], bytes] = {}
        self._lost: set[PeerId] = set()
        self._warned = ""
        rpc.serve(SWARM_KEY, self._give_key)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Learn, keep, tell and enforce, after every change of the view and once a second."""
        with self._gossip.watch() as changes:
            self._enforce_view()
            self._tell()
            task_status.started()
            while True:
                await self.look()
                with trio.move_on_after(LOOK_EVERY_S):
                    record = await changes.receive()
                    while record.kind not in (DOCUMENTS, MEMBER):
                        record = await changes.receive()

    async def look(self) -> None:
        """One turn."""
        self._learn()
        self._enforce_view()
        self._save()
        self._tell()
        for peer in self._host.peers():
            if peer in self._lost:
                log.info("%s is disconnected: %s", peer, self.roster.problem(peer))
                await self._host.disconnect(peer)
        for key_id in self.roster.wanted_keys():
            await self._ask_for(key_id)

    def _learn(self) -> None:
        now_s = self._gossip.now_s()
        for record in (
            *self._gossip.view.records(MEMBER, now_s),
            *self._gossip.view.records(DOCUMENTS, now_s),
        ):
            if record.signer == self.roster.me or self._read.get(record.key) == record.value:
                continue
            self._read[record.key] = record.value
            try:
                for document in unpack_value(Documents, record.value).documents:
                    self._learn_one(record.kind, record.signer, document)
            except RemoteFault as problem:
                log.info("what %s says of members is refused: %s", record.signer, problem)
        if len(self._read) > 4 * self._gossip.view.config.signers_max:
            self._read.clear()

    def _learn_one(self, kind: str, signer: PeerId, document: bytes) -> None:
        if kind == MEMBER:
            self.roster.learn_encoded(signer, document)
        else:
            self.roster.take(document)

    def _enforce_view(self) -> None:
        """Entries of those who are no members (any more) go, and come in no more."""
        problem = self.roster.problem(self.roster.me)
        if problem and problem != self._warned and self.roster.chain:
            log.warning("this node is no member of the mesh any more: %s", problem)
        self._warned = problem
        lost = set(self.roster.lost()) - {self.roster.me}
        for peer in lost - self._lost:
            try:
                self._gossip.forget(peer)
            except RecordRefused as full:
                log.warning("entries of %s stay in the view: %s", peer, full)
            self._directory.forget(peer)
        for peer in self._lost - lost:
            self._gossip.readmit(peer)
        self._lost = lost

    def _save(self) -> None:
        if self.roster.version == self._kept:
            return
        version = self.roster.version
        try:
            self._keep(self.roster.dump())
            self._kept = version
        except DataDirProblem as problem:
            log.error("who is a member cannot be kept: %s", problem)

    def _tell(self) -> None:
        """Say what is known, in as few records as fit; renewing them is the replica's."""
        if self.roster.version == self._said:
            return
        self._said = self.roster.version
        parts = in_parts(self.roster.documents())
        try:
            for k, part in enumerate(parts):
                self._gossip.publish(DOCUMENTS, str(k), pack_value(Documents(part)), TTL_S)
            for k in range(len(parts), self._parts):
                self._gossip.withdraw(DOCUMENTS, str(k))
            self._parts = len(parts)
            chain = self.roster.encoded_chain()
            if chain and not self.roster.public:
                self._gossip.publish(MEMBER, "", pack_value(Documents((chain,))), TTL_S)
        except OwnRecordsFull as full:
            log.warning("not all that is known of members can be told: %s", full)

    async def _ask_for(self, key_id: bytes) -> None:
        for peer in self._host.peers():
            try:
                given = await self._rpc.call(peer, SWARM_KEY, KeyAsked(key_id))
            except P2pError as problem:
                log.debug("%s did not give the new swarm key: %s", peer, problem)
                continue
            if self.roster.give_key(given.key):
                log.info("the swarm key has changed")
                self._save()
                return

    async def _give_key(self, call: Call, request: KeyAsked) -> KeyGiven:
        problem = self.roster.problem(call.peer)
        if problem:
            raise RpcRefusal("denied", problem)
        key = self.roster.key(request.key_id)
        if key is None:
            raise RpcRefusal("not_found", "no such key is known here")
        return KeyGiven(key)


def in_parts(documents: Sequence[bytes]) -> list[tuple[bytes, ...]]:
    """Documents in order, as many as fit in PARTS_MAX parts of PART_BYTES_MAX bytes; the rest is left unsaid."""
    parts: list[list[bytes]] = []
    size = 0
    for document in documents:
        if not parts or size + len(document) > PART_BYTES_MAX:
            if len(parts) == PARTS_MAX:
                break
            parts.append([])
            size = 0
        parts[-1].append(document)
        size += len(document) + 8
    return [tuple(part) for part in parts]
