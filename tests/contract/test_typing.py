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


def test_mypy(tmp_path: Path) -> None:
    """Under `mypy --strict` every type of the public API is known, and what must be refused is."""
    assert mypy(tmp_path, API) == []


def test_pyright(tmp_path: Path) -> None:
    """The same in pyright's strict mode."""
    assert pyright(tmp_path, API) == []


WRONG = {
    "sync": ("assert_type(bare(1), float)", "assert_type(bare(1), int)"),
    "async": ("await bare_async(1), float", "await bare_async(1), str"),
    "refused": ('bare("1")  # type: ignore[arg-type]', 'bare("1")'),
}


def test_a_wrong_type_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: each wrong expectation is one error for both."""
    text = API.read_text("utf-8")
    for name, (old, new) in WRONG.items():
        assert old in text
        (tmp_path / f"{name}.py").write_text(text.replace(old, new))
    files = [tmp_path / f"{name}.py" for name in WRONG]
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    for errors in (mypy(tmp_path, *files), pyright(tmp_path, *files)):
        found = sorted(Path(error.partition(":")[0]).stem for error in errors)
        assert found == sorted(WRONG), errors
