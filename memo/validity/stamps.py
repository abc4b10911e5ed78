"""Stamps: one mechanism for everything that can invalidate an entry.

Rules of this module:

1.  A stamp is taken *before* the computation begins, and is stored with the entry.  The entry is
    valid as long as every stamp still reads the same.
2.  A *generation* is a random token, never a counter.  A token that is gone (flushed, evicted)
    invalidates every entry that names it; it can never come back.
3.  Generations are stored in *groups*: one per function (`f:…`), per address prefix (`p:…`), per
    tag (`t:…`), and one for the namespace (`n`).  A group is a small table of fields:

    ========== ====================================================================================
    field      token of
    ========== ====================================================================================
    `*`        the whole group; created when an entry is first computed, rewritten by an
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
5.  A group with more than `MAX_GROUP_FIELDS` fields is renewed: `*` turns, all others are deleted.
6.  A *soft* turn lets entries expire instead of dropping them.  Its field names one more argument,
    `~`, which every call has with an empty digest.  So it leaves all other fields unchanged, and
    an entry for which only such fields have changed has expired; the field's token says when.
"""

from __future__ import annotations

import json
import os
import time
from binascii import a2b_base64, b2a_base64
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from memo.errors import encodable
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime.checksums import blake2b
from memo.runtime.named_tuple import NamedTuple

ALL = "*"
LAST = "!"
SHAPES = "?"
SOFT = "~"
TAGS = "t"
"""The group that any invalidation of a tag turns, before the tag's own."""
TO_ANY_TIER = '"to": ["*"]}'
"""End of the note of a turn that is meant for the next shared tier in use."""
TOKEN_CHARACTERS = 16
"""Characters of a token: 96 random bits in URL-safe base 64."""
MAX_GROUP_FIELDS = 4096
"""Maximum number of fields of a group; beyond it the group is renewed."""
MAX_GROUP_NAME_CHARACTERS = 1000
"""Maximum length in characters of a prefix or a tag in the name of its group."""
MAX_REFS_PER_GROUP = 256
"""Maximum number of refs of one group in an entry; with more of them it has one stamp of the whole
group."""


_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def token() -> str:
    """Return a fresh random token of `TOKEN_CHARACTERS`."""
    return b2a_base64(os.urandom(12), newline=False).translate(_URL_SAFE).decode()


def token_for(turn: Turn, note: str) -> str:
    """Return a fresh token for a turn; that of a soft one begins with the time in its note.

    So it has the time of the caller's clock, and one that is replayed later keeps its time.
    """
    if not is_soft(turn.arguments):
        return token()
    at = _noted_at(note).to_bytes(6, "big")
    return b2a_base64(at + os.urandom(6), newline=False).translate(_URL_SAFE).decode()


def _noted_at(note: str) -> int:
    """Return the time in the note of a turn, in milliseconds since the epoch; now if it has none.

    `memo.stores.authorities.make_note` writes it.
    """
    with suppress(ValueError, KeyError, TypeError, OverflowError):
        at = round(float(parse_note(note)["at"]) * 1000)
        if 0 <= at < 1 << 48:
            return at
    return time.time_ns() // 1_000_000


def parse_note(note: str) -> dict[str, Any]:
    """Return the facts in the note of a turn; none if it is not a JSON object."""
    try:
        facts = json.loads(note)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _made_at(soft: str) -> int:
    """Return the time in the token of a soft turn, in nanoseconds since the epoch; 0 if unknown."""
    try:
        data = a2b_base64(soft.encode().translate(_FROM_URL_SAFE))
    except ValueError:
        return 0
    return int.from_bytes(data[:6], "big") * 1_000_000


class Turn(NamedTuple):
    """One invalidation of one group.

    Attributes:
        group: as in `Ref`.
        arguments: (name, digest) sorted by name: it affects the entries that have all of them;
            `()`: all entries of the group.
        whole: these are all arguments of a call, so that they identify one call.
    """

    group: str
    arguments: tuple[tuple[str, str], ...] = ()
    whole: bool = False


def tag_turns(tag: str) -> tuple[Turn, Turn]:
    """Return the turns that invalidate a tag: of the group of all tags, then of the tag's own."""
    return Turn(TAGS), Turn(group("t", tag))


def as_soft(turn: Turn) -> Turn:
    """Return the soft form of a turn: it expires the entries that the turn would invalidate."""
    return turn._replace(arguments=(*turn.arguments, (SOFT, "")))


