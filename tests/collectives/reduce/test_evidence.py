"""Evidence: an altered part names its reducer, two stories name who told them, and accusations without proof name the
accuser."""

from dataclasses import replace

import pytest
import torch
from blake3 import blake3

from collectives.agreement import Member
from collectives.reduce import (
    Accusation,
    Equivocation,
    Exchange,
    ExchangeSettings,
    Verdict,
    audited,
    contribution_statement,
    recheck,
    result_statement,
)
from collectives.reduce.frames import Kind
from p2p import Identity

IDENTITIES = sorted([Identity.generate() for _ in range(4)], key=lambda identity: identity.peer_id)
NAMES = [identity.peer_id for identity in IDENTITIES]


class Audit:
    """A reduction with statements by everybody, and the means to accuse."""

    def __init__(self, tools, codec="fp32", aggregator="mean", weights=(1.0, 2.0, 3.0, 0.0)):
        self.settings = ExchangeSettings(audit=True, aggregator=aggregator)
        members = [
            Member(name, 0, 2**63 + n, weight)
            for n, (name, weight) in enumerate(zip(NAMES, weights, strict=True))
        ]
        self.declaration = tools.declare(members, codec=codec)
        generator = torch.Generator().manual_seed(3)
        tensors = {name: [torch.randn(30_000, generator=generator)] for name in NAMES}
        self.mesh = tools.Mesh(tensors, self.declaration, self.settings, seed=2)
        self.statements = {}
        for identity, member in zip(IDENTITIES, members, strict=True):
            hashes = self.mesh.nodes[member.peer].contribution_hashes()
            self.statements[member.peer] = contribution_statement(self.declaration, member, hashes).sign(
                identity
            )

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
        return recheck(evidence, self.mesh.nodes[NAMES[0]].layout, self.settings)


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
    evidence = replace(
        good,
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


def test_audits_are_drawn_from_the_seed_alone():
    assert audited(b"x" * 32, 100, 5) == audited(b"x" * 32, 100, 5)
    assert audited(b"x" * 32, 100, 5) != audited(b"y" * 32, 100, 5)
    assert len(set(audited(b"x", 100, 5))) == 5
    assert audited(b"x", 3, 10) == (0, 1, 2)
    assert audited(b"x", 0, 10) == ()


def test_without_audits_no_statements_are_needed(tools):
    declaration = tools.declare(["a"])
    assert Exchange("a", [torch.zeros(5)], declaration).done
