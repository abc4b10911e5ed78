"""Time of `import memo` beyond that of bare Python.

Each sample is a fresh interpreter, from its start to its end, with the bytecode compiled before.
Samples with and without memo alternate, so that a slow spell of the machine meets both alike; the
medians are compared.

    python benchmarks/import_time.py [--runs 21] [--limit 60]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

LIMIT = 60.0
"""Milliseconds that `import memo` may cost."""


class Cost(NamedTuple):
    """Medians, in milliseconds."""

    bare: float
    memo: float

    @property
    def over(self) -> float:
        """The part that memo adds."""
        return self.memo - self.bare


def sample(code: str, environment: dict[str, str]) -> float:
    """Milliseconds that a fresh interpreter takes to run some code, from start to end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    return (time.perf_counter() - begin) * 1000


def measure(runs: int) -> Cost:
    """Return the medians of `runs` interpreters of each kind, after one each that compiles."""
    kinds = ("pass", "import memo")
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        rows = [[sample(code, environment) for code in kinds] for _ in range(runs + 1)][1:]
    return Cost(*map(statistics.median, zip(*rows, strict=True)))


def main() -> int:
    """Print the medians; return 1 if memo costs more than the limit."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--runs", type=int, default=21, help="interpreters of each kind")
    options.add_argument("--limit", type=float, default=LIMIT, help="milliseconds")
    given = options.parse_args()
    cost = measure(given.runs)
    print(f"bare {cost.bare:.1f} ms, with memo {cost.memo:.1f} ms: memo costs {cost.over:.1f} ms")
    return int(cost.over > given.limit)


if __name__ == "__main__":
    sys.exit(main())
