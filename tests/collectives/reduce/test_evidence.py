"""Evidence: an altered part names its reducer, two stories name who told them, and accusations without proof name the
accuser."""

import random
from dataclasses import replace

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.agreement import Member
from collectives.codecs import codec as codec_of
from collectives.reduce import (
    Accusation,
    Equivocation,
    Exchange,
    ExchangeSettings,
    Layout,
    Verdict,
    commit_of,
    contribution_statement,
    pack_proof,
    recheck,
    result_statement,
    verify_proof,
)
from collectives.reduce.contribution import Contribution
from collectives.reduce.evidence import HONEST, layout_name
from collectives.reduce.frames import Kind
from p2p import Identity

IDENTITIES = sorted([Identity.generate() for _ in range(4)], key=lambda identity: identity.peer_id)
NAMES = [identity.peer_id for identity in IDENTITIES]


def layout_and_values(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    tensors = {name: [torch.randn(30_000, generator=generator).mul(9).to(dtype)] for name in NAMES}
    return Layout.of(tensors[NAMES[0]]), tensors


class Audit:
    """A reduction with statements by everybody, and the means to accuse."""

    def __init__(
        self, tools, codec="fp32", aggregator="mean", weights=(1.0, 2.0, 3.0, 0.0), dtype=torch.float32
    ):
        self.settings = ExchangeSettings(audit=True, aggregator=aggregator)
        self.layout, tensors = layout_and_values(dtype)
        hashes = {name: Contribution(self.layout, tensors[name], codec_of(codec)).hashes() for name in NAMES}
        members = [
            Member(name, 0, 2**63 + n, weight, commit=commit_of(hashes[name]))
            for n, (name, weight) in enumerate(zip(NAMES, weights, strict=True))
        ]
        plain = tools.declare(members, codec=codec)
        self.declaration = replace(plain, layout=layout_name(self.layout, self.settings))
        self.mesh = tools.Mesh(tensors, self.declaration, self.settings, seed=2)
        self.statements = {
            member.peer: contribution_statement(self.declaration, member, hashes[member.peer]).sign(identity)
            for identity, member in zip(IDENTITIES, members, strict=True)
        }

    def publish(self, after=0):
        for node in self.mesh.nodes.values():
            for peer, statement in self.statements.items():
                if peer != node.me:
                    node.committed(peer, statement.hashes)

    def result(self, peer):
        hashes = self.mesh.nodes[peer].result_hashes()
        return result_statement(self.declaration, peer, hashes).sign(IDENTITIES[NAMES.index(peer)])

    def accusation(self, chunk, accuser=NAMES[1]):
        plan = self.mesh.nodes[NAMES[0]].plan
        accused = plan.members[plan.root(chunk)].peer
        weighty = [m.peer for m in self.declaration.members if m.weight > 0]
        return Accusation(
            accuser,
            accused,
            chunk,
            self.declaration,
            tuple(self.statements[peer] for peer in weighty),
            tuple(bytes(self.mesh.nodes[peer].contribution(chunk)) for peer in weighty),
            self.result(accused),
        )

    def recheck(self, evidence):
        verdict = recheck(evidence, self.layout, self.settings)
        proof = verify_proof(pack_proof(evidence, self.layout, self.settings), "run")
        nameless = replace(verdict, guilty="") if verdict.why == "unfounded" else verdict
        assert proof == nameless, "what travels proves the same"
        return verdict


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "topk"])
@pytest.mark.parametrize("aggregator", ["mean", "clip", "trimmed", "median"])
def test_honest_results_are_made_again_to_the_bit_and_accusing_them_names_the_accuser(
    tools, codec, aggregator
):
    audit = Audit(tools, codec, aggregator)
    audit.publish()
    audit.mesh.run()
    for chunk in range(0, audit.mesh.nodes[NAMES[0]].layout.chunks, 3):
        verdict = audit.recheck(audit.accusation(chunk))
        assert (verdict.guilty, verdict.why) == (NAMES[1], "unfounded")


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_reducer_that_alters_its_part_is_named(tools, codec, monkeypatch):
    audit = Audit(tools, codec)
    audit.publish()
    villain = audit.mesh.nodes[NAMES[2]]
    honest = villain._collector.mean

    def altered(chunk, out):
        good = honest(chunk, out)
        out *= 1.01
        return good

    monkeypatch.setattr(villain._collector, "mean", altered)
    audit.mesh.run()
    plan = villain.plan
    seen = set()
    for chunk in range(villain.layout.chunks):
        verdict = audit.recheck(audit.accusation(chunk, NAMES[0]))
        guilty = plan.members[plan.root(chunk)].peer == NAMES[2]
        assert (verdict.guilty, verdict.why) == ((NAMES[2], "altered") if guilty else (NAMES[0], "unfounded"))
        seen.add(guilty)
    assert seen == {True, False}


