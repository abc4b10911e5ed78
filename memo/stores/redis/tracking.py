"""The listener: receives every change of the generations in Redis as it happens.

A daemon thread keeps one connection, on which Redis pushes the names of the groups that change
(RESP3, `CLIENT TRACKING ON BCAST`).  What was verified at a *mark* need not be verified again as
long as no change of its groups has arrived since.  Rules of this module:

1.  A mark is taken before Redis is asked, and only while the listener *listens*: tracking is on,
    and every message sent until `MAX_OUTDATED_SECONDS` ago has arrived.  An echo on the same
    connection proves that, since no older message can arrive after it.  Without such an echo no
    mark is valid.
2.  A new connection, a flush of the server and a fork invalidate all earlier marks.
3.  Bookkeeping is written before the count that announces it, and read after it, so that readers
    need no lock.
4.  After any fault, Redis is asked each time, as without a listener; the breaker is not involved.
    A server that refuses tracking causes one event, and is asked again once a minute.
5.  The connection is opened at its first use, and closed after `IDLE_CONNECTION_SECONDS` without
    use.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from memo.errors import TierError
from memo.runtime import events, fork
from memo.runtime.clock import SECOND, SYSTEM_CLOCK, Clock
from memo.stores.protocols import REDIS
from memo.stores.redis.transport.faults import Fault
from memo.stores.redis.transport.resp import ErrorReply, decoded, pack

MAX_OUTDATED_SECONDS = 1.0
"""Seconds after which a lost push is noticed: no answer is outdated for longer."""
ECHO_SECONDS = 0.25
"""Seconds between two echoes."""
IDLE_CONNECTION_SECONDS = 30.0
"""Seconds without use after which the connection is closed."""
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 5.0
"""Seconds of the first and of the longest pause before the next connection."""
REFUSED_PAUSE_SECONDS = 60.0
"""Seconds to pause if the server does not let this user track changes."""
MAX_TRACKED_GROUPS = 65_536
"""Maximum number of groups that are remembered; beyond it all marks are invalidated and the list
starts again."""
MAX_PUSH_BYTES = 16 << 20
"""Bytes above which a message cannot come from Redis."""

_log = logging.getLogger("memo.stores")


class Listener:
    """Receives every change of the generations of one namespace on one Redis.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        prefix: common prefix of the keys of groups in Redis.
        deadline: seconds that connecting and logging in may take.
        where: the server, without user and password.
        options: arguments of redis-py's client, beyond those in the URL.
        clock: tells how old the last echo is, even if the machine slept meanwhile.

    Attributes:
        count: number of changes received; the current mark.
        oldest_valid: marks below it are invalid.
        until: time of the clock until which it counts as listening; 0: it does not listen.
    """

    def __init__(
        self,
        url: str,
        prefix: bytes,
        deadline: float,
        where: str,
        clock: Clock = SYSTEM_CLOCK,
        *,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = url
        self.options = dict(options or {})
        self.prefix = prefix
        self.deadline = deadline
        self.where = where
        self.now = clock.boot_ns
        self.count = 0
        self.oldest_valid = 0
        self.until = 0
        self.in_use = False
        self.why = "not connected"
        self.refused = False
        self.changed_at: dict[str, int] = {}
        self._receiver: Receiver | None = None
        self._lock = threading.Lock()
        fork.renew_in_child(self)

    def __repr__(self) -> str:
        return f"<Listener {self.where} {self.state}>"

    # --- for lookups ----------------------------------------------------------------------------

    def mark(self) -> int | None:
        """Return a mark for entries that are verified from now on; None if it is not listening."""
        self.in_use = True
        if self.now() < self.until:
            return self.count
        if self._receiver is None:
            self._start()
        return None

    def renew_mark(self, mark: int, groups: Sequence[str]) -> int | None:
        """Return a renewed mark if no change of these groups came since, else None."""
        if self.now() >= self.until:
            return None
        self.in_use = True
        count = self.count
        if mark == count:
            return mark
        changed_at = self.changed_at
        if mark < self.oldest_valid:
            return None
        for group in groups:
            if changed_at.get(group, 0) > mark:
                return None
        return count

    @property
    def listening(self) -> bool:
        """True if marks are given and valid."""
        return self.now() < self.until

    @property
    def state(self) -> str:
        """`"listening"`, or `"strict (why)"`."""
        return "listening" if self.listening else f"strict ({self.why})"

    def wait(self, seconds: float) -> bool:
        """Begin to listen, and wait until it does; False if it cannot, or after `seconds`."""
        ends = time.monotonic() + seconds
        while self.mark() is None:
            if self.refused or time.monotonic() >= ends:
                return False
            time.sleep(0.002)
        return True

    # --- for invalidations -----------------------------------------------------------------------

    def record_changes(self, groups: Iterable[str]) -> None:
        """Record that these groups have changed."""
        with self._lock:
            count = self.count + 1
            for group in groups:
                self.changed_at[group] = count
            if len(self.changed_at) > MAX_TRACKED_GROUPS:
                self._renew()
            else:
                self.count = count

    def invalidate_marks(self) -> None:
        """Invalidate all marks, since anything may have changed."""
        with self._lock:
            self._renew()

    def _renew(self) -> None:
        self.oldest_valid = self.count + 1
        self.changed_at = {}
        self.count = self.oldest_valid

    def confirm(self, receiver: Receiver, until: int) -> None:
        """Record that all messages sent `MAX_OUTDATED_SECONDS` before `until` have arrived."""
        with self._lock:
            if self._receiver is receiver:
                self.until = until
                self.refused = False

    def record_disconnection(self, receiver: Receiver, why: str, *, ended: bool = False) -> None:
        """Record that a receiver has lost its connection."""
        with self._lock:
            if self._receiver is receiver:
                self.until = 0
                self.why = why
                self._receiver = None if ended else receiver

    # --- the thread ------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._receiver is not None:
                return
            receiver = Receiver(self)
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                receiver.thread.start()
                self._receiver = receiver

    def wake(self) -> None:
        """Try to connect now, since the server answers again."""
        receiver = self._receiver
        if receiver is not None and not self.refused:
            receiver.awake.set()

    def close(self) -> None:
        """Stop listening, until it is used again."""
        with self._lock:
            receiver, self._receiver = self._receiver, None
            self.until = 0
            self.why = "not connected"
        if receiver is not None:
            receiver.close()
            if receiver.thread is not threading.current_thread():
                receiver.thread.join(2 * self.deadline)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        receiver, self._receiver = self._receiver, None
        self.until = 0
        self._renew()
        if receiver is not None and receiver.sock is not None:
            receiver.sock.close()  # otherwise Redis keeps pushing after the parent has ended


class Receiver:
    """A thread that receives pushes, on one connection after another."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.sock: socket.socket | None = None
        self.awake = threading.Event()
        self.closing = False
        self.thread = threading.Thread(target=self.run, name="memo-listener", daemon=True)
        self._asked_at = time.monotonic()
        self._failures = 0

    def close(self) -> None:
        """Stop soon, even while it waits; from any thread."""
        self.closing = True
        self.awake.set()
        sock = self.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def run(self) -> None:
        """Receive until the listener is closed or no longer used."""
        listener, why = self.listener, "not in use"
        try:
            while self._is_wanted():
                try:
                    self._receive_on_connection()
                    continue
                except Exception as error:
                    pause, why = self._pause_after(error)
                listener.record_disconnection(self, why)
                self.awake.wait(pause)
                self.awake.clear()
        finally:
            listener.record_disconnection(self, why, ended=True)

    def _is_wanted(self) -> bool:
        now = time.monotonic()
        if self.listener.in_use:
            self.listener.in_use = False
            self._asked_at = now
        return not self.closing and now - self._asked_at < IDLE_CONNECTION_SECONDS

    def _pause_after(self, error: Exception) -> tuple[float, str]:
        """Return for how many seconds to pause after an error, and the error in words."""
        fault = _fault_of(error)
        if fault.down:
            pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures, 16))
            self._failures += 1
            return pause * (1 - random.random() / 4), fault.text
        self._report_refusal(fault, str(error))
        return REFUSED_PAUSE_SECONDS, f"{fault.text}: {fault.kind}"

    def _report_refusal(self, fault: Fault, reply: str) -> None:
        listener = self.listener
        if listener.refused or self.closing:
            return
        listener.refused = True
        text = f"{listener.where} {fault.text} ({reply})"
        events.emit(events.Event(events.ERROR, tier=REDIS, reason="tracking", detail=text))
        _log.warning(
            "memo: Redis at %s %s [%s], so that hits in memory ask it each time, as with "
            'coherence="strict". Tracking needs HELLO, ECHO and CLIENT TRACKING '
            "(+hello +echo +client|tracking in its ACL).",
            listener.where,
            fault.text,
            reply,
        )

    def _receive_on_connection(self) -> None:
        """Receive on one connection until it can no longer be used."""
        from memo.stores.redis.transport.thread_connections import dedicated_connection

        connection, sock = dedicated_connection(self.listener.url, self.listener.options)
        try:
            self.sock = sock
            if not self.closing:
                self._listen(_Stream(sock))
        finally:
            self.sock = None
            connection.disconnect()

    def _listen(self, stream: _Stream) -> None:
        listener = self.listener
        stream.send(b"HELLO", b"3")
        self._reply(stream, listener.deadline)
        words = (b"TRACKING", b"ON", b"BCAST", b"PREFIX", listener.prefix)
        stream.send(b"CLIENT", *words)
        self._reply(stream, listener.deadline)
        listener.invalidate_marks()
        while self._is_wanted():
            self._await_echo(stream)

    def _await_echo(self, stream: _Stream) -> None:
        """Wait for an echo, then receive until it is time for the next."""
        sent = self.listener.now()
        nonce = b"%d" % sent
        stream.send(b"ECHO", nonce)
        if self._reply(stream, MAX_OUTDATED_SECONDS) != nonce:
            raise ValueError("another echo than was sent")
        self.listener.confirm(self, sent + int(MAX_OUTDATED_SECONDS * SECOND))
        self._failures = 0
        ends = time.monotonic() + ECHO_SECONDS
        with contextlib.suppress(TimeoutError):
            while not self.closing and time.monotonic() < ends:
                self.record_pushed(stream.next(ends))

    def _reply(self, stream: _Stream, seconds: float) -> Any:
        """Return the reply to what was sent, after everything that was pushed before it.

        Raises:
            TimeoutError: it did not come within `seconds`.
            _RefusedError: it is an error.
        """
        ends = time.monotonic() + seconds
        while isinstance(message := stream.next(ends), _Push):
            self.record_pushed(message)
        if isinstance(message, _RefusedError):
            raise message
        return message

    def record_pushed(self, message: Any) -> None:
        """Record the changes in a push message.

        One without names means that anything may have changed.
        """
        if not isinstance(message, _Push):
            raise ValueError("a reply without a command")  # noqa: TRY004 - a fault of the server
        if message[0] != b"invalidate":
            return
        if message[1] is None:
            self.listener.invalidate_marks()
            return
        prefix = self.listener.prefix
        names = [name[len(prefix) : -1] for name in message[1] if name.startswith(prefix)]
        self.listener.record_changes(decoded(name) for name in names)


