"""The live configuration: ttls that can be changed at run time.

`@cache(ttl=300, ttl_key="ttl.products")` reads it at each store and at each check of an entry's
age, so a changed value takes effect at once, also on existing entries.  Three sources; the first
one with the key decides:

1.  this process: `memo.live["ttl.products"] = 30`,
2.  a TOML file: the setting `live_file`, checked on access, at most every `FILE_CHECK_SECONDS`; a
    dot in a key leads into a table,
3.  a shared one (Redis): at most `SHARED_REFRESH_SECONDS` old if the caller checks `due` and then
    calls `refresh`, which may block.

It needs neither a thread nor an event loop.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from memo.errors import OptionError, described, public
from memo.runtime.events import ERROR, Event, emit
from memo.settings import configuration, durations
from memo.settings.durations import seconds

FILE_CHECK_SECONDS = 0.2
"""Seconds between two checks of the file."""
SHARED_REFRESH_SECONDS = 0.5
"""Seconds after which the shared source is read again: below 1 s with its deadline of 0.25 s."""
_SHARED = "shared"
"""The shared source, in reports of faults."""
_SETTLED_SECONDS = 0.1
"""Seconds: a younger file may be written again within the resolution of its time stamp."""

Ttl: TypeAlias = "float | int | str | durations.timedelta | None"
"""A ttl as written: seconds, `"1h30m"`, a `timedelta`; None, `"none"` or infinity: no expiry."""


class SharedValues(Protocol):
    """The ttls that all processes share."""

    def live(self) -> Mapping[Any, Any]:
        """Return all keys and their ttl as users write them, as text or bytes; may block or raise.

        A number without a unit is in seconds.
        """
        ...

    def publish(self, key: str, text: str | None) -> Any:
        """Set a key for all processes; None removes it."""
        ...


def _seconds(key: str, value: Any) -> float:
    """Return the seconds of a given ttl; `math.inf` for no expiry."""
    if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
        return math.inf
    if isinstance(value, float) and value == math.inf:
        return value
    number = seconds(f"live[{key!r}]", value)
    return math.inf if number is None else number


def _name(key: object) -> str:
    if not isinstance(key, str) or not key or not all(key.split(".")):
        raise OptionError("key", key, 'must be text, dots between its parts: "ttl.products".')
    return key


class Live(Mapping[str, float]):
    """A thread-safe mapping of keys to seconds; `math.inf` means no expiry.

    Args:
        find_shared: returns the shared source under the current settings; None: there is none.
    """

    def __init__(
        self,
        find_shared: Callable[[], SharedValues | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find_shared = find_shared
        self._clock = clock
        self._lock = threading.RLock()
        self._own: dict[str, float] = {}
        self._filed: dict[str, float] = {}
        self._shared: dict[str, float] = {}
        self._values: dict[str, float] = {}
        self._look_at = -math.inf
        self._settings = -1
        self._seen: object = None
        self._complaints: dict[str, str] = {}
        self._fetching = threading.Lock()
        self._source: Callable[[], SharedValues | None] = _no_source  # weak: it may be closed
        self._fetched_at = -math.inf

    def get(self, key: str, default: Any = None) -> Any:
        """Return the seconds for a key (`math.inf`: no expiry), or `default` if none has it."""
        self._check_sources()
        return self._values.get(key, default)

    def __getitem__(self, key: str) -> float:
        self.get(key)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        self.get("")
        return iter(sorted(self._values))

    def __len__(self) -> int:
        self.get("")
        return len(self._values)

    def __repr__(self) -> str:
        return f"<live {dict(self)}>"

    @public
    def set(self, key: str, value: Ttl, *, shared: bool = False) -> None:
        """Set a key, in this process or (`shared`) in all processes, which see it within a second.

        Raises:
            OptionError: not a ttl, or `shared` without a shared source.
        """
        number = _seconds(_name(key), value)
        if shared:
            self._publish_or_fail(key, "none" if number == math.inf else f"{number!r}s")
            return
        with self._lock:
            self._own[key] = number
            self._merge()

    @public
    def delete(self, key: str, *, shared: bool = False) -> bool:
        """Undo `set`; True if there was a value."""
        if shared:
            there = key in self._shared
            self._publish_or_fail(_name(key), None)
            return there
        with self._lock:
            there = self._own.pop(key, None) is not None
            self._merge()
        return there

    @public
    def __setitem__(self, key: str, value: Ttl) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def clear(self) -> None:
        """Undo everything that was set in this process."""
        with self._lock:
            self._own.clear()
            self._merge()

    def due(self) -> bool:
        """True if the shared source has to be read again.  Never waits for it."""
        self._check_sources()
        is_old = self._clock() - self._fetched_at >= SHARED_REFRESH_SECONDS
        return is_old and self._source() is not None

    def refresh(self) -> None:
        """Read the shared source if that is due; may block, never raises.

        A source that fails keeps its last values, and causes one event per outage.
        """
        with self._fetching:
            source = self._find_shared()
            self._use_source(source)
            if source is None or not self.due():
                return
            try:
                found = self._valid_values(source.live())
            except Exception as error:  # a fault of the cache: the last values stay
                self._report_fault(_SHARED, described(error))
            else:
                self._share(source, found)
            self._fetched_at = self._clock()

    def file_fault(self) -> str:
        """Say why the file, as it is now, changes nothing; `""` if it is used, or there is none."""
        self._look_at = -math.inf
        self._check_sources()
        path = configuration.current().live_file
        return "" if path is None else self._complaints.get(str(path), "")

    def renew_locks(self) -> None:
        """Replace the locks, in the child of a fork."""
        self._lock, self._fetching = threading.RLock(), threading.Lock()

    def _share(self, source: SharedValues, found: dict[str, float]) -> None:
        with self._lock:
            if self._source() is source:
                self._shared = found
                self._merge()

    def _publish_or_fail(self, key: str, text: str | None) -> None:
        source = self._find_shared()
        if source is None:
            raise OptionError("shared", True, "needs a Redis; set redis_url first.")
        source.publish(key, text)
        self._fetched_at = -math.inf

    def _valid_values(self, found: Mapping[Any, Any]) -> dict[str, float]:
        good: dict[str, float] = {}
        wrong = ""
        for key, value in found.items():
            name, text = _text(key), _text(value)
            try:
                good[name] = _seconds(name, float(text) if _is_number(text) else text)
            except OptionError as error:
                wrong = str(error)
        self._report_fault(_SHARED, wrong)
        return good

    def _merge(self) -> None:
        self._values = {**self._shared, **self._filed, **self._own}

    def _check_sources(self) -> None:
        """Read the file if that is due, and look for another shared source if settings changed."""
        if self._clock() < self._look_at and configuration.revision == self._settings:
            return
        revision = configuration.revision
        if revision != self._settings:
            self._use_source(self._find_shared())
        with self._lock:
            self._settings = revision
            self._look_at = self._clock() + FILE_CHECK_SECONDS
            path = configuration.current().live_file
            if path is None:
                self._adopt(None, {})
                return
            self._read_file(str(path))

    def _use_source(self, source: SharedValues | None) -> None:
        found = _no_source if source is None else weakref.ref(source)
        with self._lock:
            if found != self._source:
                self._source, self._shared, self._fetched_at = found, {}, -math.inf
                self._merge()

    def _read_file(self, path: str) -> None:
        try:
            seen = _signature(path)
        except OSError as error:
            self._adopt(None, {})
            self._report_fault(path, error.strerror or str(error))
            return
        if seen is not None and seen == self._seen:
            return
        try:
            filed = _flat(load_file(path))
        except (OSError, ValueError, OptionError) as error:
            self._seen = seen
            self._report_fault(path, str(error))
            return
        self._adopt(seen, filed)
        self._report_fault(path, "")

    def _adopt(self, seen: object, filed: dict[str, float]) -> None:
        self._seen = seen
        if filed != self._filed:
            self._filed = filed
            self._merge()

    def _report_fault(self, about: str, text: str) -> None:
        """Emit an event for a fault, unless it was the last one; `""` marks its end.

        A fault of the file is logged as well; those of Redis are logged by its breaker.
        """
        if text and text != self._complaints.get(about):
            emit(Event(ERROR, reason="live configuration", detail=f"{about}: {text}"))
            if about != _SHARED:
                import logging  # only a fault needs it

                log = logging.getLogger("memo.settings")
                log.warning("memo: live_file %s changes nothing: %s", about, text)
        self._complaints[about] = text


def _no_source() -> None:
    """Return no source, in place of a weak reference to one."""


def _signature(path: str) -> object:
    """Identify this version of a file.

    None if it is too new to be distinguished from the next one.
    """
    found = os.stat(path)
    if abs(time.time() - found.st_mtime) < _SETTLED_SECONDS:
        return None
    return (path, found.st_mtime_ns, found.st_size, found.st_ino)


def load_file(path: str) -> dict[str, Any]:
    """Return the values in a TOML file."""
    import tomllib

    with open(path, "rb") as file:
        return tomllib.load(file)


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in table.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, dict):
            found |= _flat(value, name)
        else:
            found[name] = _seconds(name, value)
    return found


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and value.replace(".", "", 1).strip().isdecimal()