def test_values_wait_for_their_signature_and_other_ones_are_refused(tools):
    audit = Audit(tools)
    audit.mesh.run()
    assert not any(node.done for node in audit.mesh.nodes.values())
    audit.publish()
    audit.mesh.run()
    assert all(node.done for node in audit.mesh.nodes.values())

    audit = Audit(tools)

    def other(a, b, frame, item):
        header, payload = item
        return (header, bytes(len(payload))) if a == NAMES[1] and frame.kind == Kind.LEAF else item

    audit.mesh.tamper = other
    audit.publish()
    audit.mesh.run()
    refused = {who: why for node in audit.mesh.nodes.values() for who, why in node.refused.items()}
    assert refused == {NAMES[1]: "mismatch"}


def spoilt(audit, chunk):
    """Accusations that do not hold, each spoilt in another way."""
    good = audit.accusation(chunk)
    first = good.contributions[0]
    other = IDENTITIES[(NAMES.index(good.accused) + 1) % 4]
    yield replace(good, chunk=10**6)
    yield replace(good, chunk=-1)
    yield replace(good, accused=NAMES[(NAMES.index(good.accused) + 1) % 4])
    yield replace(good, payloads=good.payloads[:-1])
    yield replace(good, payloads=(bytes(len(good.payloads[0])), *good.payloads[1:]))
    yield replace(good, contributions=good.contributions[::-1])
    yield replace(good, contributions=(replace(first, signature=bytes(64)), *good.contributions[1:]))
    yield replace(good, contributions=(replace(first, hashes=first.hashes[::-1]), *good.contributions[1:]))
    lie = replace(good.result, hashes=bytes(len(good.result.hashes)))
    yield replace(good, result=lie)
    yield replace(good, result=lie.sign(other))
    yield replace(good, result=replace(good.result, epoch=2).sign(IDENTITIES[NAMES.index(good.accused)]))
    yield replace(good, result=replace(good.result, hashes=b"").sign(IDENTITIES[NAMES.index(good.accused)]))
    yield replace(good, declaration=replace(good.declaration, codec="no such"))
    yield replace(good, declaration=replace(good.declaration, members=()))


def test_accusations_that_do_not_hold_name_the_accuser(tools):
    audit = Audit(tools)
    audit.publish()
    audit.mesh.run()
    for evidence in spoilt(audit, 3):
        verdict = audit.recheck(evidence)
        assert (verdict.guilty, verdict.why) == (NAMES[1], "unfounded")
    # The same statement with its hashes altered and signed by the accused itself is a lie that shows.
    good = audit.accusation(3)
    lie = replace(good.result, hashes=bytes(len(good.result.hashes))).sign(
        IDENTITIES[NAMES.index(good.accused)]
    )
    assert audit.recheck(replace(good, result=lie)).guilty == good.accused


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.complex64]
)
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "topk"])
def test_honest_results_of_every_dtype_are_made_again_to_the_bit(tools, codec, dtype):
    audit = Audit(tools, codec, dtype=dtype)
    audit.publish()
    audit.mesh.run()
    for peer in NAMES:
        others = [node for node in audit.mesh.nodes.values() if node.me != peer]
        assert {node.given_hashes(peer) for node in others} == {audit.mesh.nodes[peer].result_hashes()}
    for chunk in range(0, audit.layout.chunks, 3):
        assert audit.recheck(audit.accusation(chunk)).detail == HONEST


def framed(audit, chunk, accomplice):
    """Accusations that lean on what the accused never signed; `accomplice` is a member who signs anything."""
    good = audit.accusation(chunk)
    declaration = good.declaration
    first, *rest = declaration.members
    for members in (
        (replace(first, weight=2 * first.weight), *rest),
        (replace(first, nonce=first.nonce + 1), *rest),
        (replace(first, bandwidth_bps=1e9), *rest),
        tuple(rest),
    ):
        yield replace(good, declaration=replace(declaration, members=members))
    yield replace(good, declaration=replace(declaration, codec="bf16"))
    yield replace(good, declaration=replace(declaration, layout=b"other"))
    # Another contribution, signed well, that the declaration does not know.
    number = [statement.peer for statement in good.contributions].index(accomplice.peer_id)
    payload = bytes(len(good.payloads[number]))
    old = good.contributions[number]
    hashes = old.hashes[: 32 * chunk] + blake3(payload).digest() + old.hashes[32 * chunk + 32 :]
    new = replace(old, hashes=hashes).sign(accomplice)
    yield replace(
        good,
        contributions=(*good.contributions[:number], new, *good.contributions[number + 1 :]),
        payloads=(*good.payloads[:number], payload, *good.payloads[number + 1 :]),
    )


