"""Checks: validate each setting, and convert what the user wrote to its value.

One function per kind of value.  Each takes the value and its `SettingSource`, and returns the value
in the form of `Settings`, or raises a `SettingError` that names the setting, its source, and the
fix.  A value of `redis_url` or `secret` is never part of a message.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

from memo.errors import OptionError, SecretError, SettingError, shown, type_named
from memo.runtime.named_tuple import NamedTuple
from memo.settings import options, secret_keys
from memo.settings.durations import seconds
from memo.settings.modes import MODE_KINDS
from memo.settings.secret_keys import Secret

if TYPE_CHECKING:
    from pathlib import Path

GIB: Final = 1 << 30
MIB: Final = 1 << 20
DEFAULT_RETENTION: Final = 30 * 86_400.0
"""Seconds; also how long a shared tier keeps its bookkeeping."""
DEFAULT_VALUE_LIMIT_BYTES: Final = 64 * MIB
"""Largest record or payload that is sent to Redis, unless a setting says otherwise."""
ON_MISS_OR_ERROR: Final = "on_miss_or_error"
ON_ERROR: Final = "on_error"
WRITE_THROUGH: Final = "write_through"
WRITE_AROUND: Final = "write_around"
STRICT: Final = "strict"
TRACKING: Final = "tracking"
RECOMPUTE: Final = "recompute"
TRUST_DISK: Final = "trust_disk"
TIERS: Final = ("memory", "redis", "disk")
"""Tiers that are selected by name; any other tier is an object."""


class Url(str):
    """A URL whose repr hides user, password and query; `str(url)` is complete."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(redacted(self))


def redacted(url: str) -> str:
    """Return a URL for display: `redis://***@host:6379/0`, without user, password and query."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    hidden = "***@" if "@" in parts.netloc else ""
    query = "?***" if parts.query else ""
    return f"{parts.scheme}://{hidden}{host}{parts.path}{query}"


class SettingSource(NamedTuple):
    """The source of a value, for its check and for the error about it."""

    setting: str
    source: str
    base: Path | None = None

    def wrong(self, fix: str) -> SettingError:
        return SettingError(self.setting, self.source, fix)


Check = Callable[[Any, SettingSource], Any]


def _redis_url(value: Any, place: SettingSource) -> Url | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise place.wrong('must be text such as "redis://host:6379/0".')
    from memo.settings import redis_urls  # imports urllib, which only a Redis needs

    try:
        redis_urls.parse(value)
    except ValueError as error:
        raise place.wrong(str(error)) from None
    return Url(value)


class Options(dict[str, Any]):
    """Arguments of redis-py's clients, whose values are never shown."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: ***' for name in self)}}}"


def _redis_options(value: Any, place: SettingSource) -> Options | None:
    if value is None or value == "":
        return None
    from memo.settings import redis_urls

    try:
        return Options(redis_urls.check_options(value))
    except ValueError as error:
        raise place.wrong(str(error)) from None


def _path(value: Any, place: SettingSource) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise place.wrong(f"{shown(value)} is not a path; write a directory or file name.")
    from pathlib import Path

    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise place.wrong("there is no home directory for ~; write the whole path.") from None
    return Path(os.path.abspath((place.base or Path()) / path))


def _path_or_none(value: Any, place: SettingSource) -> Path | None:
    return None if value is None or value == "" else _path(value, place)


