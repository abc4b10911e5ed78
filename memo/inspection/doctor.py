"""`memo.health()` and `memo doctor`: check a set-up, and name the fix for each finding.

Checks change nothing.  A check that fails to run is reported as a finding.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memo.decorators.assembly import default_chain, host_of, live
from memo.errors import MemoError, SettingError, public
from memo.metrics import formatting
from memo.metrics.formatting import Cell, Table, number, quantity, size
from memo.runtime import VERSION, ownership
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SYSTEM_CLOCK
from memo.runtime.named_tuple import NamedTuple
from memo.settings import configuration, secret_keys
from memo.settings.checks import MIB, redacted
from memo.settings.configuration import DEFAULT, Settings, home_of
from memo.settings.modes import OFF, ONLY, REFRESH
from memo.stores.authorities import is_for_any, receivers
from memo.stores.protocols import MEMORY, REDIS, display_name

if TYPE_CHECKING:
    import pandas as pd

GOOD = "ok"
NOTE = "note"
"""Nothing is wrong; worth knowing."""
WARN = "warn"
"""It works, but not as well as it could."""
FAIL = "fail"
"""It does not work, or must not be trusted."""
PACKAGES = ("redis", "diskcache", "cloudpickle", "pandas", "ipython")
OLDEST_REDIS = (6, 2)
"""The oldest Redis that memo is tested with."""
LEFTOVER_SECONDS = 3600.0
"""Seconds after which a temporary file is a leftover."""
MAX_NAMED_FILES = 3
"""Maximum number of files that a finding names."""


_OWN_DIRECTORY = "Set MEMO_DIRECTORY to a directory of your own."
_MODES = {
    OFF: "every call computes, and nothing is stored",
    REFRESH: "every call computes, and stores its result",
    ONLY: "no call computes",
}
TOPIC_WIDTH = 18
"""Characters of the longest topic."""
_CAPABILITY = "redis "


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        level: `GOOD`, `NOTE`, `WARN` or `FAIL`.
        topic: what was checked.
        said: what was found.
        fix: what to do; `""` if nothing.
    """

    level: str
    topic: str
    said: str
    fix: str = ""


Findings = Iterator[Finding]


class Health(tuple[Finding, ...]):
    """The findings, in the order of the checks; displayed as a table."""

    __slots__ = ()

    @property
    def ok(self) -> bool:
        """True if everything works, and may be trusted."""
        return all(finding.level != FAIL for finding in self)

    @property
    def capabilities(self) -> dict[str, bool]:
        """The abilities that sharing over Redis needs, and whether each works; empty without Redis.

        The keys are `"write"`, `"read"`, `"script"`, `"lease"` and `"invalidation"`.
        """
        tried = (finding for finding in self if finding.topic.startswith(_CAPABILITY))
        return {one.topic.removeprefix(_CAPABILITY): one.level == GOOD for one in tried}

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame, one row for each finding.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        return formatting.frame_of(self, Finding._fields)

    def __repr__(self) -> str:
        return "\n".join(_lines(finding) for finding in self)

    def _repr_html_(self) -> str:
        rows = ([Cell(word) for word in finding] for finding in self)
        table = Table(("", "checked", "found", "what to do"), list(rows), texts=4)
        return formatting.with_style(formatting.table_html(table))


def _lines(finding: Finding) -> str:
    line = f"{finding.level:<5} {finding.topic:<{TOPIC_WIDTH}} {finding.said}"
    return f"{line}\n{'':<{TOPIC_WIDTH + 6}} {finding.fix}" if finding.fix else line


@public
def health() -> Health:
    """Check this set-up, as `memo doctor` does: settings, directory, Redis, and its abilities.

    In Redis it tries a write, a read, a script, a lease and an invalidation, under a name of its
    own that expires within a minute.

    ::

        memo.health().ok
        memo.health().capabilities["lease"]
    """
    return Health(examine())


