"""Settings: read them from their sources, and decide which are in force.

Four layers; the first one with a value for a setting decides:

1.  `configure(...)`,
2.  environment variables, `MEMO_` and the name in capitals,
3.  `[tool.memo]` in the nearest `pyproject.toml`, from the working directory upwards,
4.  the defaults.

Layers 2 and 3 are read at the first call of a cached function, not at import, and then kept;
`reload` reads them again.  `configure` takes effect at once, also for functions that are already
decorated. `checks` validates each setting.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, Unpack, cast

from memo import runtime
from memo.errors import SettingError, nearest_hint
from memo.runtime import fork
from memo.runtime.named_tuple import NamedTuple
from memo.settings import durations, secret_keys
from memo.settings.checks import CHECKS, SETTING_NAMES, SettingSource
from memo.settings.secret_keys import Secret

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT: Final = "default"
CONFIGURE: Final = "configure()"
OTHER_PROCESS: Final = "configure() of another process"
_VARIABLE_PREFIX = "MEMO_"
_PYPROJECT_TABLE = "[tool.memo]"


class Settings(NamedTuple):
    """All settings at one moment.

    Attributes:
        redis_url: see `redis_urls`; None: no Redis.
        directory: absolute path of the disk tier.
        size_limit: maximum size of the disk tier in bytes.
        memory_limit: maximum size of the memory tier in bytes; 0: no memory tier.
        tiers: the chain from front to back, names of `checks.TIERS` or objects; None: the chain
            that follows from the other settings.
        read_strategy: `checks.ON_MISS_OR_ERROR` or `checks.ON_ERROR`.
        write_strategy: `checks.WRITE_THROUGH` or `checks.WRITE_AROUND`.
        self_healing: copy answers of a lower tier to the tiers above it.
        namespace: separates teams and projects.
        secrets: newest first; the first one seals, all of them open.
        coherence: `checks.STRICT` or `checks.TRACKING`.
        deadline: seconds that one Redis operation may take in all.
        redis_value_limit: bytes; larger payloads go to `payload_store`, or stay on disk.
        payload_store: a directory or bucket that several hosts can reach, or None.
        redis_options: arguments of redis-py's clients, beyond those in `redis_url`, or None.
        retention: seconds for which entries without expiry are kept after their code was replaced.
        on_redis_loss: `checks.RECOMPUTE` or `checks.TRUST_DISK`.
        compress: size in bytes from which results are compressed; None: never.
        enabled: if False, every call computes.
        mode: how every call uses the cache (`memo.mode`); None: the default.
        follow_threads: threads that a computation starts are part of it.
        live_file: a TOML file with the live configuration, or None.
        sources: setting -> source of its value.
    """

    redis_url: str | None
    directory: Path
    size_limit: int
    memory_limit: int
    tiers: tuple[Any, ...] | None
    read_strategy: str
    write_strategy: str
    self_healing: bool
    namespace: str
    secrets: tuple[Secret, ...]
    coherence: str
    deadline: float
    redis_value_limit: int
    payload_store: str | None
    redis_options: Mapping[str, Any] | None
    retention: float
    on_redis_loss: str
    compress: int | None
    enabled: bool
    mode: str | None
    follow_threads: bool
    live_file: Path | None
    sources: Mapping[str, str]


class Given(NamedTuple):
    """A checked value and its source."""

    value: Any
    source: str


Layer = dict[str, Given]


def _layer(values: Mapping[str, Any], where: Callable[[str], str], base: Path | None) -> Layer:
    """Return the checked values of one layer.

    `secret_file` becomes `secret`, which takes precedence.
    """
    layer = {}
    for name, value in values.items():
        if name not in CHECKS:
            raise _unknown(name, where(name))
        if name == "secret_file" and values.get("secret") is not None:
            continue
        source = where(name)
        final = "secret" if name == "secret_file" else name
        layer[final] = Given(CHECKS[name][0](value, SettingSource(name, source, base)), source)
    return layer


def _is_like_setting(name: str) -> bool:
    """True if a name is probably a misspelled name of a setting."""
    import difflib

    return bool(difflib.get_close_matches(name, SETTING_NAMES, 1, cutoff=0.7))


def _unknown(name: str, source: str) -> SettingError:
    near = nearest_hint(name, SETTING_NAMES) or f"; the settings are {', '.join(SETTING_NAMES)}."
    return SettingError(name, source, f"there is no such setting{near}")


def _environment() -> Layer:
    """Read `MEMO_*`; an empty variable counts as not set, except for `MEMO_SECRET`.

    A deployment template produces an empty secret if the real one is missing; with another secret
    in its place, the host would silently share nothing.

    A name that resembles a setting's is an error.  Any other is ignored, since other programs are
    called memo, too; so is `MEMO_TEST_*`.
    """
    values = {}
    for variable, text in os.environ.items():
        name = variable[len(_VARIABLE_PREFIX) :].lower()
        if not variable.startswith(_VARIABLE_PREFIX) or name.startswith("test_"):
            continue
        if not text.strip() and name != "secret":
            continue
        if name in CHECKS or _is_like_setting(name):
            values[name] = text
    return _layer(values, lambda name: _VARIABLE_PREFIX + name.upper(), None)


def _project() -> Layer:
    """Read `[tool.memo]` in the nearest `pyproject.toml`; relative paths start at its directory."""
    path = _find_pyproject()
    if path is None:
        return {}
    table = _table(path)
    if not isinstance(table, dict):
        raise SettingError("tool.memo", str(path), "must be a table: [tool.memo]")
    return _layer(table, lambda name: f"{_PYPROJECT_TABLE} in {path}", path.parent)


def _find_pyproject() -> Path | None:
    from pathlib import Path

    try:
        here = Path.cwd()
    except OSError:  # the working directory was removed
        return None
    candidates = (directory / "pyproject.toml" for directory in (here, *here.parents))
    return next((path for path in candidates if path.is_file()), None)


def _table(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(_PYPROJECT_TABLE, str(path), f"cannot be read: {error}.") from None
    if "memo" not in text:
        return {}
    import tomllib

    try:
        tool = tomllib.loads(text).get("tool", {})
    except tomllib.TOMLDecodeError as error:
        raise SettingError(_PYPROJECT_TABLE, str(path), f"is not valid TOML: {error}.") from None
    return tool.get("memo", {}) if isinstance(tool, dict) else {}


def _default_directory() -> Path:
    from pathlib import Path

    import platformdirs

    try:
        path = platformdirs.user_cache_path(secret_keys.APPLICATION, appauthor=False)
    except (KeyError, RuntimeError, OSError):
        path = Path("~")
    if path.is_absolute():
        return path
    import tempfile

    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"{secret_keys.APPLICATION}-{user}"


_lock = threading.RLock()
_overrides: Layer = {}
_read: Layer | None = None
_current: Settings | None = None
revision = 0
"""Changes whenever `current` may return something else.

