"""Links: connections to Redis that keep a total deadline, and share their exchanges among threads.

One of the two rooms that know redis-py (the other is `loops`); they are imported when Redis is
first asked.  Connecting, logging in and parsing are redis-py's; its retries, its time-outs per
read, its pools and its greetings are not used.  Rules of both rooms:

1.  An exchange has `seconds` in all, connecting included, plus the time that what was received
    takes at `RATE`: big replies may take longer, a dripped one may not.
2.  A connection whose exchange did not end well is closed: no unread reply ever waits in it.
3.  A pool keeps at most `size` connections.  Whoever finds them all busy waits for one; the
    deadline begins when he has it.
4.  A connection that died while it was idle is replaced once, within the same deadline.  Every
    command of memo may be sent twice.
"""

from __future__ import annotations

import importlib.util
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hiredis
import redis  # noqa: F401 - whole before its parts, or two threads get half of it each
import redis.connection as threads
from redis import exceptions

from memo import breaker
from memo.breaker import RATE, REPLIES, Fault
from memo.dial import dial, left
from memo.errors import TierError
from memo.scripts import Question
from memo.transit import Sink

CHUNK = 256 * 1024
"""Bytes that are handed to a socket, or taken from it, at once."""
QUEUE = 20
"""Deadlines for which a caller waits for a connection while all are busy."""
_SLACK = 0.001
"""Seconds by which a socket's time-out may exceed the deadline, to save setting it each time."""

_SPARED, _LOOK = 3, 0.005
"""So often, and for so many seconds, a socket is looked at when the deadline has passed already:
the thread may have been held up while the reply was there."""

_LARGEST = 512 << 20
"""Bytes of the largest value that Redis has."""
_LINE = 4096
"""Bytes of the longest first line of a reply: an error and its text."""
Part = bytes | memoryview
_USED = ("host", "port", "db", "username", "password", "path", "client_name")


_DRIVER_INFO = importlib.util.find_spec("redis.driver_info") is not None


class BusyError(TierError):
    """All connections are in use for too long; says nothing about the server."""


def options(url: str) -> tuple[str, dict[str, Any]]:
    """The kind of connection (`"tcp"`, `"tls"`, `"unix"`) that a URL names, and its options."""
    given: dict[str, Any] = threads.parse_url(url)  # type: ignore[no-untyped-call]
    kept = {k: v for k, v in given.items() if k in _USED or k.startswith("ssl_")}
    silent = ("driver_info",) if _DRIVER_INFO else ("lib_name", "lib_version")
    kept |= dict.fromkeys(silent)  # no CLIENT SETINFO
    kept |= {"protocol": 2}  # no HELLO
    kept |= {"socket_timeout": None, "socket_connect_timeout": None, "socket_read_size": CHUNK}
    return url.partition(":")[0].replace("rediss", "tls").replace("redis", "tcp"), kept


def reader() -> Any:
    """What makes replies of bytes: `feed` it; `gets` gives one, or False.  Errors are given too."""
    return hiredis.Reader(
        protocolError=exceptions.InvalidResponse, replyError=threads.DefaultParser.parse_error
    )


