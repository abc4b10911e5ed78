"""The types that people's own checkers see: `tests/typing/api.py` under mypy and pyright."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ports import ROOT

API = ROOT / "tests" / "typing" / "api.py"
pytestmark = pytest.mark.timeout(300)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT
    )


def mypy(path: Path, cache: Path) -> list[str]:
    """Mypy's errors in one file; those of the package are tested elsewhere."""
    done = run(
        *(sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--cache-dir", cache),
        *("--follow-imports", "silent", "--no-error-summary", path),
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def pyright(path: Path, directory: Path) -> list[str]:
    """Pyright's errors in one file."""
    settings = {
        "include": [os.path.relpath(path, directory)],
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


def test_mypy(tmp_path: Path) -> None:
    """Under `mypy --strict` every type of the public API is known, and what must be refused is."""
    assert mypy(API, tmp_path) == []


def test_pyright(tmp_path: Path) -> None:
    """So does pyright, in strict mode."""
    assert pyright(API, tmp_path) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("assert_type(bare(1), float)", "assert_type(bare(1), int)"),
        ("await bare_async(1), float", "await bare_async(1), str"),
        ('bare("1")  # type: ignore[arg-type]', 'bare("1")'),
    ],
    ids=["sync", "async", "refused"],
)
def test_a_wrong_type_is_noticed(tmp_path: Path, old: str, new: str) -> None:
    """These tests can fail: a wrong expectation is an error for both."""
    text = API.read_text("utf-8")
    assert old in text
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace(old, new))
    os.environ["MYPYPATH"] = str(ROOT)
    try:
        assert len(mypy(wrong, tmp_path)) == 1
    finally:
        del os.environ["MYPYPATH"]
    assert len(pyright(wrong, tmp_path)) == 1
