"""Servers that misbehave on purpose: a TCP proxy, and a server that answers given bytes.

Both run in threads, on a free loopback port, and count what they see.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

RESET = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""SO_LINGER on, 0 seconds: closing sends a reset."""


class Listener:
    """A loopback port whose connections are handled in threads of their own."""

    def __init__(self) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._sock.getsockname()[1])
        self.accepted = 0
        self._open: set[socket.socket] = set()
        self._over = threading.Event()
        self._threads = [self._start(self._accept)]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _start(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="chaos", daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                if not select.select([self._sock], [], [], 0.02)[0]:
                    continue
                client, _ = self._sock.accept()
            except (OSError, ValueError):  # closed
                return
            self.accepted += 1
            self._open.add(client)
            self._threads.append(self._start(self._guarded, client))

    def _guarded(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            self.handle(client)
        self._open.discard(client)

    def handle(self, client: socket.socket) -> None:
        raise NotImplementedError

    def cut_all(self, *, reset: bool = False) -> None:
        """Close all connections."""
        for client in list(self._open):
            with contextlib.suppress(OSError):
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                # Its handler closes it then; what is shut for sending has said its end already.
                client.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)

    @property
    def connected(self) -> int:
        """The number of open connections; a cut one counts until its handler ends."""
        return len(self._open)

    def close(self) -> None:
        self._over.set()
        self._sock.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Proxy(Listener):
    """Passes bytes on to a server, except as told; what is told acts at once.

    Attributes:
        mode: `"pass"`; `"refuse"`: close new connections at once, cut the old; `"silence"`: swallow
            replies; `"drip"`: one byte of a reply every `pause` seconds.
        cut_at: close after so many bytes of replies on a connection; None: never.
        flip_at: turn over the lowest bit of this byte of the replies of a connection; None: never.
        without: replies with this in them are swallowed.
        hold: called with what came from a client, before that is passed on; if it raises an
            `OSError`, that is not passed on, and the connection ends.
        hold_reply: called with what the server replied, before that is passed on.
        packets: how often something came from a client.
        pause: seconds between two dripped bytes, and before each reply that is passed on in mode
            `"slow"`.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self.mode = "pass"
        self.cut_at: int | None = None
        self.flip_at: int | None = None
        self.pause = 0.01
        self.without: bytes | None = None
        self.hold: Callable[[bytes], object] = lambda asked: None
        self.hold_reply: Callable[[bytes], object] = lambda replied: None
        self.packets = 0
        super().__init__()

    def handle(self, client: socket.socket) -> None:
        if self.mode == "refuse":
            return
        with socket.create_connection(("127.0.0.1", self._upstream)) as server:
            replied = 0
            while not self._over.is_set():
                ready, _, _ = select.select([client, server], [], [], 0.02)
                if client in ready:
                    data = client.recv(65536)
                    if not data:
                        return
                    self.packets += 1
                    self.hold(data)
                    server.sendall(data)
                if server in ready:
                    data = server.recv(65536)
                    self.hold_reply(data)
                    if not data or not self._reply(client, data, replied):
                        return
                    replied += len(data)

    def _reply(self, client: socket.socket, data: bytes, before: int) -> bool:
        """Pass a piece of a reply on; False when the connection is to be closed."""
        if self.flip_at is not None and before <= self.flip_at < before + len(data):
            at = self.flip_at - before
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if self.cut_at is not None and before + len(data) > self.cut_at:
            client.sendall(data[: max(0, self.cut_at - before)])
            return False
        if self.mode == "silence" or (self.without and self.without in data):
            return True
        if self.mode == "drip":
            for byte in data:
                if self._over.wait(self.pause):
                    return False
                client.sendall(bytes([byte]))
            return True
        if self.mode == "slow" and self._over.wait(self.pause):
            return False
        client.sendall(data)
        return True


def commands(data: bytes) -> int:
    """The number of commands that begin in some bytes; at least one."""
    return max(1, len(re.findall(rb"(?:^|\r\n)\*\d+\r\n\$", data)))


class Scripted(Listener):
    """Answers every command with given bytes, whatever it is.

    Attributes:
        answer: the bytes, or a function of the bytes received that gives them.
        echoes: answer `ECHO` as a server does.
        hang_up: close after the answer.
        piece: bytes of the answer that are sent at once, `pause` seconds apart.
        received: all that came in.
    """

    def __init__(self, answer: bytes | Callable[[bytes], bytes], *, echoes: bool = False) -> None:
        self.answer = answer
        self.echoes = echoes
        self.hang_up = False
        self.piece = 1 << 30
        self.pause = 0.0
        self.received = b""
        super().__init__()

    def handle(self, client: socket.socket) -> None:
        while not self._over.is_set():
            if not select.select([client], [], [], 0.02)[0]:
                continue
            data = client.recv(1 << 20)
            if not data:
                return
            self.received += data
            answer = self._answer_to(data)
            for at in range(0, len(answer), self.piece):
                if at:
                    self._over.wait(self.pause)
                client.sendall(answer[at : at + self.piece])
            if self.hang_up:
                return

    def _answer_to(self, data: bytes) -> bytes:
        if callable(self.answer):
            return self.answer(data)
        echo = re.search(rb"\$4\r\nECHO\r\n(\$\d+\r\n[^\r]*\r\n)", data)
        if not (self.echoes and echo):
            return self.answer * commands(data)
        return self.answer * (commands(data) - 1) + echo[1]


class HangingUp(Listener):
    """Takes connections, and closes each after some seconds without a word."""

    def __init__(self, after: float) -> None:
        self._after = after
        super().__init__()

    def handle(self, client: socket.socket) -> None:
        self._over.wait(self._after)


class BlackHole:
    """A port that takes no more connections and refuses none: its queue is full."""

    def __init__(self) -> None:
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(0)
        self.port = int(self._sock.getsockname()[1])
        self._fill = []
        for _ in range(4):
            sock = socket.socket()
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(("127.0.0.1", self.port))
            self._fill.append(sock)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        for sock in (*self._fill, self._sock):
            sock.close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
