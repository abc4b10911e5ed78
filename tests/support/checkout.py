"""Paths of the checkout that the tests run from."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
"""Modules that several test files share; on the path of every test."""
