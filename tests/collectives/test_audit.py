"""Audits in whole rounds: who alters a part is named by a proof that anybody can check, and nobody else ever is."""

import random
from dataclasses import replace

import pytest
import torch
import trio
from blake3 import blake3

from collectives import ExchangeSettings, Feedback, LocalFault, NoQuorum, RoundFailed, RunConfig, Settings
from collectives import audit as audit_module
from collectives.court import NOTICE, Notice
from collectives.reduce import Exchange, Kind, Layout, verify_proof
from collectives.reduce.collect import Collector
from p2p.testing import MemoryNetwork

ALL = 1e6  # parts: every one that others made
CONFIG = RunConfig(
    agreement=Settings(members_min=3),
    reduce=ExchangeSettings(audit=True),
    audit_parts=ALL,
    link_silence_s=2.0,
)
PARTS = 60_000


def tensors_of(run, epoch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(run.me.encode()) + 1000 * epoch)
    return [torch.randint(-50, 50, (n,), generator=generator).to(dtype) for n in (PARTS, 7)]


def mean_of(runs, epoch=1):
    columns = zip(*(tensors_of(run, epoch) for run in runs), strict=True)
    return [torch.stack(column).sum(0) / len(runs) for column in columns]


def same(got, wanted):
    return all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.fixture
def villains(monkeypatch):
    """Peers in this set give out results that are a little larger than they should be."""
    peers = set()
    honest = Collector.mean

    def mean(self, chunk, out):
        good = honest(self, chunk, out)
        if self._plan.members[self._me].peer in peers:
            out *= 1.0009765625
        return good

    monkeypatch.setattr(Collector, "mean", mean)
    return peers


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk"])
async def test_honest_members_pass_their_audits(autojump_clock, members, together, codec):
    config = replace(CONFIG, codec=codec, group="lan")
    runs = await members.start("a", "b", "c", config=config)
    feedbacks = {run.me: Feedback(Layout.of(tensors_of(run))) if codec == "topk" else None for run in runs}
    for epoch in (1, 2):

        async def call(run, epoch=epoch):
            async with run.round() as r:
                given = tensors_of(run, epoch, torch.float32)
                return await r.reduce(given, 1.0 + runs.index(run), feedback=feedbacks[run.me])

        found = await together(runs, call)
        assert all(set(one.peers) == {run.me for run in runs} for one in found)
        assert len({one.digest for one in found}) == 1
    chunks = Layout.of(tensors_of(runs[0])).chunks
    for run in runs:
        assert run.guilty == {}
        assert run.audits.unanswered == 0
        assert 0 < run.audits.parts <= 2 * chunks
    assert sum(run.audits.parts for run in runs) == 2 * 2 * chunks, "each part by the two who did not make it"


@pytest.mark.parametrize("place", [0, 1, 3], ids=["coordinator", "second", "last"])
async def test_who_alters_a_part_commits_nothing_is_named_and_shut_out(
    autojump_clock, members, together, reduce, villains, place
):
    runs = await members.start(*"abcd", config=CONFIG)
    seats = runs[0].members()
    liar = next(run for run in runs if run.me == seats[place])
    others = [run for run in runs if run is not liar]
    villains.add(liar.me)
    found = dict(
        zip(
            runs, await together(runs, lambda run: reduce(run, tensors_of(run), deadline_s=20.0)), strict=True
        )
    )
    assert isinstance(found[liar], RoundFailed)
    for run in others:
        assert set(found[run].peers) == {one.me for one in others}
        assert same(found[run].tensors, mean_of(others)), "nothing of what was altered is in it"
        assert {peer: verdict.why for peer, verdict in run.guilty.items()} == {liar.me: "altered"}
        assert run._service.report()["r"]["guilty"] == {liar.me: "altered"}
        proof = run.court.proof(liar.me)
        assert verify_proof(proof) == run.guilty[liar.me]
    # It is no member again, though it behaves, and stands on the state that the others have.
    villains.clear()
    for epoch in (2, 3, 4):

        async def call(run, epoch=epoch):
            await run.publish({"w": torch.tensor(epoch)}, epoch - 1)
            return await reduce(run, tensors_of(run, epoch), deadline_s=8.0)

        found = await together(runs, call)
        for run, one in zip(runs, found, strict=True):
            if run is liar:
                assert isinstance(one, RoundFailed)
            else:
                assert set(one.peers) == {other.me for other in others}
                assert same(one.tensors, mean_of(others, epoch))


