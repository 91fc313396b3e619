"""`shoal sim`: a simulated mesh with nodes that come and go, a trace of requests, and what a scheduler makes of it.

It turns flags into a configuration, runs `scheduler.sim`, and prints or draws the figures. No node is started and
nothing goes over a network.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scheduler import InputError, Shortage
from scheduler.sim import Load, SimConfig, compare, default_model, goodput_picture, run, times_picture
from shoal import terminal
from shoal.errors import CommandFailed, UsageProblem


def sim(options: argparse.Namespace) -> int:
    """Run one policy, or all on the same mesh and load, and print what came of it."""
    every = options.policy == "all"
    try:
        config = config_of(options)
        if every:
            found = compare(config)
            runs: Mapping[str, Mapping[str, Any]] = found["runs"]
        else:
            found = run(config)
            runs = {options.policy: found}
    except Shortage as short:
        raise CommandFailed(f"the model {short}") from None
    except InputError as problem:
        raise UsageProblem(str(problem)) from None
    pictures = save_pictures(options.plot, runs) if options.plot else []
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, runs, every)
    for path in pictures:
        terminal.note(f"wrote {path}")
    return 0


def config_of(options: argparse.Namespace) -> SimConfig:
    """The configuration that the flags ask for. Raises InputError."""
    return SimConfig(
        policy="shoal" if options.policy == "all" else options.policy,
        nodes=options.nodes,
        model=replace(default_model(), layers=options.layers),
        load=Load(trace=options.trace, speed=options.speed, requests_per_s=options.rate),
        hours=options.hours,
        churn_per_hour=options.churn_per_hour,
        seed=options.seed,
    )


def save_pictures(folder: str, runs: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Two SVG files in `folder`, which is made if it is not there. Raises CommandFailed."""
    place = Path(folder).expanduser()
    drawn = {"goodput.svg": goodput_picture(runs), "times.svg": times_picture(runs)}
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in drawn.items():
            (place / name).write_text(text, encoding="utf-8")
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise CommandFailed(f"{folder} cannot be written: {reason}") from None
    return [place / name for name in drawn]


def _show(found: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], every: bool) -> None:
    columns = (
        "policy", "in target", "goodput/s", "TTFT p50", "p90", "p99", "TPOT p50", "p90", "p99",
        "refused", "lost", "had alternate", "fetched", "messages",
    )  # fmt: skip
    rows = [
        (
            name,
            f"{figures['attainment']:.1%}",
            f"{figures['goodput_per_s']:.2f}",
            *(_seconds(figures["ttft_s"][share]) for share in ("p50", "p90", "p99")),
            *(_seconds(figures["tpot_s"][share]) for share in ("p50", "p90", "p99")),
            str(figures["refused"] + figures["unfinished"]),
            str(figures["lost"]),
            str(figures["lost_with_alternate"]),
            terminal.size(figures["bytes_moved"]),
            str(sum(figures["messages"].values())),
        )
        for name, figures in runs.items()
    ]
    terminal.table(columns, rows, right=columns[1:])
    some = next(iter(runs.values()))
    terminal.note(
        f"{some['requests']} requests in {some['hours']:g} h on {some['nodes']} nodes, of which {some['nodes_left']}"
        f" left and {some['nodes_joined']} came; targets: first token {some['targets']['ttft_s']:g} s,"
        f" each further one {some['targets']['tpot_s']:g} s"
    )
    if every and found.get("best_rival"):
        rival = found["best_rival"]
        ratio = "all of the" if rival["goodput_ratio"] is None else f"{rival['goodput_ratio']:.2f} times the"
        terminal.note(f"shoal: {ratio} goodput of the best other, {rival['policy']}")


def _seconds(value: float | None) -> str:
    return "" if value is None else terminal.duration(value)
