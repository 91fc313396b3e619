"""Letters that others carry: signed for their receiver, passed on once, and no sign of life when they are old."""

from dataclasses import replace

import pytest

from collectives.carry import LETTERS_PER_S_MAX, Carried, Carrier
from collectives.wire import Letter
from p2p import Identity, pack_value, unpack_value

KEYS = {name: Identity.generate() for name in "abcd"}
ID = {name: key.peer_id for name, key in KEYS.items()}


class World:
    """a and b are connected to c and d each, and not to one another."""

    def __init__(self):
        self.posted, self.got = [], []
        self.carriers = {name: self.one(name) for name in "abcd"}

    def one(self, name):
        apart = {ID["a"], ID["b"]}
        return Carrier(
            "r",
            ID[name],
            KEYS[name],
            lambda peer, letter: self.posted.append((ID[name], peer, letter)),
            lambda origin, letter: self.got.append((ID[name], origin, letter)),
            lambda peer: {ID[name], peer} != apart,
            lambda: set(ID.values()),
        )

    def step(self):
        posted, self.posted = self.posted, []
        for sender, to, letter in posted:
            name = next(name for name, peer in ID.items() if peer == to)
            self.carriers[name].on_letter(sender, letter)
        return posted


LETTER = Letter("agree", "outer", b"hello")


async def test_two_others_carry_a_letter_and_say_who_wrote_it(autojump_clock):
    world = World()
    world.carriers["a"].send(ID["b"], LETTER)
    assert {to for _, to, _ in world.step()} == {ID["c"], ID["d"]}
    assert {to for _, to, _ in world.step()} == {ID["b"]}
    assert world.got == [(ID["b"], ID["a"], LETTER)] * 2
    assert world.posted == []


@pytest.mark.parametrize(
    "change",
    [
        {"letter": Letter("agree", "outer", b"other")},
        {"origin": ID["c"]},
        {"number": 10**15},
        {"run": "another"},
        {"letter": Letter("carry", "", b"")},
        {"signature": bytes(64)},
        {"origin": Identity.generate().peer_id},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_carrier_can_alter_nothing(autojump_clock, change):
    world = World()
    world.carriers["a"].send(ID["b"], LETTER)
    carried = unpack_value(Carried, world.posted[0][2].body)
    world.carriers["b"].on_letter(ID["c"], Letter("carry", "", pack_value(replace(carried, **change))))
    world.carriers["b"].on_letter(ID["c"], Letter("carry", "", b"what is this"))
    assert world.got == []
    world.carriers["b"].on_letter(ID["c"], Letter("carry", "", pack_value(carried)))
    assert len(world.got) == 1


async def test_an_old_sign_of_life_is_none(autojump_clock):
    world = World()
    world.carriers["a"].send(ID["b"], Letter("beat", "", b"1"))
    old = world.posted[0][2]
    world.carriers["a"].send(ID["b"], Letter("beat", "", b"2"))
    new = world.posted[-1][2]
    for letter in (new, old, new):
        world.carriers["b"].on_letter(ID["c"], letter)
    assert [letter.body for _, _, letter in world.got] == [b"2"]


async def test_nobody_is_carried_for_others_nor_without_bounds(autojump_clock):
    world = World()
    world.carriers["a"].send(ID["b"], LETTER)
    letter = world.posted[0][2]
    world.posted.clear()
    world.carriers["c"].on_letter(ID["d"], letter)
    assert world.posted == [], "it comes from its origin, or it is not passed on"
    for _ in range(2 * LETTERS_PER_S_MAX):
        world.carriers["c"].on_letter(ID["a"], letter)
    assert len(world.posted) == LETTERS_PER_S_MAX
