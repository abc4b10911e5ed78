"""The promises of every store of generations: see `memo.stores.protocols.Generations` and `stamps`.

Every store passes them (`keepers`), but for what a store says that it cannot do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from keepers import CUSTOM, KEEPERS, NO_SCRIPTS
from ports import RUNNERS
from ports import run as run_process

from memo.records.stamp_types import LOST, Ref, State
from memo.validity import generations, stamps
from memo.validity.stamps import Turn

EU, US, Y24 = ("region", "e" * 16), ("region", "u" * 16), ("year", "2" * 16)
F = "f:module:load"
CALL_EU = Ref(F, (EU, Y24))
CALL_US = Ref(F, (US, Y24))
NOTE = '{"by": "me", "reason": "dataset"}'


PARTIAL = [name for name in KEEPERS if name != NO_SCRIPTS]
"""Keepers that can invalidate some arguments of a group."""
WITH_TABLE = [name for name in KEEPERS if name != CUSTOM]
"""Keepers that can list what a group has."""
PARTIAL_WITH_TABLE = [name for name in PARTIAL if name in WITH_TABLE]


@pytest.fixture(params=KEEPERS)
def keeper(request, tmp_path, redis_server) -> Iterator:
    with KEEPERS[request.param](tmp_path, redis_server) as keeper:
        yield keeper


@pytest.fixture(params=RUNNERS)
def run(request):
    return RUNNERS[request.param]


@pytest.fixture
def ask(keeper, run):
    """`ask.stamp_states(refs...)` and so on, over either port."""

    class Ask:
        def stamp_states(self, *refs):
            return run(lambda port: keeper.stamp_states(port, refs))

        def states(self, *refs):
            return run(lambda port: keeper.states(port, refs))

        def turn(self, *turns, note=NOTE):
            return run(lambda port: keeper.turn(port, turns, note))

        def notes(self, ref):
            return run(lambda port: keeper.notes(port, ref))

    return Ask()


def test_a_group_that_nobody_began_is_lost(ask):
    """A group without `*` reads as lost, for every ref."""
    assert ask.states(CALL_EU, Ref("n"), Ref("t:x", None)) == [LOST, LOST, LOST]


def test_begin_makes_what_is_missing_and_keeps_what_is_there(ask):
    """The first `stamp_states` gives each group a token; later ones and `states` read the same."""
    first = ask.stamp_states(CALL_EU, Ref("n"))
    assert all(len(state.text) == stamps.TOKEN_CHARACTERS for state in first)
    assert ask.stamp_states(CALL_EU, Ref("n")) == first
    assert ask.states(CALL_EU, Ref("n")) == first
    assert ask.states(CALL_US) == [first[0]]


def test_turning_a_group_changes_every_ref_of_it(ask):
    """An invalidation of a whole group is seen by all calls and by no other group."""
    eu, us, other = ask.stamp_states(CALL_EU, CALL_US, Ref("n"))
    ask.turn(Turn(F))
    now = ask.states(CALL_EU, CALL_US, Ref("n"))
    assert now[0].text not in ("", eu.text)
    assert now[1].text not in ("", us.text)
    assert now[2] == other


@pytest.mark.parametrize("keeper", PARTIAL, indirect=True)
def test_turning_some_arguments_changes_what_has_them_all(ask):
    """A partial invalidation is seen by the calls with these arguments, and by no other call."""
    eu, us = ask.stamp_states(CALL_EU, CALL_US)
    ask.turn(Turn(F, (EU,)))
    now_eu, now_us = ask.states(CALL_EU, CALL_US)
    assert now_eu.text != eu.text
    assert now_us.text == us.text
    ask.turn(Turn(F, (US, Y24), True))
    assert ask.states(CALL_EU)[0].text == now_eu.text
    assert ask.states(CALL_US)[0].text != now_us.text


def test_tokens_are_random():
    """No two processes make the same token, so that one that was lost never comes again."""
    code = "from memo.validity import stamps; print(*(stamps.token() for _ in range(1000)))"
    made = [*run_process(code).split(), *run_process(code).split()]
    assert len(set(made)) == 2000
    assert {len(token) for token in made} == {stamps.TOKEN_CHARACTERS}


def test_two_turns_of_the_same_arguments_differ(ask):
    """Each invalidation writes a fresh token."""
    ask.stamp_states(CALL_EU)
    seen = set()
    for _ in range(5):
        ask.turn(Turn(F, (EU,)))
        seen.add(ask.states(CALL_EU)[0].text)
    assert len(seen) == 5


@pytest.mark.parametrize("keeper", PARTIAL, indirect=True)
def test_last_tells_of_any_change_in_the_group(ask):
    """`last` and a ref on anything in the group change with each invalidation in it."""
    ask.stamp_states(CALL_EU)
    before, anything = ask.states(CALL_US, Ref(F, None))
    assert before.last == ""
    ask.turn(Turn(F, (EU,)))
    now, after = ask.states(CALL_US, Ref(F, None))
    assert now.last
    assert now.text == before.text
    assert after.text != anything.text


def test_turns_of_one_call_are_all_made(ask):
    """Several turns at once, of one group and of others, are all seen."""
    before = ask.stamp_states(CALL_EU, CALL_US, Ref("t:sales"), Ref("n"))
    ask.turn(Turn(F, (EU,)), Turn(F, (US,)), Turn("t:sales"))
    after = ask.states(CALL_EU, CALL_US, Ref("t:sales"), Ref("n"))
    assert [a.text == b.text for a, b in zip(after, before, strict=True)] == [False] * 3 + [True]


def test_a_turn_before_the_first_begin_revives_nothing(ask):
    """Turning a group that was never begun leaves it sound: begun entries hold until the turn."""
    ask.turn(Turn(F, (EU,)))
    state = ask.stamp_states(CALL_EU)
    assert state[0].text
    assert ask.states(CALL_EU) == state
    ask.turn(Turn(F, (EU,)))
    assert ask.states(CALL_EU) != state


@pytest.mark.parametrize("keeper", PARTIAL_WITH_TABLE, indirect=True)
def test_notes_say_who_and_why(ask):
    """The notes of a ref are those of the invalidations that it saw."""
    ask.stamp_states(CALL_EU)
    assert ask.notes(CALL_EU) == []
    ask.turn(Turn(F), note='{"n": 1}')
    ask.turn(Turn(F, (EU,)), note='{"n": 2}')
    ask.turn(Turn(F, (US,)), note='{"n": 3}')
    assert dict(ask.notes(CALL_EU)) == {"*": '{"n": 1}', f"region={EU[1]}": '{"n": 2}'}
    assert len(ask.notes(Ref(F, None))) == 3
    assert ask.notes(Ref("t:none")) == []


@pytest.mark.parametrize("keeper", PARTIAL_WITH_TABLE, indirect=True)
def test_a_group_past_its_bound_is_renewed(ask):
    """Past the bound on fields all of them go and `*` turns, so that nothing comes back to life."""
    states = {ask.stamp_states(CALL_EU)[0].text}
    stars = {next(iter(states))[: stamps.TOKEN_CHARACTERS]}
    for first in range(0, stamps.MAX_GROUP_FIELDS + 512, 256):
        numbers = range(first, first + 256)
        ask.turn(*(Turn(F, (("region", f"{number:016d}"),)) for number in numbers))
        stars.add(ask.states(CALL_EU)[0].text[: stamps.TOKEN_CHARACTERS])
    assert len(stars) == 2
    ask.turn(Turn(F, (EU,)))
    assert "|" in ask.states(CALL_EU)[0].text


@pytest.mark.parametrize("keeper", WITH_TABLE, indirect=True)
def test_a_group_with_too_many_shapes_is_renewed(ask):
    """The shapes that each reader must look at are bounded."""
    ref = Ref(F, tuple((f"a{n:03}", "0" * 16) for n in range(100)))
    first = ask.stamp_states(ref)[0].text
    for pair in ref.arguments:
        ask.turn(Turn(F, (pair,)))
    text = ask.states(ref)[0].text
    assert text[: stamps.TOKEN_CHARACTERS] != first
    assert text.count("|") <= generations.MAX_GROUP_SHAPES


def test_threads_agree_on_a_fresh_token(keeper):
    """However many begin a group at once, all of them read the same token."""
    seen, barrier = [], threading.Barrier(8)

    def begin():
        barrier.wait()
        seen.append(RUNNERS["blocking"](lambda port: keeper.stamp_states(port, [CALL_EU])))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(states) for states in seen}) == 1


@pytest.mark.parametrize("old", [{}, {"*": "s" * 16}, {"*": "s" * 16, "?": "region"}])
@pytest.mark.parametrize(
    "now",
    [
        State("n" * 16, ""),
        State("n" * 16, "l" * 16),
        State("n" * 16 + f"|region={EU[1]}:" + "t" * 16, "l" * 16),
        State("", ""),
    ],
)
@pytest.mark.parametrize("extra", [{}, {f"region={EU[1]}": "o" * 16, "!": "o" * 16}])
def test_what_was_learned_reads_the_same(old, now, extra):
    """Learning an authority's state makes the ref read exactly that state."""
    fields = {**old, **extra}
    change = generations.change_to_learn(fields, CALL_EU, now)
    assert stamps.state_of(CALL_EU, generations.apply(fields, change)) == now
    again = generations.change_to_learn(generations.apply(fields, change), CALL_EU, now)
    assert again.empty


def test_a_group_can_learn_up_to_its_limit():
    """A full group learns new states of its fields; with one field more it is lost as a whole."""
    now = State("n" * 16 + f"|region={EU[1]}:" + "t" * 16, "l" * 16)
    names = [f"region={number:016}" for number in range(stamps.MAX_GROUP_FIELDS - 3)]
    other = {"*": "n" * 16, "!": "l" * 16, "?": "region", **dict.fromkeys(names, "o" * 16)}
    full = {**other, f"region={EU[1]}": "o" * 16}
    del full[names[0]]
    learned = generations.apply(full, generations.change_to_learn(full, CALL_EU, now))
    assert stamps.state_of(CALL_EU, learned) == now
    assert generations.apply(other, generations.change_to_learn(other, CALL_EU, now)) == {}
