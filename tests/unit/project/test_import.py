"""`import memo` is cheap: it pulls in nothing heavy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

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
    *("fnmatch", "ipaddress", "logging", "pathlib", "tempfile", "textwrap", "traceback", "urllib"),
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


LATER = {
    *("memo.cli", "memo.jupyter", "memo.testing"),
    *("memo.decorators.invalidators", "memo.decorators.names", "memo.engine.invalidating"),
    *("memo.decorators.elementwise", "memo.decorators.streaming", "memo.engine.explaining"),
    *("memo.engine.answering", "memo.engine.computing", "memo.coordination.leases"),
    *("memo.stores.authorities", "memo.stores.chain", "memo.stores.confirmed"),
    *("memo.engine.sequences", "memo.keys.encoding.libraries", "memo.keys.encoding.python_types"),
    *("memo.keys.fingerprint.names_used", "memo.keys.fingerprint.normalized_code"),
    *("memo.keys.fingerprint.reachable", "memo.keys.fingerprint.source_history"),
    *("memo.keys.fingerprint.unchanged", "memo.metrics.formatting", "memo.metrics.rendering"),
    *("memo.metrics.shared_counters", "memo.metrics.snapshots", "memo.metrics.telemetry"),
    *("memo.records.spool", "memo.records.zstd_frames", "memo.settings.redis_urls"),
    "memo.stores.bundle_file",
    *("memo.stores.custom", "memo.stores.disk", "memo.stores.memory", "memo.stores.transfers"),
    *("memo.stores.redis", "memo.stores.writing", "memo.validity.remote"),
}
"""Parts of memo that no first call needs, or that a first call imports by itself."""


def added(code: str) -> set[str]:
    """The modules that some code brings into a fresh interpreter, and the packages they are in."""
    report = f"import sys; old = set(sys.modules); {code}; new = set(sys.modules) - old\n"
    report += "import json; print(json.dumps(sorted(new | {n.partition('.')[0] for n in new})))"
    answer = subprocess.run(
        [sys.executable, "-c", report], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(json.loads(answer.stdout))


def test_import_pulls_in_nothing_heavy() -> None:
    """`import memo` imports neither Redis' client nor pandas, IPython, asyncio or their like."""
    modules = added("import memo")
    assert "memo" in modules
    assert not modules & HEAVY


def test_import_leaves_the_rest_of_memo_for_later() -> None:
    """A store, a walker of code, a stream or a table is imported where it is first needed."""
    unknown = [name for name in LATER if importlib.util.find_spec(name) is None]
    assert not unknown
    assert not added("import memo") & LATER


RARE = {"bisect", "difflib", "html", "importlib.resources", "queue", "random", "uuid", "zoneinfo"}
"""Modules of the standard library that memo needs on rare paths only."""


def test_import_leaves_rare_modules_of_the_standard_library_for_later() -> None:
    """A rare path of memo imports what it needs of the standard library itself."""
    assert not added("import memo") & RARE


def test_names_that_are_imported_at_their_first_use_are_public() -> None:
    """`memo.invalidate` and its like are there, although `import memo` does not load them."""
    answer = added("import memo; memo.invalidate, memo.Invalidation")
    assert {"memo.decorators.invalidators", "memo.engine.invalidating"} <= answer


def test_named_tuples_are_made_without_compiling_their_annotations() -> None:
    """`import memo` makes no named tuple with `typing`, which takes three times as long."""
    count = "import typing; made = []; whole = typing.NamedTupleMeta.__new__; "
    count += "typing.NamedTupleMeta.__new__ = lambda *given: made.append(given) or whole(*given); "
    answer = added(f"{count}import memo; assert not made, made")
    assert "memo" in answer


CALLED = """
import atexit, sys
old = set(sys.modules)
@atexit.register  # runs last, since memo registers what it does at the end after it
def told():
    print(*sorted(set(sys.modules) - old))
import memo
memo.configure(directory=sys.argv[1])
@memo.cache(ttl=None, name="three")
def three(text, number=3):
    return text * number
print(three("a"))
"""


def test_a_process_that_only_hits_loads_nothing_to_compute_or_to_explain(tmp_path: Path) -> None:
    """Modules for a computation, a report or OpenSSL are not loaded if all calls hit."""
    miss, hit = (
        subprocess.run(
            [sys.executable, "-c", CALLED, tmp_path],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout.split()
        for _ in range(2)
    )
    assert miss[0] == hit[0] == "aaa"
    rare = {"hashlib", "memo.keys.encoding.python_types", "secrets", "zoneinfo"}
    assert not {*miss} & rare
    assert "cloudpickle" in miss
    computing = {"cloudpickle", "concurrent.futures", "logging"}
    showing = {"html", "memo.metrics.formatting", "memo.metrics.rendering"}
    assert not {*hit} & (rare | computing | showing | {"memo.engine.explaining"})


def test_decorating_pulls_in_nothing_heavy() -> None:
    """Decorating a function costs no import either: settings and tiers wait for the first call."""
    assert not added("import memo; f = memo.cache(ttl=60)(len)") & (HEAVY | LATER)


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
