"""Prefetch: which groups the entries of a function name, so that they are read along with a record.

A script that reads a record and what its stamps read now takes Redis longer than the few plain
commands that do the same once one knows which groups to ask for; and who look up together ask for a
group once.  Entries of one function mostly name the same.  Rules of this module:

1.  Groups are learned from entries whose seal held.  A group that was not asked for is never
    guessed: whoever misses one asks again, and the next look-up asks for it at once.
2.  Where parts of a group were ever invalidated (it has *shapes*), the fields that cover a call
    are not known beforehand: the script does it, and after `TRY_AGAIN` look-ups one sees whether
    the group was renewed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from memo import stamps
from memo.scripts import pack
from memo.stamps import ALL, LAST, LOST, SHAPES, Ref, State
from memo.tiers import Part

K = TypeVar("K")
V = TypeVar("V")
GROUPS = 16
"""Groups that are asked for with a record at most; entries that name more are for the script."""
KNOWN = 4096
"""Functions, and groups, of which anything is remembered."""
TRY_AGAIN = 1000
"""Questions by script after which a group that had shapes is tried without."""
BIG = 64 * 1024
"""Bytes of a record from which a function's records travel by themselves."""


class Group:
    """One group.

    Args:
        key: its name in Redis.

    Attributes:
        command: reads its `*`, `!` and `?`.
        latest: such fields without shapes, and what any part but the whole then reads.
        resting: so many questions are left to the script, since there were shapes.
    """

    __slots__ = ("command", "latest", "resting")

    def __init__(self, key: bytes) -> None:
        self.command = pack(b"HMGET", key, ALL.encode(), LAST.encode(), SHAPES.encode())
        self.latest: tuple[object, State] = None, LOST
        self.resting = 0

    def state(self, name: str, arguments: Any, fields: object) -> State | None:
        """What a part of the group reads; None where that takes more fields than these."""
        known = _named(fields)
        if known.get(SHAPES) and arguments:
            self.resting = TRY_AGAIN
            return None
        state = stamps.read(Ref(name, arguments), known)
        if arguments is not None and not known.get(SHAPES):
            self.latest = fields, state
        return state


def _named(fields: object) -> dict[str, str]:
    """The fields of a group; none where it is something else, so that nobody believes it."""
    if not isinstance(fields, list) or len(fields) != 3:
        return {}
    pairs = zip((ALL, LAST, SHAPES), fields, strict=True)
    return {k: v.decode("utf-8", "surrogateescape") for k, v in pairs if isinstance(v, bytes)}


class Plan:
    """Groups that are read together.

    Args:
        groups: by name.

    Attributes:
        commands: read one each.
        groups: name -> the place of its reply, and the group.
    """

    __slots__ = ("commands", "groups")

    def __init__(self, groups: Mapping[str, Group]) -> None:
        self.commands = tuple(group.command for group in groups.values())
        named = enumerate(groups.items())
        self.groups = {name: (place, group) for place, (name, group) in named}

    @property
    def resting(self) -> bool:
        """Whether the script had better do it."""
        for _, group in self.groups.values():
            if group.resting:
                group.resting -= 1
                return True
        return False

    def states(self, parts: Sequence[Part], replies: Sequence[object]) -> tuple[State, ...] | None:
        """What parts read, from the replies to the commands; None where it takes more than these.

        Nothing that a server may have replied makes it raise.
        """
        found = []
        for name, arguments in parts:
            known = self.groups.get(name)
            if known is None:
                return None
            place, group = known
            fields, state = group.latest
            if fields != replies[place] or arguments is None:
                other = group.state(name, arguments, replies[place])
                if other is None:
                    return None
                state = other
            found.append(state)
        return tuple(found)


class Expected:
    """What the entries of one function are expected to name.

    Args:
        group: gives a group by its name.

    Attributes:
        plan: what to read along with a record; None: nothing is known yet, or too much.
        big: the latest record was big.
    """

    __slots__ = ("_group", "big", "plan")

    def __init__(self, group: Callable[[str], Group]) -> None:
        self._group = group
        self.plan: Plan | None = None
        self.big = False

    def learn(self, parts: Sequence[Part]) -> None:
        """Ask for the groups of an entry too, from now on."""
        wanted = dict.fromkeys(name for name, _ in parts)
        known = {} if self.plan is None else self.plan.groups
        both = dict.fromkeys((*known, *wanted))
        chosen = both if len(both) <= GROUPS else wanted
        if len(chosen) > GROUPS or not chosen:
            self.plan = None
        elif chosen.keys() != known.keys():
            self.plan = Plan({name: self._group(name) for name in chosen})

    def states(
        self, plan: Plan, replies: Sequence[object], parts: Sequence[Part]
    ) -> tuple[State, ...] | None:
        """What parts read, from the replies to a plan; None where it takes more than these."""
        found = plan.states(parts, replies)
        if found is None:
            self.learn(parts)
        return found

    def told(self, states: tuple[State, ...], parts: Sequence[Part]) -> tuple[State, ...]:
        """The states that the script gave of parts, which are learned."""
        self.learn(parts)
        return states


class Prefetch:
    """What is known of the functions and groups of one server.

    Args:
        prefix: of the names of groups.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._functions: dict[str, Expected] = {}
        self._groups: dict[str, Group] = {}
        self._plans: dict[tuple[str, ...], Plan] = {}

    def expected(self, name: str) -> Expected:
        """What is known of the function of an entry with this name."""
        function = name.rpartition(":")[0]
        found = self._functions.get(function)
        if found is None:
            found = _keep(self._functions, function, Expected(self._group))
        return found

    def plan(self, parts: Sequence[Part]) -> Plan | None:
        """How to read parts of groups; None: let the script do it."""
        names = tuple([name for name, _ in parts])
        found = self._plans.get(names)
        if found is None:
            if not 0 < len(set(names)) <= GROUPS:
                return None
            found = _keep(self._plans, names, Plan({name: self._group(name) for name in names}))
        return None if found.resting else found

    def _group(self, name: str) -> Group:
        found = self._groups.get(name)
        if found is None:
            found = _keep(self._groups, name, Group(self._prefix + name.encode()))
        return found


def _keep(known: dict[K, V], key: K, value: V) -> V:
    """Remember something; the oldest goes where there is too much."""
    while len(known) >= KNOWN:
        known.pop(next(iter(known)), None)
    return known.setdefault(key, value)
