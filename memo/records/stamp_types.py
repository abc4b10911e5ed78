"""Times and stamps: what a record carries of when it was computed and of what it depends on.

Plain data, read and written by `seal`; `validity` has the rules.
"""

from memo.runtime.named_tuple import NamedTuple

ADDRESS = "@"
"""The argument of a prefix group under which a call has its address."""


class Times(NamedTuple):
    """The times of an entry, all in nanoseconds.

    Attributes:
        started: wall clock when the computation began (never goes back for one key).
        finished: wall clock when it ended.
        boot_id: the start of the machine on which `finished_boot` was read.
        finished_boot: `Clock.boot_ns` when it ended.
        ttl: how long it is fresh after `finished`; -1: no expiry.
        grace: how long after that it may still serve as stale or as fallback.
        cost: how long the computation took.
    """

    started: int
    finished: int
    boot_id: bytes
    finished_boot: int
    ttl: int
    grace: int
    cost: int


class Ref(NamedTuple):
    """The part of a group that one call depends on.

    Attributes:
        group: `"n"`, `"f:<function>"`, `"p:<prefix>"` or `"t:<tag>"`.
        arguments: (name, digest) of each argument, sorted by name; None: anything in the group.
    """

    group: str
    arguments: tuple[tuple[str, str], ...] | None = ()


class State(NamedTuple):
    """Reading of a `Ref` at one moment.

    Attributes:
        text: `*`'s token, then `|field:token` for every covering field in sorted order; `""` when
            `*` is lost, which equals no state that was ever recorded.
        last: the token of `!`, or `""` when nothing was ever invalidated in the group.
    """

    text: str
    last: str


LOST = State("", "")


class Generation(NamedTuple):
    """A stamp: what a ref read before the computation began."""

    ref: Ref
    state: State


class File(NamedTuple):
    """A stamp: a file as it was before the computation began.

    Attributes:
        path: absolute path, or a URL.
        facts: what identifies this version of the file; two equal texts mean the same content.
        by_content: whether `facts` is a digest of the content, or of size, time and inode.
        every: seconds for which a remote source is believed without asking again.
    """

    path: str
    facts: str
    by_content: bool = False
    every: float = 0.0


class Call(NamedTuple):
    """A stamp: what a `depends_on` callable answered before the computation began.

    Attributes:
        name: `"<function>#<index>"`, which finds the callable again.
        digest: of its answer.
        arguments: those that it takes of the call, by name, pickled, as base 64.
    """

    name: str
    digest: str
    arguments: str = ""


class Result(NamedTuple):
    """A stamp: the value of a call of a function with `cutoff=True`.

    Attributes:
        function: identity of the function.
        key: of the call.
        digest: of the value, by the encoding that keys use.
        arguments: those of the call, pickled, as base 64; `""`: they cannot be stored, so the call
            cannot be asked again.
        beneath: places of the stamps that vouch for the value; none: the entry that has this stamp
            is the one of the call itself.
        wave: results that were asked for at the same time, before any of them was there, have the
            same number; what was asked for after that has a higher one.
    """

    function: str
    key: str
    digest: str
    arguments: str = ""
    beneath: tuple[int, ...] = ()
    wave: int = 0


Stamp = Generation | File | Call | Result
