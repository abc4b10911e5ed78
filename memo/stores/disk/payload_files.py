"""Payload files: written once, named by their digest, shared by all entries with the same payload.

Rules of this module:

1.  A record that is too big for the index is stored beside the entry's payload, as
    `<digest>.<random>.rec`, or alone, as `<random>.rec`.  One name identifies all files of an
    entry.
2.  `payloads/ab/<digest>` is the *canonical* name of a payload.  Each entry has a hard link of its
    own beside it, `<digest>.<random>`.  So the number of links is the number of entries, without a
    table and without a race: removing the last link removes the canonical name too.
3.  A file gets its names only when it is complete.  It is never written again.
4.  Storing an entry holds a shared `flock` on its files until the entry is in the index.
    The kernel frees it when the writer dies, so `sweep` can distinguish files of a dead writer from
    those that a living one is about to use.
5.  A payload that exists already is read and hashed before an entry relies on it, so a damaged one
    is replaced by the next store.
6.  Nothing is fsynced: a payload torn by a power cut does not match its digest.
7.  Writing or hashing a big payload leaves a *voucher* beside it, `<digest>.seal`, so that the next
    process need not hash it.  The voucher is sealed with the secret, and names the boot of the
    machine and the file's identity, which changes with every write to the file and every link.
8.  If others may change files in place (`ownership`), nothing is mapped and there are no vouchers:
    each load reads a private copy, and hashes that.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

from memo.errors import TierError, file_fault
from memo.records import codec
from memo.records.codec import Payload
from memo.records.payload_pieces import IncomingPayload
from memo.runtime import ownership, private_files
from memo.runtime.checksums import compare_digest
from memo.runtime.clock import SYSTEM_CLOCK
from memo.settings.secret_keys import Secret

_ENTRY_FILE_NAME = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{64}\.[0-9a-f]{16}|[0-9a-f]{32}\.rec)")
"""The name that an entry has in the index: of its payload if it has one, else of its record."""
_CANONICAL_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")
_TEMPORARY_SUFFIX = ".tmp"
_RECORD_SUFFIX = ".rec"
_VOUCHER_SUFFIX = ".seal"
VOUCHER_FROM_BYTES = 16 << 20
"""Payloads of at least this many bytes get a voucher; hashing 16 MiB takes 2 ms on four cores."""
_COARSE_TICK_NS = 12_000_000
"""Maximum lag of the clock of file times in nanoseconds: its tick is 1, 4 or 10 ms."""
_CLOCK_PAUSE_SECONDS = 0.0005
"""Seconds between two reads of the clock while it has to get past a file time."""
_BUFFERS_PER_WRITE = 512
"""Buffers passed to one `writev`; systems take at least 1,024."""
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
"""Copy on write, and no memory reserved for copies that may never be needed."""
_MAP_RIGHTS = mmap.PROT_READ | mmap.PROT_WRITE
PAYLOAD_READ_CHUNK_BYTES = 16 << 20
"""Bytes that are read at a time."""


class PayloadFile:
    """The file of a payload: a `memo.stores.protocols.Source`.

    Attributes:
        path: the path of the file.
        identity: device, inode, size and change times, which identify this version of the bytes: of
            the file that was opened last, or else of the one at the path; None if there is none, or
            if others may change it.
    """

    __slots__ = ("_exposed", "_secrets", "identity", "path")

    def __init__(self, path: str, secrets: Sequence[Secret] = (), *, exposed: bool = False) -> None:
        self.path = path
        self._secrets = secrets
        self._exposed = exposed
        self.identity: object | None = None
        if not exposed:
            with suppress(OSError):
                self.identity = _identity(os.stat(path))

    def open(self, size: int) -> memoryview:
        """Map the payload copy-on-write: writable, private, in 0.1 ms for any size.

        If others may change the file it is read in full instead.

        Raises:
            TierError: the file is gone, or has another size.
        """
        try:
            descriptor = _open_old(self.path)
            try:
                facts = os.fstat(descriptor)
                if facts.st_size != size:
                    raise TierError(f"a payload has {facts.st_size} bytes instead of {size}")
                if self._exposed:
                    return _read_copy(descriptor, size)
                self.identity = _identity(facts)
                return map_file(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise file_fault("payload", error) from error

    def is_verified(self, digest: bytes) -> bool:
        """True if a process with one of our secrets has verified that they have this digest."""
        identity = self.identity
        if (
            not isinstance(identity, tuple)
            or identity[2] < VOUCHER_FROM_BYTES
            or not any(SYSTEM_CLOCK.boot_id)
        ):
            return False
        try:
            descriptor = _open_old(voucher_path(self.path))
            try:
                text = os.read(descriptor, 64)
            finally:
                os.close(descriptor)
        except OSError:
            return False
        return any(compare_digest(text, voucher_text(s, digest, identity)) for s in self._secrets)

    def mark_verified(self, digest: bytes) -> None:
        """Leave a voucher that the bytes opened last have this digest.

        Not while a later change of the file could still have the same timestamp.
        """
        identity = self.identity
        if not self._secrets or not isinstance(identity, tuple) or identity[2] < VOUCHER_FROM_BYTES:
            return
        if any(SYSTEM_CLOCK.boot_id) and file_time() > identity[4]:
            with suppress(OSError):
                _replace(voucher_path(self.path), voucher_text(self._secrets[0], digest, identity))


def file_time() -> int:
    """Return a file time in nanoseconds; files changed after the next tick have a later one."""
    return time.time_ns() - _COARSE_TICK_NS


def voucher_path(path: str) -> str:
    """Return the path of a payload's voucher, from any of the payload's names."""
    shard, _, name = path.rpartition("/")
    return f"{shard}/{name.partition('.')[0]}{_VOUCHER_SUFFIX}"


def voucher_text(secret: Secret, digest: bytes, identity: tuple[int, ...]) -> bytes:
    """Return the sealed content of a voucher: this digest, for a file with this identity."""
    facts = " ".join(map(str, identity)).encode()
    return secret.id + secret.seal(b"payload verified" + SYSTEM_CLOCK.boot_id, digest + facts)


def _open_shard(path: str) -> tuple[int, str]:
    """Return a descriptor of a file's shard, and the file's name in it; no link is followed.

    Raises:
        OSError: there is no shard, or there is a link on the way to it.
    """
    *directories, name = path.rsplit("/", 3)
    return private_files.open_directories(*directories), name


@contextmanager
def _folder_of(path: str) -> Iterator[tuple[int, str]]:
    """Like `_open_shard`, for a block."""
    folder, name = _open_shard(path)
    try:
        yield folder, name
    finally:
        os.close(folder)


def _open_old(path: str) -> int:
    folder, name = _open_shard(path)  # without `with`, since each hit comes here
    try:
        return private_files.open_old(name, folder=folder)
    finally:
        os.close(folder)


def _replace(path: str, text: bytes) -> None:
    """Replace a small file atomically."""
    temporary = f"{os.urandom(16).hex()}{_TEMPORARY_SUFFIX}"
    with _folder_of(path) as (folder, name):
        descriptor = private_files.create(temporary, folder=folder)
        try:
            os.write(descriptor, text)
            _rename(temporary, name, folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(descriptor)


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def map_file(descriptor: int, size: int) -> memoryview:
    """Map the content of an open file copy-on-write."""
    if not size:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(descriptor, size, flags=_MAP_FLAGS, prot=_MAP_RIGHTS))


def _read_copy(descriptor: int, size: int) -> memoryview:
    """Read the bytes of a file that may be changed or truncated at any moment.

    Raises:
        TierError: it was truncated.
    """
    copy = memoryview(bytearray(size))
    at = 0
    while at < size:
        got = os.preadv(descriptor, [copy[at : at + PAYLOAD_READ_CHUNK_BYTES]], at)
        if not got:
            raise TierError(f"a payload has {at} bytes instead of {size}")
        at += got
    return copy


class Payloads:
    """The payload files under one directory, which is created when needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._text = str(directory)
        self.secrets: Sequence[Secret] = ()
        self._sweeping = threading.Lock()

    # --- reading ---------------------------------------------------------------------------------

    def source(self, name: str) -> PayloadFile | None:
        """Return the payload file of an entry, from the entry's name for it."""
        if name.endswith(_RECORD_SUFFIX) or not _ENTRY_FILE_NAME.fullmatch(name):
            return None
        return self.file_at(f"{self._text}/{name}")

    def file_at(self, path: str) -> PayloadFile:
        return PayloadFile(path, self.secrets, exposed=ownership.exposed(self.directory))

    def find(self, digest: bytes, size: int) -> PayloadFile | None:
        """Return a payload by its digest, if it is stored and has that size."""
        path = self._canonical(digest.hex())
        try:
            return self.file_at(path) if os.stat(path).st_size == size else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes | None:
        """Return the record in an entry's file; None if it is gone."""
        if not _ENTRY_FILE_NAME.fullmatch(name):
            return None
        try:
            descriptor = _open_old(f"{self._text}/{_record(name)}")
        except FileNotFoundError:
            return None
        with open(descriptor, "rb", buffering=0) as file:
            return file.read()

    # --- writing ---------------------------------------------------------------------------------

    @contextmanager
    def write(
        self, payload: Payload | IncomingPayload | None, record: bytes | None
    ) -> Iterator[str | None]:
        """Write an entry's payload and its record to files; yields the entry's name for them.

        Until the block ends they are safe from `sweep`; if it raises they are removed again.
        """
        name: str | None = None
        descriptors: list[int] = []
        try:
            if payload is not None:
                text = payload.digest.hex()
                name = f"{text[:2]}/{text}.{os.urandom(8).hex()}"
                self._write_payload(payload, name, descriptors)
            if record is not None:
                text = os.urandom(16).hex()
                name = name or f"{text[:2]}/{text}{_RECORD_SUFFIX}"
                self._write_record(record, _record(name), descriptors)
            yield name
            if payload is not None and payload.size >= VOUCHER_FROM_BYTES and name is not None:
                self._leave_voucher(payload, name)
        except BaseException:
            if name is not None:
                self.remove(name)
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _write_payload(
        self, payload: Payload | IncomingPayload, name: str, descriptors: list[int]
    ) -> None:
        if self._link_existing(payload, name, descriptors):
            return
        with self._new_file(name[:2], descriptors) as (descriptor, temporary, folder):
            if isinstance(payload, IncomingPayload):
                payload.write(descriptor)
            else:
                _write(descriptor, codec.aligned_pieces(payload))
            try:
                os.link(temporary, name[3:], src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:  # no links here: the entry gets a file of its own
                _rename(temporary, name[3:], folder)
            else:
                _rename(temporary, payload.digest.hex(), folder)

    def _leave_voucher(self, payload: Payload | IncomingPayload, name: str) -> None:
        """Leave a voucher for a payload, once any later change of its file would be noticed."""
        source = self.file_at(f"{self._text}/{name}")
        if isinstance(source.identity, tuple):
            end = time.monotonic_ns() + 2 * _COARSE_TICK_NS
            while file_time() <= source.identity[4] and time.monotonic_ns() < end:
                time.sleep(_CLOCK_PAUSE_SECONDS)
            source.mark_verified(payload.digest)

    def _link_existing(
        self, payload: Payload | IncomingPayload, name: str, descriptors: list[int]
    ) -> bool:
        """Link to the payload that exists already, if it is complete."""
        canonical = payload.digest.hex()
        with suppress(OSError), self._shard(name[:2]) as folder:
            descriptor = private_files.open_old(canonical, folder=folder)
            descriptors.append(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_whole(descriptor, payload, ownership.exposed(self.directory)):
                # raises if the file is gone by now, or has the maximum of links
                os.link(canonical, name[3:], src_dir_fd=folder, dst_dir_fd=folder)
                return True
        return False

    def _write_record(self, record: bytes, name: str, descriptors: list[int]) -> None:
        with self._new_file(name[:2], descriptors) as (descriptor, temporary, folder):
            _write(descriptor, (memoryview(record),))
            _rename(temporary, name[3:], folder)

    @contextmanager
    def _new_file(self, shard: str, descriptors: list[int]) -> Iterator[tuple[int, str, int]]:
        """Create a locked file in a shard; its temporary name is removed when the block ends.

        Yields:
            Its descriptor, its name, and the descriptor of the shard that names are relative to.
        """
        temporary = f"{os.urandom(16).hex()}{_TEMPORARY_SUFFIX}"
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(self._shard(shard))
            except FileNotFoundError:
                with private_files.open_folder(self.directory, make=True) as directory:
                    private_files.subdirectory(shard, directory)
                folder = stack.enter_context(self._shard(shard))
            descriptor = private_files.create(temporary, folder=folder)
            descriptors.append(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                yield descriptor, temporary, folder
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)

    @contextmanager
    def _shard(self, shard: str) -> Iterator[int]:
        """Yield a descriptor of a shard's directory; no link is followed on the way to it.

        Raises:
            OSError: it is missing, or it or the directory above is a link.
        """
        with _folder_of(f"{self._text}/{shard}/") as (folder, _):
            yield folder

    # --- removing --------------------------------------------------------------------------------

    def remove(self, name: str) -> None:
        """Remove an entry's link, and the canonical name with the last link.

        A name that cannot be ours is ignored, since the index may have been written by others.
        """
        if not _ENTRY_FILE_NAME.fullmatch(name):
            return
        with suppress(OSError), self._shard(name[:2]) as folder:
            own = name[3:]
            for one in {own, _record(own)}:
                with suppress(OSError):
                    os.unlink(one, dir_fd=folder)
            if not own.endswith(_RECORD_SUFFIX):
                _remove_unused(own.rpartition(".")[0], folder)

    def sweep(self, used: Callable[[str], bool]) -> int:
        """Remove files without an entry or a living writer; return the number of names.

        Links are removed before their canonical name, which is shorter.

        Args:
            used: returns True if the index has a name.
        """
        removed = 0
        with self._sweeping:
            for shard in private_files.list_folder(self.directory):
                with suppress(OSError), self._shard(shard) as folder:
                    for name in sorted(os.listdir(folder), key=len, reverse=True):
                        removed += _sweep(folder, shard, name, used)
        return removed

    def _canonical(self, text: str) -> str:
        return f"{self._text}/{text[:2]}/{text}"


def _sweep(folder: int, shard: str, own: str, used: Callable[[str], bool]) -> bool:
    name = f"{shard}/{own}"
    try:
        descriptor = private_files.open_old(own, folder=folder)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _CANONICAL_NAME.fullmatch(name):
            return _remove_unused(own, folder)
        if name.endswith(_VOUCHER_SUFFIX):
            return _remove_voucher(own, folder)
        owner = name if _ENTRY_FILE_NAME.fullmatch(name) else name.removesuffix(_RECORD_SUFFIX)
        if name.endswith(_TEMPORARY_SUFFIX) or (
            _ENTRY_FILE_NAME.fullmatch(owner) and not used(owner)
        ):
            os.unlink(own, dir_fd=folder)
            return True
    except OSError:  # a living writer holds it
        return False
    finally:
        os.close(descriptor)
    return False


def _record(name: str) -> str:
    """Return the path of an entry's record, from the entry's name for its files."""
    return name if name.endswith(_RECORD_SUFFIX) else name + _RECORD_SUFFIX


def _rename(old: str, new: str, folder: int) -> None:
    os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def _remove_unused(canonical: str, folder: int) -> bool:
    with suppress(OSError):
        if os.stat(canonical, dir_fd=folder, follow_symlinks=False).st_nlink == 1:
            os.unlink(canonical, dir_fd=folder)
            with suppress(OSError):
                os.unlink(canonical + _VOUCHER_SUFFIX, dir_fd=folder)
            return True
    return False


def _remove_voucher(own: str, folder: int) -> bool:
    """Remove the voucher of a payload that is gone."""
    with suppress(FileNotFoundError):
        os.stat(own.removesuffix(_VOUCHER_SUFFIX), dir_fd=folder, follow_symlinks=False)
        return False
    os.unlink(own, dir_fd=folder)
    return True


def _write(descriptor: int, parts: Iterable[memoryview | bytes]) -> None:
    """Write everything, without copying any of it."""
    left = (memoryview(part) for part in parts)
    while batch := list(islice(left, _BUFFERS_PER_WRITE)):
        while batch:
            written = os.writev(descriptor, batch)
            while batch and written >= batch[0].nbytes:
                written -= batch.pop(0).nbytes
            if written:
                batch[0] = batch[0][written:]


def _is_whole(descriptor: int, payload: Payload | IncomingPayload, exposed: bool) -> bool:
    """True if a file has exactly these buffers."""
    size = os.fstat(descriptor).st_size
    if size != payload.size:
        return False
    try:
        view = _read_copy(descriptor, size) if exposed else map_file(descriptor, size)
    except TierError:
        return False
    return codec.has_valid_digests(view, payload.table)
