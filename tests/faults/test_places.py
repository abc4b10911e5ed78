"""Places: where others may change files, nothing is mapped and everything is hashed each time.

No test machine has a network file system: the tests replace `places.file_system`, which tells the
type, and change files in place as another machine would.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import FOLDER
from ports import run

import memo
from memo import cache
from memo.errors import TierError
from memo.inspection import doctor
from memo.runtime import ownership
from memo.settings.configuration import configure, current
from memo.stores.disk import payload_files
from memo.testing import recording

SIZE = 300_000


@pytest.fixture
def mounted(tmp_path: Path, set_limits: Callable[..., None]) -> Callable[[str], None]:
    """Sets the system's table of mounts; a type alone is that of every directory."""
    table = tmp_path / "mounts"

    def mount(text: str) -> None:
        table.write_text(text if "\n" in text else f"/dev/sda1 / {text} rw 0 0\n")
        set_limits(mounts=table)
        ownership.forget()

    return mount


@pytest.fixture
def nfs(mounted: Callable[[str], None]) -> None:
    """Every directory lies on a network file system, as far as memo can tell."""
    mounted("nfs4")


def made(size: int = SIZE) -> tuple[Callable[[int], Any], list[int]]:
    ran: list[int] = []

    @cache(name="places:frame", version="1", ttl=None)
    def frame(x: int) -> Any:
        ran.append(x)
        return np.arange(size) + x

    return frame, ran


def payload_of(home: Path) -> Path:
    found = [p for p in (home / FOLDER / "payloads").rglob("*") if p.is_file()]
    [path] = {p.stat().st_ino: p for p in found}.values()
    return path


# --- directories that others can write ------------------------------------------------------------


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /home/me/fast tmpfs rw 0 0
me@there: /home/me/my\\040disk fuse.sshfs rw 0 0
garbage\\040only /somewhere\\040else cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/cache", "ext4"),
        ("/home/me", "nfs4"),
        ("/home/me/fast/x", "tmpfs"),
        ("/home/me/my disk/x", "fuse.sshfs"),
        ("/homeless", "ext4"),
        ("/somewhere else", "cifs"),
    ],
)
def test_the_innermost_mount_tells_the_type(
    mounted: Callable[[str], None], path: str, kind: str
) -> None:
    """The type is that of the innermost mount above a path, with spaces in names and without."""
    mounted(MOUNTS)
    assert ownership.file_system(Path(path)) == kind


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        *((kind, True) for kind in ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs")),
        *((kind, True) for kind in ("lustre", "ceph", "fuse.s3fs", "virtiofs", "fuse.glusterfs")),
        *((kind, False) for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "apfs")),
        *((kind, False) for kind in ("fuseblk", "fuse.fuse-overlayfs", "")),
    ],
)
def test_network_file_systems(
    tmp_path: Path, mounted: Callable[[str], None], kind: str, network: bool
) -> None:
    """File systems that other machines may change are told from those of this one."""
    mounted(kind)
    assert ownership.exposed(tmp_path) == network


def test_this_machine_can_tell() -> None:
    """If the system has a table of mounts, the type of the root is in it."""
    told = ownership.file_system(Path("/"))
    assert told or not Path("/proc/mounts").exists()


@pytest.mark.parametrize(
    ("above", "mode", "exposed"),
    [
        (0o755, 0o700, False),
        (0o777, 0o700, True),
        (0o1777, 0o700, False),
        (0o702, 0o700, True),
        (0o755, 0o722, True),
        (0o755, 0o1777, True),
    ],
    ids=oct,
)
def test_directories_that_others_can_write(
    tmp_path: Path, above: int, mode: int, exposed: bool
) -> None:
    """A directory is exposed when others may write to it, or may replace it or one above it."""
    inner = tmp_path / "above" / "inner"
    inner.mkdir(parents=True)
    inner.chmod(mode)
    inner.parent.chmod(above)
    assert ownership.exposed(inner) == exposed


def test_a_group_of_ones_own_is_nobody_else(tmp_path: Path) -> None:
    """Group-writable above is private where the group is the user's own, as is common."""
    import grp
    import pwd

    inner = tmp_path / "above" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    inner.parent.chmod(0o775)
    facts = grp.getgrgid(inner.parent.stat().st_gid)
    mine = facts.gr_gid == 0 or facts.gr_name == pwd.getpwuid(os.geteuid()).pw_name
    assert ownership.exposed(inner) == (not mine or bool(set(facts.gr_mem) - {"root"}))
    assert not ownership.is_ones_own_group(2**31 - 7), "a group without a name"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_directory_under_another_users(tmp_path: Path) -> None:
    """The owner of a directory above the cache may replace its content."""
    inner = tmp_path / "above" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    assert not ownership.exposed(inner)
    os.chown(inner.parent, 12345, -1)
    ownership.forget()
    assert ownership.exposed(inner)


# --- differences there ----------------------------------------------------------------------------


