"""The flags of `shoal train`. It imports nothing that takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ORDERS = ("status", "stop", "export")


def train_command(commands: Any, add: Callable[..., Any], where: Callable[[Any], None]) -> None:
    """`add` and `where` are those of `shoal.cli_parser`."""
    train = add(
        commands,
        "train",
        "shoal.cli_train:train",
        "train a model together with the mesh, and see, stop or export a run",
        "Begin the run that a TOML file describes, or take part in one (--join). The daemon trains; this command\n"
        "shows how it goes until the run is done here. Ctrl-C ends the showing only. Computers may join and leave at\n"
        "any time, by cable or by death; what was trained is not lost.\n"
        "`stop` leaves a run cleanly (--join takes it up again), `export` writes what it has come to as a Hugging\n"
        "Face directory.",
        "  shoal train run.toml --serve my-model\n  shoal train --join tiny\n  shoal train status\n"
        "  shoal train stop tiny\n  shoal train export tiny ~/models/tiny",
    )
    train.add_argument(
        "words",
        metavar="RUN.toml | status [RUN] | stop RUN | export RUN DIR",
        nargs="*",
        help="a run's file, or an order",
    )
    train.add_argument("--join", metavar="RUN", help="take part in this run of the mesh, by its name or id")
    train.add_argument(
        "--serve",
        metavar="NAME",
        default="",
        help="offer the model to the mesh under this name, once the run is done or exported",
    )
    train.add_argument("--detach", action="store_true", help="begin or join, and do not wait for the end")
    train.add_argument(
        "--json", action="store_true", help="print what is reported as JSON, one object a line"
    )
    where(train)
