"""The seven statements of "What counts as an input", as programs that count computations.

A program is a head, a body that is cached, and steps; after each step `runs` must have so many
items.  It is written for a function and for methods of five kinds of classes, as `def` and as
`async def`, and is played as a module, as cells of an IPython shell, or in a second process that
shares the cache with a first, where what the first has computed must hit.

`python statements.py cells|module` plays every one and prints what went wrong, as JSON.
"""

from __future__ import annotations

import json
import linecache
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

HEAD = """
import asyncio, inspect, threading, types
from dataclasses import dataclass
import memo
runs = []
class Api:
    def __init__(self, requests=0):
        self.requests, self.base = requests, "x"
    def get(self, x):
        self.requests += 1
        return f"{self.base} {x}"
class Pair:
    def __init__(self, *names):
        for name in names:
            setattr(self, name, name)
def go(value):
    return asyncio.run(value) if inspect.iscoroutine(value) else value
def put(made, name, value):
    object.__setattr__(getattr(made, "held", made), name, value)
def refused(call):
    try:
        go(call())
    except TypeError as error:
        return "stored elsewhere" in str(error)
"""
INIT = """
    def __init__(self, tenant, extra):
        self.tenant, self.extra = tenant, extra
"""
METHOD = """
    @memo.cache(name="{name}", ttl=None)
    {define} f({self}{parameters}):
        runs.append(1)
        {body}
"""
MAKE = """
def make(tenant="a", extra=None):
    return K(tenant, extra)
"""
KINDS = {
    "plain": f"class K:{INIT}{METHOD}{MAKE}",
    "dataclass": f"@dataclass\nclass K:\n    tenant: str\n    extra: object\n{METHOD}{MAKE}",
    "frozen": (
        f"@dataclass(frozen=True)\nclass K:\n    tenant: str\n    extra: object\n{METHOD}{MAKE}"
    ),
    "slots": f"class K:\n    __slots__ = ('tenant', 'extra')\n{INIT}{METHOD}{MAKE}",
    "derived": (
        f"class Base:{INIT}\n    def name(self):\n        return self.tenant\n"
        f"class K(Base):\n    def name(self):\n        return super().name()\n{METHOD}{MAKE}"
    ),
    "function": (
        f"class State:{INIT}\nheld = State('a', None)\n{textwrap.dedent(METHOD)}\n"
        "def make(tenant='a', extra=None):\n    global held\n    held = State(tenant, extra)\n"
        "    return types.SimpleNamespace(f=f, held=held)\n"
    ),
}
"""Kinds of classes, and a function whose state is a global object."""
WAYS = {"sync": "def", "async": "async def"}
PLACES = ("module", "cells", "second process")


class Step(NamedTuple):
    """One step of a program.

    Attributes:
        code: to run; with `check`, an expression that must be true afterwards.
        runs: how many computations there have been by then, in the first process.
        again: the same in a second one.
        without: kinds that the step is not for.
    """

    code: str
    runs: int
    again: int = 0
    check: str = ""
    without: tuple[str, ...] = ()


class Statement(NamedTuple):
    """One statement, as a program."""

    body: str
    steps: tuple[Step, ...]
    head: str = ""
    parameters: str = "x"
    without: tuple[str, ...] = ()


