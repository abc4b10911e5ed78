"""Bundles: entries in one file, sealed with a key of their own, to be copied to other machines.

====== ======= ====================================================================================
offset bytes   content
====== ======= ====================================================================================
0      8       magic; the digit is the format
8      8       id of the bundle's key
16     32      seal: keyed BLAKE2b-256 over bytes 0-15 and 48 to the end of the manifest
48     8       length of the manifest
56     ...     the manifest: JSON with the bundle's origin and contents
...    ...     records and payloads, each at a multiple of `ALIGN`
====== ======= ====================================================================================

Rules of this module:

1.  Without the key only the manifest may be shown, marked as unverified; nothing else is read.
2.  Each record is sealed with the bundle's key, for its namespace and entry key, and contains the
    digest of its payload.  So everything that is used was authenticated by the bundle's key.
3.  Generations of another host mean nothing here.  An imported entry gets this host's generations
    at the moment of the import.  A bundle used as a tier gets those of the moment when a chain
    first used it on this host, which are stored on disk.  So an invalidation affects the entries of
    a bundle like any other.
4.  A bundle that is a tier is never written to.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from memo import stores
from memo.errors import BundleError, EntryError, OptionError, TierError
from memo.records import codec, seal
from memo.records.seal import Entry, aligned, padding
from memo.records.stamp_types import Generation, Ref, State
from memo.runtime import private_files
from memo.runtime.checksums import compare_digest
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.settings.secret_keys import SECRET_BYTES, Secret
from memo.stores.protocols import Found, Generations, Source

BUNDLE_MAGIC = b"\x89bundle1"
_ANY_FORMAT = BUNDLE_MAGIC[:-1]
KEY_VARIABLE = "MEMO_BUNDLE_KEY"
"""Environment variable with the key, used if no key is given."""
_MANIFEST_AT = 56
_LENGTH = struct.Struct(">Q")
_MAX_MANIFEST_BYTES = 256 << 20
"""Largest accepted manifest in bytes."""
_REFS_PER_STEP = 256
"""Maximum number of refs whose states are read in one step."""
_WRITE_CHUNK_BYTES = 4 << 20
_SEALED_STATES = b"memo bundle states"


class BundleItem(NamedTuple):
    """An entry of a bundle, as listed in its manifest.

    Attributes:
        function: id of the function.
        key: key of the entry.
        code: the function's code version.
        arguments: JSON, argument name -> short text and digest.
        computed: when it was computed, in seconds since the epoch.
        ttl: in seconds; None: it does not expire.
        cost: seconds that its computation took.
        size: bytes of its record and its payload.
        record: offset and length of its record.
        payload: offset and length of its payload, or None.
    """

    function: str
    key: str
    code: str
    arguments: str
    computed: float
    ttl: float | None
    cost: float
    size: int
    record: tuple[int, int]
    payload: tuple[int, int] | None


class BundleOrigin(NamedTuple):
    """The origin of a bundle.

    Attributes:
        made: when it was made, in seconds since the epoch.
        by: user, host and process that made it.
        memo, python, platform: the versions it was made with.
        namespace: the namespace of its entries.
        note: the text given when it was made.
    """

    made: float
    by: str
    memo: str
    python: str
    platform: str
    namespace: str
    note: str = ""


class BundlePart(NamedTuple):
    """An entry to be written: its record, sealed for the bundle, and its payload."""

    item: BundleItem
    record: bytes
    payload: memoryview | None


def secret_of(key: str) -> Secret:
    """Return the secret made from a bundle's key.

    Raises:
        BundleError: the key is too short.
    """
    data = key.strip().encode()
    if len(data) < SECRET_BYTES:
        message = (
            f"The key of a bundle has at least {SECRET_BYTES} bytes; this one has {len(data)}."
        )
        raise BundleError(message)
    return Secret(data)


def file_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of a bundle.

    Raises:
        OptionError: it is not a path.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise OptionError("path", path, 'must be the path of a file, such as "features.memo".')
    return Path(path)


def given_key(key: str | None) -> str | None:
    """Return the given key, or else the one in the environment.

    Raises:
        OptionError: it is not text; its value is not shown.
    """
    if key is not None and not isinstance(key, str):
        raise OptionError(
            "key", type(key), "is not text; pass the key that export_bundle returned."
        )
    return key or os.environ.get(KEY_VARIABLE) or None


def write(path: Path, origin: BundleOrigin, parts: Sequence[BundlePart], secret: Secret) -> None:
    """Write a bundle atomically, readable only by its user.

    Raises:
        OSError: it cannot be written.
    """
    at, items = 0, []
    for part in parts:
        record, at = (at, len(part.record)), aligned(at + len(part.record))
        payload = None
        if part.payload is not None:
            payload, at = (at, part.payload.nbytes), aligned(at + part.payload.nbytes)
        items.append(part.item._replace(record=record, payload=payload))
    manifest = json.dumps({"origin": origin, "entries": items}).encode()
    head = BUNDLE_MAGIC + secret.id
    length = _LENGTH.pack(len(manifest))
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    descriptor = private_files.create(temporary)
    try:
        with open(descriptor, "wb") as file:
            file.write(head + secret.seal(head, length, manifest) + length + manifest)
            file.write(padding(_MANIFEST_AT + len(manifest)))
            for part in parts:
                for blob in (part.record, part.payload):
                    if blob is not None:
                        _write(file, memoryview(blob))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _write(file: Any, blob: memoryview) -> None:
    for start in range(0, blob.nbytes, _WRITE_CHUNK_BYTES):
        file.write(blob[start : start + _WRITE_CHUNK_BYTES])
        codec.release_pages(blob, start, _WRITE_CHUNK_BYTES)
    file.write(padding(blob.nbytes))


class _Slice:
    """A payload in a bundle: a `memo.stores.protocols.Source`."""

    def __init__(self, path: Path, offset: int, identity: object) -> None:
        self._path = path
        self._offset = offset
        self.identity: object | None = (*identity, offset) if isinstance(identity, tuple) else None

    def open(self, size: int) -> memoryview:
        """Map all bytes of the payload: private and writable.

        Raises:
            TierError: the bundle is gone, or shorter than it was.
        """
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset + size:
                    raise TierError(f"{self._path.name} is shorter than its manifest says")
                start = self._offset - self._offset % mmap.ALLOCATIONGRANULARITY
                whole = mmap.mmap(
                    file.fileno(),
                    self._offset + size - start,
                    access=mmap.ACCESS_COPY,
                    offset=start,
                )
        except OSError as error:
            raise TierError(f"{self._path.name}: {error.strerror}") from error
        return memoryview(whole)[self._offset - start :]


class Bundle:
    """A bundle of entries: shows its origin, and can be used as a read-only tier.

    ::

        memo.configure(tiers=["memory", "disk", memo.Bundle("features.memo")])

    Args:
        path: the file.
        key: the key that it was sealed with; None: the environment variable `MEMO_BUNDLE_KEY`.
            Without a key only its description is shown.

    Attributes:
        verified: the seal was checked with the key.
        origin: see `BundleOrigin`.
        items: its entries.

    Raises:
        BundleError: the file is not a bundle, was sealed with another key, or was changed since.
        OSError: the file cannot be read.
    """

    name = where = "bundle"
    shared = False
    read_only = True
    budget = None

    def __init__(self, path: str | os.PathLike[str], key: str | None = None) -> None:
        self.path = file_path(path)
        key = given_key(key)
        self._secret = None if key is None else secret_of(key)
        self.verified = False
        self.generations: Generations | None = None
        self._chain: stores.Chain | None = None
        self._states: dict[Ref, State] | None = None
        self._lock = threading.Lock()
        self._read()

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            facts = os.fstat(file.fileno())
            head = file.read(_MANIFEST_AT)
            if head.startswith(_ANY_FORMAT) and not head.startswith(BUNDLE_MAGIC):
                message = f"{self.path.name} has another format than this version of memo reads."
                raise BundleError(message)
            if len(head) < _MANIFEST_AT or not head.startswith(BUNDLE_MAGIC):
                raise BundleError(f"{self.path.name} is not a memo bundle.")
            (size,) = _LENGTH.unpack(head[48:])
            manifest = file.read(size) if size <= _MAX_MANIFEST_BYTES else b""
        if len(manifest) != size:
            raise BundleError(f"{self.path.name} is cut short.")
        if self._secret is not None:
            self._verify(self._secret, head, manifest)
        self._identity = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
        self._body = aligned(_MANIFEST_AT + size)
        self._gap = len(padding(_MANIFEST_AT + size))
        self.id = head[16:48].hex()
        try:
            contents = json.loads(manifest)
            self.origin = BundleOrigin(*contents["origin"])
            self.items = [_item(row) for row in contents["entries"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(
                f"The manifest of {self.path.name} cannot be read: {error}."
            ) from None
        self._by_key = {(item.function, item.key): item for item in self.items}

    def _verify(self, secret: Secret, head: bytes, manifest: bytes) -> None:
        if head[8:16] != secret.id:
            raise BundleError(f"{self.path.name} was sealed with another key than this one.")
        sealed = secret.seal(head[:16], head[48:], manifest)
        if not compare_digest(sealed, head[16:48]):
            raise BundleError(f"{self.path.name} was changed since it was made.")
        self.verified = True

    @property
    def size(self) -> int:
        """Bytes of all entries."""
        return sum(item.size for item in self.items)

    # --- entries ---------------------------------------------------------------------------------

    def entry(self, item: BundleItem) -> Entry:
        """Return an entry, as it was sealed for the bundle.

        Raises:
            EntryError: it was not sealed with the bundle's key.
            TierError: the file is gone.
        """
        if self._secret is None:
            raise EntryError("unauthentic", f"{self.path.name} needs its key")
        try:
            with open(self.path, "rb") as file:
                file.seek(self._body + item.record[0])
                record = file.read(item.record[1])
        except OSError as error:
            raise TierError(f"{self.path.name}: {error.strerror}") from error
        return seal.unpack(record, (self._secret,), self.origin.namespace, item.key)

    def source(self, item: BundleItem) -> Source | None:
        """Return the source of an entry's payload in the file."""
        if item.payload is None:
            return None
        return _Slice(self.path, self._body + item.payload[0], self._identity)

    def changed_items(self) -> list[BundleItem]:
        """Return the entries whose bytes are not those that were sealed.

        Raises:
            BundleError: the bytes between them were changed, or the length of the file was.
            OSError: the file cannot be read.
        """
        parts = [part for item in self.items for part in (item.record, item.payload) if part]
        gaps = [(at + size, len(padding(size))) for at, size in parts]
        end = max((at + aligned(size) for at, size in parts), default=0)
        with open(self.path, "rb") as file:
            excess = os.fstat(file.fileno()).st_size - self._body - end
            if excess:
                what = "cut short" if excess < 0 else "longer than its manifest says"
                raise BundleError(f"{self.path.name} is {what}.")
            file.seek(self._body - self._gap)
            changed = any(file.read(self._gap))
            for at, size in gaps:
                file.seek(self._body + at)
                changed = changed or any(file.read(size))
        found = [item for item in self.items if not self._is_unchanged(item)]
        if changed and not found:
            raise BundleError(f"{self.path.name} was changed since it was made.")
        return found

    def _is_unchanged(self, item: BundleItem) -> bool:
        """True if an entry and its payload have the bytes that were sealed."""
        try:
            entry, source = self.entry(item), self.source(item)
            if source is None or not entry.buffers:
                return not entry.buffers
            view = source.open(seal.payload_size(entry.buffers))
        except (EntryError, TierError):
            return False
        return codec.has_valid_digests(view, entry.buffers) and codec.has_clear_gaps(
            view, entry.buffers
        )

    # --- as a tier -------------------------------------------------------------------------------

    def join(self, chain: stores.Chain) -> None:
        """Be a tier of a chain.

        Raises:
            BundleError: there is no key for it.
        """
        if not self.verified:
            raise BundleError(
                f"{self} is not verified, so nothing in it is used; give its key: "
                f'memo.Bundle("{self.path.name}", key=...), or {KEY_VARIABLE}.'
            )
        if self._chain is not chain:
            self._chain, self._states = chain, None

    async def lookup(self, port: Port, name: str) -> Found | None:
        """See `memo.stores.protocols.Tier.lookup`."""
        chain = self._chain
        function, _, rest = name.partition("{")[2].rpartition("}:")
        secret_id, _, key = rest.partition(":")
        await self.adopt(port)
        item = self._by_key.get((function, key))
        states = self._states
        if item is None or chain is None or states is None:
            return None
        if secret_id != chain.secrets[0].id.hex():
            return None
        try:
            entry = await port.offload(self.entry, item)
        except EntryError as error:
            raise TierError(str(error)) from error
        header = restamped(entry, states)._replace(namespace=chain.namespace)
        record = seal.pack(header, entry.stream, chain.secrets[0])
        return Found(record, self.source(item))

    async def adopt(self, port: Port) -> None:
        """Note which entries are valid, before anything is invalidated or looked up here.

        Raises:
            TierError: no tier can be asked, or the states cannot be recorded.
        """
        if self._states is None and self._chain is not None:
            try:
                self._states = await self._load_or_record_states(port, self._chain)
            except EntryError as error:
                raise TierError(str(error)) from error

    async def _load_or_record_states(self, port: Port, chain: stores.Chain) -> dict[Ref, State]:
        """Return this host's generations as they were when the bundle was first used here."""
        known = await port.offload(self.recorded_states, chain)
        if known is not None:
            return known
        entries = [await port.offload(self.entry, item) for item in self.items]
        states = await current_states(port, chain, entries)
        return await port.offload(self._record_states, chain, states)

    def _states_path(self, chain: stores.Chain, secret: Secret) -> Path | None:
        """Return the file of the recorded states; each secret has its own."""
        if chain.host is None:
            return None
        folder = Path(chain.host.cache_directory.path) / "bundles"
        return folder / f"{self.id}-{secret.id.hex()}.json"

    def recorded_states(self, chain: stores.Chain) -> dict[Ref, State] | None:
        """Return the states that were recorded under one of the chain's secrets, or None."""
        for secret in chain.secrets:
            path = self._states_path(chain, secret)
            states = None if path is None else _read_states(path, secret)
            if states is not None:
                return states
        return None

    def _record_states(self, chain: stores.Chain, states: dict[Ref, State]) -> dict[Ref, State]:
        """Record states unless another process has; return the recorded ones."""
        secret = chain.secrets[0]
        path = self._states_path(chain, secret)
        if path is None:
            return states
        data = json.dumps([(*ref, *state) for ref, state in states.items()]).encode()
        temporary = f"{path.stem}.{os.urandom(8).hex()}.tmp"
        try:
            with private_files.open_folder(path.parent, make=True) as folder:
                descriptor = private_files.create(temporary, folder=folder)
                with open(descriptor, "wb") as file:
                    file.write(secret.id + secret.seal(_SEALED_STATES, data) + data)
                try:
                    os.link(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                    os.unlink(temporary, dir_fd=folder)
                except FileExistsError:
                    if _read_states(path, secret) is None:  # damaged, so nothing is recorded
                        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                    else:
                        os.unlink(temporary, dir_fd=folder)
        except OSError as error:
            raise TierError(f"the generations of {self.path.name} cannot be recorded") from error
        return _read_states(path, secret) or states

    async def payload(self, port: Port, digest: bytes, size: int) -> Source | None:
        """See `memo.stores.protocols.Tier.payload`; also serves records that other tiers hold."""
        return None

    async def store(
        self,
        port: Port,
        name: str,
        record: bytes,
        payload: codec.Payload | None,
        lifetime: float | None,
    ) -> None:
        """See `memo.stores.protocols.Tier.store`; a chain never calls it.

        Raises:
            TierError: always.
        """
        raise TierError("a bundle is read-only")

    async def drop(self, port: Port, name: str) -> bool:
        """See `memo.stores.protocols.Tier.drop`; nothing is dropped."""
        return False

    async def clear(self, port: Port, prefix: str) -> int:
        """See `memo.stores.protocols.Tier.clear`; nothing is dropped."""
        return 0

    async def health(self, port: Port) -> Mapping[str, Any]:
        """See `memo.stores.protocols.Tier.health`."""
        return {"up": self.path.exists(), "entries": len(self.items), "bytes": self.size}

    def close(self) -> None:
        """See `memo.stores.protocols.Tier.close`; there is nothing to close."""

    # --- display ---------------------------------------------------------------------------------

    def functions(self) -> Iterator[tuple[str, list[BundleItem]]]:
        """Yield each function with its entries."""
        for function in dict.fromkeys(item.function for item in self.items):
            yield function, [item for item in self.items if item.function == function]

    def __repr__(self) -> str:
        count = len(self.items)
        entries = "1 entry" if count == 1 else f"{count} entries"
        note = "" if self.verified else ", not verified"
        return f"<Bundle {self.path.name}: {entries} by {self.origin.by}{note}>"


def _item(row: Sequence[Any]) -> BundleItem:
    item = BundleItem(*row)
    payload = None if item.payload is None else (int(item.payload[0]), int(item.payload[1]))
    return item._replace(record=(int(item.record[0]), int(item.record[1])), payload=payload)


def _read_states(path: Path, secret: Secret) -> dict[Ref, State] | None:
    """Return the states in a file that this secret has sealed; None if there is none."""
    try:
        with private_files.open_folder(path.parent) as folder:
            descriptor = private_files.open_old(path.name, folder=folder)
        with open(descriptor, "rb") as file:
            data = file.read()
    except OSError:
        return None
    sealed = data[:8] == secret.id and compare_digest(
        secret.seal(_SEALED_STATES, data[40:]), data[8:40]
    )
    if not sealed:
        return None
    return {Ref(g, _pairs(a)): State(text, last) for g, a, text, last in json.loads(data[40:])}


def _pairs(rows: Any) -> Any:
    return None if rows is None else tuple((name, digest) for name, digest in rows)


async def current_states(
    port: Port, chain: stores.Chain, entries: Iterable[Entry]
) -> dict[Ref, State]:
    """Return the current states, on this host, of the generations that some entries name.

    Raises:
        TierError: no tier can be asked.
    """
    refs = list(dict.fromkeys(ref for entry in entries for ref in entry.refs))
    states: dict[Ref, State] = {}
    for start in range(0, len(refs), _REFS_PER_STEP):
        some = refs[start : start + _REFS_PER_STEP]
        states.update(zip(some, await chain.authorities.stamp_states(port, some), strict=True))
    return states


def restamped(entry: Entry, states: Mapping[Ref, State]) -> seal.Header:
    """Return the header of an entry with other states of its generations."""
    stamps = tuple(
        Generation(stamp.ref, states[stamp.ref]) if type(stamp) is Generation else stamp
        for stamp in entry.stamps
    )
    return entry.header._replace(stamps=stamps)
