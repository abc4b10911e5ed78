"""Elements: a call over a collection, cached element by element (`each`).

Rules of this module:

1.  The entry of an element is that of a call with this element alone in place of the collection.
    So its key, address, tags and dependencies do not depend on the type of the collection or on
    its other elements.
2.  All missing elements are computed in one run of the function, over a collection of the same
    type.
3.  A call first leads the flights of all elements that are not being computed, runs, and only
    then waits for the others.  So two overlapping calls compute no element twice and never wait
    for each other.  With `use_lock` it never waits for a lease while it holds one.
4.  What the function returns is split at once and assembled again for every answer, so an answer
    looks the same whether it was computed or not.
5.  A result that cannot be split reaches its caller, with one warning, and is not stored.
"""

from __future__ import annotations

import copy
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any, cast

from memo.engine import computing, never_hits
from memo.engine.answering import (
    LOOK_UP_AGAIN,
    adopt_findings,
    answer_from_flight,
    at_hand,
    emit_hit,
    excluded_from_own_time,
    fall_back,
    look_up,
    settled,
    stored_by_another,
)
from memo.engine.call import NOTHING, Function, Job, Raised, emit, error_text, read_live
from memo.engine.computing import (
    AT_ONCE,
    BeforeRun,
    Run,
    before_run,
    close_flight,
    failed_result,
    invoke,
    prepare_result,
    run_once,
    store_prepared,
    warn_not_stored,
)
from memo.engine.coordination.flights import FLIGHTS, Flight, FlightResult
from memo.engine.coordination.leases import Hold, hold, until_over
from memo.engine.loading import look_and_load
from memo.engine.refreshing import revalidate
from memo.engine.replay import Wrapped
from memo.engine.used_calls import record_entry, record_flight_result, record_stamps
from memo.errors import DependencyError, OptionError, shown, type_named
from memo.keys.bindings import ABSENT
from memo.keys.call_keys import Call, Keyer
from memo.runtime import events, reasons
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port, Waiter, together
from memo.stores.chain import Answer
from memo.stores.protocols import Asked
from memo.validity.check import MISS, Verdict

_PLAIN = (list, tuple, set, frozenset)


# --- collections ----------------------------------------------------------------------------------


class Collection(NamedTuple):
    """The collection of elements in a call.

    Attributes:
        items: the elements in the caller's order.
        chosen: returns a collection of the same type with the items at given positions.
    """

    items: list[Any]
    chosen: Callable[[Sequence[int]], Any]


