"""Pairwise averages while there is no quorum, and what becomes of them afterwards.

Two members that look for one another average between themselves: the same exchange as in a round, declared by the
pair alone. Nothing is decided by it and no epoch moves. When the parts of the run meet again, the rule is: the
committed state wins; whoever went on without a quorum takes it over by a transfer, and hands in what it learnt since
the fork (`Fork.delta`), with the weight of all that, as its contribution to its next round. So nothing is thrown away,
and nothing is counted twice that the state already holds. A pair that is cut in two at its very last message may
average at one end only; that shifts a mean a little and forks nothing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import trio

from collectives.agreement import Ballot, Declaration, Member
from collectives.data_links import SERVICE, Purpose, Uplink, introduce
from collectives.errors import NoQuorum, RemoteFault
from collectives.given import Input
from collectives.reduce import Exchange, ExchangeSettings
from p2p import Call, Link, Links, Method, P2pError, Rpc, RpcRefusal

log = logging.getLogger("shoal.collectives")

PAUSE_S = 0.1
LINK_WITHIN_S = 5.0
_DONE = b"done"


@dataclass(frozen=True, slots=True)
class Pair:
    """Will you average with me?"""

    run: str
    tag: str
    nonce: int
    weight: float
    layout: bytes
    codec: str


@dataclass(frozen=True, slots=True)
class Paired:
    nonce: int
    weight: float


PAIR = Method("collectives/pair", Pair, Paired, body_bytes_max=4096, deadline_s=3.0)


@dataclass(frozen=True, slots=True)
class Gossiped:
    """The weighted mean of this member's tensors and those of `peer`. `weight` is that of both."""

    tensors: tuple[torch.Tensor, ...]
    peer: str
    weight: float


@dataclass(eq=False, slots=True)
class _Seeker:
    """A caller that looks for a partner. `taken` by a peer's proposal, or by one of its own under way."""

    given: Input
    layout: bytes
    codec: str
    taken: bool = False
    agreed: Declaration | None = None
    link: Link | None = None
    linked: trio.Event = field(default_factory=trio.Event)
    released: trio.Event = field(default_factory=trio.Event)


