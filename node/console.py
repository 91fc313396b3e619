"""What the daemon says to whoever started it: the `ready` line, how far it is, log lines, a failure.

`Console` is what scripts and services get: the ready line on stdout and nothing else. The command line puts a fuller
one in its place where a person looks on. It knows nothing of meshes and models but how they are called.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from node.gateway import ModelInfo

OURS = ("shoal", "node", "p2p", "dht", "scheduler", "model_shards")


class Console:
    """Says once that the node is ready; everything else is for subclasses to show."""

    def __init__(self) -> None:
        self._told = False

    def busy(self, label: str, fraction: float | None = None, detail: str = "") -> None:
        """Something that takes a while goes on; `fraction` is 0 to 1, None where the end is not known."""

    def ready(self, api: str, peer: str, models: Sequence[ModelInfo]) -> None:
        """The node serves at `api` what it knows of `models`. Called once for each mesh it comes to live in."""
        if not self._told:
            self._told = True
            print(f"ready api={api} peer={peer}", flush=True)

    def stopping(self) -> None:
        """The daemon was told to stop."""

    def failed(self, problem: object) -> None:
        """Why the daemon ends with status 1, in one line."""
        print("shoal: " + " ".join(str(problem).split()), file=sys.stderr, flush=True)


class _StderrHandler(logging.Handler):
    """Writes to whatever stderr is now, so that lines go above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # nobody reads it any more


def set_up_logging(level: str) -> None:
    """Our own log lines from `level` on, on stderr; of libraries only what is an error.

    A person at a terminal gets the time and the words, a log file also where they come from.
    """
    handler = _StderrHandler()
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)  # what matters of it, p2p says itself
    logging.getLogger("zeroconf").setLevel(
        logging.CRITICAL
    )  # it warns of each packet where multicast is not had
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
