"""Uploads: payloads that are too big to be sent to a shared tier while the caller waits.

Rules of this module:

1.  An upload is a name.  What lies under that name on this host's disk when its turn comes is what
    is sent, so that what waits takes no memory, and a newer entry takes the place of an older one.
2.  At most `WORKERS` run at once, never two of one name.  Where `WAITING` bytes wait already, the
    next one is refused, and its caller sends it: no caller stores faster than the network.
3.  An upload ends once, however it ends.  What was to come after it, such as freeing the lease
    under which the entry was computed, comes then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from memo.runtime import events, fork
from memo.runtime.port import Port

Work = Callable[[Port], Coroutine[Any, Any, None]]
BIG = 1 << 20
"""Bytes from which an entry is sent in the background: 1 MiB takes 10 ms at 1 Gbit/s."""
WORKERS = 2
"""Uploads that run at once."""
WAITING = 512 << 20
"""Bytes that may wait: 5 s at 1 Gbit/s, so well below the `lock_timeout` of waiting callers."""


class Upload:
    """One entry on its way, or about to be."""

    __slots__ = ("_after", "_lock", "name", "over", "size")

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.over = False
        self._after: list[Work] = []
        self._lock = threading.Lock()

    def then(self, work: Work) -> bool:
        """Have `work` done when it has ended; False, and nothing done, if it has."""
        with self._lock:
            if not self.over:
                self._after.append(work)
            return not self.over

    async def end(self, port: Port) -> None:
        """It has ended."""
        with self._lock:
            self.over = True
        for work in self._after:
            try:
                await work(port)
            except Exception as error:  # the others still have their turn
                _complain(error)


class Uploads:
    """The uploads of one chain.

    Args:
        send: sends what lies under a name; a fault of a tier is its own to tell.
    """

    def __init__(self, send: Callable[[Port, str], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self.after_fork()
        fork.renewed_in_child(self)

    def after_fork(self) -> None:
        """Forget all of them: after a fork they are the parent's."""
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, Upload] = OrderedDict()
        self._running: dict[str, Upload] = {}
        self._bytes = 0
        self._workers = 0

    def get(self, name: str) -> Upload | None:
        """The last upload of a name, where it has not ended."""
        return self._waiting.get(name) or self._running.get(name)

    def all(self) -> list[Upload]:
        """Those that have not ended."""
        with self._lock:
            return [*self._waiting.values(), *self._running.values()]

    def add(self, port: Port, name: str, size: int) -> Upload | None:
        """Send what lies under a name, in the background; None: too much waits already."""
        with self._lock:
            if name in self._waiting:
                return self._waiting[name]
            if self._waiting and name not in self._running and self._bytes + size > WAITING:
                return None
            upload = self._waiting[name] = Upload(name, size)
            self._bytes += size
            starts = self._workers < WORKERS
            self._workers += starts
        if starts:
            port.spawn(self._work, "memo-upload", apart=True)
        return upload

    def _next(self) -> Upload | None:
        """Next upload that may run; None, and one worker less, if there is none."""
        with self._lock:
            free = (name for name in self._waiting if name not in self._running)
            name = next(free, None)
            if name is None:
                self._workers -= 1
                return None
            upload = self._running[name] = self._waiting.pop(name)
            self._bytes -= upload.size
            return upload

    async def _work(self, port: Port) -> None:
        while (upload := self._next()) is not None:
            try:
                await self._send(port, upload.name)
            except Exception as error:
                _complain(error)
            finally:
                with self._lock:
                    self._running.pop(upload.name, None)
                await upload.end(port)


def _complain(error: Exception) -> None:
    detail = f"upload: {type(error).__name__}"
    events.emit(events.Event(events.ERROR, reason="background", detail=detail))
