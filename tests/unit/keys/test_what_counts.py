"""The seven statements of "What counts as an input", over every kind, way and place; and mutants.

`statements` has them as programs.  Each program computes as often as it says, and fails when the
rule that it is about is taken out of memo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import key_mutants
import pytest
import statements

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

MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], str]] = [
    (key_mutants.untyped, "arguments, bound and typed"),
    (key_mutants.keywords_sorted, "arguments, bound and typed"),
    (key_mutants.values_left_out, "code, globals, closures and defaults"),
    (key_mutants.code_left_out, "code, globals, closures and defaults"),
    (key_mutants.state_left_out, "the state of self"),
    (key_mutants.by_address, "state without a sound key"),
    (key_mutants.of_all_objects, "addresses and invalidation"),
    (key_mutants.as_it_is_now, "state that the computation changes"),
    (key_mutants.handles_have_keys, "handles to data elsewhere"),
]


@pytest.mark.parametrize(("mutant", "statement"), MUTANTS, ids=[m.__name__ for m, _ in MUTANTS])
@pytest.mark.filterwarnings("ignore")
def test_a_mutant_fails_its_statement(
    mutant: Callable[[pytest.MonkeyPatch], None], statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its rule taken out a statement fails, of every kind of class and in every way."""
    cases = [case for case in statements.cases() if case[0] == statement]
    mutant(monkeypatch)
    assert [case for case in cases if not statements.in_a_module(case)] == []


def test_every_statement_has_a_mutant() -> None:
    """No statement is without a test that it can fail."""
    assert {statement for _, statement in MUTANTS} == set(statements.STATEMENTS)
