"""The seven statements of "What counts as an input", over every kind, way and place; and mutants.

`statements` has them as programs.  Each program computes as often as it says, and fails when the
rule that it is about is taken out of memo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import statements

from memo.decorators.cached_function import CachedFunction
from memo.keys import call_keys, instances, offloading, own_changes
from memo.keys.bindings import NOT_GIVEN
from memo.keys.encoding import atoms, canonical, lookup
from memo.keys.fingerprint import held_values, normalised_code, reachable

Told = dict[str, list[list[str]]]
"""Statement -> kind, way and fault of what went wrong with it."""


def elsewhere(folder: Path, place: str) -> subprocess.Popen[str]:
    """A process of its own that plays the statements."""
    return subprocess.Popen(
        [sys.executable, statements.__file__, place],
        cwd=folder,
        env={**os.environ, "MEMO_DIRECTORY": str(folder / "cache"), "MEMO_SECRET": "s" * 64,
             "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def told(process: subprocess.Popen[str]) -> Told:
    """The faults that it met."""
    out, errors = process.communicate()
    assert not process.returncode, errors
    found: Told = {name: [] for name in statements.STATEMENTS}
    for name, *rest in json.loads(out.splitlines()[-1]):
        found[name] += [rest] if rest[-1] else []
    return found


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """The faults in the cells of a shell, and in two processes that share a cache."""
    shell, shared = tmp_path_factory.mktemp("cells"), tmp_path_factory.mktemp("shared")
    cells = elsewhere(shell, "cells")
    module = told(elsewhere(shared, "module"))
    second = told(elsewhere(shared, "second process"))
    return {"module": module, "second process": second, "cells": told(cells)}


@pytest.mark.parametrize("place", statements.PLACES)
@pytest.mark.parametrize("statement", statements.STATEMENTS)
def test_what_counts_as_an_input(statement: str, place: str, played: dict[str, Told]) -> None:
    """Equal inputs hit and others miss: functions and methods, `def` and `async def`."""
    assert played[place][statement] == []


# --- mutants --------------------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def untyped(patch: Patch) -> None:
    """The type of a number does not count."""

    def as_text(value: Any) -> bytes:
        return atoms.text(str(value))

    for table in (atoms.SIMPLE, offloading.LIGHT_ENCODERS):
        patch.setitem(table, int, as_text)


def keywords_sorted(patch: Patch) -> None:
    """The order of `**kwargs` does not count."""
    counting = call_keys.Keyer._counted_keywords

    def in_order(self: Any, extra: Any) -> Any:
        return dict(sorted(counting(self, extra).items()))

    patch.setattr(call_keys.Keyer, "_counted_keywords", in_order)


def values_left_out(patch: Patch) -> None:
    """Globals, closures and defaults do not count."""
    add_fingerprint = reachable.GraphBuilder.add_fingerprint

    def without(self: Any, node: Any, *rest: Any) -> None:
        before = set(node.facts)
        add_fingerprint(self, node, *rest)
        node.facts = before

    patch.setattr(reachable.GraphBuilder, "add_fingerprint", without)


def code_left_out(patch: Patch) -> None:
    """The code that a function reaches does not count."""
    read = normalised_code.read
    patch.setattr(normalised_code, "read", lambda *given: read(*given)._replace(text=""))


def state_left_out(patch: Patch) -> None:
    """Attributes do not count, be they of `self` or of a global."""
    values_left_out(patch)
    patch.setattr(instances, "attributes_of", lambda *_, **__: instances.NO_ATTRIBUTES)


def by_address(patch: Patch) -> None:
    """State without a sound key counts by its address."""
    one, callables = instances.encode_attribute, held_values.FingerprintWalk.callables

    def addressed(name: str, value: Any, lost: Any, *rest: Any) -> bytes:
        return one(name, value, lost, *rest) + (atoms.integer(id(value)) if lost else b"")

    patch.setattr(instances, "encode_attribute", addressed)
    patch.setattr(
        held_values.FingerprintWalk,
        "callables",
        lambda self, value, path: f"{id(value)} {callables(self, value, path)}",
    )


def of_all_objects(patch: Patch) -> None:
    """An invalidation through an object is for all objects."""
    dropped = CachedFunction._checked_invalidation

    def all_of_them(self: Any, port: Any, own: Any, *rest: Any, **more: Any) -> Any:
        return dropped(self, port, NOT_GIVEN, *rest, **more)

    patch.setattr(CachedFunction, "_checked_invalidation", all_of_them)


def as_it_is_now(patch: Patch) -> None:
    """State counts as it is, not as it was before computations changed it."""
    patch.setattr(own_changes.Registry, "base", lambda self, value, *_: value.fingerprint)


def handles_have_keys(patch: Patch) -> None:
    """A handle counts by what pickle saves of it."""
    patch.setattr(lookup, "find", lambda kind: None)
    patch.setattr(canonical, "_found", weakref.WeakKeyDictionary())


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (untyped, "arguments, bound and typed"),
    (keywords_sorted, "arguments, bound and typed"),
    (values_left_out, "code, globals, closures and defaults"),
    (code_left_out, "code, globals, closures and defaults"),
    (state_left_out, "the state of self"),
    (by_address, "state without a sound key"),
    (of_all_objects, "addresses and invalidation"),
    (as_it_is_now, "state that the computation changes"),
    (handles_have_keys, "handles to data elsewhere"),
]


@pytest.mark.parametrize(("mutant", "statement"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
@pytest.mark.filterwarnings("ignore")
def test_a_mutant_fails_its_statement(
    mutant: Callable[[Patch], None], statement: str, monkeypatch: Patch
) -> None:
    """With its rule taken out a statement fails, of every kind of class and in every way."""
    cases = [case for case in statements.cases() if case[0] == statement]
    mutant(monkeypatch)
    assert [case for case in cases if not statements.in_a_module(case)] == []


def test_every_statement_has_a_mutant() -> None:
    """No statement is without a test that it can fail."""
    assert {statement for _, statement in MUTANTS} == set(statements.STATEMENTS)