class Each:
    """The parameter that holds the collection.

    Raises:
        OptionError: the function has no such parameter, or it is `*args` or `**kwargs`.
    """

    def __init__(self, name: str, keyer: Keyer) -> None:
        self.name = name
        self._keyer = keyer
        plan = keyer.plan
        if name not in (*plan.positional, *plan.keyword):
            known = ", ".join((*plan.positional, *plan.keyword)) or "none"
            raise OptionError(
                "each", name, f"is not a parameter of its own; the parameters are: {known}."
            )
        keyer.check_names("each", [name])

    def taken(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the parameter's value in a call with valid arguments."""
        value = self.found(args, kwargs)
        return self._keyer.plan.defaults[self.name] if value is ABSENT else value

    def found(self, args: Sequence[Any], kwargs: Mapping[str, Any], own: int = 0) -> Any:
        """Return the parameter's value in some arguments, or `ABSENT`.

        Args:
            own: number of leading positional arguments that are left out, such as `self`.
        """
        place = self._place()
        if place is not None and place - own < len(args):
            return args[place - own]
        return kwargs.get(self.name, ABSENT)

    def put(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any, own: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with another value for the parameter."""
        place = self._place()
        if place is not None and place - own < len(args):
            at = place - own
            return (*args[:at], value, *args[at + 1 :]), dict(kwargs)
        return args, {**kwargs, self.name: value}

    def _place(self) -> int | None:
        """Return the parameter's position, counting `self`; None if it is keyword-only."""
        positional = self._keyer.plan.positional
        if self.name not in positional:
            return None
        return positional.index(self.name) + self._keyer.method

    def opened(self, value: Any) -> Collection:
        """Return the items of a collection.

        Raises:
            OptionError: it is not a collection that can be split and rebuilt.
        """
        kind = type(value)
        if kind in _PLAIN:
            items = list(value)
            return Collection(items, lambda at: kind([items[i] for i in at]))
        if kind is range or isinstance(value, (type({}.keys()), type({}.values()))):
            items = list(value)
            return Collection(items, lambda at: [items[i] for i in at])
        library = kind.__module__.partition(".")[0]
        if library in ("numpy", "pandas") and getattr(value, "ndim", 0) == 1:
            series = hasattr(value, "iloc")
            dated = getattr(value.dtype, "kind", "O") in "mM" and library == "numpy"
            items = list(value) if dated else value.tolist()
            return Collection(items, lambda at: value.iloc[list(at)] if series else value[list(at)])
        fix = (
            f"is {type_named(kind)}; each= takes a list, tuple, set, frozenset, range, "
            "numpy array, or pandas Index or Series."
        )
        raise OptionError(self.name, value, fix)

    def is_collection(self, value: Any) -> bool:
        """True if a value is a collection of elements rather than one element."""
        with suppress(OptionError):
            self.opened(value)
            return True
        return False


# --- answers --------------------------------------------------------------------------------------


class Part(Wrapped):
    """The result for one element, as it is stored.

    Attributes:
        value: the result; None if there is none.
        kind: `LIST`, `TUPLE`, `DICT` or `TABLE`: what the function returned as a whole.
        there: the function returned something for this element.
    """

    __slots__ = ("kind", "there")

    def __init__(self, kind: str, value: Any, there: bool = True) -> None:
        self.kind = kind
        self.value = value
        self.there = there

    def __reduce__(self) -> Any:
        return Part, (self.kind, self.value, self.there)

    def __repr__(self) -> str:
        """Omit the value: it may be secret or long."""
        return f"<Part of a {self.kind}>"


LIST, TUPLE, DICT, TABLE = "list", "tuple", "dict", "table"


class UnfitError(Exception):
    """The result of a function cannot be split by element, or cannot be assembled again."""


def divided(answer: Any, elements: Sequence[Any], name: str) -> list[Part]:
    """Split the result of a function into one part for each element.

    Args:
        name: the parameter that holds the elements.

    Raises:
        UnfitError: it cannot be split.
    """
    if isinstance(answer, (list, tuple)):
        if len(answer) != len(elements):
            raise UnfitError(f"has {len(answer)} results for {len(elements)} elements")
        kind = TUPLE if isinstance(answer, tuple) else LIST
        return [Part(kind, value) for value in answer]
    try:
        if isinstance(answer, dict):
            _refuse_others(answer, elements, name)
            return [
                Part(DICT, answer[one]) if one in answer else Part(DICT, None, False)
                for one in elements
            ]
        if type(answer).__module__.partition(".")[0] == "pandas" and hasattr(answer, "iloc"):
            at: dict[Any, list[int]] = {}
            for position, label in enumerate(answer.index.get_level_values(0).tolist()):
                at.setdefault(label, []).append(position)
            _refuse_others(at, elements, name)
            return [Part(TABLE, answer.iloc[at.get(one, [])], one in at) for one in elements]
    except TypeError as error:
        raise UnfitError(f"cannot be divided by element: {error}") from None
    raise UnfitError("cannot be divided by element")


def _refuse_others(labels: Iterable[Any], elements: Sequence[Any], name: str) -> None:
    """Refuse a result with a label that is not an element, since that part would be lost."""
    known = set(elements)
    other = next((label for label in labels if label not in known), ABSENT)
    if other is not ABSENT:
        raise UnfitError(f"has the key {shown(other)}, which is no element of `{name}`")


def assembled(items: Sequence[Any], parts: Sequence[Part]) -> Any:
    """Assemble an answer in the order of the items; in a list, a repeated item is repeated.

    Raises:
        UnfitError: the function has returned results of different kinds.
    """
    kinds = {part.kind for part in parts}
    if kinds == {LIST}:
        return [part.value for part in parts]
    if kinds == {TUPLE}:
        return tuple([part.value for part in parts])
    if kinds == {DICT}:
        pairs = zip(items, parts, strict=True)
        return {item: part.value for item, part in pairs if part.there}
    if kinds == {TABLE}:
        return _one_table(list({id(part): part.value for part in parts}.values()))
    raise UnfitError(f"was a {' and a '.join(sorted(kinds))} for different elements")


def _one_table(tables: list[Any]) -> Any:
    """Concatenate several tables; empty ones contribute nothing, not even to the column types."""
    filled = [table for table in tables if len(table)]
    if len(filled) <= 1:
        return filled[0] if filled else tables[0]
    if len({type(table) for table in filled}) > 1:
        raise UnfitError("was a DataFrame and a Series for different elements")
    return sys.modules["pandas"].concat(filled)


# --- one call over a collection -------------------------------------------------------------------


class Place:
    """One element of a call in progress.

    Attributes:
        at: its first position in the collection.
        job: the call with this element alone.
        asked: the query to the shared tier that was made for it; None if there is none, or it is
            used up.
        since: `FLIGHTS.ended` before it was looked up.
        missed: it was looked up, and a miss was emitted.
    """

    __slots__ = ("asked", "at", "flight", "found", "job", "missed", "since")

    flight: Flight

    def __init__(self, at: int, job: Job) -> None:
        self.at = at
        self.job = job
        self.asked: Asked | None = None
        self.since = 0
        self.missed = False
        self.found = Answer(Verdict(MISS, reasons.ABSENT))

    @property
    def text(self) -> str:
        return self.job.call.text


class Batch:
    """A call over a collection.

    Attributes:
        function: the function of the call; its `run` takes the whole collection.
        items: the elements in the caller's order.
        keys: the keys of the items, in the same order.
        places: by key, in the order of their first positions.
        parts: the results known so far, by key.
        keep: store what is computed.
        whole: a result over the whole collection that cannot be split; `NOTHING` if there is none.
    """

    def __init__(
        self, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.each = each
        self.args = args
        self.kwargs = kwargs
        self.collection = each.opened(each.taken(args, kwargs))
        self.items = self.collection.items
        self.keys: list[str] = []
        self.places: dict[str, Place] = {}
        self.parts: dict[str, Part] = {}
        self.keep = True
        self.whole: Any = NOTHING

    def make_keys(self) -> None:
        """Make the key of each element."""
        chain = self.function.chain()
        for at, item in enumerate(self.items):
            args, kwargs = self.each.put(self.args, self.kwargs, item)
            call = self.function.keyer.call(args, kwargs)
            self.keys.append(call.text)
            if call.text not in self.places:
                self.places[call.text] = Place(at, Job(self.function, chain, call, args, kwargs))

    def run_for(self, places: Sequence[Place]) -> Job:
        """Return the call of the function over the elements at some places."""
        chosen = self.collection.chosen([place.at for place in places])
        args, kwargs = self.each.put(self.args, self.kwargs, chosen)
        first = places[0].job
        return Job(first.function, first.chain, first.call, args, kwargs)

    def alone(self, place: Place) -> Job:
        """A job that computes one element by itself, for a refresh in the background."""
        function = copy.copy(self.function)
        run, chosen = function.run, self.run_for([place])
        element, name = self.items[place.at], self.each.name

        def one(*_: Any, **__: Any) -> Any:
            answer = run(*chosen.args, **chosen.kwargs)
            if inspect.isawaitable(answer):
                return _later(answer, element, name)
            return divided(answer, [element], name)[0]

        function.run = one
        job = place.job
        return Job(function, job.chain, job.call, job.args, job.kwargs)

    def elements(self, places: Iterable[Place]) -> list[Any]:
        return [self.items[place.at] for place in places]

    def answer(self) -> Any:
        """Return the answer; all parts must be known."""
        return assembled(self.items, [self.parts[key] for key in self.keys])

    def warn(self, answer: Any, fault: UnfitError) -> None:
        """Warn that results of this kind cannot be cached by element."""
        fix = (
            f"return a list or tuple aligned with `{self.each.name}`, or a dict, DataFrame or "
            "Series by element"
        )
        warn_not_stored(self.function, answer, str(fault), fix)


async def _later(answer: Any, element: Any, name: str) -> Part:
    return divided(await answer, [element], name)[0]


async def batch(
    port: Port, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Batch:
    """Return a call over a collection, with its keys made."""
    function.keyer.check_call(args, kwargs)
    await read_live(port, function)
    made = await _keyed(port, Batch(function, each, args, kwargs))
    if made.places and await adopt_findings(port, next(iter(made.places.values())).job):
        made = await _keyed(port, Batch(function, each, args, kwargs))
    return made


async def _keyed(port: Port, made: Batch) -> Batch:
    if len(made.items) > AT_ONCE:
        await port.offload(made.make_keys)
    else:
        made.make_keys()
    return made


async def answer(
    port: Port, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Answer a call over a collection; return its value, or `Raised`."""
    return await answer_batch(port, await batch(port, function, each, args, kwargs))


async def answer_batch(port: Port, made: Batch) -> Any:
    """Answer a call over a collection whose keys are made; return its value, or `Raised`."""
    with excluded_from_own_time():
        return await _answer(port, made)


async def _answer(port: Port, made: Batch) -> Any:
    if not made.items:
        return await _plainly(port, made)
    begun = time.perf_counter()
    pending = await _at_hand(port, made)
    while pending:
        pending = await _looked_up(port, made, pending, begun)
        led, joined, again = _joined(pending)
        try:
            ended = await _fly_and_wait(port, made, led, joined)
        finally:
            _part(*led, *joined)
        mine = {place.text for place in led}
        for place, result in ended:
            value = await _value_of(port, place, result, place.text in mine, begun)
            if value is NOTHING:
                return await _plainly(port, made)
            if type(value) is Raised:
                return value
            if value is LOOK_UP_AGAIN:
                again.append(place)
            else:
                made.parts[place.text] = value
        pending = again
    try:
        return made.answer()
    except UnfitError as fault:
        made.warn(next(iter(made.parts.values())).value, fault)
        return await _plainly(port, made)


def _part(*places: Place) -> None:
    """The call waits for the flights of some places no more."""
    for place in places:
        FLIGHTS.forget_wait(place.flight)


async def _value_of(
    port: Port, place: Place, result: FlightResult | None, leads: bool, begun: float
) -> Any:
    """Turn a result into a part, `Raised`, `LOOK_UP_AGAIN`, or `NOTHING` if the cache failed."""
    if result is None:
        return LOOK_UP_AGAIN
    if result.cache_failed:
        return NOTHING
    if not leads and result.error is None and result.encoded is None and result.valid:
        return LOOK_UP_AGAIN if result.entry is not None else NOTHING
    return await answer_from_flight(port, place.job, result, leads, begun)


async def _plainly(port: Port, made: Batch) -> Any:
    """Return the plain result of the function if it cannot be cached by element."""
    if made.whole is not NOTHING:
        record_stamps(None)
        return made.whole
    chain = made.function.chain()
    call = Call("", made.function.keyer, (), (), ())
    outcome = await invoke(port, Job(made.function, chain, call, made.args, made.kwargs))
    record_stamps(None)
    return outcome.value if outcome.error is None else Raised(outcome.error)


# --- looking up -----------------------------------------------------------------------------------


async def _at_hand(port: Port, made: Batch) -> list[Place]:
    """Answer elements in few round trips and without a coroutine each; return the other places."""
    function, left = made.function, []
    chain = function.chain()
    await chain.get_ready(port)
    with together():
        for place in made.places.values():
            place.since = FLIGHTS.ended
            begun = time.perf_counter()
            value = at_hand(lambda: port, function, place.job.call, begun)
            if type(value) is Part:
                made.parts[place.text] = value
                continue
            asked = value if type(value) is Asked else None
            place.asked = asked or chain.ask(port, function.id, place.text)
            left.append((place, asked, begun))
    pending = []
    for place, at_once, begun in left:
        if (asked := place.asked) is not None:
            asked.lookup.answer = await port.settle(asked.lookup.answer)
        if at_once is not None:
            value = settled(function, place.job.call, at_once, begun)
            if type(value) is Part:
                made.parts[place.text] = value
                continue
        if asked is not None and (asked.chain is not place.job.chain or asked.entry is not None):
            place.asked = None
        pending.append(place)
    return pending


async def _looked_up(
    port: Port, made: Batch, pending: Sequence[Place], begun: float
) -> list[Place]:
    """Look places up; return those that have to be computed."""
    left = []
    for place in pending:
        asked, place.asked = place.asked, None
        if asked is None:
            place.since = FLIGHTS.ended
        again = partial(made.alone, place)
        found, value = await look_up(
            *(port, place.job, begun, asked), shared=place.missed, refreshing=again
        )
        if value is not NOTHING:
            made.parts[place.text] = cast("Part", value)
            continue
        place.found = found
        if not place.missed:
            place.missed = True
            emit(place.job, events.MISS, reason=found.verdict.reason)
        left.append(place)
    return left


def _joined(pending: Sequence[Place]) -> tuple[list[Place], list[Place], list[Place]]:
    """Join the flights of places; return those led here, those to wait for, those to look up again.

    Raises:
        ReentryError: the computation of one of them runs around this call.
    """
    led: list[Place] = []
    joined: list[Place] = []
    again: list[Place] = []
    try:
        for place in pending:
            refs = place.job.call.refs
            flight, leads = FLIGHTS.join_since(place.job.name, refs, place.since)
            if flight is None:
                again.append(place)
                continue
            place.flight = flight
            (led if leads else joined).append(place)
    except BaseException:
        for place in led:
            FLIGHTS.abandon(place.flight)
        _part(*led, *joined)
        raise
    return led, joined, again


# --- waiting --------------------------------------------------------------------------------------


class _Shared:
    """Handle of a flight among several that one task computes.

    Cancelled once no flight is wanted.
    """

    def __init__(self, name: str, wanted: set[str]) -> None:
        self._name = name
        self._wanted = wanted
        self.handle: Handle | None = None

    def cancel(self) -> None:
        self._wanted.discard(self._name)
        if not self._wanted and self.handle is not None:
            self.handle.cancel()

    def dead(self) -> bool:
        return self.handle is not None and self.handle.dead()


async def _fly_and_wait(
    port: Port, made: Batch, led: list[Place], joined: list[Place]
) -> list[tuple[Place, FlightResult | None]]:
    """Compute what is led here, then wait for the rest; return each place with its result."""
    boarded: list[tuple[Flight, Waiter]] = []
    try:
        if led and port.native:
            boarded = _board(port, led)
            _spawn(port, made, led)
        elif led:
            await _fly(port, made, led)
        boarded += _board(port, joined)
        for flight, waiter in boarded:
            await until_over(port, flight, waiter)
    finally:
        for flight, waiter in boarded:
            FLIGHTS.remove_waiter(flight, waiter)
        for place in led:
            if place.flight.handle is None:
                FLIGHTS.abandon(place.flight)
    return [(place, place.flight.result) for place in (*led, *joined)]


def _board(port: Port, places: Sequence[Place]) -> list[tuple[Flight, Waiter]]:
    return [(place.flight, FLIGHTS.add_waiter(place.flight, port)) for place in places]


def _spawn(port: Port, made: Batch, led: list[Place]) -> None:
    """Compute in a task of its own, which runs as long as a caller waits for an element."""
    flights = [place.flight for place in led]
    wanted = {flight.name for flight in flights}
    shares = [_Shared(flight.name, wanted) for flight in flights]
    for flight, share in zip(flights, shares, strict=True):
        flight.handle = share

    def ended() -> None:
        for flight in flights:
            FLIGHTS.abandon(flight)

    handle = port.spawn(lambda port: _fly(port, made, led), f"memo-{made.function.id}", ended)
    for share in shares:
        share.handle = handle


# --- computing ------------------------------------------------------------------------------------


async def _fly(port: Port, made: Batch, led: list[Place]) -> None:
    """Compute the elements that are led here, and end their flights in any case."""
    fault = False
    try:
        await _leased(port, made, led)
    except Exception as error:  # an error of memo: the user's are in the results
        emit(led[0].job, events.ERROR, reason="engine", detail=error_text(error))
        fault = True
    finally:
        for place in led:
            if not place.flight.over:
                FLIGHTS.finish(place.flight, FlightResult(cache_failed=True) if fault else None)


async def _leased(port: Port, made: Batch, led: list[Place]) -> None:
    """Compute what no other process computes, in as few runs as possible.

    Elements that others compute are waited for one at a time, and only while no lease is held here.
    """
    policy = made.function.policy
    if not policy.use_lock:
        await _land(port, await _compute(port, made, led))
        return
    limit = policy.lock_timeout
    end = None if limit is None else time.monotonic() + limit
    left = led
    while left:
        async with AsyncExitStack() as leases:  # releases all of them in any case
            held = await _try_all(port, left, leases)
            if not held:
                await _wait_for_one(port, left[0], end, held, leases)
            late = end is not None and time.monotonic() >= end
            flight_results = await _compute_missing(port, made, left, held, late=late)
        await _land(port, flight_results)
        left = [place for place in left if not place.flight.over]


async def _compute_missing(
    port: Port, made: Batch, left: Sequence[Place], held: Mapping[str, Hold], *, late: bool
) -> list[tuple[Place, FlightResult | None]]:
    """Compute the elements whose leases are held here, unless another process has stored them.

    Args:
        late: the lock timeout has passed, so compute the others as well.
    """
    flight_results: list[tuple[Place, FlightResult | None]] = []
    wanted: list[Place] = []
    for place in left:
        one = held.get(place.text)
        if one is not None and await stored_by_another(port, place.job, one, place.found):
            flight_results.append((place, None))
        elif one is not None or late:
            wanted.append(place)
    if wanted:
        flight_results += await _compute(port, made, wanted)
    return flight_results


async def _land(port: Port, flight_results: Sequence[tuple[Place, FlightResult | None]]) -> None:
    """End the flights of these places."""
    for place, result in flight_results:
        ended = result
        if result is not None and not result.cache_failed:
            ended = await close_flight(port, place.job, place.flight, result)
        FLIGHTS.finish(place.flight, ended)


async def _try_all(port: Port, places: Sequence[Place], leases: AsyncExitStack) -> dict[str, Hold]:
    """Take the leases that are free, and return them."""
    held: dict[str, Hold] = {}
    for place in places:
        await _take(port, place, None, held, leases)
    return held


async def _wait_for_one(
    port: Port, place: Place, end: float | None, held: dict[str, Hold], leases: AsyncExitStack
) -> None:
    """Wait for the lease of one place, until it is released or the lock timeout has passed."""
    left = float("inf") if end is None else max(0.0, end - time.monotonic())
    await _take(port, place, left, held, leases)


async def _take(
    port: Port, place: Place, wait: float | None, held: dict[str, Hold], leases: AsyncExitStack
) -> None:
    """Take a lease if it is free or becomes free within `wait` seconds; None: do not wait."""
    job, policy = place.job, place.job.function.policy
    if wait is not None:
        policy = policy._replace(lock_timeout=None if wait == float("inf") else wait)
    one = await hold(
        *(port, job.chain, job.name, policy, place.flight),
        refresh=wait is None,
        expected=job.function.last_duration,
    )
    if one is not None and (one.mine or wait is not None):
        held[place.text] = one
        leases.push_async_callback(_free, port, one, job)


async def _free(port: Port, one: Hold, job: Job) -> None:
    await one.release(port, job.chain.uploads.get(job.name))


async def _compute(
    port: Port, made: Batch, places: list[Place]
) -> list[tuple[Place, FlightResult | None]]:
    """Run the function once over some elements and store each result; return the results.

    Elements whose inputs come back equal are confirmed instead of computed.
    """
    renewed: list[tuple[Place, FlightResult | None]] = []
    for place in places:
        if place.found.verdict.renewable:
            result = await revalidate(port, place.job, place.flight, place.found)
            renewed += [] if result is None else [(place, result)]
    done = {place.text for place, _ in renewed}
    left = [place for place in places if place.text not in done]
    return [*renewed, *(await _computed(port, made, left) if left else ())]


async def _computed(
    port: Port, made: Batch, places: list[Place]
) -> list[tuple[Place, FlightResult | None]]:
    """As `_compute`, without confirming any element."""
    try:
        before = await before_run(port, [place.job for place in places])
    except DependencyError as missing:
        return [(place, FlightResult(error=missing)) for place in places]
    never_hits.notice(places[0].job)
    ran = await _run(port, made, places)
    if ran.outcome.error is not None:
        return await _failed(port, places, before, ran)
    try:
        parts = divided(ran.outcome.value, made.elements(places), made.each.name)
    except UnfitError as unfit:
        made.warn(ran.outcome.value, unfit)
        if len(places) == len(made.items):
            made.whole = ran.outcome.value
        return [(place, FlightResult(cache_failed=True)) for place in places]
    share = ran._replace(cost=ran.cost / len(places))
    ready = []
    for place, part, one in zip(places, parts, before, strict=True):
        emit(place.job, events.COMPUTED, seconds=share.cost)
        ready.append(
            await prepare_result(port, place.job, place.flight, part, one, share, keep=made.keep)
        )
    return list(zip(places, await store_prepared(port, ready), strict=True))


async def _run(port: Port, made: Batch, places: Sequence[Place]) -> Run:
    """Run the function once for some elements."""
    whole = made.run_for(places)
    lead = Flight(whole.name, (), background=False)
    for place in places:  # a run that asks for one of its own elements is refused
        place.flight.call = place.job.call
        place.flight.waits.append(lead)
    try:
        return await run_once(port, whole, lead)
    finally:
        lead.over = True


async def _failed(
    port: Port, places: Sequence[Place], before: Sequence[BeforeRun], ran: Run
) -> list[tuple[Place, FlightResult | None]]:
    """Return the results of a run that raised: old values, where they still may answer."""
    flight_results: list[tuple[Place, FlightResult | None]] = []
    emit(places[0].job, events.FAILED, reason=ran.outcome.raised, seconds=ran.cost)
    for place, one in zip(places, before, strict=True):
        result = await failed_result(port, place.job, one, ran)
        if place.found.verdict.fallback and place.found.entry is not None:
            result = await fall_back(port, place.job, place.found, result)
        flight_results.append((place, result))
    return flight_results


# --- the other methods of a decorated function ----------------------------------------------------


async def only(port: Port, made: Batch) -> Any:
    """Return the answer if every element may be used now.

    Else `Raised`, or the first other place.
    """
    begun = time.perf_counter()
    for place in made.places.values():
        found, value = await look_and_load(port, place.job)
        if value is NOTHING:
            emit(place.job, events.MISS, reason=found.verdict.reason)
            return place
        emit_hit(place.job, found, begun, shared=False)
        made.parts[place.text] = value
    return made.answer()


async def peek(port: Port, made: Batch, default: Any) -> Any:
    """Return the answer if every element is stored and may be used now, else `default`."""
    if not made.items:
        return default
    for place in made.places.values():
        found, value = await look_and_load(port, place.job)
        if value is NOTHING:
            return default
        assert found.entry is not None
        place.job.chain.latest_answers.record(place.text, found.entry.times.started)
        record_entry(place.job.function, place.job.chain, place.job.call, found.entry)
        made.parts[place.text] = value
    return made.answer()


async def is_cached(port: Port, made: Batch) -> bool:
    """True if every element would be answered from the cache."""
    for place in made.places.values():
        job = place.job
        found = await job.chain.lookup(port, job.function.id, place.text, job.function.judge)
        if found.verdict.kind == MISS:
            return False
    return bool(made.places)


async def refresh(port: Port, made: Batch, *, keep: bool = True) -> Any:
    """Compute every element in one run, store them, and return the answer, or `Raised`."""
    places = list(made.places.values())
    made.keep = keep
    if not places:
        return await _plainly(port, made)
    for place in places:
        place.flight = Flight(place.job.name, place.job.call.refs, background=False)
    with excluded_from_own_time():
        await _land(port, await _compute(port, made, places))
    for place in places:
        result = place.flight.result
        if result is None or result.cache_failed:
            return await _plainly(port, made)
        record_flight_result(place.job, result)
        if result.error is not None:
            return Raised(result.error)
        made.parts[place.text] = result.value
    return made.answer()


async def put(port: Port, made: Batch, value: Any) -> None:
    """Store the answer of a call element by element, with stamps taken now.

    Raises:
        OptionError: the value cannot be split by element.
    """
    places = list(made.places.values())
    whole = len(places) == len(made.items)
    try:
        parts = divided(value, made.elements(places) if whole else made.items, made.each.name)
    except UnfitError as fault:
        fix = f"{fault}; give one result per element."
        raise OptionError("value", value, fix) from None
    keys = [place.text for place in places] if whole else made.keys
    by_key = dict(zip(keys, parts, strict=True))
    values = [by_key[place.text] for place in places]
    if places:
        await computing.put(port, [place.job for place in places], values)
