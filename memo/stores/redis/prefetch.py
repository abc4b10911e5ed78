"""Prefetch: predict the groups that a record names, so that they are read together with it.

Entries of one function mostly name the same groups.  Rules of this module:

1.  Groups are learned from entries with a valid seal.  The state of a group that was not read is
    never guessed: its reader asks again, and the next look-up reads the group at once.
2.  If parts of a group were invalidated (it has *shapes*), the fields that cover a call follow from
    its arguments and the shapes.  The shapes seen last are assumed; if they have changed, the
    reader asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from memo.records.stamp_types import LOST, Ref, State
from memo.stores.protocols import Part
from memo.stores.redis.exchange import Command, pack
from memo.validity import stamps
from memo.validity.stamps import ALL, LAST, SHAPES

K = TypeVar("K")
V = TypeVar("V")
GROUPS = 16
"""Most groups that are read with a record."""
KNOWN = 4096
"""Most functions, and groups, that are remembered."""
BIG = 64 * 1024
"""Records of a function of at least this many bytes are read without groups."""
_BASE = (ALL, LAST, SHAPES)


class Group:
    """A group of generations in Redis.

    Args:
        key: its key in Redis.

    Attributes:
        command: reads its `*`, `!` and `?`.
        latest: the last such reply without shapes, and the state that any part of the group then
            has.
        shapes: the shapes that were seen last; `""` if none.
    """

    __slots__ = ("command", "key", "latest", "shapes")

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.command = key, pack(b"HMGET", key, *map(str.encode, _BASE))
        self.latest: tuple[object, State] = None, LOST
        self.shapes = ""

    def covering(self, arguments: tuple[tuple[str, str], ...] | None) -> tuple[str, ...]:
        """Return the fields that cover a call, by the shapes that were seen last."""
        if not self.shapes or arguments is None:
            return ()
        return tuple(stamps.covering(arguments, self.shapes.split("|")))

    def read(self, names: Sequence[str]) -> Command:
        """Return the command that reads the base of the group and some more fields."""
        if not names:
            return self.command
        words = (name.encode("utf-8", "surrogateescape") for name in (*_BASE, *names))
        return self.key, pack(b"HMGET", self.key, *words)

    def state(
        self,
        name: str,
        arguments: tuple[tuple[str, str], ...] | None,
        reply: object,
        names: Sequence[str] = (),
    ) -> State | None:
        """Return the state of a part of the group, from a reply; None if that takes more fields.

        Args:
            name: name of the group.
            arguments: arguments of the call.
            reply: the reply to `read(names)`.  A value of another type counts as a group without
                fields.
            names: the fields that were read after the base.
        """
        latest, known = self.latest
        if latest == reply and arguments is not None:
            return known
        fields = {}
        if isinstance(reply, list) and len(reply) == len(_BASE) + len(names):
            pairs = zip((*_BASE, *names), reply, strict=True)
            fields = {
                k: v.decode("utf-8", "surrogateescape") for k, v in pairs if isinstance(v, bytes)
            }
        self.shapes = fields.get(SHAPES, "")
        if self.shapes and not set(self.covering(arguments)) <= set(names):
            return None
        state = stamps.read(Ref(name, arguments), fields)
        if arguments is not None and not self.shapes:
            self.latest = reply, state
        return state


class Expected:
    """The groups that the entries of one function are expected to name.

    Attributes:
        groups: name -> group, in the order in which they are read.
        commands: the command that reads each group.
        parts: entry -> the parts of groups that it names, if more than the groups must be read.
        big: the latest record was big.
    """

    __slots__ = ("_group", "big", "commands", "groups", "parts")

    def __init__(self, group: Callable[[str], Group]) -> None:
        self._group = group
        self.groups: dict[str, tuple[int, Group]] = {}
        self.commands: tuple[Command, ...] = ()
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.big = False

    def learn(self, parts: Sequence[Part]) -> None:
        """Read the groups of an entry too, from now on."""
        wanted = dict.fromkeys(name for name, _ in parts)
        both = dict.fromkeys((*self.groups, *wanted))
        chosen = both if len(both) <= GROUPS else wanted
        if len(chosen) > GROUPS:
            return
        groups = [(name, self._group(name)) for name in chosen]
        self.groups = {name: (place, group) for place, (name, group) in enumerate(groups)}
        self.commands = tuple(group.command for _, group in groups)

    def states(
        self,
        entry: str,
        groups: dict[str, tuple[int, Group]],
        replies: Sequence[object],
        parts: Sequence[Part],
    ) -> tuple[State, ...] | None:
        """Return the states of parts of groups, from replies; None if that takes more fields.

        In that case the next look-up of the entry reads them.
        It never raises, whatever a server has replied.
        """
        found = []
        for name, arguments in parts:
            known = groups.get(name)
            if known is None:
                self.learn(parts)
                if name not in self.groups:
                    self._remember(entry, parts)
                return None
            place, group = known
            state = group.state(name, arguments, replies[place])
            if state is None:
                self._remember(entry, parts)
                return None
            found.append(state)
        return tuple(found)

    def _remember(self, entry: str, parts: Sequence[Part]) -> None:
        if len(self.parts) >= KNOWN:
            self.parts.clear()
        self.parts[entry] = tuple(map(plain, parts))


def plain(part: Part) -> Part:
    """Return a part of a group in a comparable form, whatever its source."""
    name, arguments = part
    return name, None if arguments is None else tuple(map(tuple, arguments))


class Prefetch:
    """The functions and groups of one server, as far as they are known.

    Args:
        key: returns the key of a group in Redis.
    """

    def __init__(self, key: Callable[[str], bytes]) -> None:
        self._key = key
        self._functions: dict[str, Expected] = {}
        self._groups: dict[str, Group] = {}

    def expected(self, name: str) -> Expected:
        """Return what is expected for the function of an entry with this name."""
        function = name.rpartition(":")[0]
        found = self._functions.get(function)
        if found is None:
            found = _keep(self._functions, function, Expected(self.group))
        return found

    def group(self, name: str) -> Group:
        """Return a group by its name."""
        found = self._groups.get(name)
        if found is None:
            found = _keep(self._groups, name, Group(self._key(name)))
        return found


def _keep(known: dict[K, V], key: K, value: V) -> V:
    """Remember a value; if there are too many, the oldest is forgotten."""
    while len(known) >= KNOWN:
        known.pop(next(iter(known), None), None)  # type: ignore[arg-type]
    return known.setdefault(key, value)
