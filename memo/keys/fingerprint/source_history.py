"""Manifests: files with the source of code versions, for other processes of this host.

Each code version has a small JSON file, `code/<digest>.json` in the cache directory, written once.
It contains the source of the user's functions, so that `explain` can show edits; it is owner-only
and never leaves the host.

The state that functions change themselves (`own_changes`) is in `code/changed-<digest>.json`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from memo.runtime import private_files
from memo.runtime.checksums import blake2b

VERSIONS_KEPT = 4096
"""Code versions that are kept on a host; beyond it the oldest are removed."""
_FILE_NAME = re.compile(r"(?:changed-)?[0-9a-f]{32}\.json")
"""The names of these files; no other file is removed."""
WRITES_BETWEEN_PRUNES = 500
"""Files that a process writes before it looks for old ones again, since listing all of them takes
time."""


class Manifests:
    """The manifests of one cache directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "code"
        self._known: set[str] = set()
        self._made = 0

    def save(self, digest: str, parts: Callable[[], Mapping[str, str]]) -> None:
        """Store the parts of a code version, unless they are stored already.

        Raises:
            OSError: they cannot be written.
        """
        if digest in self._known:
            return
        if not self._is_there(_name(digest)):
            self._write(digest, parts())
            self._made += 1
            if self._made % WRITES_BETWEEN_PRUNES == 1:
                self.prune()
        self._known.add(digest)

    def load(self, digest: str) -> dict[str, str] | None:
        """Return the parts of a code version, or None if they are unknown."""
        try:
            with private_files.open_folder(self.directory) as folder:
                descriptor = private_files.open_old(_name(digest), folder=folder)
            with os.fdopen(descriptor, encoding="utf-8") as file:
                parts = json.load(file)
        except (OSError, ValueError):
            return None
        return parts if isinstance(parts, dict) else None

    def own_changes(self, function: str) -> dict[str, str]:
        """Return the state that a function changes itself: label and path -> its original value."""
        found = self.load(_of_function(function)) or {}
        return {k: v for k, v in found.items() if isinstance(v, str)}

    def add_own_changes(self, function: str, found: Mapping[str, str]) -> None:
        """Add state that a function changes itself; what is stored already stays as it is.

        Raises:
            OSError: it cannot be written.
        """
        known = self.own_changes(function)
        if not found.keys() <= known.keys():
            self._write(_of_function(function), {**found, **known})

    def _is_there(self, name: str) -> bool:
        try:
            with private_files.open_folder(self.directory) as folder:
                return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        except OSError:
            return False

    def _write(self, digest: str, content: Mapping[str, str]) -> None:
        temporary = f"{digest}.{os.urandom(4).hex()}"
        with private_files.open_folder(self.directory, make=True) as folder:
            descriptor = private_files.create(temporary, folder=folder)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(dict(content), file, ensure_ascii=False)
                os.replace(temporary, _name(digest), src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def prune(self) -> None:
        """Remove the oldest code versions beyond the number to keep, and no other files.

        Raises:
            OSError: they cannot be listed.
        """
        with private_files.open_folder(self.directory) as folder:
            names = list(filter(_FILE_NAME.fullmatch, os.listdir(folder)))
            if len(names) <= VERSIONS_KEPT:
                return
            ages = {}
            for name in names:
                with suppress(FileNotFoundError):
                    facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    ages[name] = facts.st_mtime
            for name in sorted(ages, key=ages.__getitem__)[:-VERSIONS_KEPT]:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _name(digest: str) -> str:
    return f"{digest}.json"


def _of_function(function: str) -> str:
    """Return the name of the file with the state that a function changes itself."""
    return (
        f"changed-{blake2b(function.encode('utf-8', 'surrogatepass'), digest_size=16).hexdigest()}"
    )