async def test_a_few_parts_drawn_at_random_catch_a_liar_before_long(
    autojump_clock, members, together, reduce, villains, monkeypatch
):
    monkeypatch.setattr(audit_module, "_chance", random.Random(4))
    runs = await members.start(
        *"abc", config=replace(CONFIG, audit_parts=0.5, agreement=Settings(members_min=2))
    )
    villains.add(runs[1].me)
    rounds = 0
    while not (runs[0].guilty and runs[2].guilty):
        rounds += 1
        assert rounds < 12
        await together(runs, lambda run, epoch=rounds: reduce(run, tensors_of(run, epoch), deadline_s=6.0))
    assert set(runs[0].guilty) == set(runs[2].guilty) == {runs[1].me}
    assert runs[0].audits.parts + runs[2].audits.parts <= 3 * rounds


async def test_one_proof_is_enough_for_everybody_and_outlives_a_restart(
    autojump_clock, members, together, reduce, villains, tmp_path
):
    trusting = replace(CONFIG, audit_parts=0.0)
    each = {name: {"journal_dir": tmp_path / name} for name in "bcd"}
    runs = await members.start(*"abcd", config=trusting, each={**each, "a": {"config": CONFIG}})
    villains.add(runs[3].me)
    await together(runs, lambda run: reduce(run, tensors_of(run), deadline_s=10.0))
    await trio.sleep(5)  # of the virtual clock: proofs are on their way
    assert [set(run.guilty) for run in runs[:3]] == [{runs[3].me}] * 3
    members.kill(runs[1])
    (again,) = await members.start("b", config=trusting, each=each)
    assert again.guilty == {runs[3].me: runs[0].guilty[runs[3].me]}


async def test_accusations_without_proof_harm_only_their_bearer(autojump_clock, members, together, reduce):
    runs = await members.start(*"abc", config=CONFIG)
    await together(runs, lambda run: reduce(run, tensors_of(run)))
    bearer, accused, told = runs
    bearer.court._proofs[accused.me] = b"believe me" * 200_000
    for asked in (True, False):
        answer = await bearer._rpc.call(told.me, NOTICE, Notice("r", accused.me, 2_000_000))
        assert answer.wanted is asked
        await trio.sleep(5)
        assert told.guilty == {}
    found = await together(runs, lambda run: reduce(run, tensors_of(run, 2)))
    assert all(len(one.peers) == 3 for one in found)


async def test_parts_can_be_audited_afterwards_where_contributions_are_kept(
    autojump_clock, members, together, reduce, villains
):
    config = replace(CONFIG, audit_parts=0.0, audit_keep=True)
    runs = await members.start(*"abc", config=config)
    with pytest.raises(LocalFault):
        await runs[0].audit()
    villains.add(runs[2].me)
    given = {run.me: tensors_of(run) for run in runs}
    found = await together(runs, lambda run: reduce(run, given[run.me]))
    assert all(len(one.peers) == 3 for one in found), "nobody has looked"
    for tensors in given.values():
        tensors[0].fill_(float("nan"))  # they are the callers' again
    mine = {
        chunk for chunk in range(15) if runs[0]._tag("outer").plane.auditor._case.root(chunk) != runs[0].me
    }
    verdicts = await runs[0].audit()
    assert len(verdicts) == len(mine)
    assert {verdict.guilty for verdict in verdicts if verdict.why == "altered"} == {runs[2].me}
    assert set(runs[0].guilty) == {runs[2].me}
    with pytest.raises(LocalFault):
        await runs[0].audit([10**6])


async def test_what_was_not_kept_cannot_be_audited(autojump_clock, members, together, reduce):
    runs = await members.start(*"abc", config=CONFIG)
    await together(runs, lambda run: reduce(run, tensors_of(run)))
    with pytest.raises(NoQuorum, match="not finished"):
        await runs[0].audit(within_s=3.0)