A cache of something made from settings reads the revision first, then the settings.
"""


def current() -> Settings:
    """Return the settings in force.  The first call reads the environment and `pyproject.toml`.

    Raises:
        SettingError: a setting is wrong; the message names it, its source, and the fix.
    """
    settings = _current
    return _build() if settings is None else settings


def reload() -> None:
    """Read the environment and `pyproject.toml` again at the next use."""
    global _read
    with _lock:
        _read = None
        _changed()


def reset() -> None:
    """Like `reload`, and also undo every `configure`; for tests."""
    with _lock:
        _overrides.clear()
        reload()


def _changed() -> None:
    global _current, revision
    _current = None
    revision += 1


def _build() -> Settings:
    global _current, _read
    with _lock:
        if _current is not None:
            return _current
        if _read is None:
            _read = {**_project(), **_environment()}
        _current = _settings({**_read, **_overrides})
        return _current


def _settings(given: Layer) -> Settings:
    values = {name: default for name, (_, default) in CHECKS.items() if name != "secret_file"}
    values |= {name: one.value for name, one in given.items()}
    sources = {name: given[name].source if name in given else DEFAULT for name in values}
    if values["directory"] is None:
        values["directory"] = _default_directory()
    secrets = values.pop("secret")
    values["secrets"] = secret_keys.generated() if secrets is None else secrets
    sources["secrets"] = sources["secret"]
    if values["redis_url"] is None and "redis" in (values["tiers"] or ()):
        fix = 'names "redis", and there is no redis_url; set redis_url as well.'
        raise SettingError("tiers", sources["tiers"], fix)
    return Settings(**values, sources=MappingProxyType(sources))


def home() -> Path:
    """Return the `home_of` the settings in force."""
    return home_of(current())


def home_of(settings: Settings) -> Path:
    """Return the directory of a namespace; each has its own host state and disk budget."""
    return _home_in(settings.directory, settings.namespace)


@functools.lru_cache(maxsize=64)
def _home_in(directory: Path, namespace: str) -> Path:
    return directory / f"{namespace}.{runtime.FORMAT}"


_suspended: list[Settings] = []
"""Settings that come back when a `with` block ends."""


def settings_in_use() -> list[Settings]:
    """Return the settings in force, and those that come back when a `with` block ends.

    Raises:
        SettingError: a setting is wrong.
    """
    with _lock:
        return [current(), *_suspended]


class Restore:
    """Returned by `configure`: leaving its `with` block restores the previous values."""

    def __init__(
        self,
        before: Mapping[str, Given | None],
        hidden: Settings | None,
        after_block: Callable[[], None] | None,
    ) -> None:
        self._before = before
        self._hidden = hidden
        self._after_block = after_block

    def __enter__(self) -> Self:
        if self._hidden is not None:
            _suspended.append(self._hidden)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            for name, given in self._before.items():
                if given is None:
                    _overrides.pop(name, None)
                else:
                    _overrides[name] = given
            if self._hidden is not None and self._hidden in _suspended:
                _suspended.remove(self._hidden)
            _changed()
        if self._after_block is not None:
            self._after_block()

    def __repr__(self) -> str:
        return f"<configured {', '.join(self._before) or 'nothing'}>"


@contextmanager
def restoring() -> Iterator[None]:
    """Undo everything that is configured inside a block, by nested calls too."""
    with _lock:
        before = dict(_overrides)
    try:
        yield
    finally:
        with _lock:
            _overrides.clear()
            _overrides.update(before)
            _changed()


class Changes(TypedDict, total=False):
    """Keyword arguments of `configure`, as users write them."""

    redis_url: str | None
    directory: str | os.PathLike[str] | None
    size_limit: int | str
    memory_limit: int | str
    tiers: str | Sequence[Any] | None
    read_strategy: str
    write_strategy: str
    self_healing: bool | str
    namespace: str
    secret: str | bytes | os.PathLike[str] | Sequence[str | bytes] | None
    secret_file: str | os.PathLike[str] | None
    coherence: str
    deadline: float | str | durations.timedelta
    redis_value_limit: int | str
    payload_store: str | os.PathLike[str] | None
    redis_options: Mapping[str, Any] | None
    retention: float | str | durations.timedelta
    on_redis_loss: str
    compress: bool | int | str
    enabled: bool | str
    mode: str | None
    follow_threads: bool | str
    live_file: str | os.PathLike[str] | None


def configure(
    after_block: Callable[[], None] | None = None, /, **settings: Unpack[Changes]
) -> Restore:
    """Change settings of this process; `memo.configure` is the public form.

    Args:
        after_block: called at the end of the `with` block, when the previous values are back.
        settings: None means the default for `redis_url`, `directory`, `tiers`, `secret` and
            `live_file`.

    Raises:
        SettingError: an unknown name or a wrong value; nothing has been changed then.
    """
    layer = _layer(cast("dict[str, Any]", settings), lambda name: CONFIGURE, None)
    with _lock:
        before = {name: _overrides.get(name) for name in layer}
        hidden = _current
        _overrides.update(layer)
        _changed()
    return Restore(before, hidden, after_block)


# --- settings that travel with a function to the workers of this process --------------------------


def settings_for_workers() -> dict[str, Any]:
    """Return what a worker may know of `configure`'s settings: no secret, password or object."""
    with _lock:
        given = {name: one.value for name, one in _overrides.items()}
    return {name: value for name, value in given.items() if _may_travel(name, value)}


