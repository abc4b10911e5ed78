"""References in docstrings and comments exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

FILES = sorted((ROOT / "memo").rglob("*.py"))
REFERENCE = re.compile(r"`(memo(?:\.\w+)+|\w+\.[A-Z][A-Z_]+)`")
"""`memo.module.name`, and a constant of a module."""


def references() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        for name in REFERENCE.findall(path.read_text("utf-8")):
            yield path.relative_to(ROOT), name


def found(name: str) -> bool:
    """True if a dotted name is a module of memo, or something in one."""
    parts = name.split(".")
    if parts[0] != "memo":
        modules = [path for path in FILES if path.stem == parts[0]]
        return any(hasattr(module(path), parts[1]) for path in modules)
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def module(path: Path) -> object:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize(("path", "name"), list(references()), ids=str)
def test_what_is_referred_to_is_there(path: Path, name: str) -> None:
    """A dotted name in backticks is the name of something that exists."""
    assert found(name) or name.startswith("memo.live"), f"{path}: {name}"