class _Bounded:
    """A socket all of whose calls together keep one deadline."""

    def __init__(self, sock: socket.socket, ends: float) -> None:
        self.bare = self._sock = sock
        self._timeout = -1.0
        self.ends = ends
        self.received = 0
        self.spared = 0

    def _arm(self) -> None:
        seconds = self.ends + self.received / RATE - time.monotonic()
        if seconds <= 0:
            if self.spared >= _SPARED:
                raise TimeoutError("deadline")
            self.spared += 1
            seconds = _LOOK
        if not seconds <= self._timeout <= seconds + _SLACK:
            self._sock.settimeout(seconds)
            self._timeout = seconds

    def recv_into(self, buffer: Any) -> int:
        self._arm()
        size = self._sock.recv_into(buffer)
        self.received += size
        return size

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._arm()
        data = self._sock.recv(size, flags)
        self.received += len(data)
        return data

    def sendall(self, data: Part) -> None:
        self._arm()
        self._sock.sendall(data)

    def settimeout(self, seconds: float | None) -> None:
        """Ignored: the deadline rules."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class ThreadLink:
    """What the three kinds of connections of threads have in common."""

    ends = 0.0
    _bounded: _Bounded | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._buffer = bytearray(CHUNK)

    def _connect(self) -> Any:
        sock = super()._connect()  # type: ignore[misc]
        self._bounded = _Bounded(sock, self.ends)
        self._reader = reader()
        return self._bounded

    @property
    def socket(self) -> socket.socket:
        """The socket of a link that is connected, without its deadline."""
        assert self._bounded is not None
        return self._bounded.bare

    def begin(self, ends: float) -> None:
        """All that follows must be over at `ends` on the monotonic clock."""
        self.ends = ends
        if self._bounded is not None:
            self._bounded.ends = ends
            self._bounded.received = 0
            self._bounded.spared = 0

    def exchange(self: Any, question: Question) -> Any:
        """Send, and read one reply, or a list of several with the errors among them."""
        if self._sock is None:
            self.connect()
        self._send(question)
        if question.sink is not None:
            return self._receive(question.sink)
        replies = self._replies(question.replies)
        if question.replies != 1:
            return replies
        if isinstance(replies[0], Exception):
            raise replies[0]
        return replies[0]

    def _send(self: Any, question: Question) -> None:
        parts, send = question.parts, self._bounded.sendall
        if question.body is not None:
            send(parts[0])
            for piece in question.body():
                send(piece)
            parts = parts[1:]
        for part in parts:
            send(part)

    def _replies(self, count: int) -> list[Any]:
        gets = self._reader.gets
        found: list[Any] = []
        while len(found) < count:
            reply = gets()
            if reply is False:
                self._more()
            elif isinstance(reply, exceptions.ConnectionError):  # nothing follows
                raise reply
            else:
                found.append(reply)
        return found

    def _more(self) -> None:
        bounded: Any = self._bounded
        size = bounded.recv_into(self._buffer)
        if not size:
            raise ConnectionError("closed")
        self._reader.feed(self._buffer, 0, size)

    def _receive(self: Any, sink: Sink) -> bool:
        """Read one reply straight into a sink; False: there is no value, or one of another size."""
        line, early = self._line()
        if line[:1] in b"-!":
            raise self._parser.parse_error(line[1:].decode("utf-8", "replace"))
        if line == b"$-1":
            return False
        if line != b"$%d" % sink.size:
            if not line[1:].isdigit() or line[:1] != b"$" or int(line[1:]) > _LARGEST:
                raise exceptions.InvalidResponse("not a value")
            self.disconnect()  # rather than read what nobody wants
            return False
        end = self._fill_sink(sink, early)
        while len(end) < 2:
            end += self._some(2 - len(end))
        if end != b"\r\n":
            raise exceptions.InvalidResponse("a value without its end")
        return True

    def _line(self: Any) -> tuple[bytes, bytes]:
        """The first line of a reply, and what came with it."""
        text = b""
        while b"\r\n" not in text:
            if len(text) > _LINE:
                raise exceptions.InvalidResponse("a line without an end")
            text += self._some(64)
        line, _, early = text.partition(b"\r\n")
        return line, early

    def _fill_sink(self: Any, sink: Sink, early: bytes) -> bytes:
        """Receive all that a sink wants; what came behind it."""
        at = 0
        sink.begin()
        while at < sink.size:
            room = sink.room(at)[: sink.size - at]
            done = min(len(early), len(room))
            room[:done] = early[:done]
            early = early[done:]
            while done < len(room):
                done += self._into(room[done:])
            sink.took(room)
            at += len(room)
        return early

    def _some(self: Any, size: int) -> bytes:
        piece = bytearray(size)
        return bytes(piece[: self._into(memoryview(piece))])

    def _into(self: Any, room: memoryview) -> int:
        try:
            size = self._sock.recv_into(room)
        except ConnectionError as error:
            raise exceptions.ConnectionError("closed while receiving") from error
        if not size:
            raise exceptions.ConnectionError("closed while receiving") from EOFError()
        return int(size)


class _PlainThread(threads.Connection):
    ends = 0.0

    def _connect(self) -> socket.socket:
        return dial(self.host, self.port, self.ends)


class _UnixThread(threads.UnixDomainSocketConnection):
    ends = 0.0

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(left(self.ends))
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock


class _TlsThread(threads.SSLConnection, _PlainThread):
    """TLS over what `_PlainThread` dials: the order of the bases says so."""


class TcpThreadLink(ThreadLink, _PlainThread):
    """TCP."""


class TlsThreadLink(ThreadLink, _TlsThread):
    """TLS."""


class UnixThreadLink(ThreadLink, _UnixThread):
    """A Unix socket."""


THREAD_LINKS: dict[str, Any] = {
    "tcp": TcpThreadLink,
    "tls": TlsThreadLink,
    "unix": UnixThreadLink,
}


def connected(url: str, seconds: float) -> Any:
    """A `ThreadLink` of one's own, logged in within so many seconds, for who reads its socket.

    Raises:
        Exception: whatever redis-py raises, for `fault_of`.
    """
    kind, given = options(url)
    link = THREAD_LINKS[kind](**given)
    link.begin(time.monotonic() + seconds)
    link.connect()
    return link


class ThreadPool:
    """Connections that the threads of this process share.

    Args:
        url: where to.
        size: how many at most.
    """

    def __init__(self, url: str, size: int) -> None:
        kind, self._options = options(url)
        self._kind: Any = THREAD_LINKS[kind]
        self._slots = threading.BoundedSemaphore(size)
        self._idle: list[Any] = []
        self._epoch = 0

    def exchange(self, question: Question, check: Callable[[], None]) -> Any:
        """Send packed commands and read their replies.

        Args:
            question: what, and within what time.
            check: raises where it is no use any more, when the caller had to wait.

        Raises:
            BusyError: no connection became free.
            Exception: whatever redis-py raises, for `fault_of`.
        """
        if not self._slots.acquire(blocking=False):
            if not self._slots.acquire(timeout=QUEUE * question.seconds):
                raise BusyError("all connections to Redis are busy")
            try:
                check()
            except BaseException:
                self._slots.release()
                raise
        try:
            return self._exchange(question, time.monotonic() + question.seconds)
        finally:
            self._slots.release()

    def _exchange(self, question: Question, ends: float) -> Any:
        link = self._used()
        if link is not None:
            try:
                return self._on(link, question, ends)
            except Exception as error:
                if fault_of(error) is not breaker.CLOSED:
                    raise
                self.flush()
        return self._on(self._kind(**self._options), question, ends)

    def _used(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _on(self, link: Any, question: Question, ends: float) -> Any:
        epoch = self._epoch
        link.begin(ends)
        try:
            answer = link.exchange(question)
        except exceptions.ResponseError:
            self._keep(link, epoch)
            raise
        except BaseException:
            link.disconnect()
            raise
        self._keep(link, epoch)
        return answer

    def _keep(self, link: Any, epoch: int) -> None:
        self._idle.append(link)
        if epoch != self._epoch:  # closed meanwhile
            self.flush()

    def flush(self) -> None:
        """Close the connections that are idle."""
        while (link := self._used()) is not None:
            link.disconnect()

    def close(self) -> None:
        """Close all connections; those in use when they come back.  May be used again."""
        self._epoch += 1
        self.flush()


# --- what went wrong -----------------------------------------------------------------------------

_CODES: dict[type[BaseException], str] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.NoScriptError: "NOSCRIPT",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
}


def fault_of(error: BaseException) -> Fault:
    """What an exception of redis-py, or of what it stands on, means."""
    if isinstance(error, exceptions.RedisError):
        code = _code(error)
        if code:
            return REPLIES[code]
        if isinstance(error, exceptions.ResponseError):
            return breaker.OTHER
    causes = list(_causes(error))
    for fault, kinds in _KINDS:
        if any(isinstance(cause, kinds) for cause in causes):
            return fault
    return breaker.GARBLED


def _code(error: exceptions.RedisError) -> str:
    """The code of an error reply; `""` for what is none, or is not in `REPLIES`.

    Redis 6.2 hides the code of what fails inside a script behind `ERR Error running script`.
    """
    known = getattr(error, "status_code", None) or _CODES.get(type(error))
    if known in REPLIES:
        return str(known)
    text = str(error)
    if isinstance(error, exceptions.AuthenticationError):
        return "WRONGPASS" if "invalid" in text or "without any password" in text else "NOAUTH"
    if "max number of clients" in text:
        return "MAXCLIENTS"
    if "user executing the script" in text:
        return "NOPERM"
    if not isinstance(error, exceptions.ResponseError):
        return ""
    words = (word.strip("-:") for word in text.split())
    return next((word for word in words if word in REPLIES), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_KINDS: tuple[tuple[Fault, Any], ...] = (
    (breaker.INSECURE, ssl.SSLError),
    (breaker.UNRESOLVED, socket.gaierror),
    (breaker.REFUSED, (ConnectionRefusedError, FileNotFoundError, PermissionError)),
    (breaker.SILENT, (TimeoutError, exceptions.TimeoutError)),
    (breaker.CLOSED, (ConnectionError, EOFError)),
    (breaker.GARBLED, exceptions.InvalidResponse),
    (breaker.REFUSED, OSError),  # no route to the host, no such network
    (breaker.CLOSED, exceptions.ConnectionError),
)
