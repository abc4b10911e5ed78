"""Damage to a SQLite file, as disks, kills and other programs do it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path


def damage_file(path: Path, how: str, table: str) -> None:
    """Damage the file in one way; `"tables"` drops this table of it."""
    if how == "gone":
        path.unlink()
    elif how in ("tables", "settings"):
        with sqlite3.connect(path) as connection:
            connection.execute(f"DROP TABLE {table}" if how == "tables" else "DELETE FROM Settings")
        connection.close()
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "half":
        os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100)
    else:
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size if how == "garbage" else 100))