def examine() -> list[Finding]:
    """Run all checks; if the settings cannot be read, that is the only finding."""
    found = _run_check("python", _python)
    try:
        settings = configuration.current()
    except SettingError as error:
        fix = "Correct this setting, then run `memo doctor` again."
        return [*found, Finding(FAIL, "settings", str(error), fix)]
    checks: list[tuple[str, Callable[[], Findings]]] = [
        ("settings", lambda: _settings(settings)),
        ("secret", lambda: _secret(settings)),
        ("directory", lambda: check_directory(settings.directory)),
        ("disk", lambda: _disk(settings)),
        ("leftovers", lambda: _leftovers(settings)),
        ("clock", _clock),
        ("tiers", lambda: _tiers(settings)),
        ("journal", lambda: _journal(settings)),
    ]
    return found + [one for topic, check in checks for one in _run_check(topic, check)]


def _run_check(topic: str, check: Callable[[], Findings]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check())
    except (OSError, MemoError) as error:
        found.append(Finding(WARN, topic, f"could not be checked: {error}"))
    return found


def _python() -> Findings:
    parts = [f"Python {sys.version.split()[0]}", f"memo {VERSION}"]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            parts.append(f"{package} not installed")
    yield Finding(GOOD, "python", ", ".join(parts))


def _settings(settings: Settings) -> Findings:
    given = {name: source for name, source in settings.sources.items() if source != DEFAULT}
    given.pop("secrets", None)
    text = ", ".join(f"{name} from {source}" for name, source in given.items())
    yield Finding(GOOD, "settings", text or "all defaults")
    if not settings.enabled:
        fix = "Set enabled to true to cache again."
        yield Finding(WARN, "settings", f"off (from {settings.sources['enabled']})", fix)
    if settings.mode is not None:
        text = f"mode is {settings.mode} (from {settings.sources['mode']}): {_MODES[settings.mode]}"
        yield Finding(WARN, "settings", text, "Unset mode to cache as usual again.")
    if fault := live.file_fault():
        text = f"live_file {settings.live_file} changes nothing: {fault}"
        yield Finding(WARN, "settings", text, f"Correct it (from {settings.sources['live_file']}).")


def _secret(settings: Settings) -> Findings:
    source = settings.sources["secrets"]
    if not all(map(secret_keys.is_kept, settings.secrets)):
        fix = "Set MEMO_SECRET_FILE to an owner-only file, so that entries outlive the process."
        yield Finding(FAIL, "secret", "it cannot be saved on this machine", fix)
        return
    where = str(secret_keys.default_file()) if source == DEFAULT else source
    ids = ", ".join(one.id.hex()[:8] for one in settings.secrets)
    yield Finding(GOOD, "secret", f"{where}; id {ids}")
    if settings.redis_url and source == DEFAULT:
        fix = "Give all hosts that share this Redis the same MEMO_SECRET or MEMO_SECRET_FILE."
        yield Finding(
            NOTE, "secret", "generated here, so other hosts cannot read these entries", fix
        )


def check_directory(directory: Path) -> Findings:
    """Check that the cache directory exists or can be created, and belongs to this user alone."""
    try:
        place = _existing(directory)
    except OSError as error:
        text = f"{directory} cannot be reached: {error.strerror}"
        yield Finding(FAIL, "directory", text, _OWN_DIRECTORY)
        return
    if place == directory and not place.is_dir():
        yield Finding(FAIL, "directory", f"{directory} is not a directory", _OWN_DIRECTORY)
        return
    if place != directory:
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            yield Finding(GOOD, "directory", f"{directory} will be created at the first use")
        else:
            yield Finding(FAIL, "directory", f"{directory} cannot be created", _OWN_DIRECTORY)
        return
    yield from _owner(directory)
    yield from _modes(directory)
    kind = ownership.file_system(directory)
    if ownership.is_network(kind):
        fix = "Set MEMO_DIRECTORY to a local disk; share results through Redis."
        text = f"{directory} is on a network file system ({kind}), so no payload is mapped"
        yield Finding(WARN, "directory", text, fix)
    elif ownership.exposed(directory):
        fix = (
            "Set MEMO_DIRECTORY to a directory all of whose parents only you or root can write to."
        )
        text = f"others can write to a parent of {directory}, so no payload is mapped"
        yield Finding(WARN, "directory", text, fix)


