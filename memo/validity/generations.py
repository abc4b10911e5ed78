"""Changes to the fields of a group: the rules of `stamps` as pure functions.

Each store of generations (the host's SQLite file, the memory tier) applies their results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memo.records.stamp_types import LOST, Ref, State
from memo.runtime.named_tuple import NamedTuple
from memo.validity import stamps
from memo.validity.stamps import ALL, LAST, MAX_GROUP_FIELDS, SHAPES, TOKEN_CHARACTERS, Turn

MIN_GROUP_SECONDS = 86_400
"""Shortest life of a group, counted from the start of a computation that names it."""
TOMBSTONE_SECONDS = 120
"""Life of a group that an invalidation had to create, so that no host restores it: no entry names
it."""
MAX_GROUP_SHAPES = 64
"""Maximum number of shapes of a group; beyond it the group is renewed, since each shape costs every
reader a read."""


class Change(NamedTuple):
    """A change to the fields of one group.

    Attributes:
        write: field -> value.
        erase: fields to delete; they are not in `write`.
        renew: delete all existing fields first.
    """

    write: Mapping[str, str]
    erase: tuple[str, ...] = ()
    renew: bool = False

    @property
    def empty(self) -> bool:
        return not (self.write or self.erase or self.renew)


def by_group(turns: Iterable[Turn]) -> dict[str, list[Turn]]:
    """Return turns by their group, for `change_for_all`."""
    groups: dict[str, list[Turn]] = {}
    for turn in turns:
        groups.setdefault(turn.group, []).append(turn)
    return groups


def change_for(fields: Mapping[str, str], turn: Turn, note: str, token: str = "") -> Change:
    """Return the change for one turn; `token` replaces its fresh token."""
    return change_for_all(fields, [turn], note, token)


def change_for_all(
    fields: Mapping[str, str], turns: Sequence[Turn], note: str, token: str = ""
) -> Change:
    """Return the change for turns of one group: a fresh token in the field of each, and in `!`.

    It takes time linear in their number.

    Args:
        token: replaces the fresh token of the only turn.
    """
    tokens = {stamps.field(turn.arguments): token or stamps.token_for(turn, note) for turn in turns}
    last = tokens[stamps.field(turns[-1].arguments)] + note
    shapes = dict.fromkeys(s for s in fields.get(SHAPES, "").split("|") if s)
    shapes.update(dict.fromkeys(stamps.shape(turn.arguments) for turn in turns))
    write = {name: value + note for name, value in tokens.items()}
    write |= {LAST: last, SHAPES: "|".join(shapes)}
    if ALL in tokens or len(shapes) > MAX_GROUP_SHAPES or _is_too_big(fields, write):
        return Change({ALL: last, LAST: last}, renew=True)
    return Change(write)


def _is_too_big(fields: Mapping[str, str], write: Mapping[str, str]) -> bool:
    """True if a group would have too many fields after a write."""
    return len(fields) + len(write.keys() - fields.keys()) > MAX_GROUP_FIELDS


def fields_without_table(turn: Turn, note: str) -> dict[str, str]:
    """Return the fields that one turn writes in a store that cannot list the fields of a group.

    Such a store has no shapes, so a turn that `readable_fields` does not cover turns the whole
    group.
    """
    token = stamps.token_for(turn, note)
    if stamps.is_soft(turn.arguments):
        # it expires the whole group, so that readers need only one more field
        return {stamps.field(_EXPIRED_FIELD): token + note, LAST: token}
    narrow = turn.whole or len(turn.arguments) == 1
    return {stamps.field(turn.arguments) if narrow else ALL: token + note, LAST: token}


def readable_fields(ref: Ref) -> list[tuple[tuple[str, str], ...]]:
    """Return the arguments of the fields, beside `*` and `!`, that such a store reads for a ref.

    The store is one that cannot list the fields of a group; see `fields_without_table`.
    """
    if not ref.arguments:
        return [_EXPIRED_FIELD]
    singles: list[tuple[tuple[str, str], ...]] = [
        _EXPIRED_FIELD,
        *((pair,) for pair in ref.arguments),
    ]
    return singles if len(singles) == 2 else [*singles, tuple(ref.arguments)]


_EXPIRED_FIELD = ((stamps.SOFT, ""),)


def change_to_learn(fields: Mapping[str, str], ref: Ref, now: State) -> Change:
    """Return the change after which a ref has the state `now`, read from another authority.

    A group that is lost there is lost here too.  So is one that would have too many fields, since
    fields may only be deleted together with `*`.
    """
    if now == LOST:
        return Change({}, renew=bool(fields))
    star, covering = split_state(now)
    write = {ALL: star, **covering}
    if now.last:
        write[LAST] = now.last
    shapes = [s for s in fields.get(SHAPES, "").split("|") if s]
    missing = dict.fromkeys(name.partition("=")[0] for name in covering)
    write[SHAPES] = "|".join([*shapes, *(s for s in missing if s not in shapes)])
    write = {name: value for name, value in write.items() if not _same(fields.get(name), value)}
    if _is_too_big(fields, write):
        return Change({}, renew=True)
    _, mine = split_state(stamps.state_of(ref, fields))
    gone = [name for name in mine if name not in covering]
    if not now.last and LAST in fields:
        gone.append(LAST)
    return Change(write, tuple(gone))


def _same(present: str | None, value: str) -> bool:
    """True if a field has this value already; the note after a token is ignored."""
    return (present or "") == value or (
        len(value) == TOKEN_CHARACTERS and (present or "")[:TOKEN_CHARACTERS] == value
    )


def split_state(state: State) -> tuple[str, dict[str, str]]:
    """Split a state into its `*` token and the tokens of its covering fields, without `!`."""
    star, *rest = state.text.split("|")
    pairs = (part.rpartition(":") for part in rest)
    return star, {name: token for name, _, token in pairs if name != LAST}


def changed_fields(before: State, now: State) -> set[str]:
    """Return the fields whose tokens are new in the later of two states of one ref."""
    (star_before, fields_before), (star, fields) = map(split_state, (before, now))
    later = {name for name, token in fields.items() if fields_before.get(name) != token}
    return later | ({ALL} if star_before != star else set())


def notes_for(fields: Mapping[str, str], ref: Ref) -> list[tuple[str, str]]:
    """Return (field, note) of every invalidation in a group's fields that affects a ref."""
    if ref.arguments is None:
        names = [name for name in fields if name not in (LAST, SHAPES)]
    else:
        names = [ALL, *split_state(stamps.state_of(ref, fields))[1]]
    return [
        (name, fields[name][TOKEN_CHARACTERS:])
        for name in names
        if len(fields.get(name, "")) > TOKEN_CHARACTERS
    ]


def apply(fields: Mapping[str, str], change: Change) -> dict[str, str]:
    """Return the fields after a change."""
    left = {} if change.renew else {n: v for n, v in fields.items() if n not in change.erase}
    return {**left, **change.write}
