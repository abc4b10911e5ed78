"""The live configuration: ttls that can be changed at run time.

`@cache(ttl=300, ttl_key="ttl.products")` reads it at each store and at each check of an entry's
age, so a changed value takes effect at once, also on existing entries.  Three sources; the first
one with the key decides:

1.  this process: `memo.live["ttl.products"] = 30`,
2.  a TOML file: the setting `live_file`, checked on access, at most every `FILE_CHECK_SECONDS`; a
    dot in a key leads into a table,
3.  a shared one (Redis), passed to `attach`: at most `SHARED_REFRESH_SECONDS` old if the caller
    checks `due` and then calls `refresh`, which may block.

It needs neither a thread nor an event loop.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from memo.errors import OptionError, public
from memo.runtime import fork
from memo.runtime.events import ERROR, Event, emit
from memo.settings import configuration, durations
from memo.settings.durations import seconds

FILE_CHECK_SECONDS = 0.2
"""Seconds between two checks of the file."""
SHARED_REFRESH_SECONDS = 0.5
"""Seconds after which the shared source is read again: below 1 s with its deadline of 0.25 s."""
_SETTLED_SECONDS = 0.1
"""Seconds: a younger file may be written again within the resolution of its time stamp."""

Ttl: TypeAlias = "float | int | str | durations.timedelta | None"
"""A ttl as written: seconds, `"1h30m"`, a `timedelta`; None, `"none"` or infinity: no expiry."""
Fetch = Callable[[], Mapping[str, Any]]
Publish = Callable[[str, str | None], Any]


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
    """A thread-safe mapping of keys to seconds; `math.inf` means no expiry."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
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
        self._fetch: Fetch | None = None
        self._publish: Publish | None = None
        self._fetched_at = -math.inf

    def get(self, key: str, default: Any = None) -> Any:
        """Return the seconds for a key (`math.inf`: no expiry), or `default` if none has it."""
        if self._clock() >= self._look_at or configuration.revision != self._settings:
            self._check_file()
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

    def attach(self, fetch: Fetch | None, publish: Publish | None = None) -> Callable[[], None]:
        """Add a shared source.

        Args:
            fetch: returns all keys and their ttl as users write them (text or bytes, in seconds or
                with units); may block, may raise.  None: there is no source.
            publish: `publish(key, text)` sets a key for all processes, and with None deletes it.

        Returns:
            A function that removes the source.
        """
        with self._lock:
            self._fetch, self._publish, self._fetched_at = fetch, publish, -math.inf

        def detach() -> None:
            with self._lock:
                if self._fetch is fetch:
                    self._fetch = self._publish = None
                    self._shared = {}
                    self._merge()

        return detach

    def due(self) -> bool:
        """True if the shared source has to be read again.  Never blocks."""
        return (
            self._fetch is not None and self._clock() - self._fetched_at >= SHARED_REFRESH_SECONDS
        )

    def refresh(self) -> None:
        """Read the shared source if that is due; may block, never raises.

        A source that fails keeps its last values, and causes one event per outage.
        """
        with self._fetching:
            fetch = self._fetch
            if fetch is None or not self.due():
                return
            try:
                found = self._valid_values(fetch())
            except Exception as error:  # a fault of the cache: the last values stay
                self._report_fault("shared", f"{type(error).__name__}: {error}")
            else:
                self._share(fetch, found)
            self._fetched_at = self._clock()

    def _share(self, fetch: Fetch, found: dict[str, float]) -> None:
        with self._lock:
            if self._fetch is fetch:
                self._shared = found
                self._merge()

    def _publish_or_fail(self, key: str, text: str | None) -> None:
        if self._publish is None:
            raise OptionError("shared", True, "needs a Redis; set redis_url first.")
        self._publish(key, text)
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
        self._report_fault("shared", wrong)
        return good

    def _merge(self) -> None:
        self._values = {**self._shared, **self._filed, **self._own}

    def _check_file(self) -> None:
        with self._lock:
            self._settings = configuration.revision
            self._look_at = self._clock() + FILE_CHECK_SECONDS
            path = configuration.current().live_file
            if path is None:
                self._adopt(None, {})
                return
            self._read_file(str(path))

    def _read_file(self, path: str) -> None:
        try:
            seen = _signature(path)
        except OSError as error:
            self._adopt(None, {})
            self._report_fault(path, str(error))
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
        """Emit an event for a fault, once until it changes; `""`: it is over."""
        if text and text != self._complaints.get(about):
            emit(Event(ERROR, reason="live configuration", detail=f"{about}: {text}"))
        self._complaints[about] = text


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


live = Live()
"""The live configuration of this process."""


def _after_fork() -> None:
    live._lock, live._fetching = threading.RLock(), threading.Lock()


fork.in_child(_after_fork)