async def test_who_does_not_hand_out_its_part_is_left_out(
    autojump_clock, members, together, reduce, monkeypatch
):
    runs = await members.start(*"abcd", config=CONFIG)
    real = audit_module.Auditor.on_part

    def on_part(self, peer, ask):
        if self._me == runs[1].me:
            raise audit_module.RpcRefusal("absent", "no")
        return real(self, peer, ask)

    monkeypatch.setattr(audit_module.Auditor, "on_part", on_part)
    found = await together(runs, lambda run: reduce(run, tensors_of(run), deadline_s=15.0))
    rest = [run for run in runs if run is not runs[1]]
    for run, one in zip(runs, found, strict=True):
        if run is not runs[1]:
            assert set(one.peers) == {other.me for other in rest}
            assert same(one.tensors, mean_of(rest))
        assert run.guilty == {}


@pytest.mark.parametrize("seed", range(12))
async def test_nobody_is_accused_when_members_die_and_links_break(
    autojump_clock, members, together, reduce, seed
):
    chance = random.Random(seed)
    config = replace(
        CONFIG,
        codec=chance.choice(["fp32", "bf16", "int8", "topk"]),
        agreement=Settings(members_min=2),
        reduce=ExchangeSettings(
            audit=True,
            aggregator=chance.choice(["mean", "mean", "clip", "trimmed", "median"]),
            weight_share_max=chance.choice([None, 0.3]),
        ),
    )
    runs = await members.start(*"abcde", config=config)
    victim = chance.choice(runs)
    others = [run for run in runs if run is not victim]

    async def trouble():
        await trio.sleep(chance.uniform(0.0, 0.25))
        if chance.random() < 0.5:
            members.kill(victim)
        else:
            members.network.partition([victim.me], [run.me for run in others])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trouble)
        for epoch in (1, 2, 3):
            await together(
                runs,
                lambda run, epoch=epoch: reduce(run, tensors_of(run, epoch), 1.0 + epoch, deadline_s=8.0),
            )
    assert all(run.guilty == {} for run in runs)
    assert all(run.committed() >= 2 for run in others)
    assert sum(run.audits.parts for run in others) > 0


async def test_who_signs_one_result_for_one_and_another_for_the_rest_is_named(
    autojump_clock, members, together, reduce, monkeypatch
):
    seats = [host.peer_id for host in map(MemoryNetwork().host, "abcd")]
    liar, victim = seats[1], seats[3]
    told = {}
    pick, answer = Exchange._pick, audit_module.AuditServer._statement

    def next_frame(self, box, peer):
        frame = pick(self, box, peer)
        if frame is not None and frame.kind == Kind.RESULT and (self.me, peer) == (liar, victim):
            payload = bytearray(b"".join(frame.payload))
            payload[:4] = b"lies"
            told[frame.chunk] = blake3(payload).digest()
            frame = replace(frame, payload=(memoryview(payload),))
        return frame

    async def statement(self, call, ask):
        found = await answer(self, call, ask)
        if ask.of or found.peer != liar or found.kind != "result" or str(call.peer) != victim:
            return found
        lies = b"".join(told[chunk] for chunk in sorted(told))
        return replace(found, hashes=lies).sign(members.network.hosts[liar].identity)

    monkeypatch.setattr(Exchange, "_pick", next_frame)
    monkeypatch.setattr(audit_module.AuditServer, "_statement", statement)
    runs = await members.start(*"abcd", config=replace(CONFIG, audit_parts=0.0))
    found = await together(runs, lambda run: reduce(run, tensors_of(run)))
    assert all(same(one.tensors, mean_of(runs)) for one in found), "what was decided, also at the victim's"
    await trio.sleep(3)  # of the virtual clock: the proof is on its way
    for run in runs:
        if run.me != liar:
            assert {peer: verdict.why for peer, verdict in run.guilty.items()} == {liar: "equivocated"}
            assert verify_proof(run.court.proof(liar)) == run.guilty[liar]
