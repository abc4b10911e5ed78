"""Manifests: what is written down of functions, for other processes of this host.

What the code of a function was when an entry was computed, so that edits show: one small JSON file
per code version, `code/<digest>.json` in the cache directory, written once.  It holds the source of
the user's functions; it is owner-only and never leaves the host.

And what functions change themselves (`own_changes`), in `code/changed-<digest>.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from memo.runtime import private_files
from memo.runtime.checksums import blake2b

KEPT = 4096
"""Code versions that are kept on a host; past that the oldest go."""
PRUNED = 500
"""Files that a process makes between two times that it looks for old ones: to list them takes time
for each that is there."""


class Manifests:
    """The manifests of one cache directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "code"
        self._known: set[str] = set()
        self._made = 0

    def save(self, digest: str, parts: Callable[[], Mapping[str, str]]) -> None:
        """Write down what a code version is made of, unless that has been done.

        Raises:
            OSError: it cannot be written.
        """
        if digest in self._known:
            return
        path = self._path(digest)
        if not path.exists():
            self._write(digest, parts())
            self._made += 1
            if self._made % PRUNED == 1:
                self.prune()
        self._known.add(digest)

    def load(self, digest: str) -> dict[str, str] | None:
        """The parts of a code version, or None where they are not known."""
        try:
            with os.fdopen(private_files.open_old(self._path(digest)), encoding="utf-8") as file:
                parts = json.load(file)
        except (OSError, ValueError):
            return None
        return parts if isinstance(parts, dict) else None

    def changed(self, function: str) -> dict[str, str]:
        """State that a function changes itself: label and path -> its value at first."""
        found = self.load(_of_function(function)) or {}
        return {k: v for k, v in found.items() if isinstance(v, str)}

    def add_changed(self, function: str, found: Mapping[str, str]) -> None:
        """Write down what a function changes itself; what is known already stays as it is.

        Raises:
            OSError: it cannot be written.
        """
        known = self.changed(function)
        if not found.keys() <= known.keys():
            self._write(_of_function(function), {**found, **known})

    def _path(self, digest: str) -> Path:
        return self.directory / f"{digest}.json"

    def _write(self, digest: str, content: Mapping[str, str]) -> None:
        private_files.claim_folder(self.directory.parent)
        private_files.subdirectory(self.directory)
        path = self._path(digest)
        temporary = path.with_suffix(f".{os.urandom(4).hex()}")
        try:
            with os.fdopen(private_files.create(temporary), "w", encoding="utf-8") as file:
                json.dump(dict(content), file, ensure_ascii=False)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def prune(self) -> None:
        paths = list(self.directory.glob("*.json"))
        if len(paths) <= KEPT:
            return
        for path in sorted(paths, key=lambda path: path.stat().st_mtime)[:-KEPT]:
            path.unlink(missing_ok=True)


def _of_function(function: str) -> str:
    """The name of the file with what a function changes itself."""
    return (
        f"changed-{blake2b(function.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
    )