STATEMENTS: dict[str, Statement] = {
    "arguments, bound and typed": Statement(
        "return 1",
        (
            Step("o = make(); go(o.f(1)); go(o.f(x=1)); go(o.f(1, 2)); go(o.f(y=2, x=1))", 1),
            Step("go(o.f('1')); go(o.f(1.0)); go(o.f(True)); go(o.f(b'1'))", 5),
            Step("go(o.f({'a': 1, 'b': 2})); go(o.f({'b': 2, 'a': 1}))", 7),
            Step("go(o.f(1, p=1, q=2)); go(o.f(1, q=2, p=1))", 9),
            Step("go(o.f({1, 1 << 20, 5})); go(o.f({5, 1 << 20, 1}))", 10),
            Step("go(o.f(Pair('a', 'b'))); go(o.f(Pair('b', 'a')))", 11),
        ),
        parameters="x, y=2, **more",
    ),
    "code, globals, closures and defaults": Statement(
        "return x, helper(), captured(), bump()",
        (
            Step("o = make(); go(o.f(1)); go(o.f(1))", 1),
            Step("G = 2\ngo(o.f(1))", 2),
            Step("G = 1\ngo(o.f(1))", 2),
            Step("captured = closed(2)\ngo(o.f(1))", 3),
            Step("captured = closed(1)\ngo(o.f(1))", 3),
            Step("bump.__defaults__ = (2,); go(o.f(1))", 4),
            Step("bump.__defaults__ = (1,); go(o.f(1))", 4),
            Step("def helper():\n    return G * 11\ngo(o.f(1))", 5),
            Step("def helper():\n    return G * 10  # as it was\ngo(o.f(1))", 5),
        ),
        head=(
            "G = 1\ndef helper():\n    return G * 10\ndef closed(n):\n    def inner():\n"
            "        return n\n    return inner\ncaptured = closed(1)\n"
            "def bump(by=1):\n    return by\n"
        ),
    ),
    "the state of self": Statement(
        "return x, {tenant}",
        (
            Step("a = make('a'); go(a.f(1)); b = make('b'); go(b.f(1))", 2),
            Step("a = make('a'); go(a.f(1)); b = make('b'); go(b.f(1))", 2),
            Step("put(b, 'tenant', 'c'); assert go(b.f(1)) == (1, 'c')", 3),
            Step("put(b, 'tenant', 'b'); assert go(b.f(1)) == (1, 'b')", 3),
            Step("put(b, 'extra', 5); go(b.f(1))", 3, without=("function",)),
        ),
    ),
    "state without a sound key": Statement(
        "with self.extra: return x, {tenant}",
        (
            Step("a = make('a', threading.Lock()); go(a.f(1))", 1),
            Step("a = make('a', threading.Lock()); go(a.f(1))", 1),
            Step("b = make('b', threading.Lock()); assert go(b.f(1)) == (1, 'b')", 2),
            Step(
                "[told] = warned",
                2,
                check="'__cache_key__()' in told and 'key_resolver=' in told and 'ignore=' in told",
                without=("function",),
            ),
            Step("", 2, check="any('extra' in one for one in b.f.explain(1).untracked)"),
        ),
    ),
    "addresses and invalidation": Statement(
        "return x, {tenant}",
        (
            Step("a, b = make('a'), make('b'); go(a.f(1)); go(a.f(2)); go(b.f(1))", 3),
            Step("", 3, check="a.f.address(1) == b.f.address(1) and a.f.key(1) != b.f.key(1)"),
            Step("a.f.invalidate(1); go(b.f(1)); go(a.f(2))", 3, check="not a.f.is_cached(1)"),
            Step("go(a.f(1))", 4, 1),
            Step("a.f.expire(); go(b.f(1)); go(a.f(2)); go(a.f(1))", 6, 3),
            Step("K.f.invalidate(1); go(a.f(2)); go(a.f(1)); go(b.f(1))", 8, 5),
        ),
        without=("function",),
    ),
    "state that the computation changes": Statement(
        "return self.extra.get(x), {tenant}",
        (
            Step("o = make('a', Api(BEGIN)); go(o.f(1)); go(o.f(1)); go(o.f(2)); go(o.f(2))", 2),
            Step("", 2, check="o.f.is_cached(1) and o.f.is_cached(2)"),
            Step("", 2, check="len(warned) == FIRST and all('requests' in one for one in warned)"),
            Step(
                "told = o.f.explain(1).untracked",
                2,
                check="any('requests`: left out' in one for one in told) or not FIRST",
            ),
            Step("getattr(o, 'held', o).extra.base = 'y'; assert 'y 1' in go(o.f(1))", 3, 1),
        ),
        head="FIRST, BEGIN = 1, 0\n",
    ),
    "handles to data elsewhere": Statement(
        "return x, away.protocol",
        (
            Step("o = make(); go(o.f(1)); assert refused(lambda: o.f(handle('a')))", 1),
            Step("away = handle('b')\ngo(o.f(1))", 1),
            Step("", 1, check="any('away' in one for one in o.f.explain(1).untracked)"),
        ),
        head=(
            "from fsspec.implementations.memory import MemoryFileSystem\n"
            "def handle(name):\n"
            "    return MemoryFileSystem(name=name, skip_instance_cache=True)\n"
            "away = handle('a')\n"
        ),
    ),
}