def _existing(directory: Path) -> Path:
    """Return a directory, or its nearest parent that exists."""
    return next(place for place in (directory, *directory.parents) if place.exists())


def _owner(directory: Path) -> Findings:
    if directory.stat().st_uid != os.geteuid():
        text = f"{directory} belongs to another user"
        yield Finding(FAIL, "directory", text, _OWN_DIRECTORY)
    elif not os.access(directory, os.W_OK | os.X_OK):
        fix = f"Run: chmod 700 {directory}"
        yield Finding(FAIL, "directory", f"{directory} cannot be written", fix)
    else:
        yield Finding(GOOD, "directory", str(directory))


def _modes(directory: Path) -> Findings:
    """Check that all files in the directory belong to the user alone: 0700, 0600, no symlinks."""
    open_, foreign = [], []
    for path, facts in _all_files(directory):
        if stat.S_ISLNK(facts.st_mode) or facts.st_uid != os.geteuid():
            foreign.append(path)
        elif facts.st_mode & 0o077:
            open_.append(path)
    if open_:
        fix = f"Run: chmod -R go= {directory}"
        yield Finding(WARN, "directory", f"others can reach {_file_names(open_)}", fix)
    if foreign:
        fix = "Find out how they got there, and remove them."
        text = f"symlinks, or files of another user: {_file_names(foreign)}"
        yield Finding(FAIL, "directory", text, fix)


def _all_files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for root, folders, names in os.walk(directory):
        for name in ("", *folders, *names) if root == str(directory) else (*folders, *names):
            path = Path(root, name)
            try:
                yield path, path.lstat()
            except FileNotFoundError:
                continue  # evicted meanwhile


def _file_names(paths: list[Path]) -> str:
    more = (
        f" and {number(len(paths) - MAX_NAMED_FILES)} more" if len(paths) > MAX_NAMED_FILES else ""
    )
    return ", ".join(str(path) for path in paths[:MAX_NAMED_FILES]) + more


def _disk(settings: Settings) -> Findings:
    directory = home_of(settings)
    place = _existing(directory)
    sizes = {facts.st_ino: facts.st_blocks * 512 for _, facts in _all_files(directory)}
    used = sum(sizes.values())
    free = shutil.disk_usage(place).free
    limit = settings.size_limit
    text = f"{size(used)} used of {size(limit)} allowed, {size(free)} free"
    if used > limit * 1.1:
        yield Finding(WARN, "disk", text, "Run `memo clear`, or raise size_limit.")
    elif free < limit - used:
        most = used + free // 2
        fix = f"Free some space, or set size_limit to at most {size(most)}."
        fix = fix if most >= MIB else "Free some space."
        yield Finding(WARN, "disk", f"{text}: the disk is full before the limit is reached", fix)
    else:
        yield Finding(GOOD, "disk", text)


def _leftovers(settings: Settings) -> Findings:
    horizon = time.time() - LEFTOVER_SECONDS
    places = [settings.directory]
    if (file := secret_keys.default_file()) is not None:
        places.append(file.parent)
    old = [
        path
        for place in places
        for path, facts in _all_files(place)
        if _is_leftover(path.name) and facts.st_mtime < horizon
    ]
    if old:
        names = " ".join(str(path) for path in old[:MAX_NAMED_FILES])
        fix = f"They are leftovers; run: rm {names}"
        yield Finding(WARN, "leftovers", _file_names(old), fix)
    else:
        yield Finding(GOOD, "leftovers", "none")


def _is_leftover(name: str) -> bool:
    return name.startswith((".secret.", ".tmp")) or name.endswith((".tmp", ".damaged"))


