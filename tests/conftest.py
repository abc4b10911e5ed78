"""Fixtures of every test: a private home, a real Redis, and nothing left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import limits
import pytest
from hypothesis import HealthCheck, settings
from redis_server import RedisServer
from sheets import sheet  # noqa: F401 - a fixture of every test
from time_ahead import ahead  # noqa: F401 - the same
from waiting import wait_for
from ways import place, site, way, where  # noqa: F401 - fixtures of every test

settings.register_profile("memo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("memo")  # a busy machine is no fault of a test

GRACE = float(os.environ.get("MEMO_TEST_GRACE", "30"))
"""Seconds that threads and descriptors may take to go away after a test; less in a pytest that is
started to fail, whose report of the failure holds them."""
_MEMO_ENVIRONMENT = "MEMO_"
_POOLED = ("memo-background", "memo-offload", "memo-portal")
"""Threads that stay by design, idle: those of the pools (for 10 s) and of the portals."""
_SHARED_FILES = (
    *("/dev/null", "/dev/urandom", "/dev/random", "/dev/pts/", "/proc/"),
    *("anon_inode:[eventpoll]", "anon_inode:[eventfd]"),
)
"""Files that a library opens once per process, at its first use; the last two are those of
polars' runtime.  An event loop that was left behind still shows by its pair of sockets."""
SECRET = "0123456789abcdef" * 4
"""The secret of the tests: 64 characters."""


_ON_REDIS = {"redis_server", "redis_private", "cluster", "sentinels"}
"""Fixtures that start the redis-server at hand."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Redis."""
    for item in items:
        if not _ON_REDIS.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.redis)


def pytest_report_header() -> str:
    """The redis-server that the tests run on."""
    import redis_server

    try:
        path = redis_server.binary()
    except pytest.fail.Exception as failure:
        return f"redis-server: none ({failure.msg})"
    return f"redis-server: {'.'.join(map(str, redis_server.version(path)))} at {path}"


HISTORIES: list[dict[str, int]] = []
"""The content of each history of `test_history`; with several workers, of all of them."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect what the histories held; where workers run the tests, the controller hears it too."""
    if report.when == "call":
        HISTORIES.extend(value for name, value in report.user_properties if name == "history")


def _calls_wanted() -> int:
    """The number of calls that the histories of this run must make: `MEMO_TEST_CALLS`."""
    return int(os.environ.get("MEMO_TEST_CALLS", "0").replace("_", ""))


def _calls_made() -> int:
    return sum(past["calls"] for past in HISTORIES)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run with fewer calls than `MEMO_TEST_CALLS` has failed, whatever its tests say."""
    controls = not hasattr(session.config, "workerinput")
    if controls and _calls_made() < _calls_wanted() and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The number of calls that the histories made in all, and of wrong answers among them."""
    missing = _calls_wanted() - _calls_made()
    if not HISTORIES and missing <= 0:
        return
    totals = (
        f"{sum(past[what] for past in HISTORIES):,} {what}"
        for what in ("calls", "runs", "invalidations", "violations")
    )
    line = f"history: {len(HISTORIES)} configurations, {', '.join(totals)}"
    terminalreporter.write_line(line)
    if missing > 0:
        terminalreporter.write_line(f"history: {missing:,} calls fewer than wanted", red=True)


@pytest.fixture(scope="session")
def _redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.close()


@pytest.fixture
def redis_server(_redis_session: RedisServer) -> Iterator[RedisServer]:
    """A real redis-server, empty; the test may stop, kill, freeze and restart it."""
    _redis_session.reset()
    yield _redis_session
    _redis_session.thaw()
    _redis_session._close_clients()


@pytest.fixture
def redis_private(tmp_path: Path) -> Iterator[RedisServer]:
    """A second redis-server, for tests that need two, or a fresh one."""
    server = RedisServer(tmp_path / "redis-private")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private home for the cache: no test sees the user's settings, cache or secret.

    Yields the cache directory.  When the test is over, memo is closed and set back, and the test
    fails if it left threads or file descriptors behind.
    """
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for name in list(os.environ):
        if name.startswith(_MEMO_ENVIRONMENT) and name != "MEMO_TEST_REDIS":
            monkeypatch.delenv(name)
    for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(home / kind.lower()))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    monkeypatch.setenv("MEMO_DIRECTORY", str(home / "memo"))
    monkeypatch.setenv("MEMO_SECRET", SECRET)
    _forget()
    before = _descriptors()
    running = set(threading.enumerate())
    yield home / "memo"
    _settle()
    _forget()
    _within_grace("threads", lambda: _left_running(running))
    _within_grace("descriptors", lambda: _left_open(before))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The file that records each run of a job, in any process."""
    path = tmp_path / "runs"
    path.touch()
    return path


@pytest.fixture
def set_limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets limits of memo by their names in `limits.LIMITS`, until the test is over."""
    return partial(limits.change, monkeypatch.setattr)


def _settle() -> None:
    """Let background work end, as a program would that calls `drain`."""
    blocking = sys.modules.get("memo.runtime.blocking")
    if blocking is None:
        return
    for name in ("BACKGROUND", "OWN_THREADS", "OFFLOAD"):
        assert getattr(blocking, name).drain(GRACE), f"memo's {name} still works after the test"


def _forget() -> None:
    """Close what memo has open and forget its settings."""
    testing = sys.modules.get("memo.testing")
    if testing is None:
        from memo import testing
    testing.reset()


def _within_grace(what: str, left: Callable[[], list[str]]) -> None:
    """Fail when `left()` still answers with something after `GRACE` seconds."""

    def gone() -> bool:
        if left():
            gc.collect()
        return not left()

    if not wait_for(gone, GRACE):
        pytest.fail(f"the test left {what} behind: {', '.join(left())}", pytrace=False)


def _left_running(before: set[threading.Thread]) -> list[str]:
    names = (thread.name for thread in threading.enumerate() if thread not in before)
    return [name for name in names if name.startswith("memo-") and not name.startswith(_POOLED)]


def _descriptors() -> dict[str, str]:
    """Descriptor -> what it is, where the system can tell (Linux); else nothing."""
    found: dict[str, str] = {}
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for name in names:
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    return found


def _left_open(before: dict[str, str]) -> list[str]:
    portal = _portal_descriptors()
    return [
        target
        for name, target in _descriptors().items()
        if before.get(name) != target
        and name not in portal
        and not target.startswith(_SHARED_FILES)
    ]


def _portal_descriptors() -> set[str]:
    """Those of the loops in memo's portal threads, which live as long as the process."""
    loops = getattr(sys.modules.get("memo.runtime.blocking"), "_loops", {})
    parts = ("_selector", "_ssock", "_csock")
    return {str(getattr(loop, part).fileno()) for loop in loops.values() for part in parts}
