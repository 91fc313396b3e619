"""A whole run: a config in, figures out; and the same mesh and load under every policy.

The same config gives the same figures, to the last digit. It prints and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

SPEED_DOUBLINGS_MAX = 6
Each = Callable[[Callable[[SimConfig], dict[str, Any]], list[SimConfig]], Iterable[dict[str, Any]]]
RIVALS = ("petals", "petals-fresh", "parallax", "parallax-mending", "random")


def policy_of(config: SimConfig) -> Policy:
    """The scheduler that the config names."""
    if config.policy == "shoal":
        return Shoal(config)
    if config.policy in ("petals", "petals-fresh"):
        return Petals(config, fresh=config.policy == "petals-fresh")
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


def compare(config: SimConfig, policies: Sequence[str] = POLICIES, *, each: Each = map) -> dict[str, Any]:
    """Every policy on the same mesh, churn and load: `runs` by policy, and ours against the best of the others.

    `each` maps `run` over configs in order; one over several processes gives the same figures sooner.

    `better_baseline` is the best among those of the published designs (Petals-like, Parallax-like); the mending
    variant of Parallax is its own row and is named too when it is better still.
    """
    found = each(run, [replace(config, policy=name) for name in policies])
    runs = dict(zip(policies, found, strict=True))
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


def capacity(config: SimConfig, *, share: float = 0.9, steps: int = 5) -> dict[str, float]:
    """The highest load at which `share` of the requests keep their targets (goodput as in DistServe, arXiv 2401.09670).

    Found by doubling or halving the load's speed from the config's and then `steps` bisections; `speed` is that of the
    load, `requests_per_s` what it comes to.
    """

    def holds(speed: float) -> float | None:
        figures = run(replace(config, load=replace(config.load, speed=speed)))
        return figures["requests"] / (config.hours * 3600.0) if figures["attainment"] >= share else None

    low, high = 0.0, config.load.speed
    best = holds(high)
    rate = 0.0 if best is None else best
    for _ in range(SPEED_DOUBLINGS_MAX):
        if best is None:
            break
        low, high = high, 2 * high
        best = holds(high)
        rate = best if best is not None else rate
    for _ in range(steps):
        middle = (low + high) / 2
        found = holds(middle)
        if found is None:
            high = middle
        else:
            low, rate = middle, found
    return {"speed": round(low, 4), "requests_per_s": round(rate, 4)}