def _payload_store(value: Any, place: SettingSource) -> Url | str | None:
    if value is None or value == "":
        return None
    if find_spec("fsspec") is None:
        raise place.wrong("needs fsspec: pip install 'jupyter-memo[remote]'.")
    if not isinstance(value, str) or "://" not in value:
        return str(_path(value, place))
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(value.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise place.wrong(f"{redacted(value)!r} cannot be used: {error}.") from None
    return Url(value)


def _size(value: Any, place: SettingSource) -> int:
    fix = 'write bytes as a number, or for instance "10GiB" or "256 MiB".'
    number = options.size(value)
    if number is None:
        raise place.wrong(f"{shown(value)} is not a size; {fix}")
    if number < 0:
        raise place.wrong(f"{value} is less than 0; {fix}")
    return number


def _disk_size(value: Any, place: SettingSource) -> int:
    size = _size(value, place)
    if size < MIB:
        raise place.wrong(f'{size} bytes are too few; write 1 MiB or more, for instance "10GiB".')
    return size


def _redis_size(value: Any, place: SettingSource) -> int:
    size = _size(value, place)
    if size > 512 * MIB:
        raise place.wrong("Redis takes at most 512 MiB in one value.")
    return size


def _duration(example: str) -> Check:
    def check(value: Any, place: SettingSource) -> float:
        fix = f'must be seconds above 0, as a number or as text such as "{example}".'
        with suppress(ValueError):  # text with units is read by `seconds`
            value = float(value) if isinstance(value, str) else value
        try:
            number = seconds(place.setting, value)
        except OptionError:
            raise place.wrong(f"{shown(value)}: {fix}") from None
        if number is None:
            raise place.wrong(fix)
        return number

    return check


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


def _boolean(value: Any, place: SettingSource) -> bool:
    found = (
        _BOOLEANS.get(str(value).strip().lower()) if isinstance(value, (bool, int, str)) else None
    )
    if found is None:
        raise place.wrong(f"{shown(value)} is neither true nor false; write true or false.")
    return found


def _compress(value: Any, place: SettingSource) -> int | None:
    truth = _BOOLEANS.get(value.strip().lower()) if isinstance(value, str) else None
    try:
        return options.compress(place.setting, value if truth is None else truth)
    except OptionError:
        fix = 'write true, false, or the size from which results are compressed, like "1MiB".'
        raise place.wrong(f"{shown(value)} is none of these; {fix}") from None


def _mode(value: Any, place: SettingSource) -> str | None:
    return None if value is None or value == "" else _one_of(*MODE_KINDS)(value, place)


def _one_of(*choices: str) -> Check:
    def check(value: Any, place: SettingSource) -> str:
        if not isinstance(value, str) or value not in choices:
            words = " or ".join(f'"{choice}"' for choice in choices)
            raise place.wrong(f"{shown(value)} is unknown; write {words}.")
        return value

    return check


_NAMESPACE_PATTERN = r"\w[\w.-]{0,99}"


def _namespace(value: Any, place: SettingSource) -> str:
    if not isinstance(value, str) or not re.fullmatch(_NAMESPACE_PATTERN, value):
        fix = "write 1 to 100 letters, digits, dots, hyphens or underscores."
        raise place.wrong(f"{shown(value)} cannot be a namespace; {fix}")
    return value


def _tiers(value: Any, place: SettingSource) -> tuple[Any, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, (list, tuple)):
        value = (value,)
    if not value:
        raise place.wrong('is empty; write for instance "memory,redis,disk".')
    for tier in value:
        _check_tier(tier, place)
    for name in TIERS:
        if sum(isinstance(tier, str) and tier == name for tier in value) > 1:
            raise place.wrong(f'names "{name}" twice; name each tier once.')
    return tuple(value)


def _check_tier(tier: Any, place: SettingSource) -> None:
    if isinstance(tier, str):
        if tier not in TIERS:
            names = ", ".join(f'"{name}"' for name in TIERS)
            raise place.wrong(f"{shown(tier)} is not a tier; the names are {names}.")
        return
    if isinstance(tier, type):
        raise place.wrong(f"{tier.__name__} is a class; give an object: {tier.__name__}().")
    kinds = (("lookup", "store", "drop"), ("get", "set", "delete", "clear"))
    if not any(all(callable(getattr(tier, m, None)) for m in kind) for kind in kinds):
        fix = "needs the async methods get, set, delete and clear to be a tier."
        raise place.wrong(f"{type_named(type(tier))} {fix}")


def _secret(value: Any, place: SettingSource) -> tuple[Secret, ...] | None:
    if value is None:
        return None
    if place.base is not None:
        secret_keys.read_private(place.base / "pyproject.toml", place.source)
    if isinstance(value, os.PathLike):
        return secret_keys.from_file(_path(value, place), place.source)
    return secret_keys.from_value(value, place.source)


def _secret_file(value: Any, place: SettingSource) -> tuple[Secret, ...] | None:
    path = _path_or_none(value, place)
    try:
        return None if path is None else secret_keys.from_file(path, place.source, mounted=True)
    except SecretError as error:
        raise SecretError(place.setting, error.source, error.fix) from None


CHECKS: Final[dict[str, tuple[Check, Any]]] = {
    "redis_url": (_redis_url, None),
    "directory": (_path_or_none, None),
    "size_limit": (_disk_size, 10 * GIB),
    "memory_limit": (_size, 256 * MIB),
    "tiers": (_tiers, None),
    "read_strategy": (_one_of(ON_MISS_OR_ERROR, ON_ERROR), ON_MISS_OR_ERROR),
    "write_strategy": (_one_of(WRITE_THROUGH, WRITE_AROUND), WRITE_THROUGH),
    "self_healing": (_boolean, True),
    "namespace": (_namespace, "memo"),
    "secret": (_secret, None),
    "secret_file": (_secret_file, None),
    "coherence": (_one_of(STRICT, TRACKING), STRICT),
    "deadline": (_duration("250ms"), 0.25),
    "redis_value_limit": (_redis_size, DEFAULT_VALUE_LIMIT_BYTES),
    "payload_store": (_payload_store, None),
    "redis_options": (_redis_options, None),
    "retention": (_duration("30d"), DEFAULT_RETENTION),
    "on_redis_loss": (_one_of(RECOMPUTE, TRUST_DISK), RECOMPUTE),
    "compress": (_compress, None),
    "enabled": (_boolean, True),
    "mode": (_mode, None),
    "follow_threads": (_boolean, True),
    "live_file": (_path_or_none, None),
}
"""Setting -> its check and its default; SPEC, section 6.  The deadline is five times a slow
round trip within one data centre; 64 MiB is about what a 1 Gbit/s line carries in half a second."""
SETTING_NAMES: Final = tuple(CHECKS)
"""Every name that `configure` takes."""
