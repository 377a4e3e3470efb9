"""Side-by-side benchmarks against peers: ``python bench/run.py [--quick] [--only NAME]``."""

import sys
from pathlib import Path


def main() -> int:
    # Peers are started as ``python -m bench.peers.NAME``; this makes the same names ours.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from bench.suite import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
