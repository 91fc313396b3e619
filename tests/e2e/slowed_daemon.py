"""`shoal`, with an engine that takes longer: PIECE_S more for a piece of a prompt, STEP_S more for a decode step."""

import os
import sys
import threading

from model_shards import engine
from shoal.cli import main

PIECE_S, STEP_S = float(os.environ["PIECE_S"]), float(os.environ["STEP_S"])
run = engine.Engine.run


def slowed(self, steps, *more, **named):
    is_prompt = any(step.count > 1 for step in steps)
    threading.Event().wait(PIECE_S if is_prompt else STEP_S)
    return run(self, steps, *more, **named)


engine.Engine.run = slowed

if __name__ == "__main__":
    sys.exit(main())
