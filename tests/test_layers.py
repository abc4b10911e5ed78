"""The house stands as drawn: which room may know which, and who may touch the outside world."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "memo"

# A module imports only from rows above its own, or, without cycles, from its own.
ROWS = (
    ("pure data", "errors clock digests port events policy"),
    ("settings", "redis_urls options modes files places secret checks config live"),
    (
        "code and arguments",
        "origin code name_graph members patches reach seen probes uses image identity",
    ),
    (
        "values",
        (
            "atoms canon bands arrays columns tables frames callables kinds bindings resolvers"
            " summaries for_handles for_xarray for_dask for_sqlalchemy for_science"
        ),
    ),
    ("entries", "zstd codec reducers seal stamps generations transit"),
    ("numbers", "tally figures board stats"),
    ("plumbing", "breaker manifests"),
    (
        "compositions",
        (
            "instances keys weights flights tiers uploads transfers authorities floors chain leases"
            " sources display output"
        ),
    ),
    ("a host's files", "sqlite salvage ledger locks payloads index"),
    ("Redis' wire", "exchange scripts coalescing connections client grants listener prefetch"),
    ("leaves", "disk host remote memory adapted"),
    ("flows", "jobs reads loading same_types computing refreshing engine explanations"),
    ("loops and threads", "drivers"),
    (
        "assembly",
        (
            "classes matching invalidating names assembly decorators invalidation inventory"
            " graph_drawing call_graph reports"
            " under_way live_view watcher cells widget web_page"
        ),
    ),
    ("doors", "demo doctor magics cli testing __init__ __main__"),
)
ROW_OF = (0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6)  # the groups of one row are neighbours
FLOWS = {"jobs", "reads", "loading", "computing", "refreshing", "engine", "explanations"}
LEAVES = {"disk", "host", "remote", "memory", "adapted"}

# Packages of others, and the only rooms that may import them: one home each, so that one room is
# all there is to read when a package changes.
HOMES: dict[str, set[str]] = {
    "redis": {"connections"},
    "diskcache": {"index"},
    "cloudpickle": {"codec"},
    "blake3": {"codec", "arrays"},
    "backports": {"zstd"},
    "compression": {"zstd"},
    "platformdirs": {"config", "secret"},
    "click": {"cli"},
    "rich": {"cli", "demo", "display", "watcher"},
    "anywidget": {"widget"},
    "IPython": {"magics", "__init__"},
}

# What costs too much to be imported with memo: see tests/test_import.py.
HEAVY = {
    *(
        "IPython",
        "anywidget",
        "asyncio",
        "blake3",
        "cloudpickle",
        "diskcache",
        "numpy",
        "pandas",
        "polars",
    ),
    *("pyarrow", "pydantic", "redis", "rich", "scipy", "torch"),
}
# Rooms that are never imported with memo, and may import what they like.
LATE = {
    *("cli", "demo", "doctor", "connections", "exchange", "coalescing", "index", "magics"),
    "salvage",
    "zstd",
}

LOOPS = {"asyncio", "concurrent", "_thread", "selectors", "multiprocessing"}

# Who may import from LOOPS although it is not `drivers`, and why.
LOOPS_ALLOWED = {
    "bands": "big arrays are put in order by all cores",
    "demo": "a program, which runs its own pipeline",
    "coalescing": "what many callers of one event loop send together",
    "connections": "the client connections of one event loop",
    "exchange": "what is sent and received on an event loop",
    "remote": "closing from a loop what blocks",
    "client": "closing the connections of the running loop",
}

# Who may use `threading`, and for what; only `drivers`, and who is in STARTS, starts threads.
LOCKS = {
    "under_way": "computations begin and end in any thread",
    "web_page": "requests are answered one at a time",
    "assembly": "a chain is made once",
    "board": "statistics are written by whichever thread comes past",
    "loading": "which payloads were verified is shared by all callers",
    "breaker": "its state is shared by all callers",
    "code": "sources are parsed by one thread at a time",
    "config": "settings change and are read at once",
    "events": "hooks come and go while others are called",
    "floors": "the latest answers (I2) are shared by all threads",
    "flights": "the table of flights is shared by all threads",
    "grants": "the pause before a lost acquire is undone",
    "image": "recursion is noticed per thread",
    "connections": "connections are shared by all threads",
    "listener": "its thread hears what all others ask about",
    "live": "live values change and are read at once",
    "memory": "its records are shared by all threads",
    "output": "streams are wrapped once; threads of one computation share a record",
    "payloads": "one sweep at a time",
    "secret": "the file is made once, by one thread",
    "sqlite": "connections are one per thread, and opened one at a time",
    "stats": "events come from every thread",
    "transfers": "who fetches a payload is known to all who want it",
    "uploads": "what waits is shared by who stores and who sends",
    "watcher": "what ends while it is drawn is not drawn afterwards",
    "client": "clients come and go with their loops",
}
STARTS = {
    "bands": "a band is copied by several threads, which end with the array",
    "connections": "connecting knows no deadline in all: it is left behind",
    "grants": "a cancelled acquire is undone although its caller has gone",
    "listener": "what Redis pushes is heard whatever sync code or a loop is busy with",
}


class Import(NamedTuple):
    """One imported module, `memo.x` or foreign, and where."""

    name: str
    line: int
    top: bool


def modules() -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.glob("*.py"))}


TREES = modules()
RANK = {name: row for row, (_, names) in zip(ROW_OF, ROWS, strict=True) for name in names.split()}


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every import of a module, at its top or inside a function, for types only or not."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in top)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert node.module is not None
            if node.module == "memo":
                for alias in node.names:
                    inner = alias.name if alias.name in TREES else "__init__"
                    yield Import(f"memo.{inner}", node.lineno, id(node) in top)
            else:
                yield Import(node.module, node.lineno, id(node) in top)


def inner(module: str) -> Iterator[Import]:
    """The imports from memo itself, named by room."""
    for found in imports(TREES[module]):
        first, _, rest = found.name.partition(".")
        if first == "memo":
            yield found._replace(name=rest or "__init__")


def foreign(module: str) -> Iterator[Import]:
    """The imports from elsewhere, named by their first part."""
    for found in imports(TREES[module]):
        first = found.name.partition(".")[0]
        if first != "memo":
            yield found._replace(name=first)


def below(module: str) -> set[str]:
    """All rooms that a module knows, directly or by way of others; not the package itself."""
    known: set[str] = set()
    fresh = {module}
    while fresh:
        found = {f.name for name in fresh for f in inner(name)} - {"__init__"}
        fresh = found - known
        known |= found
    return known


def test_every_room_is_in_the_table() -> None:
    """A new module has its place in the house before it has any use."""
    assert set(TREES) == set(RANK)


@pytest.mark.parametrize("module", TREES)
def test_imports_only_downwards(module: str) -> None:
    """A room knows only the rooms below it, or beside it."""
    wrong = [f for f in inner(module) if RANK[f.name] > RANK[module]]
    assert not wrong, f"memo/{module}.py imports upwards: {wrong}"


def test_no_cycles() -> None:
    """No room knows itself by way of others; the package, the last door, is nobody's neighbour."""
    beside = {
        name: {f.name for f in inner(name) if f.name not in (name, "__init__")} for name in TREES
    }
    settled: set[str] = set()
    while free := {name for name, known in beside.items() if known <= settled} - settled:
        settled |= free
    assert not set(TREES) - settled, "these import each other in a circle"


