"""`python -m tests.simulation --seed 7` repeats a run; `--seeds 0:2000` makes many, and prints those that fail."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import Counter

from tests.simulation.world import simulate


def main() -> int:
    """Returns 1 if a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int)
    which.add_argument("--seeds", metavar="A:B", help="from A to B - 1")
    arguments = parser.parse_args()
    if arguments.seeds:
        first, end = map(int, arguments.seeds.split(":"))
    else:
        first, end = arguments.seed, arguments.seed + 1
    # As the dataflow does: of many small objects none is in a cycle.
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    began, counts, failed = time.monotonic(), Counter[str](), 0
    for seed in range(first, end):
        wrong, own = simulate(seed)
        counts += own
        if wrong:
            failed += 1
            print(f"seed {seed}: {'; '.join(wrong[:3])}\n  rerun it alone: python -m tests.simulation --seed {seed}")
    took_s = time.monotonic() - began
    print(f"{end - first} seeds, {failed} failed, {took_s:.1f} s; {dict(sorted(counts.items()))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
