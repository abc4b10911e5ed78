"""Dial: a socket that is connected to a host, within a deadline that bounds its name's look-up too.

`getaddrinfo` cannot be interrupted, so it runs in a thread of its own, which whoever waits for it
may leave alone.  At most one such thread runs per host.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import Future
from typing import Any

Address = tuple[Any, ...]


class Resolver:
    """Host names to addresses, in threads that a caller need not wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, int], Future[list[Address]]] = {}

    def __call__(self, host: str, port: int) -> Future[list[Address]]:
        """The addresses of a host; whoever asks for the same while it is looked up shares it."""
        place = (host, port)
        with self._lock:
            if place in self._pending:
                return self._pending[place]
            future: Future[list[Address]] = Future()
            self._pending[place] = future
        threading.Thread(
            target=self._resolve, args=(place, future), name="memo-resolve", daemon=True
        ).start()
        return future

    def _resolve(self, place: tuple[str, int], future: Future[list[Address]]) -> None:
        try:
            future.set_result(socket.getaddrinfo(*place, type=socket.SOCK_STREAM))
        except UnicodeError:  # a label that is empty or too long
            future.set_exception(socket.gaierror("not a host name"))
        except BaseException as error:
            future.set_exception(error)
        finally:
            with self._lock:
                self._pending.pop(place, None)


_resolver = Resolver()


def _numeric(host: str, port: int) -> list[Address] | None:
    """The address that a host is, when it is no name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)
    except OSError:
        return None
    return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]


def left(ends: float) -> float:
    """Seconds until `ends` on the monotonic clock.

    Raises:
        TimeoutError: none.
    """
    seconds = ends - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("deadline")
    return seconds


def dial(host: str, port: int, ends: float) -> socket.socket:
    """A connected socket to the first address of a host that takes it."""
    addresses = _numeric(host, port) or _resolver(host, port).result(left(ends))
    refusal: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left(ends))
            sock.connect(address)
        except OSError as error:
            sock.close()
            refusal = error
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise refusal or OSError("no address")


async def dial_async(host: str, port: int) -> socket.socket:
    """As `dial`; whoever awaits it sets the deadline."""
    addresses = _numeric(host, port) or await _resolved(host, port)
    refusal: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            await connect_async(sock, address)
        except OSError as error:
            refusal = error
        else:
            return sock
    raise refusal or OSError("no address")


async def _resolved(host: str, port: int) -> list[Address]:
    """The addresses of a host; a loop that ends meanwhile is no concern of the resolver's."""
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def tell(_: object) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(wake)

    found = _resolver(host, port)
    found.add_done_callback(tell)
    await waiter
    return found.result()


async def connect_async(sock: socket.socket, address: Any) -> None:
    """Connect a socket over the running loop; closes it when that fails."""
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