@pytest.mark.usefixtures("nfs")
def test_there_each_hit_is_a_verified_copy(cache_home: Path) -> None:
    """A file changed in place since the last hit is a miss, and changes no returned result."""
    frame, ran = made()
    expected = np.arange(SIZE) + 1
    with configure(tiers=["disk"]):
        frame(1)
        held = frame(1)
        assert ran == [1]
        path = payload_of(cache_home)
        with path.open("r+b") as file:
            file.seek(SIZE)
            file.write(b"\1")
        assert np.array_equal(held, expected)
        with recording() as heard:
            assert np.array_equal(frame(1), expected)
        assert ran == [1, 1]
        assert [event.reason for event in heard if event.kind == "error"] == ["unreadable"]
        assert np.array_equal(frame(1), expected)
        assert ran == [1, 1], "it was not stored anew"


@pytest.mark.usefixtures("nfs")
def test_there_a_results_bytes_are_not_taken_over_unread(cache_home: Path) -> None:
    """An equal result shares a payload that is there only after it was read and hashed."""
    frame, ran = made()
    with configure(tiers=["disk"]):
        frame(1)
        path = payload_of(cache_home)
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
        assert np.array_equal(frame.refresh(1), np.arange(SIZE) + 1)  # type: ignore[attr-defined]
        assert np.array_equal(frame(1), np.arange(SIZE) + 1)
        assert ran == [1, 1]


@pytest.mark.usefixtures("nfs")
def test_there_nothing_is_vouched_for(cache_home: Path) -> None:
    """No voucher is written where it could not hold."""
    frame, _ = made(payload_files.VOUCHER_FROM_BYTES // 8 + 1)
    with configure(tiers=["disk"]):
        frame(1)
        frame(1)
    assert not list(cache_home.rglob("*.seal"))


@pytest.mark.usefixtures("nfs")
def test_there_a_file_may_be_cut_while_it_is_read(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that is cut short in the middle of a load is a miss, not half a result."""
    piece = payload_files.PAYLOAD_READ_CHUNK_BYTES
    long = 2 * piece // 8
    frame, ran = made(long)
    with configure(tiers=["disk"]):
        frame(1)
        path = payload_of(cache_home)
        read = os.preadv

        def cutting(descriptor: int, buffers: Any, at: int) -> int:
            got = read(descriptor, buffers, at)
            os.truncate(path, 4096)
            return got

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", cutting)
            assert np.array_equal(frame(1), np.arange(long) + 1)
            assert ran == [1, 1]
            path.write_bytes(bytes(8 * long))
            with pytest.raises(TierError, match=f"{piece} bytes instead"):
                payload_files.PayloadFile(str(path), exposed=True).open(8 * long)


CUT = """
import os, sys
from pathlib import Path
import limits
import numpy as np
import memo
from memo.runtime import FORMAT
from memo.settings.configuration import configure

home = Path(sys.argv[1])
mounts = home.with_name("mounts")
mounts.write_text("server:/cache / nfs4 rw 0 0\\n")  # as if it were one: there is none here
limits.change(mounts=mounts)

@memo.cache(name="places:cut", version="1", ttl=None)
def frame(x):
    return np.arange(300_000) + x

with configure(directory=home, tiers=["memory", "disk"]):
    frame(1)
    held = frame(1)
    for path in (home / f"memo.{FORMAT}" / "payloads").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    os.truncate(home / f"memo.{FORMAT}" / "host.bell", 0)
    assert held[-1] == 300_000
    assert frame(1)[-1] == 300_000
    os.truncate(home / f"memo.{FORMAT}" / "host.bell", 0)
    frame.invalidate(1)
    os.truncate(home / f"memo.{FORMAT}" / "host.bell", 0)
    assert frame(1)[-1] == 300_000
print("alive")
"""


def test_there_nobody_dies_of_a_file_that_was_cut(tmp_path: Path) -> None:
    """Payloads and bell cut to nothing in place: no SIGBUS, held results whole, calls go on."""
    assert run(CUT, tmp_path / "cache") == "alive"


def test_here_files_are_mapped(tmp_path: Path, mounted: Callable[[str], None]) -> None:
    """In a directory of one's own on a local disk a payload is mapped, and verified once."""
    for kind, exposed in (("ext4", False), ("nfs4", True)):
        mounted(kind)
        file = tmp_path / "payload"
        file.write_bytes(bytes(8192))
        source = payload_files.Payloads(tmp_path).file_at(str(file))
        view = source.open(8192)
        assert isinstance(view.obj, bytearray if exposed else mmap.mmap)
        assert (source.identity is None) == exposed
        view[0] = 1
        assert file.read_bytes() == bytes(8192)


@pytest.mark.parametrize("how", ["nfs4", "modes"])
def test_doctor_says_so(how: str, tmp_path: Path, mounted: Callable[[str], None]) -> None:
    """`memo doctor` warns of a directory that others may change, and says what to do."""
    home = tmp_path / "above" / "cache"
    home.mkdir(parents=True, mode=0o700)
    home.parent.chmod(stat.S_IRWXU | stat.S_IRWXO if how == "modes" else 0o755)
    mounted("ext4" if how == "modes" else how)
    with configure(directory=home):
        found = list(doctor.check_directory(current().directory))
    [warned] = [one for one in found if "no payload is mapped" in one.said]
    assert warned.level == doctor.WARN
    assert "MEMO_DIRECTORY" in warned.fix
    memo.testing.reset()