def _may_travel(name: str, value: Any) -> bool:
    if name == "secret":
        return False
    if name in ("redis_url", "payload_store"):
        return value is None or not _password(value)
    if name == "redis_options":
        return value is None or not {"password", "ssl_password", "credential_provider"} & {*value}
    return name != "tiers" or all(isinstance(tier, str) for tier in value or ())


def _password(url: str) -> bool:
    from urllib.parse import parse_qs, urlsplit

    parts = urlsplit(url)
    return parts.password is not None or "password" in parse_qs(parts.query)


def adopt(settings: Mapping[str, Any], sender: str) -> None:
    """Adopt the `settings_for_workers` of the process `sender`, unless `configure` set them here.

    It replaces what other processes sent before.  Settings sent by this process itself are ignored,
    and so are those of a function inside a stored result, which have no sender (`""`).
    """
    if sender in ("", PROCESS):
        return
    with _lock:
        mine = {name: one for name, one in _overrides.items() if _keeps(name, one)}
        theirs = {name: Given(value, OTHER_PROCESS) for name, value in settings.items()}
        wanted = theirs | mine
        if wanted != _overrides:
            _overrides.clear()
            _overrides.update(wanted)
            _changed()


def _keeps(name: str, given: Given) -> bool:
    return given.source != OTHER_PROCESS or name == "secret"


PROCESS = os.urandom(8).hex()
"""The id of this process, for the workers that it sends settings to."""


def _after_fork() -> None:
    """Treat the parent's configuration as carried: what it sends later replaces it."""
    global _lock, PROCESS
    _lock = threading.RLock()
    PROCESS = os.urandom(8).hex()
    for name, given in list(_overrides.items()):
        _overrides[name] = Given(given.value, OTHER_PROCESS)


fork.in_child(_after_fork)
