"""What a node has once for all runs: the methods that its Rpc serves, its links, and the end of connections.

It hands letters, links and questions to the run they are for. It knows nothing of rounds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from collectives.audit import Auditor, AuditServer
from collectives.court import Court, CourtServer
from collectives.data_links import LinkDesk, Purpose
from collectives.errors import LocalFault
from collectives.gossip import PAIR, Pair, Paired
from collectives.place import Place
from collectives.reduce import Result
from collectives.state import Shelf
from collectives.state_rpc import StateServer
from collectives.values import ValueServer
from collectives.wire import Mailroom
from p2p import Call, Identity, Link, Links, PeerEvent, Rpc, RpcRefusal

if TYPE_CHECKING:
    from collectives.run import Run

_made: weakref.WeakKeyDictionary[Rpc, Collectives] = weakref.WeakKeyDictionary()


class Collectives:
    """One a node: found by `of`, which makes it when there is none for this Rpc. `place` tells where the node stands
    now; whoever measures it sets it."""

    def __init__(self, host: Any, rpc: Rpc, links: Links, identity: Identity) -> None:
        self.host = host
        self.rpc = rpc
        self.links = links
        self.identity = identity
        self.runs: dict[str, Run] = {}
        self.place: Callable[[], Place] = lambda: Place(dialable=bool(host.addrs()))
        self._mail = Mailroom(rpc)
        self._desk = LinkDesk(links, self._on_link)
        StateServer(rpc, self._shelf, self._expect, self._decision)
        ValueServer(rpc, self._result)
        AuditServer(rpc, self._auditor)
        CourtServer(rpc, self._court)
        rpc.serve(PAIR, self._on_pair)

    @classmethod
    def of(cls, host: Any, rpc: Rpc, links: Links, identity: Identity) -> Collectives:
        """The node's own."""
        found = _made.get(rpc)
        if found is None:
            found = _made[rpc] = cls(host, rpc, links, identity)
        return found

    def add(self, run: Run) -> None:
        """Letters and links for this run come to it from now on. Raises LocalFault if it is open already."""
        if run.run_id in self.runs:
            raise LocalFault(f"the run {run.run_id!r} is open already")
        self.runs[run.run_id] = run
        self._mail.open(run.run_id, run.on_letter)

    def remove(self, run: Run) -> None:
        if self.runs.get(run.run_id) is run:
            del self.runs[run.run_id]
            self._mail.close(run.run_id)

    def report(self) -> dict[str, Any]:
        """What each open run reports."""
        return {run_id: run.report() for run_id, run in self.runs.items()}

    async def watch_peers(
        self, run: Run, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Tell a run whose connections come and go, until cancelled."""
        started = False
        while True:
            with self.host.watch() as events:
                for peer in self.host.peers():
                    run.on_peer(PeerEvent(peer, "up"))
                if not started:
                    started = True
                    task_status.started()
                async for event in events:
                    if event.kind == "up" or not self.host.is_connected(event.peer):
                        run.on_peer(event)

    async def _on_link(self, purpose: Purpose, link: Link) -> None:
        run = self.runs.get(purpose.run)
        if run is not None:
            await run.on_link(purpose, link)

    async def _on_pair(self, call: Call, ask: Pair) -> Paired:
        run = self.runs.get(ask.run)
        if run is None or run.court.is_guilty(str(call.peer)):
            raise RpcRefusal("absent", "this node takes no part in the run, or not with you")
        return await run.gossip.on_pair(call, ask)

    def _shelf(self, run_id: str, tag: str) -> Shelf | None:
        run = self.runs.get(run_id)
        return None if run is None else run.shelf(tag)

    def _decision(self, run_id: str, tag: str) -> bytes:
        run = self.runs.get(run_id)
        return b"" if run is None else run.decision(tag)

    def _expect(self, run_id: str, tag: str, peer: str, took_s: float) -> None:
        run = self.runs.get(run_id)
        if run is not None:
            run.expect(tag, peer, took_s)

    def _auditor(self, run_id: str, tag: str) -> Auditor | None:
        run = self.runs.get(run_id)
        plane = None if run is None else run.plane(tag)
        return None if plane is None else plane.auditor

    def _court(self, run_id: str) -> Court | None:
        run = self.runs.get(run_id)
        return None if run is None else run.court

    def _result(self, run_id: str, tag: str, digest: bytes) -> Result | None:
        run = self.runs.get(run_id)
        plane = None if run is None else run.plane(tag)
        whole = None if plane is None else plane.whole(digest)
        return None if whole is None else whole.result