class Gossip:
    """Of one run at one node."""

    def __init__(
        self, rpc: Rpc, links: Links, run: str, me: str, uplink: Uplink, settings: ExchangeSettings
    ) -> None:
        self._rpc, self._links, self._run, self._me = rpc, links, run, me
        self._uplink = uplink
        self._settings = replace(settings, audit=False)  # nothing is decided, so there is nothing to audit
        self._seekers: dict[str, _Seeker] = {}

    async def average(
        self,
        tag: str,
        given: Input,
        layout: bytes,
        codec: str,
        others: Callable[[], Sequence[str]],
        deadline_s: float,
    ) -> Gossiped:
        """With any of `others()` that is looking too. Raises NoQuorum when there is none before the deadline."""
        if tag in self._seekers:
            raise NoQuorum(f"an average of {tag!r} is sought already")
        seeker = self._seekers[tag] = _Seeker(given, layout, codec)
        try:
            with trio.move_on_at(deadline_s):
                while True:
                    found = await self._try(tag, seeker, others())
                    if found is not None:
                        return found
                    await trio.sleep(random.uniform(0.5, 1.5) * PAUSE_S)  # two who ask each other must part
        finally:
            del self._seekers[tag]
        raise NoQuorum(f"nobody to average {tag!r} with")

    async def _try(self, tag: str, seeker: _Seeker, others: Sequence[str]) -> Gossiped | None:
        if seeker.taken:
            return await self._as_asked(seeker)
        for peer in random.sample(list(others), len(others)):
            given = seeker.given
            seeker.taken = True
            try:
                ask = Pair(self._run, tag, given.nonce, given.weight, seeker.layout, seeker.codec)
                answer = await self._rpc.call(peer, PAIR, ask)
                declaration = self._declared(tag, seeker, peer, answer.nonce, answer.weight)
                async with self._links.open(peer, SERVICE, deadline_s=LINK_WITHIN_S) as link:
                    await introduce(link, Purpose(self._run, tag, str(given.nonce)))
                    return await self._swap(seeker, declaration, link)
            except (P2pError, RemoteFault) as problem:
                log.debug("no average with %s: %s", peer, problem)
            finally:
                seeker.taken = False
        return None

    async def _as_asked(self, seeker: _Seeker) -> Gossiped | None:
        """A peer has asked: its link comes."""
        try:
            with trio.move_on_after(LINK_WITHIN_S):
                await seeker.linked.wait()
            if seeker.link is not None and seeker.agreed is not None:
                return await self._swap(seeker, seeker.agreed, seeker.link)
        except (P2pError, RemoteFault) as problem:
            log.debug("an average broke off: %s", problem)
        finally:
            seeker.taken, seeker.agreed, seeker.link = False, None, None
            seeker.linked = trio.Event()
            seeker.released.set()
            seeker.released = trio.Event()
        return None

    async def on_pair(self, call: Call, ask: Pair) -> Paired:
        """Somebody proposes."""
        await trio.lowlevel.checkpoint()
        seeker = self._seekers.get(ask.tag)
        if seeker is None or seeker.taken:
            raise RpcRefusal("absent", "no average is sought here now")
        if (seeker.layout, seeker.codec) != (ask.layout, ask.codec):
            raise RpcRefusal("absent", "other tensors are averaged here")
        seeker.taken = True
        seeker.agreed = self._declared(ask.tag, seeker, str(call.peer), ask.nonce, ask.weight)
        return Paired(seeker.given.nonce, seeker.given.weight)

    async def on_link(self, purpose: Purpose, link: Link) -> None:
        """The link of a proposal that was agreed to."""
        seeker = self._seekers.get(purpose.tag)
        if seeker is None or seeker.agreed is None or seeker.link is not None:
            return
        partner = seeker.agreed.member(str(link.peer))
        if partner is None or str(partner.nonce) != purpose.pair:
            return
        released = seeker.released
        seeker.link = link
        seeker.linked.set()
        await released.wait()

    def _declared(self, tag: str, seeker: _Seeker, peer: str, nonce: int, weight: float) -> Declaration:
        given = seeker.given
        both = sorted([(self._me, given.nonce, given.weight), (peer, nonce, weight)])
        members = tuple(Member(name, 0, number, heavy) for name, number, heavy in both)
        seed = f"pair {both[0][1]} {both[1][1]}".encode().ljust(32, b".")[:32]
        return Declaration(
            self._run, tag, 1, Ballot(0, both[0][0]), members, seeker.codec, seeker.layout, seed
        )

    async def _swap(self, seeker: _Seeker, declaration: Declaration, link: Link) -> Gossiped:
        """Both ways at once, then a last word from both."""
        given, peer = seeker.given, str(link.peer)
        exchange = Exchange(self._me, given.tensors, declaration, self._settings, layout=given.layout)
        woken = trio.Event()

        async def write() -> None:
            nonlocal woken
            while True:
                frame = exchange.next_frame(peer)
                if frame is not None:
                    await self._uplink.take(len(frame.header) + frame.payload_bytes)
                    await link.send(frame.header, frame.payload)
                elif exchange.done:
                    await link.send(_DONE)
                    return
                else:
                    woken = trio.Event()
                    await woken.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while True:
                header, payload = await link.receive(
                    lambda header, count: (
                        None if header == _DONE else exchange.buffer_for(peer, header, count)
                    )
                )
                if header == _DONE:
                    break
                exchange.arrived(peer, header, payload)
                if exchange.refused:
                    raise RemoteFault(f"{peer}'s values cannot be used: {exchange.refused}")
                woken.set()
        exchange.close()
        weight = sum(member.weight for member in declaration.members)
        return Gossiped(tuple(exchange.result.tensors), peer, weight)


@dataclass(eq=False, slots=True)
class Fork:
    """What one member does on its own since it lost the quorum. `base`: copies of the state it forked from."""

    base: dict[str, torch.Tensor]
    weight: float = 0.0

    @classmethod
    def at(cls, state: Mapping[str, torch.Tensor]) -> Fork:
        return cls({key: tensor.detach().clone() for key, tensor in state.items()})

    def add(self, weight: float) -> None:
        """Something was learnt, of that weight (tokens)."""
        self.weight += weight

    def delta(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What was learnt since the fork, by key: to be handed in, with `weight`, after the committed state has been
        taken over."""
        return {key: state[key] - base for key, base in self.base.items()}
