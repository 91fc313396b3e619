"""Who belongs to a mesh, as one node knows it: a synchronous core over certificates and signed documents.

Expulsions, rotations and uses of single-use invites only ever grow, so any order of learning them ends in
equal rosters. The rules, which every member applies alike:

- A chain of certificates from the founding key proves membership. Certificates do not expire.
- The founding key may expel anybody, a member those that came in through it. Of two members that expel one
  another the one nearer to the founding key prevails. What the expelled signed as expulsions no longer counts.
- Through an expelled member nobody comes in any more, also not by certificates dated back: of those that came
  in through it the expulsion names who stays.
- Of two devices that used one single-use invite, on two sides of a partition, the one stays that was let in
  nearer to the founding key, then the earlier one; the other is out once both are known.
- The founding key alone announces a new swarm key. The old one counts until the announced time is over; who
  was away is known by its certificate and is handed the new key then.

It knows no network, files or clock.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Iterable

import msgpack

from p2p.certs import (
    INVITE_ID_BYTES,
    KEEP_MAX,
    Cert,
    Chain,
    Document,
    Expulsion,
    Rotation,
    Ticket,
    Use,
    chain_problem,
    decode_chain,
    decode_document,
    encode_chain,
    key_id_of,
)
from p2p.errors import LocalFault, ProtocolViolation
from p2p.identity import Identity, PeerId

EXPULSIONS_MAX = 1024
EXPULSIONS_PER_SIGNER_MAX = 256
USES_MAX = 1024
USES_PER_INVITE_MAX = 8
ROTATIONS_MAX = 32
MEMBERS_MAX = 4096
REFUSALS_MAX = 64
STATE_BYTES_MAX = 96 << 20


class NotAdmitted(Exception):
    """An invite that lets nobody in (any more); the message says why."""


class Roster:
    """One mesh as `identity` knows it. `swarm_key` is None for a public mesh, where certificates are not asked for.

    `ticket` is what an invite gave (empty once it was redeemed), `founding` the founding key where this node
    holds it.
    """

    def __init__(
        self,
        identity: Identity,
        mesh_id: str,
        founder: PeerId,
        swarm_key: bytes | None,
        *,
        ticket: bytes = b"",
        founding: Identity | None = None,
    ) -> None:
        self.mesh_id = mesh_id
        self.founder = founder
        self.me = identity.peer_id
        self.public = swarm_key is None
        self.chain: Chain = ()
        self.ticket = ticket
        self.founding = founding
        self.counts: Counter[str] = Counter()
        self.refusals: dict[PeerId, str] = {}
        self.version = 0
        self._identity = identity
        first = swarm_key or b""
        self._keys: dict[bytes, bytes] = {key_id_of(first): first}
        self._members: dict[PeerId, Chain] = {}
        self._expulsions: dict[tuple[PeerId, PeerId], Expulsion] = {}
        self._rotations: dict[bytes, Rotation] = {}
        self._uses: dict[bytes, dict[PeerId, Chain]] = {}
        self._out: dict[PeerId, frozenset[PeerId]] = {}

    # ---- standing

    def certify_self(self, now_s: float) -> None:
        """The founding key lets this node in; nothing where it already is. Needs `founding`."""
        if self.founding is not None and not self.chain:
            self.chain = (Cert.sign(self.founding, self.mesh_id, self.me, now_s),)
            self.version += 1

    @property
    def expelled(self) -> frozenset[PeerId]:
        """Peers that were put out by name."""
        return frozenset(self._out)

    @property
    def members(self) -> dict[PeerId, Chain]:
        """Chains of members met or heard of, this node's left out; not all need be in good standing now."""
        return dict(self._members)

    def problem(self, peer: PeerId, chain: Chain | None = None) -> str:
        """Why `peer` (by `chain`, else by what is known of it) is no member in good standing, or an empty text."""
        if peer in self._out:
            return "it was expelled from this mesh"
        if self.public:
            return ""
        if chain is None:
            chain = self.chain if peer == self.me else self._members.get(peer, ())
        return (
            chain_problem(chain, self.mesh_id, self.founder, peer) or self._broken(chain) or self._used(chain)
        )

    def lost(self) -> tuple[PeerId, ...]:
        """Everybody known who is no member (any more): expelled, let in by an expelled one, or by a used invite."""
        known = () if self.public else self._members
        return tuple(sorted({*self._out, *(peer for peer in known if self._fallen(peer))}))

    def _fallen(self, peer: PeerId) -> bool:
        chain = self._members[peer]  # its signatures were checked when it was taken in
        return peer in self._out or bool(self._broken(chain) or self._used(chain))

    def _broken(self, chain: Chain) -> str:
        for cert in chain:
            kept = self._out.get(cert.issuer)
            if kept is not None and cert.subject not in kept:
                return "a member that was expelled let it in"
        return ""

    def _used(self, chain: Chain) -> str:
        for cert in chain:
            if cert.once and self._winner(cert.invite) not in (None, cert.subject):
                return "its invite served for one device, and another one had used it"
        return ""

    def _winner(self, invite: bytes) -> PeerId | None:
        """Whom a single-use invite let in, of all who are known to have used it."""
        uses = self._uses.get(invite, {})
        if len(uses) < 2:
            return next(iter(uses), None)
        whole = [(len(c), c[-1].issued_at_s, peer) for peer, c in uses.items() if not self._broken(c)]
        return min(whole)[2] if whole else None

    # ---- learning

    def refused(self, by: PeerId, reason: str) -> None:
        """`by` would not connect for `reason` (empty: it did). A hint for this node's owner and no proof."""
        self.refusals.pop(by, None)
        if reason:
            self.refusals[by] = reason
            if len(self.refusals) > REFUSALS_MAX:
                del self.refusals[next(iter(self.refusals))]

    def learn(self, peer: PeerId, chain: Chain) -> str:
        """Take in what `peer` shows of itself; returns `problem` of it."""
        wrong = chain_problem(chain, self.mesh_id, self.founder, peer)
        if wrong or self.public:
            return self.problem(peer, chain)
        for k, cert in enumerate(chain):
            if cert.once:
                self._use(chain[: k + 1])
        wrong = self.problem(peer, chain)
        known = self._members.get(peer)
        room = len(self._members) < MEMBERS_MAX
        better = room if known is None else known != chain and not wrong and bool(self.problem(peer))
        if peer != self.me and better:
            self._members[peer] = chain
            self.version += 1
        return wrong

    def learn_encoded(self, peer: PeerId, data: bytes) -> str:
        """As `learn`, from bytes. Raises ProtocolViolation (counted) for what is no chain."""
        try:
            return self.learn(peer, decode_chain(data))
        except ProtocolViolation:
            self.counts["documents_refused"] += 1
            raise

    def encoded_chain(self) -> bytes:
        """This node's own chain for others; empty where it has none."""
        return encode_chain(self.chain) if self.chain else b""

    def take(self, data: bytes) -> bool:
        """Take in one document; True if it was new. Raises ProtocolViolation (counted) for what may not be believed."""
        try:
            return self._take(decode_document(data))
        except ProtocolViolation:
            self.counts["documents_refused"] += 1
            raise

    def documents(self) -> tuple[bytes, ...]:
        """Everything that other members must know too, what matters most first, in the same order on all."""
        expulsions = sorted(self._expulsions.values(), key=lambda one: (one.depth, one.encode()))
        uses = sorted(Use(chain).encode() for by in self._uses.values() for chain in by.values())
        rotations = sorted(one.encode() for one in self._rotations.values())
        return (*rotations, *(one.encode() for one in expulsions), *uses)

    def _take(self, document: Document) -> bool:
        if isinstance(document, Use):
            peer = document.chain[-1].subject
            wrong = chain_problem(document.chain, self.mesh_id, self.founder, peer)
            if wrong:
                raise ProtocolViolation(wrong)
            return self._use(document.chain)
        if isinstance(document, Rotation):
            wrong = document.problem(self.mesh_id, self.founder)
            if wrong:
                raise ProtocolViolation(wrong)
            return self._rotated(document)
        wrong = document.problem(self.mesh_id, self.founder, public=self.public)
        if wrong:
            raise ProtocolViolation(wrong)
        return self._put_out(document)

    def _put_out(self, document: Expulsion) -> bool:
        key = (document.peer, document.signer)
        held = self._expulsions.get(key)
        # Of two by one signer the one that keeps fewer counts: that order needs no clock.
        if held is not None and (len(held.keep), held.encode()) <= (len(document.keep), document.encode()):
            return False
        same = sum(signer == document.signer for _, signer in self._expulsions)
        full = len(self._expulsions) >= EXPULSIONS_MAX or same >= EXPULSIONS_PER_SIGNER_MAX
        if held is None and full and document.signer != self.founder:
            raise ProtocolViolation("there are too many expulsions already")
        self._expulsions[key] = document
        self._reckon()
        self.version += 1
        return True

    def _reckon(self) -> None:
        """Who is out, the expulsions nearest to the founding key first."""
        out: dict[PeerId, frozenset[PeerId]] = {}
        order = sorted(self._expulsions.values(), key=lambda one: (one.depth, one.issued_at_s, one.encode()))
        for one in order:
            if one.signer not in out:
                kept = frozenset(one.keep)
                out[one.peer] = out[one.peer] & kept if one.peer in out else kept
        self._out = out

    def _use(self, chain: Chain) -> bool:
        last = chain[-1]
        uses = self._uses.get(last.invite)
        if uses is None:
            if len(self._uses) >= USES_MAX:
                del self._uses[self._use_to_forget()]
            uses = self._uses[last.invite] = {}
        if last.subject in uses or len(uses) >= USES_PER_INVITE_MAX:
            return False
        uses[last.subject] = chain
        self.version += 1
        return True

    def _use_to_forget(self) -> bytes:
        """The oldest by whoever let in most, so that nobody can push out what others said."""
        by = {invite: next(iter(uses.values()))[-1].issuer for invite, uses in self._uses.items()}
        most = Counter(by.values()).most_common(1)[0][0]
        return next(invite for invite, issuer in by.items() if issuer == most)

    def _rotated(self, document: Rotation) -> bool:
        if document.key_id in self._rotations:
            return False
        kept = sorted([*self._rotations.values(), document], key=lambda one: (one.seq, one.key_id))[
            -ROTATIONS_MAX:
        ]
        if document not in kept:
            return False
        self._rotations = {one.key_id: one for one in kept}
        self.version += 1
        return True

    # ---- acting

    def invite(self, now_s: float, ttl_s: float | None, *, once: bool) -> bytes:
        """A ticket for an invite of this node's. Raises LocalFault where it is no member in good standing."""
        wrong = self.problem(self.me)
        if wrong:
            raise LocalFault(f"this node cannot invite: {wrong}")
        expires_at_s = float("inf") if ttl_s is None else now_s + ttl_s
        invite = secrets.token_bytes(INVITE_ID_BYTES)
        return Ticket.sign(self._identity, self.mesh_id, self.chain, invite, expires_at_s, once).encode()

    def admit(self, peer: PeerId, ticket: bytes, now_s: float) -> Chain:
        """Let `peer` in by an invite's ticket; asked again it gets the same. Raises NotAdmitted."""
        try:
            asked = Ticket.decode(ticket)
        except ProtocolViolation as error:
            raise NotAdmitted(str(error)) from None
        if self.problem(self.me):
            raise NotAdmitted("neither of the two is a member yet")
        if peer in self._out:
            raise NotAdmitted("it was expelled from this mesh")
        wrong = self.problem(asked.issuer, asked.chain)
        if wrong or not asked.valid(self.mesh_id):
            raise NotAdmitted(f"the invite is void: {wrong or 'its signature is not good'}")
        if asked.issuer == peer:
            raise NotAdmitted("the invite is its own")
        known = self._members.get(peer, ())
        if known and known[-1].invite == asked.id and not self.problem(peer):
            return known
        if now_s >= asked.expires_at_s:
            raise NotAdmitted("the invite has expired; ask for a new one with `shoal invite`")
        if asked.once and self._uses.get(asked.id, {}).keys() - {peer}:
            raise NotAdmitted("the invite was for one device, and another one has used it")
        cert = Cert.sign(self._identity, self.mesh_id, peer, now_s, invite=asked.id, once=asked.once)
        chain = (*self.chain, cert)
        wrong = self.learn(peer, chain)
        if wrong:
            raise NotAdmitted(wrong)
        return chain

    def admitted(self, chain: Chain) -> bool:
        """This node was let in: keep its chain, the invite has served. False where it is no good."""
        if self.problem(self.me, chain):
            return False
        self.chain, self.ticket = chain, b""
        self.learn(self.me, chain)
        self.version += 1
        return True

    def expel(self, peer: PeerId, now_s: float, *, branch: bool = False) -> Expulsion:
        """Put `peer` out, and with `branch` all that came in through it. Raises LocalFault where this node may not."""
        chain = self._members.get(peer, ())
        if peer == self.me:
            chain = self.chain
        if not chain and not self.public:
            raise LocalFault(f"{peer} is not known to this node as a member")
        above = [cert.issuer for cert in chain]
        signer = self.founding or (self._identity if self.me in above else None)
        if signer is None or (signer is not self.founding and peer == self.me):
            raise LocalFault(
                "only the node that founded the mesh, or the one that let that member in, can expel it"
            )
        stay = [c[k + 1].subject for c, k in self._below(peer) if not branch and not self._broken(c)]
        keep = tuple(dict.fromkeys(one for one in stay if one not in self._out))[:KEEP_MAX]
        document = Expulsion.sign(signer, self.mesh_id, peer, chain, keep, now_s)
        # What it expelled itself would come back with its word: the signer stands above those too.
        orphaned = [one for one in self._expulsions.values() if one.signer == peer and one.peer in self._out]
        for one in orphaned:
            again = Expulsion.sign(signer, self.mesh_id, one.peer, one.chain, one.keep, now_s)
            self.take(again.encode())
        self.take(document.encode())
        return document

    def _below(self, peer: PeerId) -> Iterable[tuple[Chain, int]]:
        """Chains that go through `peer`, and where in them it is the subject."""
        for chain in (*self._members.values(), self.chain):
            for k, cert in enumerate(chain[:-1]):
                if cert.subject == peer:
                    yield chain, k

    # ---- swarm keys

    def rotate(self, now_s: float, overlap_s: float) -> Rotation:
        """A new swarm key from now on. Raises LocalFault without the founding key and in a public mesh."""
        if self.public or self.founding is None:
            why = (
                "a public mesh has no swarm key"
                if self.public
                else "only the node that founded the mesh can do it"
            )
            raise LocalFault(f"the swarm key cannot be changed here: {why}")
        key = secrets.token_bytes(32)
        seq = 1 + max((one.seq for one in self._rotations.values()), default=0)
        document = Rotation.sign(self.founding, self.mesh_id, seq, key_id_of(key), now_s, overlap_s)
        self.take(document.encode())
        self.give_key(key)
        return document

    def give_key(self, key: bytes) -> bool:
        """Take a swarm key that was announced; False for any other."""
        if key_id_of(key) not in self._rotations or key_id_of(key) in self._keys:
            return False
        self._keys[key_id_of(key)] = key
        self.version += 1
        return True

    def wanted_keys(self) -> tuple[bytes, ...]:
        """Id of the newest announced key, where this node does not have it yet."""
        newest = max(self._rotations.values(), key=lambda one: (one.seq, one.key_id), default=None)
        return () if newest is None or newest.key_id in self._keys else (newest.key_id,)

    def key(self, key_id: bytes) -> bytes | None:
        """A key of this mesh by its id, for members in good standing only."""
        return self._keys.get(key_id) if key_id in self._rotations else None

    @property
    def swarm_key(self) -> bytes | None:
        """The newest key that this node holds; None in a public mesh."""
        return None if self.public else self._keys[max(self._keys, key=self._age)]

    def accepted_keys(self, now_s: float) -> dict[bytes, bytes]:
        """By id, newest first: the newest key held, and older ones that still count."""
        newest_first = sorted(self._keys, key=self._age, reverse=True)
        return {
            key_id: self._keys[key_id]
            for place, key_id in enumerate(newest_first)
            if place == 0 or now_s < self._counts_until_s(key_id)
        }

    def _age(self, key_id: bytes) -> tuple[int, bytes]:
        rotation = self._rotations.get(key_id)
        return (0, b"") if rotation is None else (rotation.seq, key_id)

    def _counts_until_s(self, key_id: bytes) -> float:
        """Until when a key counts beside the one announced after it."""
        after = [one for one in self._rotations.values() if (one.seq, one.key_id) > self._age(key_id)]
        following = min(after, key=lambda one: (one.seq, one.key_id), default=None)
        return float("inf") if following is None else following.issued_at_s + following.overlap_s

    # ---- keeping

    def dump(self) -> bytes:
        """All of this but the founding key, for `load`; at most STATE_BYTES_MAX bytes. Holds the swarm keys."""
        state = {
            "version": 1,
            "chain": encode_chain(self.chain),
            "ticket": self.ticket,
            "keys": list(self._keys.values()),
            "documents": list(self.documents()),
            "members": {str(peer): encode_chain(chain) for peer, chain in self._members.items()},
        }
        packed: bytes = msgpack.packb(state, use_bin_type=True)
        return packed

    def load(self, data: bytes) -> None:
        """Take in what `dump` gave. Raises LocalFault where it cannot be read; what is in it is verified anew."""
        try:
            state = msgpack.unpackb(data, raw=False, max_ext_len=0)
            chain, ticket = decode_chain(state["chain"]), bytes(state["ticket"])
            keys = [bytes(key) for key in state["keys"]]
            documents = [decode_document(one) for one in state["documents"]]
            members = {PeerId(peer): decode_chain(one) for peer, one in state["members"].items()}
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            msgpack.UnpackException,
            ProtocolViolation,
        ) as error:
            raise LocalFault(f"what was kept of the mesh cannot be read ({type(error).__name__})") from None
        for document in documents:
            with contextlib.suppress(ProtocolViolation):
                self._take(document)
        for peer, one in members.items():
            self.learn(peer, one)
        for key in keys:
            self._keys.setdefault(key_id_of(key), key)
        if chain:
            self.chain = chain
            self.ticket = ticket or self.ticket if self.problem(self.me) else b""
        else:
            self.ticket = self.ticket or ticket
