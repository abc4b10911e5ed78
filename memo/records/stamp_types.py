"""Times and stamps: when a record was computed, and what it depends on.

Plain data, read and written by `seal`; `validity` has the rules.
"""

from memo.runtime.named_tuple import NamedTuple

ADDRESS = "@"
"""The argument of a prefix group that stands for the address of a call."""


class Times(NamedTuple):
    """The times of an entry, all in nanoseconds.

    Attributes:
        started: wall clock when the computation began (never decreases for a key).
        finished: wall clock when it ended.
        boot_id: the boot of the machine on which `finished_boot` was read.
        finished_boot: `Clock.boot_ns` when it ended.
        ttl: how long it is fresh after `finished`; -1: it does not expire.
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
    """The state of a `Ref` at one moment.

    Attributes:
        text: `*`'s token, then `|field:token` for every covering field in sorted order; `""` if `*`
            is lost, which equals no state that was ever recorded.
        last: the token of `!`, or `""` if nothing was ever invalidated in the group.
    """

    text: str
    last: str


LOST = State("", "")


class Generation(NamedTuple):
    """A stamp: the state of a ref before the computation began."""

    ref: Ref
    state: State


MISSING = "missing"
"""The facts of a path or a URL that does not exist."""
_PATTERN_CHARACTERS = frozenset("*?[")


def is_pattern(path: str) -> bool:
    """True if the path of a stamp has characters of a glob pattern."""
    return not _PATTERN_CHARACTERS.isdisjoint(path)


class FileStamp(NamedTuple):
    """A stamp: the state of a file before the computation began.

    Attributes:
        path: absolute path, or a URL.
        facts: identifies this version of the file; equal texts mean the same content.
        by_content: `facts` is a digest of the content, not of size, time and inode.
        every: seconds for which the state of a remote source is reused without asking again.
    """

    path: str
    facts: str
    by_content: bool = False
    every: float = 0.0


class CallStamp(NamedTuple):
    """A stamp: the answer of a `depends_on` callable before the computation began.

    Attributes:
        name: `"<function>#<index>"`, by which the callable is found again.
        digest: the digest of its answer.
        arguments: the arguments of the call that it takes, by name, pickled, in base 64.
    """

    name: str
    digest: str
    arguments: str = ""


class Result(NamedTuple):
    """A stamp: the value of a call of a function with `cutoff=True`.

    Attributes:
        function: id of the function.
        key: key of the call.
        digest: digest of the value, by the encoding that keys use.
        arguments: arguments of the call, pickled, in base 64; `""`: they cannot be stored, so the
            call cannot be repeated.
        beneath: positions, in the entry's list, of the stamps that the value depends on; empty: the
            entry with this stamp is that of the call itself.
        wave: the same number for results that were asked for concurrently, a higher one for later
            results.
    """

    function: str
    key: str
    digest: str
    arguments: str = ""
    beneath: tuple[int, ...] = ()
    wave: int = 0


Stamp = Generation | FileStamp | CallStamp | Result
