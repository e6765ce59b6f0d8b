"""The old name of `experiments.speed`."""

from __future__ import annotations

import sys

from experiments.speed import main

if __name__ == "__main__":
    print("python -m experiments.benchmark is called python -m experiments.speed now", file=sys.stderr)
    main()
