"""The types that people's own checkers see: `tests/typing/api.py` under mypy and pyright.

And those that tools (Sphinx, FastAPI, pydantic) read from the annotations while a program runs.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import ROOT

import memo
from memo import cache

API = ROOT / "tests" / "typing" / "api.py"
pytestmark = pytest.mark.timeout(300)


Checker = Callable[..., list[str]]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


def mypy(directory: Path, *files: Path) -> list[str]:
    """Mypy's errors in these files; those of the package are tested elsewhere."""
    done = run(
        *(
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--warn-unused-ignores",
            "--cache-dir",
            directory,
        ),
        *("--follow-imports", "silent", "--no-error-summary", *files),
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def pyright(directory: Path, *files: Path) -> list[str]:
    """Pyright's errors in these files."""
    settings = {
        "include": [os.path.relpath(path, directory) for path in files],
        "extraPaths": [os.path.relpath(ROOT, directory)],
        "pythonVersion": "3.11",
        "typeCheckingMode": "strict",
        "reportUnnecessaryTypeIgnoreComment": True,
        "reportPrivateUsage": False,
        "reportUnusedCoroutine": True,
    }
    project = directory / "pyrightconfig.json"
    project.write_text(json.dumps(settings))
    done = run(
        *(sys.executable, "-m", "pyright", "--project", project, "--outputjson"),
        *("--pythonpath", sys.executable),
    )
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] >= 1
    return [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']}"
        for one in found["generalDiagnostics"]
        if one["severity"] == "error"
    ]


WRONG = {
    "sync": ("assert_type(bare(1), float)", "assert_type(bare(1), int)"),
    "async": ("await bare_async(1), float", "await bare_async(1), str"),
    "refused": ('bare("1")  # type: ignore[arg-type]', 'bare("1")'),
}
"""Wrong expectations, each in a copy of `api.py` of that name."""


@pytest.mark.parametrize("check", [mypy, pyright])
def test_every_type_is_known(check: Checker, tmp_path: Path) -> None:
    """In strict mode every type of the public API is known, and what must be refused is.

    The test can fail: each wrong expectation is one error.
    """
    text, files = API.read_text("utf-8"), [API]
    for name, (old, new) in WRONG.items():
        assert old in text
        files.append(tmp_path / f"{name}.py")
        files[-1].write_text(text.replace(old, new))
    errors = check(tmp_path, *files)
    assert [error for error in errors if Path(error.partition(":")[0]).stem == API.stem] == []
    assert Counter(Path(error.partition(":")[0]).stem for error in errors) == Counter(list(WRONG))


class Shop:
    @cache
    def method(self, x: int) -> str:
        return str(x)

    @classmethod
    @cache
    def of_class(cls, x: int) -> str:
        return str(x)


@cache
def plain(x: int) -> str:
    return str(x)


@cache(replay=True)
async def waited(x: int) -> str:
    return str(x)


@cache
def counted(x: int) -> Iterator[int]:
    yield x


@cache
async def counted_async(x: int) -> AsyncIterator[int]:
    yield x


@cache(each="x")
def of_each(x: list[int]) -> list[str]:
    return list(map(str, x))


KINDS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "waited": waited,
    "counted": counted,
    "counted_async": counted_async,
    "of_each": of_each,
    "method": Shop().method,
    "Shop.method": Shop.method,
    "of_class": Shop.of_class,
}


def parts(name: str, one: Any) -> Iterator[tuple[str, Any]]:
    """A public object, and its public methods."""
    if callable(one):
        yield name, one
    known = dir(getattr(one, "__func__", one))
    for part in (*known, "__init__", "__call__"):
        if not part.startswith("_") or part in ("__init__", "__call__"):
            method = inspect.getattr_static(type(one), part, None)
            if callable(getattr(one, part, None)) and method is not getattr(object, part, None):
                yield f"{name}.{part}", getattr(one, part)


def test_type_hints() -> None:
    """`typing.get_type_hints` works on every public callable and on each kind of function."""
    public = {name: getattr(memo, name) for name in memo.__all__}
    wrong, seen = {}, 0
    for name, one in (public | KINDS).items():
        for part, found in parts(name, one):
            if type(found).__module__ == "builtins" and not hasattr(found, "__annotations__"):
                continue  # a method of Python's own types
            seen += 1
            try:
                typing.get_type_hints(found)
            except Exception as error:
                wrong[part] = repr(error)
    assert wrong == {}
    assert seen > 200


def test_type_hints_are_the_types() -> None:
    """The types are those that a call gives and takes, of a decorated function its own."""
    assert typing.get_type_hints(memo.stats)["return"] is type(memo.stats())
    assert typing.get_type_hints(memo.explain)["return"] is type(plain.explain(1))
    assert typing.get_type_hints(plain.cache_info)["return"] is type(plain.cache_info())
    assert (
        typing.get_type_hints(memo.mode.__init__)["max_age"]
        == (typing.get_type_hints(plain.using)["max_age"])
    )
    changes = typing.get_type_hints(memo.configure)["settings"].__args__[0]
    assert typing.get_type_hints(changes)["memory_limit"] == int | str
    for function in (plain, Shop().method, Shop.of_class):
        type(function).__annotations__  # noqa: B018 - Python may now give the class a dict
        assert typing.get_type_hints(function) == {"x": int, "return": str}
