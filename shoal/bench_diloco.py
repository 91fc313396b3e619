"""`shoal bench diloco`: what training apart costs in loss and saves in bytes, against data parallel training on as many
tokens. All workers run in this process, with the strategies, codecs and reductions of a mesh."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal import terminal
from shoal.errors import ShoalError

TOLD_EVERY = 100
MODELS = {  # layers, heads, width, tokens of a sequence
    "nano": (4, 4, 128, 64),
    "30m": (12, 8, 448, 256),
}


def diloco(options: argparse.Namespace) -> int:
    """Run the arms and print the figures."""
    # Torch takes seconds to load: other commands must not wait for it.
    import torch

    from node.errors import NodeError

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        try:
            found = measure(options, Path(scratch))
        except NodeError as problem:
            raise ShoalError(str(problem)) from None
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    arms = [name for name, value in found.items() if isinstance(value, dict) and "val_loss" in value]
    rows = []
    for key in dict.fromkeys(key for name in arms for key in found[name]):
        rows.append((key, *(_shown(found[name].get(key)) for name in arms)))
    terminal.table(("figure", *arms), rows, right=tuple(arms))
    others = [(key, _shown(value)) for key, value in found.items() if key not in arms]
    terminal.table(("figure", "seen"), others, right=("seen",))
    return 0


def _shown(value: object) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)


def measure(options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The figures, as printed by --json."""
    from node.train.corpus import open_corpus
    from node.train.emulate import Parallel, Setting, World, deaths
    from node.train.recipe import DataRecipe, InnerRecipe, ModelRecipe, OuterRecipe

    layers, heads, width, sequence = MODELS["nano"]
    if not options.corpus.is_file():
        raise ShoalError(f"{options.corpus} is no file")
    data = DataRecipe((options.corpus.absolute(),), tokenizer="chars", validation=0.1, sequence=sequence)
    model = ModelRecipe(
        layers=layers,
        heads=heads,
        kv_heads=heads,
        hidden=width,
        head_dim=width // heads,
        intermediate=344,
        context=sequence,
        tied=False,
    )
    inner = InnerRecipe(
        steps=options.steps,
        batch=12,
        lr=options.lr,
        warmup=min(100, options.steps // 10),
        seed=options.seed,
        precision=options.precision,
        compile=options.compile,
    )
    strategy = options.strategy or ("streaming" if options.streaming else "diloco")
    outer = OuterRecipe(
        strategy,
        options.inner_steps,
        None,
        options.outer_lr,
        options.outer_momentum,
        options.codec or {"streaming": "int4", "sparseloco": "topk"}.get(strategy, "int8"),
        options.fragments,
        min(options.delay, options.inner_steps - 1),
        options.alpha,
    )
    if options.inner_steps > options.steps:
        raise ShoalError(f"--inner-steps {options.inner_steps} are more than --steps {options.steps}")
    together = Setting(open_corpus(data, cache), model, inner, options.workers)
    setting = replace(together, inner=replace(inner, lr=options.inner_lr or options.lr))
    killed = deaths(options.workers, options.steps, options.churn, options.seed) if options.churn else ()
    found: dict[str, Any] = {"strategy": strategy, "codec": outer.codec, "workers": options.workers}
    found["diloco"] = _arm(strategy, World(setting, outer, killed), options)
    if killed:
        found["deaths"] = [[death.step, death.index] for death in killed]
        found["quiet"] = _arm("quiet", World(setting, outer), options)
    if not options.alone:
        found["data_parallel"] = _arm("data-parallel", Parallel(together, outer), options)
        found["loss_difference"] = found["diloco"]["val_loss"] - found["data_parallel"]["val_loss"]
        sent = max(1, found["diloco"]["bytes_per_worker"])
        found["bytes_ratio"] = found["data_parallel"]["bytes_per_worker"] / sent
    if options.link_mbps is not None:
        found["link"] = link_shares(options, outer)
    if options.failure_every:
        found["goodput"] = _goodputs(options, found["diloco"])
    return found


def _arm(name: str, world: Any, options: argparse.Namespace) -> dict[str, Any]:
    began_s = time.monotonic()
    for step in world.run():
        if step % TOLD_EVERY == 0 and sys.stderr.isatty():
            print(f"\r{name}: step {step} of {options.steps}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    figures: dict[str, Any] = world.figures()
    return figures | {"took_s": time.monotonic() - began_s}


def link_shares(options: argparse.Namespace, outer: Any) -> dict[str, Any]:
    """The share of time computing with a model of 30 million parameters, computed from a step's measured time on this
    machine, the bytes of real exchanges and the link's speed: the strategy, plain DiLoCo (int8) and data parallel."""
    from node.train.emulate import fragments_of, step_time
    from node.train.linktime import computing_share
    from node.train.recipe import InnerRecipe, ModelRecipe

    layers, heads, width, sequence = MODELS["30m"]
    model = ModelRecipe(
        layers=layers, heads=heads, kv_heads=heads, hidden=width, head_dim=width // heads,
        intermediate=1216, context=sequence, tied=True,
    )  # fmt: skip
    inner = InnerRecipe(batch=options.link_batch, precision=options.precision, recompute=False)
    step_s, parameters = step_time(model, inner, sequence)
    if options.step_s is not None:
        step_s = options.step_s
    found: dict[str, Any] = {"mbps": options.link_mbps, "parameters": parameters, "step_s": step_s}
    arms: dict[str, tuple[Any, Callable[[int], int]]] = {
        outer.strategy: (outer, lambda delay: delay),
        "diloco": (replace(outer, strategy="diloco", codec="int8"), lambda delay: 0),
        "data_parallel": (
            replace(outer, strategy="data-parallel", inner_steps=1, codec="fp32"),
            lambda delay: 0,
        ),
    }
    for name, (recipe, delayed) in arms.items():
        sizes, phases, delay = fragments_of(model, inner, recipe, options.workers)
        shares = computing_share(
            sizes, phases, recipe.inner_steps, delayed(delay), step_s, options.link_mbps * 1e6
        )
        found[name] = {
            "computing": shares.computing,
            "mbps_used": shares.bits_per_s / 1e6,
            "bytes_per_round": sum(sizes.values()),
        }
    return found


def _goodputs(options: argparse.Namespace, arm: dict[str, Any]) -> dict[str, Any]:
    """With a death every so many seconds, from this run's own step time."""
    from node.train.linktime import goodput

    step_s = arm["compute_s"] / max(1, options.steps * options.workers)
    round_s = options.inner_steps * step_s
    found: dict[str, Any] = {"round_s": round_s, "away_s": options.away_s}
    for every_s in options.failure_every:
        found[f"{every_s:g}"] = goodput(options.workers, round_s, every_s, options.away_s, options.seed)
    return found
