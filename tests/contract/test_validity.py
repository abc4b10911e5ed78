"""One table of invalidations and one of comparisons, for the rules and for every store alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from keepers import CUSTOM, KEEPERS, NO_SCRIPTS
from redis_records import record
from redis_server import RedisServer

from memo.records.stamp_types import LOST, CallStamp, FileStamp, Generation, Ref, State
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.reasons import (
    DEPENDENCY_CHANGED,
    EXPIRED,
    FILE_CHANGED,
    GENERATION_LOST,
    INVALIDATED,
)
from memo.validity import check, generations, stamps
from memo.validity.stamps import Turn, as_soft

EU, US = ("region", "e" * 16), ("region", "u" * 16)
Y23, Y24 = ("year", "3" * 16), ("year", "4" * 16)
F = "f:m:load"
PROBES = {
    "EU 2023": Ref(F, (EU, Y23)),
    "EU 2024": Ref(F, (EU, Y24)),
    "US 2024": Ref(F, (US, Y24)),
    "US": Ref(F, (US,)),
    "no arguments": Ref(F),
    "anything": Ref(F, None),
    "another group": Ref("t:sales"),
}
ALL_OF_F = set(PROBES) - {"another group"}
OF_F = Turn(F)
OF_EU, OF_2024 = Turn(F, (EU,)), Turn(F, (Y24,))
OF_EU_2024 = Turn(F, (EU, Y24))
MANY = [Turn(F, ((f"a{n}", "0" * 16),)) for n in range(generations.MAX_GROUP_SHAPES + 1)]
FULL = [Turn(F, (("region", f"{n:016}"),)) for n in range(stamps.MAX_GROUP_FIELDS - 3)]
"""Turns that fill a group to its limit, together with `*`, `!` and `?`."""

TURNS: dict[str, tuple[Sequence[Turn | list[Turn]], set[str]]] = {
    "the group": ([OF_F], ALL_OF_F),
    "one argument": ([OF_EU], {"EU 2023", "EU 2024", "anything"}),
    "two arguments": ([OF_EU_2024], {"EU 2024", "anything"}),
    "one call": ([OF_EU_2024._replace(whole=True)], {"EU 2024", "anything"}),
    "two one after the other": (
        [OF_EU, OF_2024],
        {"EU 2023", "EU 2024", "US 2024", "anything"},
    ),
    "the same twice": ([OF_EU, OF_EU], {"EU 2023", "EU 2024", "anything"}),
    "an argument that no call has": ([Turn(F, (("month", "m" * 16),))], {"anything"}),
    "part, then the group": ([OF_EU, OF_F], ALL_OF_F),
    "the group, then part": ([OF_F, OF_EU], ALL_OF_F),
    "another group": ([Turn("t:sales")], {"another group"}),
    "more shapes than a group may have": (MANY, ALL_OF_F),
    "more shapes at once than a group may have": ([MANY], ALL_OF_F),
    "two at once": ([[OF_EU, OF_2024]], {"EU 2023", "EU 2024", "US 2024", "anything"}),
    "part and the group at once": ([[OF_EU, OF_F]], ALL_OF_F),
    "the group and part at once": ([[OF_F, OF_EU]], ALL_OF_F),
    "two groups at once": (
        [[OF_EU_2024, Turn("t:sales")]],
        {"EU 2024", "anything", "another group"},
    ),
    "as many fields as a group may have": ([FULL], {"anything"}),
    "a field again in a full group": ([FULL, FULL[0]], {"anything"}),
    "more fields than a group may have": ([FULL, OF_EU], ALL_OF_F),
    "more fields at once than a group may have": ([[*FULL, OF_EU]], ALL_OF_F),
}
"""Invalidations one after the other, or several at once -> the `PROBES` that do not hold then."""


class Rules:
    """The rules over nothing but dictionaries."""

    def __init__(self) -> None:
        self.groups: dict[str, dict[str, str]] = {}

    async def stamp_states(self, port: Any, refs: list[Ref]) -> list[State]:
        for ref in refs:
            self.groups.setdefault(ref.group, {"*": stamps.token()})
        return await self.states(port, refs)

    async def states(self, port: Any, refs: list[Ref]) -> list[State]:
        return [stamps.state_of(ref, self.groups.get(ref.group, {})) for ref in refs]

    async def turn(self, port: Any, turns: list[Turn], note: str) -> None:
        for name, own in generations.by_group(turns).items():
            fields = self.groups.setdefault(name, {})
            change = generations.change_for_all(fields, own, note)
            self.groups[name] = generations.apply(fields, change)


@contextmanager
def _rules(directory: Path, server: RedisServer) -> Iterator[Any]:
    yield Rules()


ALL_KEEPERS = {"rules": _rules, **KEEPERS}


@pytest.fixture(params=ALL_KEEPERS)
def keeper(request: Any, tmp_path: Path, redis_server: RedisServer) -> Iterator[Any]:
    with ALL_KEEPERS[request.param](tmp_path, redis_server) as made:
        yield request.param, made


@pytest.mark.parametrize("case", TURNS)
def test_the_same_invalidation_breaks_the_same_entries_in_every_store(
    keeper: tuple[str, Any], case: str
) -> None:
    """Rules, memory, host file and Lua scripts agree.

    Without scripts Redis breaks the whole group; a store of get and set may break more, too.
    """
    name, store = keeper
    turns, expected = TURNS[case]
    refs = list(PROBES.values())
    before = drive(store.stamp_states(BLOCKING, refs))
    assert not check.why_changed(
        check.state_texts(before), check.state_texts(drive(store.states(BLOCKING, refs)))
    )
    for step in turns:
        drive(store.turn(BLOCKING, step if isinstance(step, list) else [step], "{}"))
    after = drive(store.states(BLOCKING, refs))
    pairs = zip(PROBES, before, after, strict=True)
    broken = {probe for probe, old, new in pairs if check.why_changed([old.text], [new.text])}
    if name == CUSTOM:
        bound = case.startswith("more ")  # it has no table, so no bound to one
        assert bound or expected <= broken | {"anything"}
        assert "another group" not in broken - expected
    elif name == NO_SCRIPTS:
        assert broken == expected | (ALL_OF_F if "anything" in expected else set())
    else:
        assert broken == expected


@pytest.mark.parametrize("case", ["the group", "one argument", "two arguments"])
def test_what_is_let_expire_is_told_from_what_is_invalidated(
    keeper: tuple[str, Any], case: str
) -> None:
    """A soft turn gives the reason `expired` with the time in its note, in every store."""
    name, store = keeper
    [turn], expected = TURNS[case]
    assert isinstance(turn, Turn)
    refs = list(PROBES.values())
    before = drive(store.stamp_states(BLOCKING, refs))
    drive(store.turn(BLOCKING, [as_soft(turn)], '{"at": 1234.567}'))
    after = drive(store.states(BLOCKING, refs))
    for probe, old, new in zip(PROBES, before, after, strict=True):
        reason = check.why_changed([old.text], [new.text])
        if name == NO_SCRIPTS:
            assert bool(reason) == (probe in ALL_OF_F)
        elif probe in expected - {"anything"}:
            assert isinstance(reason, check.Expired), (probe, reason)
            assert reason.at == 1_234_567_000_000
        elif name != CUSTOM:
            assert not isinstance(reason, check.Expired) or probe == "anything", (probe, reason)


def test_the_notes_of_an_entry_are_the_same_in_every_store(keeper: tuple[str, Any]) -> None:
    """The notes of the invalidations that affect an entry, with the field of each; no others."""
    name, store = keeper
    if name == "rules":
        pytest.skip("it has no notes of its own")
    drive(store.stamp_states(BLOCKING, [*PROBES.values()]))
    ref = Ref(F, (EU, Y23))
    assert drive(store.notes(BLOCKING, ref)) == []
    drive(store.turn(BLOCKING, [OF_F], "all"))
    if name != NO_SCRIPTS:
        drive(store.turn(BLOCKING, [OF_EU], "mine"))
        drive(store.turn(BLOCKING, [Turn(F, (US,))], "other"))
    expected = [("*", "all"), ("region=" + EU[1], "mine")]
    assert drive(store.notes(BLOCKING, ref)) == expected[: 1 if name == NO_SCRIPTS else 2]


@pytest.mark.parametrize("name", ["redis", NO_SCRIPTS])
def test_no_group_in_redis_lives_shorter_than_its_entries(
    name: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    """Neither an invalidation, nor a new process, nor an entry with a shorter ttl shortens it."""
    client = redis_server.client()
    month = 30 * 86_400
    refs = [Ref(F), Ref("t:sales")]
    groups = [f"memo:2:g:{{{ref.group}}}" for ref in refs]

    def least() -> int:
        return min(map(client.ttl, groups))

    with KEEPERS[name](tmp_path, redis_server) as tier:
        states = drive(tier.stamp_states(BLOCKING, refs))
        assert 0 < least() <= 86_400
        for group in groups:
            client.expire(group, month)
        drive(tier.turn(BLOCKING, [OF_EU, Turn("t:sales")], "{}"))
        assert least() > month - 60
        drive(tier.turn(BLOCKING, [Turn("t:new")], "{}"))
        assert 0 < client.ttl("memo:2:g:{t:new}") <= generations.TOMBSTONE_SECONDS
    with KEEPERS[name](tmp_path, redis_server) as tier:
        stored = record(*map(Generation, refs, states))
        drive(tier.store(BLOCKING, "memo:k", stored, None, 5))
        assert least() > month - 60
    with KEEPERS[name](tmp_path, redis_server) as tier:
        drive(tier.stamp_states(BLOCKING, refs))
        assert least() > month - 60
        stored = record(*map(Generation, refs, states))
        drive(tier.store(BLOCKING, "memo:k", stored, None, 2 * month))
        assert least() > 2 * month


A, B, C = "a" * 16, "b" * 16, "c" * 16
SOFT = f"|~=:{stamps.token_for(Turn(F, ((stamps.SOFT, ''),)), '')}"


@pytest.mark.parametrize(
    ("recorded", "present", "reason"),
    [
        ([], [], ""),
        ([A], [A], ""),
        ([A, B], [A, B], ""),
        ([A], [B], INVALIDATED),
        ([A, B], [A, C], INVALIDATED),
        ([A], [""], GENERATION_LOST),
        ([""], [""], GENERATION_LOST),
        ([A], [f"{A}|region=x:{B}"], INVALIDATED),
        ([A], [A + SOFT], EXPIRED),
        ([A, B], [A + SOFT, C], INVALIDATED),
        ([A, B], [A + SOFT, B], EXPIRED),
        ([A + SOFT], [A + SOFT], ""),
        ([A + SOFT], [A], INVALIDATED),
    ],
)
def test_one_comparison(recorded: list[str], present: list[str], reason: str) -> None:
    """The recorded state against the present one: the same verdict in every store."""
    assert check.why_changed(recorded, present) == reason
    pairs = zip(recorded, present, strict=True)
    assert all(check.is_unchanged(before, now) for before, now in pairs) is (reason == "")


def test_every_kind_of_stamp_is_asked(tmp_path: Path) -> None:
    """One stamp that does not hold is enough, whichever kind it is; expiry alone is told last."""
    path = tmp_path / "rates.csv"
    held = Generation(Ref(F), State(A, ""))
    missing = FileStamp(str(path), "1:2:3")

    def why(*some: Any, now: str = A) -> str:
        states = [State(now, "")] * sum(type(one) is Generation for one in some)
        return drive(check.why_invalid(BLOCKING, some, states))

    assert why(held) == ""
    assert why(held, missing) == FILE_CHANGED
    assert why(held, CallStamp("nobody#0", "digest")) == DEPENDENCY_CHANGED
    assert why(held, now=B) == INVALIDATED
    assert why(held, now=A + SOFT) == EXPIRED
    assert why(held, missing, now=A + SOFT) == FILE_CHANGED
    assert why(Generation(Ref(F), LOST), now="") == GENERATION_LOST
