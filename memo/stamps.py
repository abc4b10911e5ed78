"""Stamps: one mechanism for everything that can make an entry untrue.

Rules of this module:

1.  A stamp is taken *before* the computation that it vouches for begins, and is stored with the
    entry.  The entry is true while every stamp still reads the same.
2.  A *generation* is a random token, never a counter.  A token that is gone (flushed, evicted)
    makes every entry that names it untrue; it can never come back.
3.  Generations live in *groups*: one per function (`f:…`), per address prefix (`p:…`), per tag
    (`t:…`), and one for the namespace (`n`).  A group is a small table of fields:

    ========== ====================================================================================
    field      token of
    ========== ====================================================================================
    `*`        the whole group; created when an entry is first computed, written anew by an
               invalidation of the group
    `!`        the last change of anything in the group
    `?`        not a token: the *shapes* (sets of argument names) ever invalidated, as
               `region|region,year`
    `a,b=x,y`  the entries whose arguments `a` and `b` have the digests `x` and `y`
    ========== ====================================================================================

    The address of an entry is the argument `@` of its prefix group.
4.  A `Ref` names the part of a group that one call depends on: the group and the call's argument
    digests.  Its `State` is `*` and every field that covers the call.  Invalidating is O(1): write
    one field.  Reading is O(number of shapes), which is small and bounded.
5.  Past `FIELDS` fields a group is renewed: `*` turns and the fields go.
"""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Iterable, Mapping
from typing import NamedTuple

ALL = "*"
LAST = "!"
SHAPES = "?"
ADDRESS = "@"
TOKEN = 16
"""Characters of a token: 96 random bits in URL-safe base 64."""
FIELDS = 4096
"""Past so many fields a group is renewed."""
READS = 256
"""Past so many refs of one group, a computation's reads are kept as one stamp of the group."""


_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def token() -> str:
    """A fresh random token of `TOKEN` characters."""
    return b2a_base64(os.urandom(12), newline=False).translate(_URL_SAFE).decode()


class Ref(NamedTuple):
    """The part of a group that one call depends on.

    Attributes:
        group: `"n"`, `"f:<function>"`, `"p:<prefix>"` or `"t:<tag>"`.
        arguments: (name, digest) of each argument, sorted by name; None: anything in the group.
    """

    group: str
    arguments: tuple[tuple[str, str], ...] | None = ()


class State(NamedTuple):
    """What a `Ref` reads at one moment.

    Attributes:
        text: `*`'s token, then `|field:token` for every covering field in sorted order; `""` when
            `*` is lost, which equals no state that was ever recorded.
        last: the token of `!`, or `""` when nothing was ever invalidated in the group.
    """

    text: str
    last: str


LOST = State("", "")


class Turn(NamedTuple):
    """One invalidation of one group.

    Attributes:
        group: as in `Ref`.
        arguments: (name, digest) sorted by name: entries that have all of them; `()`: the group.
        whole: the arguments are all that a call has, so that they name one call.
    """

    group: str
    arguments: tuple[tuple[str, str], ...] = ()
    whole: bool = False


def shape(arguments: Iterable[tuple[str, str]]) -> str:
    """The names of some arguments, as `?` lists them."""
    return ",".join(name for name, _ in arguments)


def field(arguments: Iterable[tuple[str, str]]) -> str:
    """The field of a group for some arguments; `*` for none."""
    pairs = tuple(arguments)
    if not pairs:
        return ALL
    return f"{shape(pairs)}={','.join(digest for _, digest in pairs)}"


def concerns(turns: Iterable[Turn], refs: Iterable[Ref]) -> bool:
    """Whether one of some invalidations is about one of some refs."""
    own = tuple(refs)
    return any(
        turn.group == ref.group
        and (ref.arguments is None or set(turn.arguments) <= set(ref.arguments))
        for turn in turns
        for ref in own
    )


def read(ref: Ref, fields: Mapping[str, str]) -> State:
    """The state of a ref in a group's fields.

    Args:
        ref: what to read.
        fields: field -> value; a value is a token, which may be followed by more for people.
    """
    star = fields.get(ALL, "")[:TOKEN]
    if not star:
        return LOST
    last = fields.get(LAST, "")[:TOKEN]
    if ref.arguments is None:
        return State(f"{star}|{LAST}:{last}" if last else star, last)
    shapes = fields.get(SHAPES, "")
    if not shapes:
        return State(star, last)
    names = sorted(n for n in covering(ref.arguments, shapes.split("|")) if n in fields)
    return State(star + "".join(f"|{name}:{fields[name][:TOKEN]}" for name in names), last)


def covering(arguments: tuple[tuple[str, str], ...], shapes: Iterable[str]) -> Iterable[str]:
    """The fields of a group with these shapes that cover a call with these arguments."""
    digests = dict(arguments)
    for names in shapes:
        parts = names.split(",")
        if all(part in digests for part in parts):
            yield f"{names}={','.join(digests[part] for part in parts)}"


class Generation(NamedTuple):
    """A stamp: what a ref read before the computation began."""

    ref: Ref
    state: State


class File(NamedTuple):
    """A stamp: a file as it was before the computation began.

    Attributes:
        path: absolute path.
        facts: what identifies this version of the file; two equal texts mean the same content.
        by_content: whether `facts` is a digest of the content, or of size, time and inode.
    """

    path: str
    facts: str
    by_content: bool = False


class Call(NamedTuple):
    """A stamp: what a `depends_on` callable answered before the computation began.

    Attributes:
        name: `"<function>#<index>"`, which finds the callable again.
        digest: of its answer.
    """

    name: str
    digest: str


Stamp = Generation | File | Call