def is_soft(arguments: Iterable[tuple[str, str]]) -> bool:
    """True if a turn with these arguments is a soft one."""
    return (SOFT, "") in arguments


def without_soft(arguments: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the arguments of the calls that a turn affects; its soft form affects the same."""
    return tuple(pair for pair in arguments if pair != (SOFT, ""))


def expired_at(before: str, now: str) -> int | None:
    """Return when a state was first expired since; None if it was also invalidated.

    A field has only the time of its latest turn, so the true time may be earlier.

    Args:
        before: the text of the state that an entry recorded.
        now: the text of the current state, which differs from it.

    Returns:
        Nanoseconds since the epoch; None if it was invalidated or is lost.
    """
    if SOFT not in now:  # tokens, digests and argument names cannot contain it
        return None
    old, new = before.split("|"), now.split("|")
    if [part for part in old if not _is_soft_field(part)] != [
        part for part in new if not _is_soft_field(part)
    ]:
        return None
    later = set(new).difference(old)
    return min((_made_at(part[-TOKEN_CHARACTERS:]) for part in later), default=None)


def _is_soft_field(part: str) -> bool:
    """True if a part of a state's text is the field of a soft turn."""
    return SOFT in names_of(part)


def names_of(field: str) -> list[str]:
    """Return the names of the arguments in a field; for a soft turn `SOFT` comes last."""
    names, equals, _ = field.partition("=")
    return names.split(",") if equals else []


def group(kind: str, name: str) -> str:
    """Return the group of a prefix (`"p"`) or a tag (`"t"`), as text that every store can write.

    A long name is cut, and ends with its digest.
    """
    name = encodable(name)
    if len(name) > MAX_GROUP_NAME_CHARACTERS:
        digest = blake2b(name.encode(), digest_size=16).hexdigest()
        name = f"{name[:MAX_GROUP_NAME_CHARACTERS]}…{digest}"
    return f"{kind}:{name}"


def shape(arguments: Iterable[tuple[str, str]]) -> str:
    """Return the names of some arguments, as `?` lists them."""
    return ",".join(dict(arguments))


def field(arguments: Iterable[tuple[str, str]]) -> str:
    """Return the field of a group for some arguments; `*` if there are none."""
    pairs = dict(arguments)
    return f"{','.join(pairs)}={','.join(pairs.values())}" if pairs else ALL


class Affected:
    """The refs that some turns affect.

    As in a group, each turn is a field, and each set of argument names a shape.  So the time to
    check a ref grows with the shapes, not with the turns.
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._fields: dict[str, set[str]] = {}
        self._shapes: dict[str, set[str]] = {}
        for group, arguments, _ in turns:
            self._fields.setdefault(group, set()).add(field(arguments))
            self._shapes.setdefault(group, set()).add(shape(arguments))

    def __contains__(self, ref: Ref) -> bool:
        fields = self._fields.get(ref.group)
        if fields is None:
            return False
        return (
            ref.arguments is None
            or ALL in fields
            or not fields.isdisjoint(covering_fields(ref.arguments, self._shapes[ref.group]))
        )

    def has_any(self, refs: Iterable[Ref]) -> bool:
        """True if any of these refs is affected."""
        return any(ref in self for ref in refs)


def state_of(ref: Ref, fields: Mapping[str, str]) -> State:
    """Return the state of a ref from a group's fields.

    Args:
        ref: the ref to read.
        fields: field -> value; a value is a token, which may be followed by a note.
    """
    star = fields.get(ALL, "")[:TOKEN_CHARACTERS]
    if not star:
        return LOST
    last = fields.get(LAST, "")[:TOKEN_CHARACTERS]
    if ref.arguments is None:
        return State(f"{star}|{LAST}:{last}" if last else star, last)
    shapes = fields.get(SHAPES, "")
    if not shapes:
        return State(star, last)
    text = star
    for name in sorted(fields.keys() & covering_fields(ref.arguments, shapes.split("|"))):
        text += f"|{name}:{fields[name][:TOKEN_CHARACTERS]}"
    return State(text, last)


def covering_fields(arguments: tuple[tuple[str, str], ...], shapes: Iterable[str]) -> list[str]:
    """Return the fields of a group with these shapes that cover a call with these arguments."""
    digests = {**dict(arguments), SOFT: ""}
    found: list[str] = []
    for names in shapes:
        parts = names.split(",")
        if digests.keys() >= set(parts):
            found.append(f"{names}={','.join(map(digests.__getitem__, parts))}")
    return found
