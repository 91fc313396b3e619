"""A state is made again from any k of its pieces, whoever lies, is gone or is full."""

from dataclasses import replace

import pytest
import torch
import trio

from collectives import Snapshot
from collectives.checkpoint import CopyService, Pantry
from collectives.checkpoint.copies import Cutter, decode_description
from collectives.checkpoint.peers import Piece
from collectives.errors import BadContribution, CheckpointProblem, PiecesLost, ResourceLimit
from p2p import Identity, Rpc, Tensor
from p2p.testing import MemoryNetwork

torch.set_num_threads(1)
STRIPE = 1 << 14


def a_state(seed=0, epoch=5):
    g = torch.Generator().manual_seed(seed)
    state = {f"layer.{n}": torch.randn(3000 + n, generator=g) for n in range(5)}
    return Snapshot.take(state, epoch)


class Liar(CopyService):
    """Alters one of its pieces on the way out."""

    async def _get(self, call, ask):
        piece = await super()._get(call, ask)
        data = bytearray(piece.data.data)
        data[0] ^= ask.stripe == 1  # all is well until then
        return Piece(Tensor("uint8", (len(data),), bytes(data)))


class Peers:
    """Connected nodes, each with a service; the first is the owner."""

    def __init__(self, nursery, network, folder):
        self.nursery, self.network, self.folder = nursery, network, folder
        self.services, self.scopes = [], []

    async def start(self, count, liar=None, **pantry):
        hosts = [self.network.host(f"peer-{n}") for n in range(count)]
        await self.network.connect_all(*hosts)
        for number, host in enumerate(hosts):
            rpc = Rpc(host)
            on_disk = None if self.folder is None else self.folder / str(number)
            kind = Liar if number == liar else CopyService
            self.services.append(kind(rpc, host.identity, Pantry(on_disk, **pantry)))
            await self.nursery.start(rpc.run)
        return self.services

    @property
    def names(self):
        return [service.me for service in self.services]

    def kill(self, number):
        self.network.kill(self.services[number].me)


@pytest.fixture(params=["disk", "memory"])
async def peers(request, tmp_path, nursery, autojump_clock):
    return Peers(nursery, MemoryNetwork(), tmp_path if request.param == "disk" else None)


async def place(peers, snapshot, k=None, **how):
    owner = peers.services[0]
    return await owner.place(
        "r", "state", snapshot, {"tokens": 7}, peers.names, k, stripe_bytes=STRIPE, **how
    )


async def test_a_state_comes_back_from_half_of_the_pieces(autojump_clock, peers):
    services, snapshot = await peers.start(5), a_state()
    placed = await place(peers, snapshot)
    assert (placed.epoch, placed.k, set(placed.held), placed.without) == (5, 2, set(peers.names), {})
    for gone in (0, 1, 3):  # the owner too
        peers.kill(gone)
    found = await services[4].restore("r", "state", peers.names)
    assert found.snapshot.digest == snapshot.digest
    assert (found.snapshot.epoch, found.meta) == (5, {"tokens": 7})
    assert torch.equal(found.snapshot.tensors["layer.3"], snapshot.tensors["layer.3"])


async def test_too_few_pieces_are_told(autojump_clock, peers):
    services = await peers.start(4)
    await place(peers, a_state(), k=3)
    peers.kill(0)
    peers.kill(1)
    with pytest.raises(PiecesLost, match="'state' of the run 'r'"):
        await services[3].restore("r", "state", peers.names)


async def test_a_holder_that_lies_is_named_and_done_without(autojump_clock, peers):
    services, snapshot = await peers.start(4, liar=1), a_state()
    await place(peers, snapshot, k=2)
    found = await services[3].restore("r", "state", peers.names)
    assert found.snapshot.digest == snapshot.digest
    assert found.bad == {services[1].me: "it sent a wrong piece"}


async def test_a_holder_that_lost_its_piece_is_named(autojump_clock, peers):
    services, snapshot = await peers.start(3), a_state()
    await place(peers, snapshot, k=2)
    held = services[0].pantry.held("r")[0]
    if held.directory is None:
        held.parts[0] = b"x" + held.parts[0][1:]
    else:
        with (held.directory / "piece").open("r+b") as file:
            file.write(b"????")
    found = await services[2].restore("r", "state", peers.names)
    assert found.snapshot.digest == snapshot.digest
    assert list(found.bad) == [services[0].me]
    assert services[0].pantry.held("r") == []  # it offers it no more


