"""Ownership: tests that a directory belongs to this user on this machine alone.

If others can change files in place, a file must not be mapped: verified bytes could change
afterwards, and truncating the file invalidates its pages (SIGBUS).  That is so on network file
systems, and if others may write to the directory or to one above it.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

NETWORK_FILE_SYSTEMS = (
    *("nfs", "cifs", "smb", "afs", "9p", "lustre", "gluster", "ceph", "beegfs", "gpfs", "orangefs"),
    *("virtiofs", "vboxsf", "vmhgfs", "prl_fs", "fuse."),
)
"""Prefixes of the types of file systems that other machines may change; FUSE does not tell."""
_LOCAL_FILE_SYSTEMS = ("fuse.fuse-overlayfs",)
OWNERSHIP_RECHECK_SECONDS = 60.0
"""Seconds for which an answer of `exposed` is reused."""
MOUNTS_FILE = Path("/proc/mounts")
_WRITABLE_BY_OTHERS = stat.S_IWOTH | stat.S_IWGRP

_known: dict[Path, tuple[float, bool]] = {}


def exposed(directory: Path) -> bool:
    """True if another user or machine may change the files in a directory.

    Determined again every `OWNERSHIP_RECHECK_SECONDS`.  False if the system does not tell.
    """
    now = time.monotonic()
    known = _known.get(directory)
    if known is None or now > known[0]:
        found = is_network(file_system(directory)) or not _is_private(directory)
        known = _known[directory] = now + OWNERSHIP_RECHECK_SECONDS, found
    return known[1]


def forget() -> None:
    """Forget all answers."""
    _known.clear()


def is_network(kind: str) -> bool:
    """True if other machines may change files on a file system of this type."""
    return kind.startswith(NETWORK_FILE_SYSTEMS) and kind not in _LOCAL_FILE_SYSTEMS


def file_system(path: Path) -> str:
    """Return the type of the file system of a path; `""` if the system does not tell."""
    try:
        lines = MOUNTS_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
        real = path.resolve()
    except (OSError, RuntimeError):
        return ""
    best = ("", "")
    for line in lines:
        where, kind = line.split(" ")[1:3]
        place = where.replace(r"\040", " ")
        if real.is_relative_to(place) and len(place) >= len(best[0]):
            best = (place, kind)
    return best[1]


def _is_private(directory: Path) -> bool:
    """True if no other user can write to a directory, nor replace it."""
    try:
        real = directory.resolve()
        return not _writable(os.stat(real), inside=True) and not any(
            _writable(os.stat(parent), inside=False) for parent in real.parents
        )
    except (OSError, RuntimeError):  # missing, or not visible to this user
        return True


def _writable(facts: os.stat_result, *, inside: bool) -> bool:
    """True if others may change a directory's entries; a sticky directory above ours is safe."""
    if facts.st_uid not in (os.geteuid(), 0):
        return True
    if facts.st_mode & stat.S_ISVTX and not inside:
        return False
    if facts.st_mode & _WRITABLE_BY_OTHERS == stat.S_IWGRP:
        return not is_ones_own_group(facts.st_gid)
    return bool(facts.st_mode & _WRITABLE_BY_OTHERS)


def is_ones_own_group(group: int) -> bool:
    """True if a group is root's, or the private group of this user."""
    import grp
    import pwd

    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
        facts = grp.getgrgid(group)
    except KeyError:
        return False
    return not set(facts.gr_mem) - {name, "root"} and (group == 0 or facts.gr_name == name)
