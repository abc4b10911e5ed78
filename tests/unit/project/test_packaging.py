"""The package, its two environments, its two commands and its check agree with each other."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import yaml
from checkout import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")

CONDA = {"redis": "redis-py"}
"""Names that differ on conda-forge; an extra in brackets is a package of its own there."""
CONDA_ONLY = {"pip", "redis-server"}
IMPORTS = {"IPython": "ipython", "backports": "backports.zstd"}
"""Import names that differ from the distribution's."""
OPTIONAL = {
    "fsspec",
    "opentelemetry",
    "pytest",
    "starlette",
    "uvicorn",
    "anywidget",
    "numpy",
    "polars",
    "pyarrow",
    "scipy",
    "torch",
    "traitlets",
    "sqlite3",
}
"""Used where the user has them, or brought by pandas and ipython."""
LATER = {"compression"}
"""Parts of later versions of the standard library."""


def bounds(lines: list[str]) -> dict[str, str]:
    """Requirement lines as name -> bound; `redis[hiredis]>=5` also gives `hiredis`.

    A package that only some versions of Python need may be needed by the one that conda chooses.
    """
    found = {}
    for line in (line.partition(";")[0] for line in lines):
        match = re.fullmatch(r"([\w.-]+)(?:\[([\w-]+)\])?(\S*)", line)
        assert match, line
        name, extra, bound = match.groups()
        found[CONDA.get(name, name)] = bound
        if extra:
            found[extra] = ""
    return found


def test_conda_environment_is_the_projects() -> None:
    """environment.yml asks for what pyproject.toml asks for, with the same bounds, and a Redis."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    listed = environment["dependencies"]
    assert listed.pop() == {"pip": ["-e ."]}
    conda = bounds(listed)
    assert conda.pop("python") == PROJECT["requires-python"]
    assert set(conda) >= CONDA_ONLY
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebook"]]
    assert {k: v for k, v in conda.items() if k not in CONDA_ONLY} == bounds(wanted)
    assert environment["channels"][0] == "conda-forge"


def test_extras_agree_with_each_other() -> None:
    """A package that several extras bring has one lowest version, whichever is installed."""
    wanted: dict[str, set[str]] = {}
    for lines in PROJECT["optional-dependencies"].values():
        for line in lines:
            name, bound = re.split(r"(?=[>=<])", line, maxsplit=1)
            wanted.setdefault(name.partition("[")[0], set()).add(bound)
    assert {name: least for name, least in wanted.items() if len(least) > 1} == {}


def test_every_import_is_declared() -> None:
    """Each import of memo is the standard library's, declared, or optional."""
    declared = {name.lower() for name in bounds(PROJECT["dependencies"])}
    declared.add("redis")
    used = set()
    for path in (ROOT / "memo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.partition(".")[0])
    others = used - set(sys.stdlib_module_names) - {"memo"} - OPTIONAL - LATER
    assert {IMPORTS.get(name, name) for name in others} <= declared


def test_every_dependency_is_used() -> None:
    """Nothing is asked for that memo does not import."""
    text = "\n".join(path.read_text("utf-8") for path in (ROOT / "memo").rglob("*.py"))
    names = {distribution: module for module, distribution in IMPORTS.items()}
    for line in PROJECT["dependencies"]:
        name = re.split(r"[\[>=]", line)[0]
        name = names.get(name, name)
        assert re.search(rf"\b(import|from) {name}\b", text), f"{name} is never imported"


def test_wheel_is_the_package_and_nothing_else(tmp_path: Path) -> None:
    """The wheel has every module and py.typed, but no tests and no sources of the view."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("jupyter_memo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    built_from = ROOT / "memo" / "inspection" / "static" / "src"
    files = (path for path in (ROOT / "memo").rglob("*") if path.is_file())
    files = (path for path in files if built_from not in path.parents)
    sources = {str(path.relative_to(ROOT)) for path in files if path.suffix != ".pyc"}
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_command_is_there() -> None:
    """The command `memo` names something that can be called."""
    module, _, name = PROJECT["scripts"]["memo"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_version_is_one() -> None:
    """The package says which version it is, and the changelog knows it."""
    import memo

    assert memo.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def commands() -> list[str]:
    """README's shell lines."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_readme_has_two_commands_each_complete() -> None:
    """Two lines, each from a fresh environment to the end: the demo, and the tests."""
    demo, tests = commands()
    fresh = "python3 -m venv .venv && .venv/bin/pip install "
    assert demo == f"{fresh}. && .venv/bin/memo demo"
    assert tests.startswith(f"{fresh}-e '.[test]' && .venv/bin/python -m pytest")


def test_check_runs_readmes_command() -> None:
    """.ci/run takes its test command out of README, where it finds exactly that line."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    (pattern,) = re.findall(r"grep -x '(.*)' README\.md", script)
    found = subprocess.run(
        ["grep", "-x", pattern, "README.md"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.splitlines()
    assert found == [commands()[1]]
    extras = re.findall(r"""pip install -q -e ['"](\S+)['"]""", script)  # after README's
    assert extras == [".[test,docs$with_lab]", ".[test,frameworks]"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], check=True, cwd=ROOT)


def test_a_misspelt_release_is_told() -> None:
    """`.ci/run` with a word that it does not know checks nothing, and says so."""
    answer = subprocess.run(
        [".ci/run", "relase"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (answer.returncode, answer.stderr) == (2, "usage: .ci/run [release]\n")


def test_check_reads_the_code() -> None:
    """.ci/run lints, checks the format, and runs both type checkers in strict order."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    tools = (
        'ruff" check .',
        'ruff" format --check .',
        'mypy" --strict memo',
        'pyright" --pythonpath',
    )
    assert [tool for tool in tools if tool not in script] == []
    assert "set -euo pipefail" in script


def test_each_exception_of_the_linter_has_a_reason() -> None:
    """Each exception for ruff or the warnings filter has its reason on the same line."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    rule = re.compile(r'^\s*"(?:[A-Z]+\d*|(?:ignore|default):.*)",')
    bare = [line for line in text.splitlines() if rule.match(line) and "# " not in line]
    assert not bare


def test_distribution_needs_what_the_project_says() -> None:
    """The installed distribution is this project, under its own name."""
    assert importlib.metadata.metadata("jupyter-memo")["Name"] == PROJECT["name"]
