"""Audits of one tag: what was contributed is bound, results are signed, and parts are made again before anybody votes.

Once a membership is declared each member asks the others for the signed hashes of their contributions, and adds up
nothing else. When its result is whole, it asks whoever made parts of it to sign them, and then makes some parts, drawn
in secret, once more from everybody's contributions. A part that comes out otherwise is a proof, which goes to the
court; until then this member's vote waits. So a majority has looked before anything is committed, and who is caught
has nothing committed. It decides neither who is guilty (`reduce.evidence`) nor what follows (`court`).
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
from blake3 import blake3

from collectives.agreement import Declaration, Member, Value
from collectives.codecs import codec
from collectives.errors import LocalFault, NonFinite, NoQuorum
from collectives.reduce import (
    Accusation,
    Equivocation,
    Exchange,
    Layout,
    MisuseError,
    Statement,
    Verdict,
    commit_of,
    pack_proof,
    recheck,
    result_statement,
)
from collectives.reduce.contribution import Contribution
from collectives.reduce.evidence import CONTRIBUTION, HONEST, RESULT, contribution_name, declared, is_bound
from collectives.reduce.result import HASH_BYTES
from collectives.state_rpc import aside
from collectives.values import CHUNK_BYTES_MAX, value_digest
from p2p import Call, Method, P2pError, Rpc, RpcRefusal, Tensor

if TYPE_CHECKING:
    from collectives.given import Input
    from collectives.run import Run

log = logging.getLogger("shoal.collectives")

PAUSE_S = 0.05
SIGNED_KEPT_MAX = 8
PARTS_PER_PEER_MAX = 256
_chance = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class AskStatement:
    """What have you signed under `name`? With `of`: what has that peer signed for you?"""

    run: str
    tag: str
    kind: str
    name: bytes
    of: str = ""


@dataclass(frozen=True, slots=True)
class AskPart:
    """What did you contribute to `chunk`, in the attempt that is stated under `name`?"""

    run: str
    tag: str
    name: bytes
    chunk: int


@dataclass(frozen=True, slots=True)
class Part:
    data: Tensor


STATEMENT = Method(
    "collectives/audit/statement", AskStatement, Statement, body_bytes_max=1 << 20, deadline_s=5.0
)
PART = Method(
    "collectives/audit/part", AskPart, Part, body_bytes_max=4096, payload_bytes_max=CHUNK_BYTES_MAX,
    deadline_s=30.0, lane="bulk",
)  # fmt: skip


@dataclass(slots=True)
class AuditCount:
    """Since the run was opened, all tags together. Bytes are payloads of parts, and hashes."""

    parts: int = 0
    convictions: int = 0
    unanswered: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0


@dataclass(eq=False, slots=True)
class _Case:
    """One declaration, what was signed about it, and who makes what."""

    declaration: Declaration
    name: bytes
    layout: Layout
    roots: dict[str, list[int]]
    own: Callable[[int], bytes] | None = None
    stated: dict[str, Statement] = field(default_factory=dict)
    signed: dict[str, Statement] = field(default_factory=dict)
    made: trio.Event = field(default_factory=trio.Event)
    heard: trio.Event = field(default_factory=trio.Event)
    digest: bytes = b""
    passed: bool = False

    @property
    def weighty(self) -> list[Member]:
        return [member for member in self.declaration.members if member.weight > 0]

    def root(self, chunk: int) -> str:
        return next(peer for peer, chunks in self.roots.items() if chunk in chunks)


class Auditor:
    """Made by the tag's plane: `trouble(peers, why)` is told whom this member cannot go on with, `after()` that
    something changed, `own_fault(error)` that the caller's tensors cannot be used."""

    def __init__(
        self,
        run: Run,
        rpc: Rpc,
        tag: str,
        sign: Callable[[Statement], Statement],
        trouble: Callable[[Sequence[str], str], None],
        after: Callable[[], None],
        own_fault: Callable[[NonFinite], None],
    ) -> None:
        self._run, self._rpc, self._tag, self._sign = run, rpc, tag, sign
        self._me, self._config, self._count = run.me, run.config, run.audits
        self._trouble, self._after, self._own_fault = trouble, after, own_fault
        self._mine: Statement | None = None
        self._kept: list[bytes] = []
        self._known: dict[tuple[str, int], Statement] = {}
        self._signed: dict[bytes, Statement] = {}
        self._handed: Counter[str] = Counter()
        self._case: _Case | None = None
        self._exchange: Exchange | None = None
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    # ---- what this member gives

    async def prepare(self, given: Input, epoch: int, layout: bytes) -> bytes:
        """Signs what the attempt contributes, and returns what its offer is bound to. Encodes everything once."""
        contribution = Contribution(given.layout, given.tensors, codec(self._config.codec), given.feedback)
        chunks = range(given.layout.chunks)
        kept: list[bytes] = []

        def look() -> bytes:
            if not self._config.audit_keep:
                return contribution.hashes()
            kept.extend(bytes(contribution.encoded(chunk)) for chunk in chunks)
            return b"".join([blake3(data).digest() for data in kept])

        hashes = await aside(given.layout.tensor_bytes, look)
        name = contribution_name(given.nonce, self._config.codec, layout)
        about = (CONTRIBUTION, self._run.run_id, self._tag, epoch, self._me)
        if self._case is not None:
            self._case.own = None  # what was kept for it makes room
        self._mine = self._sign(Statement(*about, name, hashes))
        self._kept = kept
        self._handed.clear()
        self._known.clear()
        return commit_of(hashes)

    def begin(self, exchange: Exchange, declaration: Declaration) -> None:
        """`exchange` is at this declaration from now on."""
        name = declared(declaration)
        if self._case is not None and self._exchange is exchange and self._case.name == name:
            return
        self._scope.cancel()
        self._scope = trio.CancelScope()
        self._exchange = exchange
        case = self._case = _Case(declaration, name, exchange.layout, exchange.roots(), self._own_part)
        member = declaration.member(self._me)
        if self._mine is None or member is None or member.commit != commit_of(self._mine.hashes):
            log.warning("%s declares what we have not offered", declaration.ballot.owner)
            self._trouble((declaration.ballot.owner,), "mismatch")
        elif self._nursery is not None:
            case.stated[self._me] = self._mine
            self._nursery.start_soon(self._follow, case, exchange, self._scope)

    def end(self) -> None:
        """The attempt is over, its tensors are the caller's again. What was kept of it can still be audited."""
        self._scope.cancel()
        self._exchange = None
        if self._case is not None:
            self._case.own = self._kept_part if self._kept else None

    def passed(self, exchange: Exchange) -> bool:
        """Whether `exchange`, which is done, may be reported: its results are signed and stood the audit."""
        case = self._case
        if case is None or self._exchange is not exchange:
            return False
        if not case.made.is_set():
            self._sign_result(case)
            case.digest = exchange.digest
            case.made.set()
        return case.passed

    # ---- what it asks of the others

    async def _follow(self, case: _Case, exchange: Exchange, scope: trio.CancelScope) -> None:
        with scope:
            sees_all = self._me in case.roots or all(
                self._run.reaches(member.peer) for member in case.weighty if member.peer != self._me
            )  # two that cannot be dialled do not see each other: only who owns nothing may do without
            if sees_all:
                async with trio.open_nursery() as nursery:
                    for member in case.weighty:
                        if member.peer != self._me:
                            nursery.start_soon(self._learn, case, exchange, member)
            await case.made.wait()
            async with trio.open_nursery() as nursery:
                for peer in case.roots:
                    if peer != self._me:
                        nursery.start_soon(self._learn_result, case, exchange, peer)
            case.heard.set()
            verdicts = [await self._look(case, chunk) for chunk in (self._drawn(case) if sees_all else ())]
            if all(verdict.why == "unfounded" for verdict in verdicts):
                case.passed = True
                self._after()

    async def _learn(self, case: _Case, exchange: Exchange, member: Member) -> None:
        key = member.peer, member.nonce
        statement = self._known.get(key)
        if statement is None or commit_of(statement.hashes) != member.commit:
            declaration = case.declaration
            name = contribution_name(member.nonce, declaration.codec, declaration.layout)
            statement = self._known[key] = await self._ask(
                member.peer,
                CONTRIBUTION,
                name,
                lambda found: is_bound(declaration, member, found, case.layout.chunks),
            )
        case.stated[member.peer] = statement
        try:
            exchange.committed(member.peer, statement.hashes)
        except NonFinite as error:
            self._own_fault(error)
        self._after()

    async def _learn_result(self, case: _Case, exchange: Exchange, peer: str) -> None:
        given = exchange.given_hashes(peer)
        subject = result_statement(case.declaration, peer, b"").subject
        case.signed[peer] = await self._ask(
            peer,
            RESULT,
            case.name,
            lambda found: found.subject == subject and found.hashes == given and found.genuine,
        )

    async def _ask(self, peer: str, kind: str, name: bytes, good: Callable[[Statement], bool]) -> Statement:
        """Goes on until there is an answer that is `good`; one that says nothing, or something else, is reported."""
        patience_s = self._config.link_silence_s
        blame_s = trio.current_time() + patience_s
        why = "silent"
        while True:
            try:
                found = await self._rpc.call(
                    peer,
                    STATEMENT,
                    AskStatement(self._run.run_id, self._tag, kind, name),
                    deadline_s=patience_s,
                )
                self._count.bytes_received += len(found.hashes)
                if good(found):
                    return found
                if why == "silent":
                    why, blame_s = "mismatch", trio.current_time()
            except P2pError as problem:
                log.debug("no statement of %s yet: %s", peer, problem)
            if trio.current_time() >= blame_s:
                log.info("%s does not state its %s: %s", peer, kind, why)
                self._trouble((peer,), why)
                self._count.unanswered += 1
                blame_s = trio.current_time() + patience_s
            await trio.sleep(PAUSE_S)

    def _drawn(self, case: _Case) -> list[int]:
        """Parts that others made: `audit_parts` of them on the average, as nobody can foretell."""
        made = [chunk for peer, chunks in case.roots.items() if peer != self._me for chunk in chunks]
        count = math.floor(self._config.audit_parts)
        count += _chance.random() < self._config.audit_parts - count
        return _chance.sample(made, min(count, len(made)))

    async def _look(self, case: _Case, chunk: int, patience_s: float = math.inf) -> Verdict:
        """Makes `chunk` once more. Who altered it is brought to court."""
        accused = case.root(chunk)
        payloads: dict[str, bytes] = {}
        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:
                for member in case.weighty:
                    nursery.start_soon(self._part_of, case, member, chunk, payloads)
        missing = [member.peer for member in case.weighty if member.peer not in payloads]
        if missing:
            return Verdict("", "unanswered", f"{', '.join(missing)} did not hand out chunk {chunk}")
        evidence = Accusation(
            self._me,
            accused,
            chunk,
            case.declaration,
            tuple([case.stated[member.peer] for member in case.weighty]),
            tuple([payloads[member.peer] for member in case.weighty]),
            case.signed[accused],
        )
        settings = self._config.reduce
        verdict = await aside(
            sum(map(len, payloads.values())), lambda: recheck(evidence, case.layout, settings)
        )
        self._count.parts += 1
        if verdict.why != "unfounded":
            self._run.court.convict(verdict, pack_proof(evidence, case.layout, settings))
            self._trouble((verdict.guilty,), "mismatch")
        elif verdict.detail != HONEST:
            log.error(
                "chunk %d of epoch %d cannot be audited: %s", chunk, case.declaration.epoch, verdict.detail
            )
        return verdict

    async def _part_of(self, case: _Case, member: Member, chunk: int, payloads: dict[str, bytes]) -> None:
        peer, statement = member.peer, case.stated[member.peer]
        if peer == self._me:
            if case.own is not None:
                payloads[peer] = case.own(chunk)
            return
        patience_s = self._config.link_silence_s
        blame_s = trio.current_time() + patience_s
        why = "silent"
        while True:
            try:
                ask = AskPart(self._run.run_id, self._tag, statement.name, chunk)
                data = bytes((await self._rpc.call(peer, PART, ask, deadline_s=2 * patience_s)).data.data)
                self._count.bytes_received += len(data)
                if blake3(data).digest() == statement.hashes[HASH_BYTES * chunk : HASH_BYTES * (chunk + 1)]:
                    payloads[peer] = data
                    return
                if why == "silent":
                    why, blame_s = "mismatch", trio.current_time()
            except P2pError as problem:
                log.debug("no part of %s: %s", peer, problem)
            if trio.current_time() >= blame_s:
                self._trouble((peer,), why)
                self._count.unanswered += 1
                blame_s = trio.current_time() + patience_s
            await trio.sleep(PAUSE_S)

    async def compare(self, value: Value, voters: Sequence[str]) -> None:
        """Something else was decided than what was made here, of the same contributions: somebody has given, and
        signed, one result to this member and another one to those who voted."""
        case = self._case
        if case is None or case.name != declared(value.declaration) or not case.digest:
            return
        if value_digest(value.declaration, case.digest) == value.digest:
            return
        log.warning("epoch %d is decided otherwise than it was made here", value.declaration.epoch)
        with trio.move_on_after(self._config.link_silence_s):
            await case.heard.wait()
            for voter in voters:
                for peer, mine in case.signed.items():
                    if self._me in (voter, peer) or self._run.court.is_guilty(peer):
                        continue
                    ask = AskStatement(self._run.run_id, self._tag, RESULT, case.name, peer)
                    try:
                        other = await self._rpc.call(voter, STATEMENT, ask)
                    except P2pError as problem:
                        log.debug("%s does not tell what %s has signed: %s", voter, peer, problem)
                        continue
                    evidence = Equivocation(self._me, mine, other)
                    verdict = recheck(evidence, case.layout, self._config.reduce)
                    if verdict.guilty == peer:
                        proof = pack_proof(evidence, case.layout, self._config.reduce)
                        self._run.court.convict(verdict, proof)

    async def audit(self, chunks: Sequence[int] | None, within_s: float) -> list[Verdict]:
        """Parts of the last result, all that others made by default, on demand: as long as everybody keeps what it
        contributed (`RunConfig.audit_keep`), or is still in the round. LocalFault, NoQuorum."""
        case = self._case
        if case is None or not case.passed:
            raise LocalFault(f"there is no audited result of {self._tag!r} here")
        made = {chunk for peer, numbers in case.roots.items() if peer != self._me for chunk in numbers}
        if chunks is not None and not made.issuperset(chunks):
            raise LocalFault(
                f"others made {len(made)} of {case.layout.chunks} chunks, and not all of {list(chunks)}"
            )
        verdicts = [
            await self._look(case, chunk, within_s) for chunk in (sorted(made) if chunks is None else chunks)
        ]
        unanswered = next((verdict for verdict in verdicts if verdict.why == "unanswered"), None)
        if unanswered is not None:
            raise NoQuorum(f"the audit is not finished: {unanswered.detail}", case.declaration.epoch)
        return verdicts

    # ---- what it answers

    def _own_part(self, chunk: int) -> bytes:
        if self._kept:
            return self._kept[chunk]
        if self._exchange is None:
            raise MisuseError("the attempt is over")
        return bytes(self._exchange.contribution(chunk))

    def _kept_part(self, chunk: int) -> bytes:
        return self._kept[chunk]

    def _sign_result(self, case: _Case) -> None:
        exchange = self._exchange
        if exchange is None or case.name in self._signed or self._me not in case.roots:
            return
        statement = self._sign(result_statement(case.declaration, self._me, exchange.result_hashes()))
        self._signed[case.name] = case.signed[self._me] = statement
        while len(self._signed) > SIGNED_KEPT_MAX:
            del self._signed[next(iter(self._signed))]

    def on_statement(self, ask: AskStatement) -> Statement:
        """RpcRefusal for what was never said, or is not kept any more."""
        case = self._case
        if ask.kind == RESULT and ask.of not in ("", self._me):
            told = None if case is None or case.name != ask.name else case.signed.get(ask.of)
            if told is None:
                raise RpcRefusal("absent", "this peer has signed nothing of that name for us")
            return told
        found = self._mine if ask.kind == CONTRIBUTION else self._signed.get(ask.name)
        if ask.kind == RESULT and found is None and case is not None and case.name == ask.name:
            try:
                self._sign_result(case)
            except MisuseError:
                raise RpcRefusal("absent", "these results are not made yet") from None
            found = self._signed.get(ask.name)
        if found is None or found.name != ask.name:
            raise RpcRefusal("absent", "nothing of this name was signed here")
        self._count.bytes_sent += len(found.hashes)
        return found

    def on_part(self, peer: str, ask: AskPart) -> Part:
        """RpcRefusal for those who are no members, who ask too often, and once the attempt is over."""
        case, mine = self._case, self._mine
        if case is None or mine is None or mine.name != ask.name or case.declaration.member(peer) is None:
            raise RpcRefusal("absent", "no such contribution of a round that you are in")
        if case.own is None or not 0 <= ask.chunk < case.layout.chunks:
            raise RpcRefusal("absent", "this part is not kept")
        self._handed[peer] += 1
        if self._handed[peer] > max(PARTS_PER_PEER_MAX, case.layout.chunks if self._kept else 0):
            raise RpcRefusal("busy", "this peer has asked for too many parts")
        data = case.own(ask.chunk)
        self._count.bytes_sent += len(data)
        return Part(Tensor("uint8", (len(data),), data))


class AuditServer:
    """Answers for all runs of a node; `find(run, tag)` gives None for tags that are not audited here."""

    def __init__(self, rpc: Rpc, find: Callable[[str, str], Auditor | None]) -> None:
        self._find = find
        rpc.serve(STATEMENT, self._statement)
        rpc.serve(PART, self._part)

    def _auditor(self, run: str, tag: str) -> Auditor:
        found = self._find(run, tag)
        if found is None:
            raise RpcRefusal("absent", "this node audits no such tag")
        return found

    async def _statement(self, call: Call, ask: AskStatement) -> Statement:
        await trio.lowlevel.checkpoint()
        return self._auditor(ask.run, ask.tag).on_statement(ask)

    async def _part(self, call: Call, ask: AskPart) -> Part:
        await trio.lowlevel.checkpoint()
        return self._auditor(ask.run, ask.tag).on_part(str(call.peer), ask)