def _clock() -> Findings:
    if SYSTEM_CLOCK.boot_id == bytes(16):
        fix = "Synchronize the system clock (NTP): ages are measured with it."
        yield Finding(NOTE, "clock", "this system has no boot id", fix)
    else:
        yield Finding(GOOD, "clock", "ages are measured with a clock that cannot step")


def _tiers(settings: Settings) -> Findings:
    chain = default_chain()
    for name, facts in drive(chain.health(BLOCKING)).items():
        if name in ("host", MEMORY):
            continue
        if name == "redis":
            yield from _redis(settings, facts)
            if facts.get("up"):
                (tier,) = (tier for tier in chain.tiers if tier.name == name)
                yield from _capabilities(tier)
        elif facts.get("up"):
            yield Finding(GOOD, name, _facts(facts) or "up")
        else:
            fix = "See `directory` and `disk` above." if name == "disk" else ""
            yield Finding(FAIL, name, str(facts.get("error", "down")), fix)
    if not settings.redis_url:
        fix = "Set MEMO_REDIS_URL to share entries between hosts."
        yield Finding(NOTE, "redis", "not configured: entries are shared on this host only", fix)


def _redis(settings: Settings, facts: dict[str, Any]) -> Findings:
    url = redacted(settings.redis_url or "")
    if not facts.get("up"):
        fix = facts.get("fix") or "Start it, or correct redis_url."
        fix += f" (redis_url is from {settings.sources['redis_url']})"
        text = f"{url} cannot be used: {facts.get('error', 'down')}; memo goes on without it"
        yield Finding(FAIL, "redis", text, fix)
        return
    yield Finding(GOOD, "redis", f"{url}: {_facts(facts) or 'up'}")
    version = str(facts.get("version", ""))
    if version and _version_numbers(version) < OLDEST_REDIS:
        fix = "Use Redis 6.2 or newer."
        yield Finding(FAIL, "redis", f"version {version} is too old", fix)
    if str(facts.get("tracking", "")).startswith("strict"):
        fix = "Allow +hello +echo +client|tracking in its ACL."
        text = f"coherence is {facts['tracking']}: each hit in memory asks Redis"
        yield Finding(WARN, "redis", text, fix)
    if facts.get("limit") and facts.get("policy") == "noeviction":
        fix = "Set its maxmemory-policy to allkeys-lfu or volatile-lru."
        yield Finding(WARN, "redis", "refuses to store when its memory is full", fix)


def _capabilities(tier: Any) -> Findings:
    """Try each command that sharing needs, under a name of its own."""
    for capability, error in drive(tier.capabilities(BLOCKING)).items():
        topic = f"{_CAPABILITY}{capability}"
        if not error:
            yield Finding(GOOD, topic, "works")
        else:
            yield Finding(FAIL, topic, error, "See docs/deployments.md.")


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _facts(facts: dict[str, Any]) -> str:
    """Describe the facts that a tier reports, except its location."""
    hidden = ("up", "where", "error", "directory", "fix")
    sizes = ("bytes", "budget", "used", "limit")
    parts = (
        f"{name} {size(fact) if name in sizes else fact}"
        for name, fact in facts.items()
        if name not in hidden
    )
    return ", ".join(parts)


def _journal(settings: Settings) -> Findings:
    rows = host_of(settings).journal.due_rows() if settings.directory.exists() else []
    if not settings.redis_url:  # invalidations for the next Redis to be configured may wait forever
        rows = [row for row in rows if not is_for_any(row[2])]
    if not rows:
        yield Finding(GOOD, "journal", "every invalidation reached its tier")
        return
    to = receivers(row[2] for row in rows)
    fix = f"Nothing: they are replayed before the next read from {to}."
    if not settings.redis_url and display_name(REDIS) in to:
        fix = f"Set redis_url again: they are replayed before the next read from {to}."
    text = f"{quantity(len(rows), 'invalidation')} not yet in {to}"
    yield Finding(WARN, "journal", text, fix)