Case = tuple[str, str, str]
"""A statement, a kind of class, a way."""


def cases() -> list[Case]:
    """Every case that there is."""
    return [
        (name, kind, way)
        for name, statement in STATEMENTS.items()
        for kind in KINDS
        if kind not in statement.without
        for way in WAYS
    ]


def written(case: Case) -> str:
    """The source of a case, before its steps."""
    name, kind, way = case
    statement = STATEMENTS[name]
    method = kind != "function"
    tenant = {"derived": "self.name()"}.get(kind, "self.tenant")
    body = statement.body.replace("{tenant}", tenant)
    text = KINDS[kind].replace("{name}", f"statement:{'-'.join(case)}")
    text = text.replace("{define}", WAYS[way]).replace("{self}", "self, " if method else "")
    text = text.replace("{parameters}", statement.parameters)
    body = body if method else body.replace("self.", "held.")
    return HEAD + statement.head + text.replace("{body}", body)


def play(case: Case, run: Callable[[str], None], names: dict[str, Any], first: bool = True) -> str:
    """Play a case; the first step that went wrong, and how.

    Args:
        run: runs a piece of source.
        names: the variables that it leaves.
        first: no other process has played it before.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(written(case))
        if not first:
            run("BEGIN, FIRST = 17, 0")
        for step in STATEMENTS[case[0]].steps:
            if case[1] in step.without or (not first and "warned" in step.code + step.check):
                continue
            names["warned"] = [str(one.message) for one in told]
            try:
                run(step.code)
            except Exception as error:
                return f"{step.code}: {type(error).__name__}: {error}"
            wanted = step.runs if first else step.again
            if len(names["runs"]) != wanted:
                return f"{step.code}: {len(names['runs'])} computations rather than {wanted}"
            if step.check and not eval(step.check, names):
                return f"{step.check}: {names['warned']}"
    return ""


def in_a_module(case: Case, first: bool = True) -> str:
    """Play a case as a module, whose steps have source as well."""
    module = types.ModuleType("statement_" + "".join(c for c in "_".join(case) if c.isalnum()))
    sys.modules[module.__name__] = module
    count = iter(range(100))

    def run(source: str) -> None:
        file = f"<{module.__name__} {next(count)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec", dont_inherit=True), vars(module))

    try:
        return play(case, run, vars(module), first)
    finally:
        del sys.modules[module.__name__]


def in_cells(shell: Any, case: Case) -> str:
    """Play a case as cells of an IPython shell."""

    def run(source: str) -> None:
        shell.run_cell(source, silent=True).raise_error()

    return play(case, run, shell.user_ns)


def played(place: str) -> Iterator[tuple[Case, str]]:
    """Every case, and what went wrong with it, `""` for nothing, in this process."""
    shell: Any = None
    if place == "cells":
        from IPython.core.interactiveshell import InteractiveShell

        shell = InteractiveShell.instance()
    for case in cases():
        if shell is not None:
            yield case, in_cells(shell, case)
        else:
            yield case, in_a_module(case, first=place == "module")


if __name__ == "__main__":
    print(json.dumps([[*case, said] for case, said in played(sys.argv[1])]))