def test_engine_and_leaves_never_meet() -> None:
    """The engine knows tiers by their Protocol only, and no tier knows the engine."""
    for flow in FLOWS:
        assert not below(flow) & LEAVES, flow
    for leaf in LEAVES:
        assert not below(leaf) & FLOWS, leaf


def test_tables_name_only_what_is_there() -> None:
    """No table of this file speaks of a room that has gone."""
    named = (
        LEAVES | set(LOOPS_ALLOWED) | set(LOCKS) | set(STARTS) | LATE | set().union(*HOMES.values())
    )
    assert named <= set(TREES)
    for package, rooms in HOMES.items():
        users = {module for module in TREES if any(f.name == package for f in foreign(module))}
        assert rooms == users, package
    for module in LOOPS_ALLOWED:
        assert any(f.name in LOOPS for f in foreign(module)), module


@pytest.mark.parametrize("module", [name for name in TREES if name != "drivers"])
def test_only_drivers_knows_loops(module: str) -> None:
    """Event loops, executors and processes are the drivers' business alone."""
    if module not in LOOPS_ALLOWED:
        wrong = [f for f in foreign(module) if f.name in LOOPS]
        assert not wrong, f"memo/{module}.py: {wrong}"


@pytest.mark.parametrize("module", [name for name in TREES if name != "drivers"])
def test_locks_have_a_reason(module: str) -> None:
    """Whoever else uses `threading` is listed with what for, and starts no thread."""
    used = any(f.name == "threading" for f in foreign(module))
    assert used == (module in LOCKS), f"memo/{module}.py: threading, against the table LOCKS"
    named = {n.attr for n in ast.walk(TREES[module]) if isinstance(n, ast.Attribute)}
    starts = bool(named & {"Thread", "Timer", "ThreadPoolExecutor"})
    assert starts == (module in STARTS), f"memo/{module}.py: threads, against the table STARTS"


@pytest.mark.parametrize("module", TREES)
def test_private_names_stay_at_home(module: str) -> None:
    """No room imports, or reaches for, a name that another room keeps to itself."""
    tree = TREES[module]
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memo")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    rooms = {f.name for f in inner(module)}
    reached = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in rooms
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    ]
    assert not imported + reached


@pytest.mark.parametrize("module", TREES)
def test_foreign_packages_have_one_home(module: str) -> None:
    """Each package of others is known in the rooms of its own, and nowhere else."""
    wrong = [f for f in foreign(module) if module not in HOMES.get(f.name, {module})]
    assert not wrong, f"memo/{module}.py: {wrong}"


@pytest.mark.parametrize("module", [name for name in TREES if name not in LATE])
def test_heavy_packages_are_imported_late(module: str) -> None:
    """What is heavy is imported inside the function that needs it."""
    wrong = [f for f in foreign(module) if f.top and f.name in HEAVY]
    assert not wrong, f"memo/{module}.py: {wrong}"


@pytest.mark.parametrize("module", TREES)
def test_rooms_and_what_is_public_are_documented(module: str) -> None:
    """Every module, and every public class and function of one, says what it is."""
    tree = TREES[module]
    assert ast.get_docstring(tree), f"memo/{module}.py"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, kinds)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and not any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)
    ]
    assert not bare, f"memo/{module}.py: {bare}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("tests/test_*.py")), ids=lambda path: path.stem)
def test_every_test_states_its_promise(path: Path) -> None:
    """The docstring of a test is the promise that it keeps."""
    bare = [
        node.name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert not bare
