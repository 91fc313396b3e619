"""Many seeds of the simulated world: `python tests/collectives/agreement/check.py --seeds 100000`."""

import argparse
import collections
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]

import agreement_world  # noqa: E402 - beside this file, wherever it is run from


def check(first, seeds):
    began = time.perf_counter()
    totals, excused, broken = collections.Counter(), collections.Counter(), 0
    for seed in range(first, first + seeds):
        try:
            one = agreement_world.World(seed).run()
        except (agreement_world.Violation, RuntimeError) as error:
            broken += 1
            print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
            continue
        totals.update(one.stats)
        if one.excused:
            excused[one.excused] += 1
    seconds = round(time.perf_counter() - began, 1)
    return {
        "seeds": seeds,
        "violations": broken,
        "seconds": seconds,
        **totals,
        "beyond_mending": dict(excused),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    report = check(given.first, given.seeds)
    print(json.dumps(report, indent=1))
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
