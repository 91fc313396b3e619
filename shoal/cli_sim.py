"""`shoal sim`: a simulated mesh with nodes that come and go, a trace of requests, and what a scheduler makes of it.

It turns flags into a configuration, runs `scheduler.sim`, and prints or draws the figures. No node is started and
nothing goes over a network.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scheduler import InputError, Shortage
from scheduler.sim import (
    POLICIES,
    Load,
    SimConfig,
    Targets,
    capacity,
    compare,
    default_model,
    goodput_picture,
    run,
    times_picture,
)
from shoal import terminal
from shoal.errors import CommandFailed, UsageProblem


def sim(options: argparse.Namespace) -> int:
    """Run one policy, or all on the same mesh and load, and print what came of it."""
    every = options.policy == "all"
    try:
        config = config_of(options)
        if options.capacity:
            return _capacities(config, POLICIES if every else (options.policy,), as_json=options.json)
        if every:
            found = _compared(config)
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


def _compared(config: SimConfig) -> dict[str, Any]:
    """The comparison, each policy in a process of its own, as many at once as there are processors."""
    workers = min(len(POLICIES), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return compare(config, each=pool.map)


def config_of(options: argparse.Namespace) -> SimConfig:
    """The configuration that the flags ask for. Raises InputError."""
    rows = None if options.latencies is None else read_latencies(options.latencies)
    return SimConfig(
        policy="shoal" if options.policy == "all" else options.policy,
        nodes=options.nodes,
        model=replace(default_model(), layers=options.layers),
        load=Load(trace=options.trace, speed=options.speed, requests_per_s=options.rate),
        targets=Targets(options.ttft, options.tpot),
        hours=options.hours,
        churn_per_hour=options.churn_per_hour,
        crash_share=options.crash_share,
        return_share=options.return_share,
        diurnal=options.diurnal,
        gateways=options.gateways,
        view_age_s=options.view_age,
        regions=options.regions if rows is None else len(rows),
        latency_s=rows,
        copies=options.copies,
        seed=options.seed,
    )


def read_latencies(path: str) -> tuple[tuple[float, ...], ...]:
    """Rows of one-way milliseconds between regions, as seconds. Raises InputError."""
    right = "a JSON list of rows of milliseconds, one row and one figure in it for each region"
    try:
        rows = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        return tuple(tuple(float(each) / 1000.0 for each in row) for row in rows)
    except OSError as problem:
        raise InputError("latencies", path, f"a file that can be read ({problem.strerror})") from None
    except (ValueError, TypeError):
        raise InputError("latencies", path, right) from None


def _capacities(config: SimConfig, policies: Sequence[str], *, as_json: bool) -> int:
    """Print the highest load that each policy bears."""
    found = {name: capacity(replace(config, policy=name)) for name in policies}
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [(name, f"{each['requests_per_s']:.2f}", f"{each['speed']:.2f}") for name, each in found.items()]
    columns = ("policy", "requests/s at nine of ten in target", "speed of the load")
    terminal.table(columns, rows, right=columns[1:])
    return 0


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
    for key, words in (("better_baseline", "better published design"), ("best_rival", "best other")):
        if every and found.get(key):
            rival = found[key]
            ratio = (
                "all of the" if rival["goodput_ratio"] is None else f"{rival['goodput_ratio']:.2f} times the"
            )
            terminal.note(f"shoal: {ratio} goodput of the {words}, {rival['policy']}")


def _seconds(value: float | None) -> str:
    return "" if value is None else terminal.duration(value)
