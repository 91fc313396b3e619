"""What a gateway is told of admitting, judging, guessing and mending. Knows no mesh."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.config import DaemonConfig
from node.datadir import DataDir
from node.serve.failover import Patience
from node.serve.history import Shelf
from scheduler import AdmissionConfig, HealthConfig
from scheduler.parting import GAIN

WINDOW_ROWS = 8
HISTORY_DISK = 8
"""So many times as much of what stages hand on may lie on the disk as in memory."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """How this gateway admits and judges. `wait_s` bounds the wait of requests that name no target of their own;
    `split_gain` is the share of a request's time that separate chains for prefill and decode must save (1: never).
    Passes check up to `window` tokens at once, the certain one among them (1: no guesses)."""

    wait_s: float = 60.0
    window: int = WINDOW_ROWS
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    split_gain: float = GAIN
    patience: Patience = field(default_factory=Patience)


def serve_config(config: DaemonConfig) -> ServeConfig:
    """What the daemon was told of serving. A straggler is avoided longer than a node that failed: it still answers,
    and so says itself when it got better."""
    return ServeConfig(
        wait_s=config.queue_wait_s,
        admission=AdmissionConfig(
            waiting_max=config.queue_max, waiting_a_client_max=max(1, config.queue_max // 2)
        ),
        health=HealthConfig(out_s=config.avoid_s, slow_s=3 * config.avoid_s),
        split_gain=config.split_gain,
        patience=Patience(mend_s=config.mend_wait_s),
        window=WINDOW_ROWS if config.speculate == "lookup" else 1,
    )


def shelf_of(config: DaemonConfig, data: DataDir) -> Shelf:
    """Where stages keep what they hand on."""
    return Shelf(config.history_bytes, HISTORY_DISK * config.history_bytes, data.scratch_path())
