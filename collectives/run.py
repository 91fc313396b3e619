"""A run at one node: its tags, its members, its shared state. `open_run` is how a caller gets one.

It joins the parts: chains decide (`tag`), planes move bytes (`data`), letters and heartbeats travel (`wire`), states
are published and fetched (`state_rpc`). It knows nothing of what is trained.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trio

from collectives.agreement import (
    Alive,
    Config,
    Message,
    Met,
    Offer,
    Received,
    Suspected,
    founding,
    pack_message,
    unpack_message,
)
from collectives.audit import AuditCount
from collectives.carry import Carrier
from collectives.codecs import codec
from collectives.config import RunConfig
from collectives.court import Court
from collectives.data import Plane
from collectives.data_links import Purpose, Uplink
from collectives.errors import Behind, LocalFault, NoQuorum, RemoteFault, ResourceLimit, Superseded
from collectives.given import Input, input_of, storages
from collectives.gossip import Gossip, Gossiped
from collectives.journal import Journal
from collectives.reduce.evidence import Verdict, layout_name
from collectives.reduce.feedback import Feedback
from collectives.reduce.robust import norm_of
from collectives.round import Reduced, Round, new_nonce
from collectives.service import Collectives
from collectives.state import Shelf, Snapshot
from collectives.state_rpc import Fetch, Head, aside, ask_heads, choose_head
from collectives.tag import Outcome, TagShell
from collectives.watch import Watch
from collectives.wire import Letter, Post
from p2p import Identity, Link, Links, PeerEvent, PeerId, ProtocolViolation, Rpc

log = logging.getLogger("shoal.collectives")

DEFAULT_TAG = "outer"
RUN_CHARS_MAX = 64
HEADS_WITHIN_S = 3.0
_INCARNATION_BITS = 52


class Run:
    """Made by `open_run`. One trio event loop; no method is safe from another thread."""

    def __init__(
        self,
        service: Collectives,
        run_id: str,
        config: RunConfig,
        founders: Sequence[str],
        contacts: Sequence[str],
        directory: Path | None,
    ) -> None:
        self.run_id = run_id
        self.config = config
        self.me = str(service.host.peer_id)
        self._service = service
        self._founders = tuple(dict.fromkeys(founders))
        self._contacts = dict.fromkeys(peer for peer in contacts if peer != self.me)
        name = hashlib.sha256(run_id.encode()).hexdigest()[:24]
        self._directory = None if directory is None else directory / name
        self._journal = Journal.open(None if self._directory is None else self._directory / "rounds")
        self._tags: dict[str, TagShell] = {}
        self._shelves: dict[str, Shelf] = {}
        self._posts: dict[str, Post] = {}
        self._carrier = Carrier(
            run_id,
            self.me,
            service.identity,
            lambda peer, letter: self._post(peer).send(letter),
            self._on_own_letter,
            self.reaches,
            self._known,
        )
        self._watch = Watch(config.detector, self._beat, self._on_health, self._mark)
        self._nursery: trio.Nursery | None = None
        self._rounds: set[str] = set()
        self.audits = AuditCount()
        proofs = None if self._directory is None else self._directory / "proofs"
        self.court = Court(service.rpc, run_id, self.me, proofs, self._others, self._on_guilty)
        self.uplink = Uplink(config.uplink_bps)
        self.gossip = Gossip(service.rpc, service.links, run_id, self.me, self.uplink, config.reduce)

    # ---- rounds

    @asynccontextmanager
    async def round(self, tag: str = DEFAULT_TAG, *, deadline_s: float | None = None) -> AsyncIterator[Round]:
        """A round of `tag`, which ends within `deadline_s` seconds. Rounds of different tags go on at once. Raises
        Superseded while one of the same tag is open."""
        if self._nursery is None:
            raise LocalFault("the run is not open")
        if tag in self._rounds:
            raise Superseded(f"a round of {tag!r} is open already", self.epoch(tag) + 1)
        within_s = self.config.round_deadline_s if deadline_s is None else deadline_s
        self._rounds.add(tag)
        self._watch.rounds_open += 1
        try:
            yield Round(self, tag, trio.current_time() + within_s)
        finally:
            self._watch.rounds_open -= 1
            self._rounds.discard(tag)

    async def reduce(
        self,
        tag: str,
        tensors: Sequence[torch.Tensor],
        weight: float,
        deadline_s: float,
        out: Sequence[torch.Tensor] | None = None,
        feedback: Feedback | None = None,
    ) -> Reduced:
        """Round.reduce. `deadline_s` by trio's clock."""
        shell = self._tag(tag)
        began_s = trio.current_time()
        if shell.missed and shell.missed[0].epoch == shell.caller_epoch + 1:
            first, last = shell.missed[0], shell.missed[-1].epoch
            counted = first.value.declaration.member(self.me) is not None
            raise Behind("a result that was missed is here: catch_up first", first.epoch, last, counted)
        given = input_of(new_nonce(), tensors, weight, out, feedback)
        # Before anybody hears of it: what cannot be averaged is nobody else's trouble.
        norm = await aside(
            given.layout.tensor_bytes, lambda: norm_of(tensors, given.layout, feedback, weight)
        )
        offer = self._offer(shell, given, norm if self.config.check_norms else 0.0)
        if shell.plane.auditor is not None:
            commit = await shell.plane.auditor.prepare(given, offer.epoch + 1, offer.layout)
            offer = replace(offer, commit=commit)
        shell.plane.open_attempt(given)
        try:
            outcome = await shell.attempt_round(offer, deadline_s)
            try:
                if shell.plane.auditor is not None:
                    await shell.plane.auditor.compare(outcome.value, outcome.certificate.voters)
                await shell.plane.drain(deadline_s)
            except trio.Cancelled:
                shell.missed.append(outcome)  # it is decided, and the next catch_up gives it
                raise
        finally:
            shell.plane.close_attempt(given.nonce)
        shell.caller_epoch = outcome.epoch
        shell.transfer_s = 0.0
        if feedback is not None:
            feedback.commit(tensors, codec(outcome.value.declaration.codec))
        result = self._reduced(shell, outcome, began_s)
        if out is None or storages(result.tensors) == storages(out):
            return result
        for tensor, found in zip(out, result.tensors, strict=True):
            tensor.copy_(found)  # it was fetched, or made anew after a vote
        return replace(result, tensors=tuple(out))

    def _offer(self, shell: TagShell, given: Input, norm: float) -> Offer:
        newest = self._shelf(shell.tag).newest
        state = newest.digest if newest is not None and newest.epoch == shell.caller_epoch else b""
        place, config = self._service.place(), self.config
        return Offer(
            epoch=shell.caller_epoch,
            nonce=given.nonce,
            weight=float(given.weight),
            layout=layout_name(given.layout, self.config.reduce),
            state=state,
            codec=self.config.codec,
            bandwidth_bps=shell.plane.bandwidth_bps(),
            group=place.group if config.group is None else config.group,
            dialable=place.dialable if config.dialable is None else config.dialable,
            norm=norm,
        )

    def _reduced(self, shell: TagShell, outcome: Outcome, began_s: float) -> Reduced:
        if outcome.whole is None:
            raise LocalFault(f"the result of epoch {outcome.epoch} was decided and is not here")
        declaration = outcome.value.declaration
        members = self.config.reduce.weighed(declaration.members)
        return Reduced(
            tensors=tuple(outcome.whole.tensors()),
            epoch=outcome.epoch,
            tag=shell.tag,
            members=members,
            weight=sum(member.weight for member in members),
            digest=outcome.value.digest,
            left_out=declaration.left_out,
            certificate=outcome.certificate,
            bytes_sent=outcome.whole.traffic.bytes_out,
            bytes_received=outcome.whole.traffic.bytes_in,
            took_s=trio.current_time() - began_s,
        )

    def epoch(self, tag: str = DEFAULT_TAG) -> int:
        """Of the state that this caller stands on: the last result it was given, or the state it published."""
        return self._tag(tag).caller_epoch

    def committed(self, tag: str = DEFAULT_TAG) -> int:
        """The last epoch known here to be decided; -1 where nothing is known yet."""
        return self._tag(tag).chain.epoch

    def members(self, tag: str = DEFAULT_TAG) -> tuple[str, ...]:
        """The members of the last epoch known here."""
        config = self._tag(tag).chain.config
        return () if config is None else config.peers

    def catch_up(self, tag: str = DEFAULT_TAG) -> tuple[Reduced, ...]:
        """Results that were decided after this caller was told an error, in order: they count like those of its own
        rounds, and its epoch moves on. Empty if there are none, or if only a transfer of the state helps."""
        shell = self._tag(tag)
        results = []
        while shell.missed:
            outcome = shell.missed.popleft()
            if outcome.epoch == shell.caller_epoch + 1 and outcome.whole is not None:
                results.append(self._reduced(shell, outcome, trio.current_time()))
                shell.caller_epoch = outcome.epoch
        return tuple(results)

    async def average(
        self,
        tensors: Sequence[torch.Tensor],
        weight: float = 1.0,
        *,
        tag: str = DEFAULT_TAG,
        deadline_s: float = 30.0,
    ) -> Gossiped:
        """The mean with one other member that calls this too, where the run allows it (`RunConfig.gossip`): for the
        time in which rounds raise NoQuorum. See `Fork` for what follows. Raises LocalFault, NoQuorum."""
        if not self.config.gossip:
            raise LocalFault("this run does not allow pairwise averages (RunConfig.gossip)")
        given = input_of(new_nonce(), tensors, weight, None, None)
        name = layout_name(given.layout, self.config.reduce)
        until_s = trio.current_time() + deadline_s
        return await self.gossip.average(tag, given, name, self.config.codec, self._others, until_s)

    # ---- audits

    async def audit(
        self, chunks: Sequence[int] | None = None, tag: str = DEFAULT_TAG, *, within_s: float = 30.0
    ) -> tuple[Verdict, ...]:
        """Makes these parts of the last result once more (all that others made, by default), from what the members
        still keep of their contributions (`RunConfig.audit_keep`). A verdict each: "unfounded" is well made. Who is
        guilty stands in `guilty` from then on. Raises LocalFault without `reduce.audit`, NoQuorum when parts are not
        to be had."""
        auditor = self._tag(tag).plane.auditor
        if auditor is None:
            raise LocalFault("this run has no audits (ExchangeSettings.audit)")
        return tuple(await auditor.audit(chunks, within_s))

    @property
    def guilty(self) -> Mapping[str, Verdict]:
        """Who was proved to have altered what it was to add up, or to have signed what cannot be; this node has no
        more to do with them. `court.proof(peer)` are bytes that `verify_proof` takes, anywhere."""
        return dict(self.court.verdicts)

    def report(self) -> dict[str, Any]:
        """For people and programs, as JSON has it: the last epoch by tag, parts audited, who is guilty of what."""
        return {
            "epochs": {tag: shell.chain.epoch for tag, shell in self._tags.items()},
            "audited_parts": self.audits.parts,
            "guilty": {peer: verdict.why for peer, verdict in self.court.verdicts.items()},
        }

    # ---- state

    async def publish(
        self, state: Mapping[str, torch.Tensor], epoch: int | None = None, tag: str = DEFAULT_TAG
    ) -> Snapshot:
        """Share the state after `epoch` (by default, that of the last result): an immutable copy, named by hashes,
        which joiners may fetch. All members must publish equal states for an epoch, or none."""
        shell = self._tag(tag)
        epoch = shell.caller_epoch if epoch is None else epoch
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        snapshot = await aside(nbytes, lambda: Snapshot.take(state, epoch))
        self._shelf(tag).put(snapshot, trio.current_time())
        shell.caller_epoch = max(epoch, 0)
        while shell.missed and shell.missed[0].epoch <= epoch:
            shell.missed.popleft()
        return snapshot

    async def fetch_state(
        self, tag: str = DEFAULT_TAG, *, epoch_min: int = 0, deadline_s: float = 600.0
    ) -> Snapshot:
        """The newest state that most of those who have one hold, from all of them at once. The caller then stands on
        its epoch; the snapshot is also served from here. Raises NoQuorum when nobody has one in time.

        Rounds go on meanwhile. Where they leave it behind again, whoever is asked for the next state hears how long
        this one took, and the next rounds wait for it within their grace (`Settings.grace_max_s`)."""
        shell = self._tag(tag)
        problem: Exception = NoQuorum("nobody was asked yet")
        with trio.move_on_after(deadline_s):
            fetch: tuple[Head, Fetch] | None = None
            while True:
                began_s = trio.current_time()
                others = self._others()
                heads = await ask_heads(self._rpc, others, self.run_id, tag, HEADS_WITHIN_S, shell.transfer_s)
                head = choose_head(heads, max(epoch_min, shell.chain.epoch))
                if head is not None:
                    if fetch is None or fetch[0] != head:
                        directory = None if self._directory is None else self._directory / "state"
                        fetch = (head, Fetch(self._rpc, self.run_id, tag, head, directory))
                    sources = [peer for peer, one in heads.items() if one.digest == head.digest]
                    try:
                        snapshot = await fetch[1].run(sources)
                    except RemoteFault as failed:
                        problem = failed
                    else:
                        self._shelf(tag).put(snapshot, trio.current_time())
                        for peer in sources:
                            self._hear(shell, peer, heads[peer].decision)
                        shell.caller_epoch = snapshot.epoch
                        shell.transfer_s = trio.current_time() - began_s
                        while shell.missed and shell.missed[0].epoch <= snapshot.epoch:
                            shell.missed.popleft()
                        return snapshot
                await trio.sleep(HEADS_WITHIN_S / 10)
        raise NoQuorum(f"no state of {tag!r} could be fetched: {problem}", shell.chain.epoch)

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._service.add(self)
                self.court.start(nursery)
                for key in self._journal.names():
                    if key.startswith("chain/"):
                        self._tag(key.removeprefix("chain/"))
                await nursery.start(self._service.watch_peers, self)
                nursery.start_soon(self._watch.run)
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for shell in self._tags.values():
                if shell.attempt is not None:  # nothing would ever end it
                    gone = Superseded("the run is being left", shell.attempt.offer.epoch + 1)
                    shell.abort(shell.attempt.offer.nonce, gone)
            self._service.remove(self)
            self._journal.close()

    async def leave(self, within_s: float = 5.0) -> None:
        """Resign from all tags, so that the others need not wait for this node, nor count it. Final: it comes back as
        a joiner."""
        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                for shell in self._tags.values():
                    nursery.start_soon(shell.leave)
            await trio.sleep(self.config.detector.heartbeat_s)  # the letters are on their way

    def on_peer(self, event: PeerEvent) -> None:
        """A connection came up or ended. The end of one is the surest sign of a death there is."""
        peer = str(event.peer)
        if peer == self.me:
            return
        if event.kind == "down":
            self._watch.down(peer)
            return
        self._watch.up(peer)
        self.court.met(peer)
        if not self._founders or peer in self._founders:
            self._contacts[peer] = None
        for shell in self._tags.values():
            if shell.chain.epoch < 0:
                shell.tell(Met(tuple(self._contacts)))

    async def on_link(self, purpose: Purpose, link: Link) -> None:
        """A data link that a peer opened; it is closed when this returns."""
        peer = str(link.peer)
        if self.court.is_guilty(peer):
            return
        if purpose.pair:
            await self.gossip.on_link(purpose, link)
            return
        if purpose.tag in self._tags or len(self._tags) < self.config.tags_max:
            await self._tag(purpose.tag).plane.use(peer, link)

    def on_letter(self, peer: str, letter: Letter) -> None:
        """Something from an authenticated peer."""
        if self.court.is_guilty(peer):
            return
        if letter.kind == "carry":
            self._carrier.on_letter(peer, letter)
        else:
            self._on_own_letter(peer, letter)

    def _on_own_letter(self, peer: str, letter: Letter) -> None:
        """What `peer` has written to this node, itself or by others."""
        if self.court.is_guilty(peer):
            return
        if letter.kind == "beat":
            self._watch.beat(peer, letter.body)
            return
        self._watch.heard(peer)
        if letter.tag not in self._tags and len(self._tags) >= self.config.tags_max:
            return
        self._hear(self._tag(letter.tag), peer, letter.body)

    def _hear(self, shell: TagShell, peer: str, body: bytes) -> None:
        """A message of agreement, by letter or with a state."""
        try:
            message = unpack_message(body, self.config.agreement.members_max)
        except ProtocolViolation as violation:
            log.warning("a message from %s is refused: %s", peer, violation)
        else:
            shell.tell(Received(peer, message))

    # ---- parts

    @property
    def _rpc(self) -> Rpc:
        return self._service.rpc

    def _others(self) -> list[str]:
        """Peers that may know of the run and can be asked now."""
        connected = {str(peer) for peer in self._service.host.peers()} - {self.me, *self.court.verdicts}
        return sorted(self._known() & connected or connected)

    def reaches(self, peer: str) -> bool:
        """Whether there is a connection to `peer`."""
        return bool(self._service.host.is_connected(PeerId(peer)))

    def _known(self) -> set[str]:
        """Who belongs to the run, as far as this node knows."""
        seats = {peer for shell in self._tags.values() for peer in self._seats(shell)}
        return seats | set(self._contacts) | set(self._founders)

    def _seats(self, shell: TagShell) -> tuple[str, ...]:
        config = shell.chain.config
        return () if config is None else config.peers

    def _tag(self, tag: str) -> TagShell:
        shell = self._tags.get(tag)
        if shell is not None:
            return shell
        if self._nursery is None:
            raise LocalFault("the run is not open")
        if len(self._tags) >= self.config.tags_max or not 0 < len(tag) <= 64:
            raise ResourceLimit(f"a run has at most {self.config.tags_max} tags, of at most 64 characters")
        founder = self.me in self._founders
        config: Config | None = founding(self.run_id, tag, self._founders) if founder else None
        plane = Plane(self._service, self, tag)
        shell = self._tags[tag] = TagShell(
            self.me,
            self.run_id,
            tag,
            config=config,
            settings=self.config.agreement,
            incarnation=0 if founder else secrets.randbits(_INCARNATION_BITS) + 1,
            journal=self._journal,
            plane=plane,
            send=self._send,
            letters_max=self.config.letters_waiting_max,
        )
        plane.tell = shell.tell
        plane.own_fault = shell.abort
        self._nursery.start_soon(shell.run)
        self._nursery.start_soon(plane.run)
        shell.tell(Met((*self._contacts, *self._founders)))
        for peer in (*self._watch.suspects(), *self.court.verdicts):
            shell.tell(Suspected(peer))
        return shell

    def plane(self, tag: str) -> Plane | None:
        """The data plane of a tag, if there is one."""
        shell = self._tags.get(tag)
        return None if shell is None else shell.plane

    def expect(self, tag: str, peer: str, took_s: float) -> None:
        """`peer` was overtaken while it transferred the state, and transfers it again."""
        shell = self._tags.get(tag)
        if shell is not None and not self.court.is_guilty(peer):
            shell.expect(peer, took_s)

    def decision(self, tag: str) -> bytes:
        """What is known here to be decided, as a message for whoever takes over a state; empty where nothing is."""
        shell = self._tags.get(tag)
        message = None if shell is None else shell.chain.decision()
        return b"" if message is None else pack_message(message)

    def shelf(self, tag: str) -> Shelf | None:
        """The published states of a tag, if there is one."""
        return self._shelves.get(tag)

    def _shelf(self, tag: str) -> Shelf:
        if tag not in self._shelves:
            self._shelves[tag] = Shelf(self.config.states_kept_max, self.config.state_lease_s)
        return self._shelves[tag]

    def _send(self, tag: str, peer: str, message: Message) -> None:
        self._watch.follow(peer)
        self._write(peer, Letter("agree", tag, pack_message(message)))

    def _write(self, peer: str, letter: Letter) -> None:
        self._post(peer).send(letter)
        if not self.reaches(peer):
            self._carrier.send(peer, letter)  # perhaps neither of the two can be dialled

    def _post(self, peer: str) -> Post:
        post = self._posts.get(peer)
        if post is None:
            post = self._posts[peer] = Post(self._rpc, self.run_id, peer)
            if self._nursery is not None:
                self._nursery.start_soon(post.run)
        return post

    def _mark(self) -> int:
        """How far the reductions under way are, in bytes; 0 while there are none."""
        return sum(shell.plane.moved_bytes() for shell in self._tags.values())

    def _beat(self, peer: str, body: bytes) -> None:
        self._write(peer, Letter("beat", "", body))

    def _on_guilty(self, peer: str, verdict: Verdict) -> None:
        """It is dead to this node: suspected for ever, and its links are cut."""
        self.audits.convictions += 1
        self._on_health(peer, False)
        for shell in self._tags.values():
            shell.plane.cut(peer)

    def _on_health(self, peer: str, trusted: bool) -> None:
        if trusted and self.court.is_guilty(peer):
            return
        for shell in self._tags.values():
            shell.tell(Alive(peer) if trusted else Suspected(peer))
            shell.plane.on_health(peer, trusted)


@asynccontextmanager
async def open_run(
    host: Any,
    rpc: Rpc,
    links: Links,
    identity: Identity,
    run_id: str,
    config: RunConfig | None = None,
    *,
    founders: Sequence[str] = (),
    contacts: Sequence[str] = (),
    journal_dir: Path | None = None,
) -> AsyncIterator[Run]:
    """Take part in `run_id` while the block lasts.

    `founders` are given once, when the run is created, by the founders themselves and the same to all of them;
    whoever joins later, or has lost its journal, gives none. `contacts` are members to ask first; without them every
    connected peer is asked. With a `journal_dir`, this node may crash at any instant and come back as the member it
    was; without one it comes back as a newcomer. Raises JournalError, and LocalFault for a run that is open already.
    """
    service = Collectives.of(host, rpc, links, identity)
    if not 0 < len(run_id) <= RUN_CHARS_MAX:
        raise LocalFault(f"a run's id must be 1 to {RUN_CHARS_MAX} characters, got {run_id!r}")
    run = Run(service, run_id, config or RunConfig(), founders, contacts, journal_dir)
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(run.run)
        try:
            yield run
        except BaseException as raised:  # noqa: BLE001 - raised again below, as it is and not in a group
            failure = raised
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
