"""The structure of the package: its folders, and which of them may import which."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

import memo

PACKAGE = ROOT / "memo"
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def lint(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", script, "--no-cache", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_go_down_only() -> None:
    """import-linter keeps the directions that pyproject.toml states, inside functions as well."""
    done = lint()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout, done.stdout


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    """The check can fail: with the layers upside down it does."""
    configuration = tmp_path / "linter.ini"
    configuration.write_text(
        "[importlinter]\nroot_package = memo\n[importlinter:contract:1]\n"
        "name = upside down\ntype = layers\nlayers =\n  memo.runtime\n  memo.engine\n"
    )
    assert lint("--config", str(configuration)).returncode == 1


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda one: str(one.relative_to(ROOT)))
def test_a_folder_is_small_and_says_what_it_is(folder: Path) -> None:
    """At most 12 modules and folders (15 at the top), and a docstring that says where to start."""
    entries = [one.name for one in folder.iterdir() if one.suffix in ("", ".py")]
    entries = [name for name in entries if not name.startswith("_")]
    assert len(entries) <= (15 if folder == PACKAGE else 12), entries
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert re.search(r"\b[Ii]mports?\b", told), "says what it may import"
    assert "Start with" in told, "says where to start reading"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda one: str(one.relative_to(ROOT)))
def test_files_that_a_folder_names_are_there(folder: Path) -> None:
    """The docstring of a folder names files that exist, from there or from further up."""
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    named = [one for one in re.findall(r"`([\w/]+(?:\.py|/))`", told) if one != "conftest.py"]
    roots = (folder, folder.parent.parent, PACKAGE)
    assert [one for one in named if not any((root / one).exists() for root in roots)] == []


def test_no_module_hides_a_public_name_or_one_of_pythons_library() -> None:
    """`memo.graph()` would be hidden by `memo/graph.py`, and `statistics` by a module of ours."""
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    names = {part for path in files for part in path.parts if not part.startswith("__")}
    assert not names & {*sys.stdlib_module_names, *memo.__all__}


WHERE = {
    "keys/encoding/libraries/for_pandas.py": "keys",
    "validity/check.py": "validity",
    "coordination/leases.py": "coordination",
    "metrics/rendering.py": "jupyter",
}
"""A newcomer's question -> the folder of `memo/` whose docstring leads to the answer."""


@pytest.mark.parametrize("path", WHERE)
def test_what_a_newcomer_looks_for_is_two_clicks_away(path: str) -> None:
    """The key of a DataFrame, the judgement of a ttl, leases and `%cache_stats` are pointed to."""
    assert (PACKAGE / path).exists()
    told = (PACKAGE / WHERE[path] / "__init__.py").read_text("utf-8")
    assert path.removeprefix(f"{WHERE[path]}/") in told


def test_forks_are_registered_in_one_place() -> None:
    """Only `runtime/fork.py` calls `os.register_at_fork`, so that the order is one list."""
    calls = [p for p in PACKAGE.rglob("*.py") if "os.register_at_fork(" in p.read_text()]
    assert calls == [PACKAGE / "runtime" / "fork.py"]


SHARED_NAMES = {"ADAPTERS"}
"""Constants that each module of a kind defines: see `keys/encoding/libraries/`."""


def constants(module: Path) -> set[str]:
    """Constants that a module defines, without the underscore of private ones."""
    tree = ast.parse(module.read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    inside = {id(node) for one in functions for node in ast.walk(one)}
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or id(node) in inside:
            continue
        value = "" if node.value is None else ast.unparse(node.value)
        if value.startswith(("TypeVar(", "ParamSpec(")):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            found |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name.lstrip("_") for name in found if name.isupper()} - SHARED_NAMES


def test_a_constant_has_a_name_of_its_own() -> None:
    """No two modules have a constant of one name: the same value is imported, another renamed."""
    modules: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in constants(path):
            modules.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in modules.items() if len(paths) > 1} == {}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_names(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Private names of memo that a test uses: imported, read, or patched by their name."""
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, DEFINITIONS)}
    names = known - own
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memo"):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and node.attr in names:
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in names:
            yield node.value


def test_tests_use_few_private_names() -> None:
    """Tests stand on the public surface: at most 30 uses of names that are private to a module."""
    known = {
        node.name if isinstance(node, DEFINITIONS) else node.attr
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, DEFINITIONS)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    }
    known = {name for name in known if is_private(name) and not name.startswith("_repr_")}
    known -= {"_replace", "_fields"}  # methods of named tuples
    uses = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in private_names(ast.parse(path.read_text("utf-8")), known)
    ]
    assert len(uses) <= 30, "\n".join(uses)


REPLACING = ("support/", "faults/test_faults.py", "history/test_mutation_trust.py")
"""Modules that may replace parts of memo: limits, mutants, clocks, faults of no real cause."""


def replaced_parts(tree: ast.AST) -> Iterator[str]:
    """Attributes of memo's modules, classes and objects that a test sets."""
    ours = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] == "memo"
    }
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            targets = node.args[:1]
        elif isinstance(node, ast.Assign):
            targets = [one.value for one in node.targets if isinstance(one, ast.Attribute)]
        for target in targets:
            said = ast.unparse(target)
            if re.split(r"[.(\[]", said)[0] in ours or said.startswith(("'memo.", "type(memo")):
                yield ast.unparse(node)


def test_tests_replace_no_parts_of_memo() -> None:
    """Tests reach limits by `limits`, and cause faults for real; only a few modules patch memo."""
    found = [
        f"{path.relative_to(ROOT)}: {text}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if not str(path.relative_to(ROOT / "tests")).startswith(REPLACING)
        for text in replaced_parts(ast.parse(path.read_text("utf-8")))
    ]
    assert found == []