def test_nobody_is_framed_by_what_others_signed(tools):
    audit = Audit(tools)
    audit.publish()
    audit.mesh.run()
    plan = audit.mesh.nodes[NAMES[0]].plan
    chunk = next(c for c in range(audit.layout.chunks) if plan.members[plan.root(c)].peer == NAMES[0])
    seen = [audit.recheck(evidence) for evidence in framed(audit, chunk, IDENTITIES[1])]
    assert len(seen) == 7
    assert {(verdict.guilty, verdict.why) for verdict in seen} == {(NAMES[1], "unfounded")}
    # With other settings, or another layout, a proof is none either.
    good = audit.accusation(chunk)
    for layout, terms in (
        (audit.layout, replace(audit.settings, aggregator="median")),
        (audit.layout, replace(audit.settings, weight_cap=1.0)),
        (Layout(audit.layout.shapes, audit.layout.dtypes, 2048), audit.settings),
    ):
        assert recheck(good, layout, terms).detail == "of other tensors, or settings"


@given(st.binary(max_size=300))
@settings(deadline=None, derandomize=True)
def test_any_bytes_prove_nothing_or_what_they_say(data):
    assert verify_proof(data) == Verdict("", "unfounded", verify_proof(data).detail)


def test_a_proof_with_any_byte_changed_names_nobody_else(tools):
    audit = Audit(tools)
    audit.publish()
    audit.mesh.run()
    good = audit.accusation(3)
    lie = replace(good.result, hashes=bytes(len(good.result.hashes)))
    evidence = replace(good, result=lie.sign(IDENTITIES[NAMES.index(good.accused)]))
    proof = pack_proof(evidence, audit.layout, audit.settings)
    assert verify_proof(proof, "run") == Verdict(good.accused, "altered", "chunk 3 of epoch 1")
    assert verify_proof(proof, "another").why == "unfounded"
    chance = random.Random(5)
    named = set()
    for _ in range(300):
        spoilt_proof = bytearray(proof)
        spoilt_proof[chance.randrange(len(proof))] ^= 1 << chance.randrange(8)
        named.add(verify_proof(bytes(spoilt_proof)).guilty)
    assert named <= {"", good.accused}


def test_a_member_that_signs_what_is_no_number_is_named(tools):
    audit = Audit(tools)
    audit.publish()
    audit.mesh.run()
    good = audit.accusation(3)
    payload = b"\xff" * len(good.payloads[1])
    statement = good.contributions[1]
    hashes = bytearray(statement.hashes)
    hashes[3 * 32 : 4 * 32] = blake3(payload).digest()
    signed = replace(statement, hashes=bytes(hashes)).sign(IDENTITIES[1])
    members = [
        replace(member, commit=commit_of(signed.hashes)) if member.peer == NAMES[1] else member
        for member in good.declaration.members
    ]
    declaration = replace(good.declaration, members=tuple(members))
    result = result_statement(declaration, good.accused, good.result.hashes)
    evidence = replace(
        good,
        declaration=declaration,
        result=result.sign(IDENTITIES[NAMES.index(good.accused)]),
        contributions=(good.contributions[0], signed, *good.contributions[2:]),
        payloads=(good.payloads[0], payload, *good.payloads[2:]),
    )
    assert (audit.recheck(evidence).guilty, audit.recheck(evidence).why) == (NAMES[1], "nonfinite")


def test_two_stories_on_one_subject_name_who_told_them(tools):
    audit = Audit(tools)
    one = audit.statements[NAMES[2]]
    two = replace(one, hashes=bytes(len(one.hashes))).sign(IDENTITIES[2])
    verdict = audit.recheck(Equivocation(NAMES[0], one, two))
    assert verdict == Verdict(NAMES[2], "equivocated", verdict.detail)
    forged = replace(one, hashes=bytes(len(one.hashes))).sign(IDENTITIES[0])
    other = replace(two, name=b"another nonce").sign(IDENTITIES[2])
    for second in (one, forged, other):
        assert audit.recheck(Equivocation(NAMES[0], one, second)).guilty == NAMES[0]


def test_without_audits_no_statements_are_needed(tools):
    declaration = tools.declare(["a"])
    assert Exchange("a", [torch.zeros(5)], declaration).done
