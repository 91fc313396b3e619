"""Kills a writer of checkpoints at random instants, again and again, and looks at what it left.

    python killed_writer.py FOLDER KILLS SEED

Prints one JSON object. Each writer is a fork that saves state after state, slowly and in small pieces, keeps the newest
two, and says by a pipe which of them are on the disk. What is found afterwards must be whole, the last one it confirmed
or the one after that.
"""

import json
import os
import random
import select
import signal
import sys
from pathlib import Path

import torch

from collectives import Snapshot
from collectives.checkpoint import Retention, clean, files, keeper, newest

torch.set_num_threads(1)
PIECE = 2048


def pause(seconds):
    """Random instants of another process are what this is about: there is no event to wait for."""
    select.select((), (), (), seconds)


def state_of(epoch):
    g = torch.Generator().manual_seed(epoch)
    state = {
        "a.weight": torch.randn(33, 17, generator=g),
        "b": torch.randint(0, 255, (4097,), generator=g, dtype=torch.uint8),
        "outer.momentum.a.weight": torch.randn(33, 17, generator=g),
        "c": torch.full((5,), float(epoch), dtype=torch.bfloat16),
    }
    return Snapshot.take(state, epoch)


def write_on(root, first, tell):
    """Never returns."""
    files.PIECE_BYTES = PIECE
    epoch = first
    while True:
        path = files.write(root, state_of(epoch), {"epoch": epoch}, lambda: pause(2e-4))
        os.write(tell, f"{epoch}\n".encode())
        keeper.prune(root, Retention(last=2), keep=path)
        epoch += 1


def kill_once(root, first, after_s):
    """(what it confirmed last, what is there)."""
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        write_on(root, first, tell)
    os.close(tell)
    pause(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(hear, "rb") as pipe:
        said = pipe.read().split(b"\n")
    confirmed = max((int(line) for line in said if line), default=first - 1)
    return confirmed, newest(root)


def main(root, kills, seed):
    rng = random.Random(seed)
    epoch = 1
    files.write(root, state_of(epoch), {"epoch": epoch})
    found = {"kills": 0, "old": 0, "new": 0, "debris": 0, "mixtures": 0, "lost": 0}
    for _ in range(kills):
        confirmed, there = kill_once(root, epoch + 1, rng.uniform(0.0, 0.03))
        found["kills"] += 1
        found["debris"] += any(path.name.startswith(".") for path in root.iterdir())
        if there is None or there.epoch not in (confirmed, confirmed + 1):
            found["lost"] += 1
            break
        found["mixtures"] += (
            there.snapshot.digest != state_of(there.epoch).digest
            or there.meta != {"epoch": there.epoch}
            or bool(there.refused)
        )
        found["new" if there.epoch > confirmed else "old"] += 1
        epoch = there.epoch
        clean(root)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
