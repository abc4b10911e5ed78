"""Batches: commands that only read, sent in one piece for callers who know nothing of each other.

Rules of this module:

1.  A command that several callers ask for is sent once; each gets its reply.  All of them asked
    before it was sent, so it is fresh for each.
2.  The last command is an `ECHO` of a nonce.  Replies are handed out only when the nonce came back
    in its place: what an earlier exchange left unread on a connection is never taken for an answer.
3.  Who has gone meanwhile is no reason to do anything: his replies are thrown away.
4.  A batch is settled once, for all: with replies, or with one `Failure` that all of them share.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from memo.errors import TierError

COUNT = 64
"""Commands from which a batch is sent: so many that a packet costs each little, so few that the
server works on them while the next are asked for."""
SIZE = 64 * 1024
"""Bytes of commands from which a batch is sent."""

_nonces = itertools.count()


def signed() -> tuple[bytes, bytes]:
    """An `ECHO` of a nonce of its own, and what it is answered with."""
    nonce = b"%012x" % next(_nonces)
    return b"*2\r\n$4\r\nECHO\r\n$12\r\n%s\r\n" % nonce, nonce


class Failure:
    """What went wrong with an exchange; whoever was part of it raises an error of his own."""

    __slots__ = ("_error",)

    def __init__(self, error: TierError) -> None:
        self._error = error

    def again(self) -> TierError:
        """The error, without the frames of others."""
        return copy.copy(self._error)


class Slot(Protocol):
    """Where one caller waits: a future of a loop, or what stands for one among threads."""

    def done(self) -> bool:
        """Whether he has gone, or has his answer."""
        ...

    def set_result(self, answer: Any, /) -> None:
        """Give him a list of replies, in the order of his commands, or a `Failure`."""
        ...


class Batch:
    """The commands of one exchange.

    Args:
        begun: when its first caller asked, or when it was sent, in seconds of some clock.

    Attributes:
        again: it has been sent before, on a connection that turned out to be dead.
        replies: those that have come so far.
    """

    __slots__ = (
        "_nonce",
        "_ping",
        "_places",
        "_slots",
        "_wanted",
        "again",
        "begun",
        "replies",
        "size",
    )

    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.again = False
        self.replies: list[Any] = []
        self.size = 0
        self._places: dict[bytes, int] = {}
        self._slots: list[Slot] = []
        self._wanted: list[list[int]] = []
        self._ping, self._nonce = signed()

    def add(self, commands: Sequence[bytes], slot: Slot) -> None:
        """Ask for the replies to some packed commands."""
        places = self._places
        wanted = []
        for command in commands:
            place = places.get(command)
            if place is None:
                place = places[command] = len(places)
                self.size += len(command)
            wanted.append(place)
        self._slots.append(slot)  # two lists: a pair for each caller is one more for the collector
        self._wanted.append(wanted)

    @property
    def full(self) -> bool:
        """Whether it had better be sent now."""
        return len(self._places) >= COUNT or self.size >= SIZE

    @property
    def missing(self) -> int:
        """How many replies have not come yet."""
        return len(self._places) + 1 - len(self.replies)

    def packed(self) -> bytes:
        """All of it as bytes."""
        return b"".join((*self._places, self._ping))

    def land(self, explain: Callable[[Exception], Failure]) -> bool:
        """Hand out the replies, which are all there; whether none of them is an error.

        Args:
            explain: makes a failure of an error reply; called once for each that is different.

        Raises:
            ValueError: they are not those to these commands.
        """
        replies = self.replies
        last = replies.pop()
        if isinstance(last, Exception):  # then nothing works here
            self.fail(explain(last))
            return False
        if last != self._nonce:
            raise ValueError("the answer to another question")
        if any(isinstance(reply, Exception) for reply in replies):
            self._explain(explain)
            return False
        for slot, wanted in zip(self._slots, self._wanted, strict=True):
            if not slot.done():
                slot.set_result([replies[place] for place in wanted])
        return True

    def _explain(self, explain: Callable[[Exception], Failure]) -> None:
        errors = {str(reply): reply for reply in self.replies if isinstance(reply, Exception)}
        failures = {text: explain(error) for text, error in errors.items()}
        for slot, wanted in zip(self._slots, self._wanted, strict=True):
            mine = [self.replies[place] for place in wanted]
            wrong = [failures[str(reply)] for reply in mine if isinstance(reply, Exception)]
            if not slot.done():
                slot.set_result(wrong[0] if wrong else mine)

    def fail(self, failure: Failure) -> None:
        """Tell everybody that nothing will come."""
        for slot in self._slots:
            if not slot.done():
                slot.set_result(failure)

    def restart(self) -> None:
        """Forget what has come: it is sent once more."""
        self.again = True
        self.replies = []
