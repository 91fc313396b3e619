"""Many seeds of the simulated world: `python tests/collectives/agreement/check.py --seeds 100000`."""

import argparse
import collections
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

import world  # noqa: E402 - beside this file, wherever it is run from


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    totals, excused, broken = collections.Counter(), collections.Counter(), []
    for seed in range(given.first, given.first + given.seeds):
        try:
            one = world.World(seed).run()
        except (world.Violation, RuntimeError) as error:
            broken.append(f"seed {seed}: {error}")
            print(broken[-1], file=sys.stderr, flush=True)
            continue
        totals.update(one.stats)
        if one.excused:
            excused[one.excused] += 1
    report = {
        "seeds": given.seeds,
        "violations": len(broken),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps({**report, **totals, "beyond_mending": dict(excused)}, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
