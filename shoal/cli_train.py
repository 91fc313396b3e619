"""`shoal train`: begin, join, show, stop and export training runs. The daemon trains; here its answers are drawn."""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from shoal import terminal
from shoal.cli_parser_train import ORDERS
from shoal.daemon_client import DaemonClient, connect, one_event
from shoal.errors import CommandFailed, UsageProblem

USAGE = "shoal train RUN.toml, --join RUN, status [RUN], stop RUN, or export RUN DIR"


def train(options: argparse.Namespace) -> int:
    """Carry out one order about a run."""
    words = list(options.words)
    if options.join is not None:
        if words:
            raise UsageProblem(f"--join takes part in one run and nothing else; got also {' '.join(words)}")
        client = connect(options.api, options.data_dir)
        body = {"run": options.join, "serve": options.serve}
        return _follow(client.ndjson("/shoal/train/join", body), options)
    if not words:
        raise UsageProblem(f"say what to train: {USAGE}")
    if words[0] in ORDERS:
        return {"status": _status, "stop": _stop, "export": _export}[words[0]](words[1:], options)
    if len(words) > 1:
        raise UsageProblem(f"one run's file at a time, got {' '.join(words)}: {USAGE}")
    path = Path(words[0]).expanduser().resolve()
    if not path.is_file():
        raise UsageProblem(f"{words[0]} is no file: {USAGE}")
    client = connect(options.api, options.data_dir)
    return _follow(client.ndjson("/shoal/train", {"recipe": str(path), "serve": options.serve}), options)


def _client(options: argparse.Namespace) -> DaemonClient:
    return connect(options.api, options.data_dir)


def _follow(lines: Generator[dict[str, Any]], options: argparse.Namespace) -> int:
    """Draw a run until it ends here."""
    last: dict[str, Any] = {}
    shown = -1
    try:
        with closing(lines):
            for line in lines:
                one_event(line)
                if "run" not in line:
                    continue
                last = line
                if options.json:
                    print(json.dumps(line), flush=True)
                elif line.get("rounds") != shown or line.get("state") not in ("training",):
                    shown = line.get("rounds", -1)
                    print(_line(line), flush=True)
                if options.detach:
                    return 0
    except KeyboardInterrupt:
        name = last.get("name") or options.join or "RUN"
        terminal.note(
            f"\nthe run goes on; leave it with: {terminal.program()} train stop {name}{terminal.aim(options)}"
        )
        return 0
    if last.get("state") == "failed":
        raise CommandFailed(str(last.get("problem") or "the run failed here"))
    return 0


def _status(words: list[str], options: argparse.Namespace) -> int:
    if len(words) > 1:
        raise UsageProblem(f"status takes one run at most, got {' '.join(words)}")
    runs = _client(options).post("/shoal/train/status", {"run": words[0] if words else ""}).get("runs", [])
    if options.json:
        print(json.dumps(runs, indent=1))
        return 0
    if not runs:
        terminal.note("the mesh has no training run now")
    for run in runs:
        print(_line(run))
        columns = ("node", "state", "steps", "loss", "tokens/s", "computing")
        terminal.table(columns, [_member(one) for one in run.get("members", ())], right=columns[2:])
    return 0


def _stop(words: list[str], options: argparse.Namespace) -> int:
    if len(words) != 1:
        raise UsageProblem("say which run to leave: shoal train stop RUN")
    answer = _client(options).post("/shoal/train/stop", {"run": words[0]})
    print(json.dumps(answer) if options.json else f"this node has left {answer.get('stopped')}")
    return 0


def _export(words: list[str], options: argparse.Namespace) -> int:
    if len(words) != 2:
        raise UsageProblem("say which run and where to: shoal train export RUN DIR")
    directory = str(Path(words[1]).expanduser().absolute())
    body = {"run": words[0], "directory": directory, "serve": options.serve}
    answer = _client(options).post("/shoal/train/export", body)
    if options.json:
        print(json.dumps(answer))
        return 0
    print(f"{words[0]} is in {answer.get('directory')}")
    if not options.serve:
        terminal.note(
            f"serve it with: {terminal.program()} add {answer.get('directory')}{terminal.aim(options)}"
        )
    return 0


def _line(run: dict[str, Any]) -> str:
    """One run on one line."""
    members = sum(1 for one in run.get("members", ()) if one.get("state") in ("training", "stuck"))
    parts = [
        str(run.get("name")),
        str(run.get("state")),
        f"round {run.get('rounds')} of {run.get('rounds_whole') or '?'}",
        f"{members} training",
        f"{run.get('tokens_per_s') or 0:.0f} tokens/s",
    ]
    for field, label in (("loss", "loss"), ("val_loss", "held out")):
        if run.get(field) is not None:
            parts.append(f"{label} {run[field]:.3f}")
    if run.get("computing") is not None:
        parts.append(f"computing {run['computing']:.0%}")
    if run.get("bytes_sent"):
        parts.append(f"sent {terminal.size(run['bytes_sent'])}")
    if run.get("problem"):
        parts.append(str(run["problem"]))
    return "  ".join(parts)


def _member(one: dict[str, Any]) -> tuple[str, ...]:
    loss = one.get("loss")
    return (
        str(one.get("name") or one.get("node")),
        str(one.get("state")),
        str(one.get("epoch")),
        "" if loss is None else f"{loss:.3f}",
        f"{one.get('tokens_per_s') or 0:.0f}",
        f"{one.get('computing') or 0:.0%}",
    )
