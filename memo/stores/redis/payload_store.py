"""The payload store: a directory or bucket, of any fsspec kind, for payloads too big for Redis.

Rules of this module:

1.  A payload is named by its digest, in a directory for its namespace and format.  It is written
    whole or not at all.
2.  Bytes are not verified here: they are hashed on arrival, like those from Redis.
3.  After a fault the store is not used for `STORE_RETRY_SECONDS`; each outage logs one warning.
4.  An entry in Redis lives at most `PAYLOAD_KEPT_SECONDS` with a payload here.  If a payload is
    stored again and is older than that, it is written again; it is swept when it is twice as old.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

from memo.errors import TierError, TierUnavailable, described
from memo.records.codec import Payload, aligned_pieces
from memo.records.payload_pieces import OutgoingPayload, PayloadSink
from memo.settings.checks import redacted

T = TypeVar("T")
PAYLOAD_KEPT_SECONDS = 30 * 86400.0
"""Seconds for which a payload may be used after it was written."""
STORE_RETRY_SECONDS = 5.0
"""Seconds for which the store is not used after a fault."""
MIN_SWEEP_SECONDS = 86400.0
"""Shortest time in seconds between two sweeps by a process."""

_log = logging.getLogger("memo")


class PayloadStore:
    """Payloads in a place that several hosts can reach.

    Args:
        url: a directory or bucket, as an fsspec URL or a path.
        folder: the directory below it, for a namespace and a format.
        now: returns seconds since the epoch.

    Attributes:
        where: the URL without user, password and query.
    """

    def __init__(self, url: str, folder: str, now: Callable[[], float] = time.time) -> None:
        self._url = url
        self._folder = folder
        self._now = now
        self.where = redacted(url) if "://" in url else url
        self._lock = threading.Lock()
        self._fs: Any = None
        self._root = ""
        self._retry_at = 0.0
        self._warned = False
        self._swept = 0.0

    def store(self, payload: Payload) -> None:
        """Write a payload, unless it is stored and recent; blocks.

        Raises:
            TierError: it could not be written.
        """
        pieces = (
            payload.pieces() if isinstance(payload, OutgoingPayload) else aligned_pieces(payload)
        )
        self._run(lambda fs: self._store(fs, self._path(payload.digest), payload.size, pieces))

    def _store(self, fs: Any, path: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        facts = self._facts(fs, path)
        if (
            facts is not None
            and facts.get("size") == size
            and self._age(facts) < PAYLOAD_KEPT_SECONDS
        ):
            return
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        with fs.open(path, "wb", autocommit=False) as file:
            try:
                for piece in pieces:
                    file.write(piece)
            except BaseException:
                file.discard()
                raise
        file.commit()
        if self._now() - self._swept > MIN_SWEEP_SECONDS:
            self._swept = self._now()
            self._sweep(fs)

    def fetch(self, digest: bytes, sink: PayloadSink) -> bool:
        """Pass a payload to a sink, in this thread; False if it is not stored.

        Raises:
            TierError: it could not be read, or the sink refused it.
        """
        return self._run(lambda fs: self._fetch(fs, self._path(digest), sink))

    def _fetch(self, fs: Any, path: str, sink: PayloadSink) -> bool:
        facts = self._facts(fs, path)
        if facts is None or facts.get("size") != sink.size:
            return False
        with fs.open(path, "rb") as file:
            sink.begin()
            at = 0
            while at < sink.size:
                room = sink.buffer_at(at)[: sink.size - at]
                piece = file.read(len(room))
                if not piece:
                    return False
                room[: len(piece)] = piece
                sink.accept(room[: len(piece)])
                at += len(piece)
        return True

    def clear(self) -> None:
        """Remove all payloads of the namespace.

        Raises:
            TierError: they could not be removed.
        """

        def work(fs: Any) -> None:
            if fs.exists(self._root):
                fs.rm(self._root, recursive=True)

        self._run(work)

    def probe(self) -> bool:
        """Write a few bytes, read them back, and remove them.

        Raises:
            TierError: one of these steps failed.
        """

        def work(fs: Any) -> bool:
            path, bytes_ = f"{self._root}/probe-{os.urandom(8).hex()}", b"memo"
            fs.makedirs(self._root, exist_ok=True)
            fs.pipe_file(path, bytes_)
            try:
                return bool(fs.cat_file(path) == bytes_)
            finally:
                fs.rm_file(path)

        return self._run(work)

    def _sweep(self, fs: Any) -> None:
        """Remove payloads that no entry in Redis refers to any more."""
        for path, facts in fs.find(self._root, detail=True).items():
            if self._age(facts) > 2 * PAYLOAD_KEPT_SECONDS:
                with suppress(FileNotFoundError):  # another host may sweep at the same time
                    fs.rm_file(path)

    def _facts(self, fs: Any, path: str) -> dict[str, Any] | None:
        try:
            fs.invalidate_cache()
            facts: dict[str, Any] = fs.info(path)
        except FileNotFoundError:
            return None
        return facts

    def _age(self, facts: dict[str, Any]) -> float:
        """Return the age of a file in seconds; 0 if its file system does not tell."""
        at = next((facts[name] for name in _WRITE_TIME_FACTS if facts.get(name) is not None), None)
        if isinstance(at, datetime):
            at = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        return max(0.0, self._now() - at) if isinstance(at, (int, float)) else 0.0

    def _path(self, digest: bytes) -> str:
        name = digest.hex()
        return f"{self._root}/{name[:2]}/{name}"

    def _run(self, work: Callable[[Any], T]) -> T:
        if time.monotonic() < self._retry_at:
            raise TierUnavailable(
                f"the payload store {self.where} cannot be reached", reported=True
            )
        try:
            found = work(self._open_file_system())
        except TierError:  # raised by the sink
            raise
        except Exception as error:
            self._retry_at = time.monotonic() + STORE_RETRY_SECONDS
            message = f"the payload store {self.where}: {described(error)}"
            if not self._warned:
                self._warned = True
                advice = "payloads too big for Redis stay on this host meanwhile"
                _log.warning("memo: %s. See payload_store; %s.", message, advice)
            raise TierError(message) from error
        self._warned = False
        return found

    def _open_file_system(self) -> Any:
        with self._lock:
            if self._fs is None:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self._url, skip_instance_cache=True)
                self._fs, self._root = fs, f"{root.rstrip('/')}/{self._folder}"
            return self._fs

    def close(self) -> None:
        """Close connections; the next use opens them again."""
        with self._lock:
            self._fs = None


_WRITE_TIME_FACTS = ("LastModified", "mtime", "last_modified", "updated", "created")
"""The names under which file systems report the time of a file's last write."""
