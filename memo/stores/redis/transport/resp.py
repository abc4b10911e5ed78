"""The protocol of Redis, RESP2: commands are packed into bytes, and replies parsed from them.

Replies are parsed here and not by hiredis, which allocates an array of any announced length before
its elements have arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any

MAX_LINE_BYTES = 4096
"""Bytes of the longest first line of a reply, such as an error with its text."""
MAX_REPLY_ELEMENTS = 1 << 20
"""Maximum number of elements of an array in a reply."""
MAX_VALUE_BYTES = 512 << 20
"""Bytes of the largest value that Redis can store."""

Part = bytes | memoryview
Command = tuple[bytes, bytes]
"""A key that selects the server, and a packed command."""


class ErrorReply(Exception):  # noqa: N818 - a reply, not a fault of ours
    """An error that the server answered with."""

    @property
    def code(self) -> str:
        """Its first word, such as `"OOM"`."""
        return str(self).partition(" ")[0]


def with_key(reply: ErrorReply, command: Part) -> ErrorReply:
    """Return the error with the key that it is about, which Redis does not name."""
    words = bytes(command).split(b"\r\n", 9) if "WRONGTYPE" in str(reply) else []
    place = 8 if words[2:3] and words[2].startswith(b"EVAL") else 4
    if not words or words[0][:1] != b"*" or len(words) <= place:
        return reply
    return ErrorReply(f"{reply} Key: {words[place].decode('utf-8', 'replace')}")


class GarbledError(Exception):
    """The received bytes are not replies to what was sent."""


def pack(*words: bytes) -> bytes:
    """Pack a command into the bytes that Redis reads."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        parts += (b"$%d\r\n" % len(word), word, b"\r\n")
    return b"".join(parts)


def encoded(text: str) -> bytes:
    """Encode a name for Redis; `decoded` restores it, whatever it contains."""
    return text.encode("utf-8", "surrogateescape")


def decoded(word: bytes) -> str:
    """Decode a name or a text that Redis holds."""
    return word.decode("utf-8", "surrogateescape")


def command_bytes(commands: Iterable[Command]) -> tuple[bytes, ...]:
    """Return the bytes of commands, without the keys that select their server."""
    return tuple(map(itemgetter(1), commands))


class Reader:
    """Parses replies from bytes that arrive in pieces.

    Attributes:
        unread: number of bytes that belong to no reply that was taken.
    """

    __slots__ = ("_at", "_chunks", "_data", "_wanted", "unread")

    def __init__(self) -> None:
        self._data = b""
        self._at = 0
        self._chunks: list[bytes] = []
        self._wanted = 1
        self.unread = 0

    def feed(self, data: bytes) -> None:
        """Add bytes that have arrived."""
        if self.unread:
            self._chunks.append(data)
        else:
            self._data, self._at = data, 0
        self.unread += len(data)

    def take(self, replies: list[Any], count: int) -> bool:
        """Append the replies that have arrived, until there are `count`; True if there are.

        An error reply is appended as an `ErrorReply`.

        Raises:
            GarbledError: these bytes are not replies.
        """
        if self.unread < self._wanted:
            return False
        if self._chunks:
            self._join()
        whole, at = True, self._at
        try:
            at = _parse(self._data, at, replies, count)
        except _Incomplete as incomplete:
            whole, at = False, incomplete.at
            self._wanted = incomplete.end - at
        except ValueError as error:
            raise GarbledError(str(error)) from None
        self.unread -= at - self._at
        self._at = at
        if whole:
            self._wanted = 1
        return whole

    def _join(self) -> None:
        self._data = b"".join((self._data[self._at :], *self._chunks))
        self._at = 0
        self._chunks.clear()

    def header(self) -> bytes | None:
        """Take the first line of the next reply; None if it has not arrived."""
        self._join()
        end = self._data.find(b"\r\n")
        if end < 0:
            if len(self._data) > MAX_LINE_BYTES:
                raise GarbledError("a line without an end")
            return None
        self._at = end + 2
        self.unread -= self._at
        return self._data[:end]

    def take_bytes(self, size: int) -> bytes:
        """Take at most `size` bytes that have arrived and are not parsed."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        self.unread -= len(taken)
        return taken


class _Incomplete(Exception):  # noqa: N818 - a signal between functions of this module
    """The reply that begins at `at` is incomplete: it extends to `end` at least."""

    def __init__(self, at: int, end: int) -> None:
        self.at = at
        self.end = end


def _parse(data: bytes, at: int, replies: list[Any], count: int) -> int:  # noqa: C901, PLR0912
    """Append RESP2 replies from a position on, until there are `count`; return where they end.

    One loop for all of them, including arrays of any depth: a call for each costs a tenth of a hit.
    """
    around: list[tuple[list[Any], int]] = []  # arrays that contain the next reply
    into, size = replies, count
    first = at
    while True:
        while len(into) >= size:
            if not around:
                return at
            array = into
            into, size = around.pop()
            into.append(array)
        if not around:
            first = at
        elif data[at : at + 5] == b"$-1\r\n":  # most fields of a group are missing
            into.append(None)
            at += 5
            continue
        end = data.find(b"\r\n", at)
        if end < 0:
            if len(data) - at > MAX_LINE_BYTES:
                raise ValueError("a line without an end")
            raise _Incomplete(first, len(data) + 1)
        kind, line = data[at], data[at + 1 : end]
        at = end + 2
        if kind == 36:  # $
            length = int(line)
            if length < 0:
                into.append(None)
                continue
            if length > MAX_VALUE_BYTES:
                raise ValueError("a value above the largest size")
            end = at + length
            if data[end : end + 2] != b"\r\n":
                raise _bad_end(data, first, end + 2)
            into.append(data[at:end])
            at = end + 2
        elif kind == 42:  # *
            length = int(line)
            if length > MAX_REPLY_ELEMENTS:
                raise ValueError("an array longer than any command returns")
            if length < 0:
                into.append(None)
            else:
                around.append((into, size))
                into, size = [], length
        else:
            into.append(_parse_line(kind, line))


def _parse_line(kind: int, line: bytes) -> Any:
    """Parse a reply of one line: a status, a number, or an error."""
    if kind == 43:  # +
        return line
    if kind == 58:  # :
        return int(line)
    if kind == 45:  # -
        return ErrorReply(line.decode("utf-8", "replace"))
    raise ValueError("not RESP2")


def _bad_end(data: bytes, first: int, end: int) -> Exception:
    """Return the error for a value that does not end where its length says."""
    if len(data) < end:
        return _Incomplete(first, end)
    return ValueError("a value without its end")
