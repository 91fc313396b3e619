"""Seeded worlds of replicas under loss, repetition, reordering and partition: in the end all views are equal."""

from __future__ import annotations

import os

import pytest

from dht.replica import Publish, Withdraw

SEEDS = 300
# 10,000 seeds take two hours of one core: SHOAL_CONVERGENCE_SEEDS=FIRST:END runs them in pieces.
FIRST, END = (int(part) for part in os.environ.get("SHOAL_CONVERGENCE_SEEDS", "0:10000").split(":"))


def trouble(world, rounds):
    """Bad links and a partition, while nodes publish, change their minds and withdraw."""
    rng = world.rng
    peers = list(world.replicas)
    world.loss, world.repeat, world.delay_max_s = (
        rng.uniform(0, 0.6),
        rng.uniform(0, 0.3),
        rng.uniform(0.01, 2),
    )
    groups = rng.randint(1, 4)
    world.group = {peer: rng.randrange(groups) for peer in peers}

    def act():
        for peer in peers:
            if rng.random() < 0.5:
                kind, name = "host", str(rng.randrange(3))
                if rng.random() < 0.2:
                    world.do(peer, Withdraw(kind, name))
                else:
                    world.do(peer, Publish(kind, name, rng.randbytes(8), 400.0))

    mortal, restarted = rng.sample(peers, 2)
    world.do(mortal, Publish("node", "", b"soon gone", 3.0))
    for number in range(rounds):
        act()
        world.rounds(1)
        if number == 1:
            peers.remove(mortal)
            world.kill(mortal)
            world.kill(restarted)
            world.start(restarted)


def heal(world):
    world.loss = world.repeat = 0.0
    world.delay_max_s = 0.1
    world.group = {}


def check_world(world):
    trouble(world, 4)
    for replica in world.replicas.values():
        replica.validate()
    heal(world)
    world.rounds(3)
    world.settle()
    for replica in world.replicas.values():
        replica.validate()
    assert world.converged()


def test_views_are_equal_three_rounds_after_healing(make_world):
    held = 0
    for seed in range(SEEDS):
        world = make_world(seed, 3 + seed % 6)
        check_world(world)
        held += len(world.states()[0])
    assert held > 5 * SEEDS


def test_sixty_four_replicas_are_equal_three_rounds_after_healing(make_world):
    check_world(make_world(1, 64))


@pytest.mark.slow
def test_sixty_four_replicas_converge_for_all_seeds(make_world):
    for seed in range(FIRST, END):
        try:
            check_world(make_world(seed, 64))
        except Exception as problem:
            problem.add_note(f"seed {seed}")
            raise
