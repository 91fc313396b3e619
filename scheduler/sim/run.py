"""A whole run: a config in, figures out; and the same mesh and load under every policy.

The same config gives the same figures, to the last digit. It prints and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scheduler.sim.chance import AtRandom
from scheduler.sim.clock import Clock
from scheduler.sim.config import POLICIES, SimConfig
from scheduler.sim.figures import measure
from scheduler.sim.parallax import Parallax
from scheduler.sim.petals import Petals
from scheduler.sim.policy import Policy, Shoal
from scheduler.sim.service import Service
from scheduler.sim.trace import asks
from scheduler.sim.world import World

RIVALS = ("petals", "parallax", "parallax-mending", "random")


def policy_of(config: SimConfig) -> Policy:
    """The scheduler that the config names."""
    if config.policy == "shoal":
        return Shoal(config)
    if config.policy == "petals":
        return Petals(config)
    if config.policy == "random":
        return AtRandom(config)
    return Parallax(config, mends=config.policy == "parallax-mending")


def run(config: SimConfig) -> dict[str, Any]:
    """Figures of one policy, see `figures.measure`. Raises Shortage when the mesh cannot hold the model."""
    service = simulate(config)
    return measure(config, service, service.policy, config.hours * 3600.0)


def simulate(config: SimConfig) -> Service:
    """The mesh after the run, for tests and pictures."""
    until_s = config.hours * 3600.0
    clock, policy = Clock(), policy_of(config)
    service = Service(config, World(config), clock, policy)
    fleet = service.fleet
    fleet.order(policy.start(fleet), at_once=True)
    fleet.announce()

    def tick() -> None:
        orders = policy.tick(fleet)
        if orders:
            clock.at(clock.now_s + config.adopt_s, fleet.order, orders)

    end_s = until_s + config.drain_s
    clock.every(config.gossip_s, end_s, fleet.announce)
    clock.every(policy.tick_s, end_s, tick)
    fleet.start_churn(until_s)
    for ask in asks(config.load, config.model, until_s, config.seed):
        clock.at(ask.at_s, service.arrive, ask)
    clock.run(end_s)
    return service


def compare(config: SimConfig, policies: Sequence[str] = POLICIES) -> dict[str, Any]:
    """Every policy on the same mesh, churn and load: `runs` by policy, and ours against the best of the others.

    `better_baseline` is the best among those of the published designs (Petals-like, Parallax-like); the mending
    variant of Parallax is its own row and is named too when it is better still.
    """
    runs = {name: run(replace(config, policy=name)) for name in policies}
    goodput = {name: figures["goodput_per_s"] for name, figures in runs.items()}
    out: dict[str, Any] = {"runs": runs}
    for key, names in (("better_baseline", ("petals", "parallax")), ("best_rival", RIVALS)):
        known = [name for name in names if name in runs]
        if "shoal" not in runs or not known:
            continue
        best = max(known, key=lambda name: (goodput[name], name))
        ratio = goodput["shoal"] / goodput[best] if goodput[best] > 0 else None
        out[key] = {"policy": best, "goodput_ratio": None if ratio is None else round(ratio, 4)}
    return out
