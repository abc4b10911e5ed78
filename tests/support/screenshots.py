"""Screenshots of the browser tests, which are kept to be looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkout import ROOT


def folder() -> Path:
    """The folder for them: `build/screenshots` of the checkout, or the one `SCREENSHOTS` names."""
    named = Path(os.environ.get("SCREENSHOTS") or ROOT / "build" / "screenshots")
    named.mkdir(parents=True, exist_ok=True)
    return named


def keep(target: Any, name: str, **options: Any) -> bytes:
    """Take a picture of a page or of a part of it, and keep it."""
    made: bytes = target.screenshot(path=str(folder() / f"{name}.png"), **options)
    return made