async def test_the_newest_copy_that_can_be_made_is_taken(autojump_clock, peers):
    services = await peers.start(3)
    await place(peers, a_state(1, epoch=1), k=2)
    await place(peers, a_state(2, epoch=2), k=2)
    assert (await services[1].restore("r", "state", peers.names)).snapshot.epoch == 2
    for service in services[:2]:
        service.pantry.drop(service.pantry.held("r")[0])
    found = await services[2].restore("r", "state", peers.names)
    assert found.snapshot.digest == a_state(1).digest


async def test_older_copies_make_room(autojump_clock, peers):
    services = await peers.start(2)
    for epoch in range(1, 6):
        await place(peers, a_state(epoch, epoch=epoch))
    assert [h.description.epoch for h in services[1].pantry.held("r")] == [5, 4]
    if peers.folder is not None:
        assert len(list((peers.folder / "1").iterdir())) == 2


async def test_who_is_full_is_left_out(autojump_clock, peers):
    await peers.start(3)
    peers.services[2].pantry._memory_bytes = peers.services[2].pantry._disk_bytes = 1000
    placed = await place(peers, a_state(), k=2)
    assert placed.enough
    assert set(placed.held) == set(peers.names[:2])
    assert "no room" in placed.without[peers.names[2]]


async def test_who_dies_meanwhile_is_left_out(autojump_clock, peers, monkeypatch):
    await peers.start(4)
    put = Pantry.put

    def put_and_kill(pantry, held, stripe, data):
        if stripe == 1 and pantry is peers.services[3].pantry:
            trio.from_thread.run_sync(peers.kill, 3)
        return put(pantry, held, stripe, data)

    monkeypatch.setattr(Pantry, "put", put_and_kill)
    placed = await place(peers, a_state(), k=2)
    assert set(placed.held) == set(peers.names[:3])
    found = await peers.services[1].restore("r", "state", peers.names)
    assert found.snapshot.digest == a_state().digest


def cut(identity, holders, **how):
    cutter = Cutter(identity, "r", "state", a_state(), {}, tuple(holders), 1, STRIPE)
    return cutter, cutter.describe()


def test_pieces_survive_a_restart_and_a_torn_one_does_not(tmp_path):
    me = Identity.generate()
    cutter, description = cut(me, [str(me.peer_id)] * 2)
    pantry = Pantry(tmp_path)
    for index in range(2):
        held = pantry.open(description, index)
        for stripe, pieces in enumerate(cutter.pieces()):
            assert pantry.put(held, stripe, pieces[index])
        if index == 0:
            pantry.close(held)
    again = Pantry(tmp_path).held("r")
    assert [(one.index, one.whole) for one in again] == [(0, True)]
    assert len(list(tmp_path.iterdir())) == 1
    piece = again[0].directory / "piece"
    piece.write_bytes(piece.read_bytes()[:-1])
    assert Pantry(tmp_path).held("r") == []


def test_a_piece_that_never_came_whole_is_not_closed(tmp_path):
    me = Identity.generate()
    cutter, description = cut(me, [str(me.peer_id)])
    pantry = Pantry(tmp_path)
    held = pantry.open(description, 0)
    pantry.put(held, 0, next(cutter.pieces())[0])
    with pytest.raises(CheckpointProblem, match="not whole"):
        pantry.close(held)


def test_what_was_begun_and_never_ended_makes_room():
    me = Identity.generate()
    _, one = cut(me, [str(me.peer_id)])
    pantry = Pantry(None, memory_bytes=one.piece_bytes)
    pantry.open(one, 0)
    other = replace(one, epoch=6).signed(me)
    pantry.open(other, 0)
    stranger = Identity.generate()
    with pytest.raises(ResourceLimit):
        pantry.open(cut(stranger, [str(me.peer_id)])[1], 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0}, {"k": 9}, {"stripe_bytes": 0}, {"stripe_bytes": 1 << 30}, {"nbytes": 1}, {"nbytes": 1 << 50},
        {"hashes": ()}, {"hashes": (b"x",) * 3}, {"epoch": -1}, {"state": b""}, {"run": "x" * 200},
        {"meta": bytes(1 << 17)},
    ],
)  # fmt: skip
def test_descriptions_that_cannot_be_are_refused(wrong):
    me = Identity.generate()
    _, description = cut(me, ["a", "b", "c"])
    assert decode_description(description.encode(), "p") == description
    with pytest.raises(BadContribution):
        decode_description(replace(description, **wrong).signed(me).encode(), "p")


def test_descriptions_that_somebody_else_changed_are_refused():
    _, description = cut(Identity.generate(), ["a", "b", "c"])
    with pytest.raises(BadContribution, match="did not sign"):
        decode_description(replace(description, epoch=9).encode(), "p")
    with pytest.raises(BadContribution):
        decode_description(b"\xc1", "p")
