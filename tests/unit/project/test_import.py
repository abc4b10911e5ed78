"""`import memo` is cheap: it pulls in nothing heavy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from checkout import ROOT

HEAVY = {
    *("IPython", "anywidget", "asyncio", "attr", "blake3", "click", "cloudpickle", "concurrent"),
    *(
        "dataclasses",
        "datetime",
        "diskcache",
        "hashlib",
        "hiredis",
        "multiprocessing",
        "numpy",
        "pandas",
        "platformdirs",
        "polars",
    ),
    *(
        "pyarrow",
        "pydantic",
        "redis",
        "rich",
        "scipy",
        "sqlite3",
        "ssl",
        "torch",
        "typer",
    ),
}


def added(code: str) -> set[str]:
    """The top-level modules that some code brings into a fresh interpreter."""
    report = f"import sys; old = set(sys.modules); {code}; new = set(sys.modules) - old\n"
    report += "import json; print(json.dumps(sorted({name.partition('.')[0] for name in new})))"
    answer = subprocess.run(
        [sys.executable, "-c", report], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(json.loads(answer.stdout))


def test_import_pulls_in_nothing_heavy() -> None:
    """`import memo` imports neither Redis' client nor pandas, IPython, asyncio or their like."""
    modules = added("import memo")
    assert "memo" in modules
    assert not modules & HEAVY


def test_decorating_pulls_in_nothing_heavy() -> None:
    """Decorating a function costs no import either: settings and tiers wait for the first call."""
    assert not added("import memo; f = memo.cache(ttl=60)(len)") & HEAVY


@pytest.mark.timing
def test_the_import_benchmark_measures() -> None:
    """The benchmark of the import time runs; what it finds is in docs/performance.md.

    Nothing is asserted on the time itself but that no package was pulled in by an oversight, which
    would cost several times the 60 ms that are promised.
    """
    path = ROOT / "benchmarks" / "import_time.py"
    spec = importlib.util.spec_from_file_location("import_time", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert 0 < benchmark.measure(runs=3).over < 10 * benchmark.LIMIT
