"""Lookups in Redis: a record is read together with the groups that it is likely to name.

Entries of one function mostly name the same groups.  Rules of this module:

1.  Groups are learned from entries with a valid seal.  The state of a group that was not read is
    never guessed: its reader asks again, and the next lookup reads the group at once.
2.  If parts of a group were invalidated (it has *shapes*), the fields that cover a call follow from
    its arguments and the shapes.  The shapes seen last are assumed; if they have changed, the
    reader asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from memo.errors import TierError
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.stores.protocols import Found, GroupPart
from memo.stores.redis.transport.resp import Command, decoded, encoded, pack
from memo.validity import stamps
from memo.validity.stamps import ALL, LAST, SHAPES

if TYPE_CHECKING:
    from memo.stores.redis.client import Client

V = TypeVar("V")
STATE_READ_ATTEMPTS = 4
"""Attempts to read generations that change meanwhile."""
GROUPS_PER_LOOKUP = 16
"""Maximum number of groups that are read with a record."""
MAX_KNOWN_GROUPS = 4096
"""Maximum number of functions, and groups, that are remembered."""
LONE_RECORD_BYTES = 64 * 1024
"""Records of a function of at least this many bytes are read without groups."""
_BASE_FIELDS = (ALL, LAST, SHAPES)


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
        self.command = key, pack(b"HMGET", key, *map(str.encode, _BASE_FIELDS))
        self.latest: tuple[object, State] = None, LOST
        self.shapes = ""

    def covering_fields(self, arguments: tuple[tuple[str, str], ...] | None) -> tuple[str, ...]:
        """Return the fields that cover a call, according to the shapes seen last."""
        if not self.shapes or arguments is None:
            return ()
        return tuple(stamps.covering_fields(arguments, self.shapes.split("|")))

    def read_command(self, names: Sequence[str]) -> Command:
        """Return the command that reads `*`, `!`, `?` and some more fields."""
        if not names:
            return self.command
        words = (encoded(name) for name in (*_BASE_FIELDS, *names))
        return self.key, pack(b"HMGET", self.key, *words)

    def state(
        self,
        name: str,
        arguments: tuple[tuple[str, str], ...] | None,
        reply: object,
        names: Sequence[str] = (),
    ) -> State | None:
        """Return the state of a part of the group from a reply; None if it lacks a field.

        Args:
            name: name of the group.
            arguments: arguments of the call.
            reply: the reply to `read_command(names)`; one of another type counts as no fields.
            names: the fields that were read after `*`, `!` and `?`.
        """
        latest, known = self.latest
        if latest == reply and arguments is not None:
            return known
        fields = {}
        if isinstance(reply, list) and len(reply) == len(_BASE_FIELDS) + len(names):
            pairs = zip((*_BASE_FIELDS, *names), reply, strict=True)
            fields = {k: decoded(v) for k, v in pairs if isinstance(v, bytes)}
        self.shapes = fields.get(SHAPES, "")
        if self.shapes and not set(self.covering_fields(arguments)) <= set(names):
            return None
        state = stamps.state_of(Ref(name, arguments), fields)
        if arguments is not None and not self.shapes:
            self.latest = reply, state
        return state


class ExpectedGroups(NamedTuple):
    """The groups that are read with a record, replaced as a whole.

    Attributes:
        places: name -> its place among the groups, and the group.
        commands: the command that reads each group, in order.
    """

    places: Mapping[str, tuple[int, Group]]
    commands: tuple[Command, ...]


class FunctionGroups:
    """The groups that the entries of one function are expected to name.

    Attributes:
        expected: the groups that are read with each record.
        parts: entry -> the parts of groups that it names, if more than the groups must be read.
        known: all groups.
        big: the latest record was big.
    """

    __slots__ = ("big", "expected", "known", "parts")

    def __init__(self, known: _BoundedTable[Group]) -> None:
        self.known = known
        self.expected = ExpectedGroups({}, ())
        self.parts: dict[str, tuple[GroupPart, ...]] = {}
        self.big = False

    def learn(self, parts: Sequence[GroupPart]) -> None:
        """Read the groups of this entry with every record from now on."""
        wanted = dict.fromkeys(name for name, _ in parts)
        both = dict.fromkeys((*self.expected.places, *wanted))
        chosen = both if len(both) <= GROUPS_PER_LOOKUP else wanted
        if len(chosen) > GROUPS_PER_LOOKUP:
            return
        places = {name: (place, self.known[name]) for place, name in enumerate(chosen)}
        commands = tuple(group.command for _, group in places.values())
        self.expected = ExpectedGroups(places, commands)

    def states(
        self,
        entry: str,
        expected: ExpectedGroups,
        replies: Sequence[object],
        parts: Sequence[GroupPart],
    ) -> tuple[State, ...] | None:
        """Return the states of parts of groups from replies; None if they lack a field.

        Then the next lookup of the entry reads that field.
        It never raises, whatever a server has replied.

        Args:
            expected: the groups that the replies are about.
        """
        found = []
        for name, arguments in parts:
            known = expected.places.get(name)
            if known is None:
                self.learn(parts)
                if name not in self.expected.places:
                    self._remember(entry, parts)
                return None
            place, group = known
            state = group.state(name, arguments, replies[place])
            if state is None:
                self._remember(entry, parts)
                return None
            found.append(state)
        return tuple(found)

    def _remember(self, entry: str, parts: Sequence[GroupPart]) -> None:
        if len(self.parts) >= MAX_KNOWN_GROUPS:
            self.parts.clear()
        self.parts[entry] = tuple(map(normalize_part, parts))


def normalize_part(part: GroupPart) -> GroupPart:
    """Return a part of a group with tuples in place of other sequences, for comparison."""
    name, arguments = part
    return name, None if arguments is None else tuple(map(tuple, arguments))


class Lookups:
    """Lookups of records and groups in one Redis, and what is known of its functions and groups.

    Args:
        client: the client of that Redis.
        namespace: in front of all names.
        prefix: in front of all keys.
        group_key: returns the key of a group.
    """

    def __init__(
        self, client: Client, namespace: str, prefix: bytes, group_key: Callable[[str], bytes]
    ) -> None:
        self._client = client
        self._namespace = f"{namespace}:"
        self._prefix = prefix
        self._groups = _BoundedTable(lambda name: Group(group_key(name)))
        self._functions = _BoundedTable(lambda _: FunctionGroups(self._groups))

    def key(self, name: str) -> bytes:
        """Return the key of an entry."""
        return self._prefix + name.removeprefix(self._namespace).encode()

    async def lookup(self, port: Port, name: str) -> Found | None:
        """Return the record under a name and the states of its groups, in one round trip."""
        lookup = RecordLookup(self._client, self._functions, name, self.key(name))
        if lookup.function.big:
            return lookup.parse_replies(await self._client.ask_each(port, lookup.commands))
        return await self._client.look_up(port, lookup.commands, parse=lookup.parse_replies)

    def start_lookup(self, port: Port, name: str) -> RecordLookup | None:
        """Like `lookup`, but a plain function; None if that needs a coroutine."""
        lookup = RecordLookup(self._client, self._functions, name, self.key(name))
        if lookup.function.big:
            return None
        lookup.answer = self._client.start_lookup(port, lookup.commands)
        return None if lookup.answer is None else lookup

    def prepare_lookup(self, name: str, refs: Sequence[Ref] = ()) -> RecordLookup | None:
        """Like `start_lookup`, not sent yet: `RecordLookup.send` or `RedisLeases.acquire` does."""
        lookup = RecordLookup(self._client, self._functions, name, self.key(name), refs)
        return None if lookup.function.big else lookup

    def start_reading(self, port: Port, parts: Sequence[GroupPart]) -> StatesLookup | None:
        """Like `read`, but a plain function; None if that needs a coroutine."""
        lookup = StatesLookup(self._client, StatesQuery(self._groups, parts))
        return lookup if lookup.send(port) else None

    async def read(self, port: Port, refs: Sequence[Ref]) -> list[State]:
        """Read refs: one round trip, one more where parts were invalidated lately.

        Raises:
            TierError: they cannot be read.
        """
        for _ in range(STATE_READ_ATTEMPTS):
            query = StatesQuery(self._groups, refs)
            if not query.commands:
                return []
            states = await self._client.look_up(port, query.commands, parse=query.states)
            if states is not None:
                return list(states)
        raise TierError("the generations in Redis change faster than they can be read")


class RecordLookup:
    """A lookup of a record and of the groups that it is likely to name.

    Args:
        client: the client of that Redis.
        functions: the groups that entries of each function are likely to name.
        name, key: the name of the entry, and its key in Redis.
        refs: refs to read with it; none: those that the record is likely to name.

    Attributes:
        answer: see `memo.stores.protocols.Lookup`.
        function: the groups of the entry's function.
    """

    __slots__ = (
        "_client",
        "_expected",
        "_key",
        "_name",
        "_parts",
        "_query",
        "answer",
        "function",
        "refs",
    )

    def __init__(
        self,
        client: Client,
        functions: _BoundedTable[FunctionGroups],
        name: str,
        key: bytes,
        refs: Sequence[Ref] = (),
    ) -> None:
        self._client = client
        self._name = name
        self._key = key
        self.function = function = functions[name.rpartition(":")[0]]
        self.refs = refs
        self.answer: Any = None
        self._parts = tuple(refs) or (function.parts.get(name) if function.parts else None)
        self._expected = function.expected
        self._query = None if self._parts is None else StatesQuery(function.known, self._parts)

    @property
    def commands(self) -> tuple[Command, ...]:
        """The commands that it sends; made at each access, so that a waiting lookup stays small.

        The garbage collector looks at what 1,000 lookups in one gather hold: a fifth of a hit.
        """
        key = self._key
        get = key, b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key)
        others = self._expected if self._query is None else self._query
        return (get, *others.commands)

    def send(self, port: Port) -> bool:
        """See `memo.stores.protocols.Lookup`."""
        self.answer = self._client.start_lookup(port, self.commands)
        return self.answer is not None

    def found(self) -> Found | None:
        """See `memo.stores.protocols.Lookup`."""
        return self._client.parse_answer(self.parse_replies, self.answer)

    def states(self) -> tuple[State, ...] | None:
        """Return the states of `refs`; None if the replies lack a field."""
        return self._client.parse_answer(self._parse_states, self.answer)

    def _parse_states(self, replies: list[Any]) -> tuple[State, ...] | None:
        return None if self._query is None else self._query.states(replies[1:])

    def parse_replies(self, replies: list[Any]) -> Found | None:
        """Return the record among the replies, with `states_of` for the groups among them."""
        record, *others = replies
        if record is None:
            return None
        if not isinstance(record, bytes):
            raise TypeError("not bytes")
        function = self.function
        function.big = len(record) > LONE_RECORD_BYTES
        if self._query is None:
            states_of = partial(function.states, self._name, self._expected, others)
        else:
            states_of = partial(self._states_of, self._query, others)
        return Found(record, states_of=states_of)

    def _states_of(
        self, query: StatesQuery, replies: list[Any], parts: Sequence[GroupPart]
    ) -> tuple[State, ...] | None:
        if self._parts != tuple(map(normalize_part, parts)):
            self.function.parts.pop(self._name, None)
            return None
        return query.states(replies)


class StatesLookup:
    """A lookup of parts of groups.

    Attributes:
        answer: see `memo.stores.protocols.Lookup`.
    """

    __slots__ = ("_client", "_query", "answer")

    def __init__(self, client: Client, query: StatesQuery) -> None:
        self._client = client
        self._query = query
        self.answer: Any = None

    def send(self, port: Port) -> bool:
        """See `memo.stores.protocols.Lookup`."""
        if self._query.commands:
            self.answer = self._client.start_lookup(port, self._query.commands)
        return self.answer is not None

    def found(self) -> tuple[State, ...] | None:
        """See `memo.stores.protocols.Lookup`."""
        return self._client.parse_answer(self._query.states, self.answer)


class StatesQuery:
    """The commands that read some parts of groups, and the parser of their replies."""

    __slots__ = ("_parts", "commands")

    def __init__(self, groups: _BoundedTable[Group], parts: Sequence[GroupPart]) -> None:
        places: dict[Command, int] = {}
        self._parts = []
        for name, arguments in parts:
            group = groups[name]
            fields = group.covering_fields(arguments) if group.shapes else ()
            place = places.setdefault(group.read_command(fields), len(places))
            self._parts.append((name, arguments, group, fields, place))
        self.commands = tuple(places)

    def states(self, replies: list[Any]) -> tuple[State, ...] | None:
        """Return the states of the parts; None if the replies lack a field."""
        found = []
        for name, arguments, group, fields, place in self._parts:
            state = group.state(name, arguments, replies[place], fields)
            if state is None:
                return None
            found.append(state)
        return tuple(found)


class _BoundedTable(dict[str, V]):
    """Functions or groups by name, created at first use; beyond `MAX_KNOWN_GROUPS` the oldest go.

    Args:
        make: creates one.
    """

    def __init__(self, make: Callable[[str], V]) -> None:
        self._make = make

    def __missing__(self, name: str) -> V:
        while len(self) >= MAX_KNOWN_GROUPS:
            self.pop(next(iter(self), ""), None)
        return self.setdefault(name, self._make(name))
