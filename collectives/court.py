"""Who was proved guilty in a run, and the proofs: kept, told to everybody, and believed from nobody.

A proof (`reduce.evidence`) is verified by whoever takes it, so it does not matter who shows it; one that proves nothing
costs its bearer the ear of this node. Whoever holds a proof has nothing to do with the guilty one any more: what that
means for rounds is the run's matter. At most `GUILTY_MAX` names and `PROOFS_BYTES_MAX` bytes are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import trio

from collectives.reduce import Verdict, verify_proof
from collectives.state_rpc import aside
from p2p import Call, Method, P2pError, Rpc, RpcRefusal, Tensor

log = logging.getLogger("shoal.collectives")

GUILTY_MAX = 256
PROOF_BYTES_MAX = 128 << 20
PROOFS_BYTES_MAX = 256 << 20
PIECE_BYTES = 1 << 20
TELL_TRIES = 5
TELL_PAUSE_S = 0.5
FETCH_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Notice:
    """I hold a proof of so many bytes against `guilty`."""

    run: str
    guilty: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Noted:
    """Whether the proof will be asked for."""

    wanted: bool


@dataclass(frozen=True, slots=True)
class AskProof:
    run: str
    guilty: str
    offset: int


@dataclass(frozen=True, slots=True)
class ProofPiece:
    data: Tensor


NOTICE = Method("collectives/proof/notice", Notice, Noted, body_bytes_max=4096, deadline_s=5.0)
PROOF = Method(
    "collectives/proof/piece", AskProof, ProofPiece, body_bytes_max=4096, payload_bytes_max=PIECE_BYTES,
    deadline_s=30.0, lane="bulk",
)  # fmt: skip


class Court:
    """Of one run at one node. `on_guilty(peer)` is told each name once, `others()` are those to tell; `directory`
    keeps the proofs over restarts."""

    def __init__(
        self,
        rpc: Rpc,
        run: str,
        me: str,
        directory: Path | None,
        others: Callable[[], Iterable[str]],
        on_guilty: Callable[[str, Verdict], None],
    ) -> None:
        self.verdicts: dict[str, Verdict] = {}
        self._proofs: dict[str, bytes] = {}
        self._bearers: set[str] = set()
        self._rpc, self._run, self._me = rpc, run, me
        self._directory = directory
        self._others, self._on_guilty = others, on_guilty
        self._nursery: trio.Nursery | None = None
        self._turn = trio.Lock()
        self._fetching: set[str] = set()

    def start(self, nursery: trio.Nursery) -> None:
        """Proofs of an earlier life count, once they are verified again."""
        self._nursery = nursery
        if self._directory is not None and self._directory.is_dir():
            for path in sorted(self._directory.glob("*.proof"))[:GUILTY_MAX]:
                proof = path.read_bytes()
                self.convict(verify_proof(proof, self._run), proof)

    def is_guilty(self, peer: str) -> bool:
        return peer in self.verdicts

    def proof(self, peer: str) -> bytes | None:
        """Bytes that `verify_proof` takes, if they are kept here."""
        return self._proofs.get(peer)

    def convict(self, verdict: Verdict, proof: bytes) -> None:
        """`verdict` is what `verify_proof` says of `proof`."""
        peer = verdict.guilty
        if not peer or peer in self.verdicts or len(self.verdicts) >= GUILTY_MAX:
            return
        self.verdicts[peer] = verdict
        log.warning("%s is guilty: %s (%s)", peer, verdict.why, verdict.detail)
        held = sum(len(one) for one in self._proofs.values())
        if len(proof) <= PROOF_BYTES_MAX and held + len(proof) <= PROOFS_BYTES_MAX:
            self._proofs[peer] = proof
            self._store(peer, proof)
            for other in self._others():
                self.tell(other, peer)
        self._on_guilty(peer, verdict)

    def _store(self, peer: str, proof: bytes) -> None:
        if self._directory is None:
            return
        path = self._directory / f"{hashlib.sha256(peer.encode()).hexdigest()[:24]}.proof"
        if path.exists():
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            spare = path.with_suffix(".new")
            spare.write_bytes(proof)
            spare.replace(path)
        except OSError as problem:
            log.warning("the proof against %s is not kept over a restart: %s", peer, problem)

    # ---- telling

    def met(self, peer: str) -> None:
        """A connection came up."""
        for guilty in self._proofs:
            self.tell(peer, guilty)

    def tell(self, peer: str, guilty: str) -> None:
        if self._nursery is not None and peer not in (self._me, guilty) and peer not in self.verdicts:
            self._nursery.start_soon(self._tell, peer, guilty)

    async def _tell(self, peer: str, guilty: str) -> None:
        for _ in range(TELL_TRIES):
            with contextlib.suppress(P2pError):
                await self._rpc.call(peer, NOTICE, Notice(self._run, guilty, len(self._proofs[guilty])))
                return
            await trio.sleep(TELL_PAUSE_S)

    # ---- being told

    def on_notice(self, bearer: str, notice: Notice) -> Noted:
        wanted = (
            notice.guilty not in self.verdicts
            and notice.guilty != self._me
            and bearer not in self._bearers
            and bearer not in self.verdicts
            and 0 < notice.nbytes <= PROOF_BYTES_MAX
            and self._nursery is not None
        )
        if wanted and bearer in self._fetching:
            raise RpcRefusal("busy", "another proof of yours is being read")
        if wanted and self._nursery is not None:
            self._fetching.add(bearer)
            self._nursery.start_soon(self._fetch, bearer, notice)
        return Noted(wanted)

    async def _fetch(self, bearer: str, notice: Notice) -> None:
        try:
            proof = bytearray()
            verdict: Verdict | None = None
            async with self._turn:  # one at a time: that bounds the memory
                if notice.guilty in self.verdicts:
                    return
                with trio.move_on_after(FETCH_WITHIN_S):
                    while len(proof) < notice.nbytes:
                        ask = AskProof(self._run, notice.guilty, len(proof))
                        piece = (await self._rpc.call(bearer, PROOF, ask)).data.data
                        if len(piece) == 0:
                            break
                        proof += piece
                    data = bytes(proof)
                    verdict = await aside(len(data), lambda: verify_proof(data, self._run))
            if verdict is None:
                log.info("%s is too slow with its proof against %s", bearer, notice.guilty)
            elif verdict.guilty == notice.guilty:
                self.convict(verdict, data)
            else:
                log.warning("%s accuses %s without proof: %s", bearer, notice.guilty, verdict.detail)
                self._bearers.add(bearer)
        except P2pError as problem:
            log.info("no proof against %s from %s: %s", notice.guilty, bearer, problem)
        finally:
            self._fetching.discard(bearer)

    def on_ask(self, ask: AskProof) -> ProofPiece:
        """RpcRefusal for names that nothing is held against."""
        proof = self._proofs.get(ask.guilty)
        if proof is None or ask.offset < 0:
            raise RpcRefusal("absent", "no proof against this peer is kept here")
        data = proof[ask.offset : ask.offset + PIECE_BYTES]
        return ProofPiece(Tensor("uint8", (len(data),), data))


class CourtServer:
    """Answers for all runs of a node; `find(run)` gives None for runs that are not open."""

    def __init__(self, rpc: Rpc, find: Callable[[str], Court | None]) -> None:
        self._find = find
        rpc.serve(NOTICE, self._notice)
        rpc.serve(PROOF, self._proof)

    def _court(self, run: str) -> Court:
        found = self._find(run)
        if found is None:
            raise RpcRefusal("absent", "this node takes no part in the run")
        return found

    async def _notice(self, call: Call, notice: Notice) -> Noted:
        await trio.lowlevel.checkpoint()
        return self._court(notice.run).on_notice(str(call.peer), notice)

    async def _proof(self, call: Call, ask: AskProof) -> ProofPiece:
        await trio.lowlevel.checkpoint()
        return self._court(ask.run).on_ask(ask)