# --- parsing what Redis sends --------------------------------------------------------------------


class _Push(list[Any]):
    """A push message of Redis."""


class _RefusedError(TierError):
    """An error reply."""


class _Stream:
    """The messages that arrive on a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()

    def send(self, *words: bytes) -> None:
        """Send a command."""
        self._sock.settimeout(MAX_OUTDATED_SECONDS)
        self._sock.sendall(pack(*words))

    def next(self, ends: float) -> Any:
        """Return the next message.

        Raises:
            TimeoutError: none came until `ends`, by `time.monotonic`.
            EOFError: the connection was closed.
            ValueError: the data is not RESP3.
        """
        while True:
            try:
                message, end = parse(self._data, 0)
            except IndexError:
                self._receive(ends)
                continue
            del self._data[:end]
            return message

    def _receive(self, ends: float) -> None:
        if len(self._data) > MAX_PUSH_BYTES:
            raise ValueError("a message that does not end")
        self._sock.settimeout(max(0.001, ends - time.monotonic()))
        more = self._sock.recv(1 << 16)
        if not more:
            raise EOFError("the connection was closed")
        self._data += more


def parse(data: bytearray, at: int) -> tuple[Any, int]:
    """Parse the RESP3 message at a position; return it and where it ends.

    Raises:
        IndexError: it is incomplete.
        ValueError: it is not RESP3.
    """
    end = data.find(b"\r\n", at)
    if end < 0:
        raise IndexError("an incomplete line")
    kind, line, behind = bytes(data[at : at + 1]), bytes(data[at + 1 : end]), end + 2
    if kind in (b"+", b":", b",", b"#", b"("):
        return line, behind
    if kind == b"-":
        return _RefusedError(line.decode("utf-8", "replace")), behind
    if kind == b"_" or (kind in (b"$", b"*") and line == b"-1"):
        return None, behind
    size = int(line)
    if kind in (b"$", b"=", b"!") and size >= 0:
        return _text(data, kind, behind, size)
    if kind not in (b"*", b"~", b">", b"%") or size < 0:
        raise ValueError("not RESP3")
    parts: list[Any] = _Push() if kind == b">" else []
    for _ in range(2 * size if kind == b"%" else size):
        part, behind = parse(data, behind)
        parts.append(part)
    return parts, behind


def _text(data: bytearray, kind: bytes, at: int, size: int) -> tuple[Any, int]:
    end = at + size
    if len(data) < end + 2:
        raise IndexError("an incomplete text")
    text = bytes(data[at:end])
    return (_RefusedError(text.decode("utf-8", "replace")) if kind == b"!" else text), end + 2


def _fault_of(error: Exception) -> Fault:
    from memo.stores.redis.transport.redis_errors import fault_of

    return fault_of(ErrorReply(str(error)) if isinstance(error, _RefusedError) else error)
