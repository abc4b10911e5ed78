"""Elements: a call over a collection, cached element by element (`each`).

Rules of this module:

1.  The entry of an element is that of a call with this element in place of the collection.  So its
    key, address, tags and dependencies do not depend on the type of the collection or on its other
    elements.
2.  All missing elements are computed in one run of the function, over a collection of the same
    type.
3.  A call first leads the flights of all elements that are not being computed, runs, and only
    then waits for the others.  So two overlapping calls compute no element twice and never wait
    for each other.  With `use_lock` it never waits for a lease while it holds one.
4.  The value that the function returns is split immediately, and assembled again for each answer,
    so an answer looks the same whether it was computed or not.
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

from memo.coordination.flights import FLIGHTS, Flight, FlightResult, inside
from memo.coordination.leases import Lease, acquire_lease, wait_until_over
from memo.engine import computing, never_hits
from memo.engine.answering import (
    LOOK_UP_AGAIN,
    adopt_own_changes,
    answer_after_lookup,
    answer_from_first_tier,
    answer_from_flight,
    excluded_from_own_time,
    fall_back,
    has_usable_entry,
    look_up,
    peek_entry,
    read_entry,
    stored_by_another,
)
from memo.engine.call import NOTHING, Function, Job, Raised, emit, error_text, reload_live_if_due
from memo.engine.computing import (
    GENERATIONS_PER_STEP,
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
from memo.engine.refreshing import revalidate
from memo.engine.replay import Wrapped
from memo.engine.used_calls import record_flight_result, record_stamps
from memo.errors import DependencyError, OptionError, shown, type_named
from memo.keys.bindings import NOT_GIVEN
from memo.keys.call_keys import Call, Keyer
from memo.runtime import events, reasons
from memo.runtime.events import MISS
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Handle, Port, Steps, Waiter, sharing_round_trips
from memo.stores.chain import Answer
from memo.stores.protocols import PendingLookup
from memo.validity.check import Verdict

_COLLECTION_TYPES = (list, tuple, set, frozenset)


# --- collections ----------------------------------------------------------------------------------


class Collection(NamedTuple):
    """The collection of elements in a call.

    Attributes:
        items: the elements in the caller's order.
        select: returns a collection of the same type with the items at given positions.
    """

    items: list[Any]
    select: Callable[[Sequence[int]], Any]


class Each:
    """The parameter that holds the collection.

    Raises:
        OptionError: the function has no such parameter, or it is `*args` or `**kwargs`.
    """

    def __init__(self, name: str, keyer: Keyer) -> None:
        self.name = name
        self._keyer = keyer
        plan = keyer.plan
        if name not in (*plan.positional, *plan.keyword_only):
            known = ", ".join((*plan.positional, *plan.keyword_only)) or "none"
            raise OptionError(
                "each", name, f"is not a parameter of its own; the parameters are: {known}."
            )
        keyer.check_names("each", [name])

    def value_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the parameter's value in a call with valid arguments."""
        value = self.find_value(args, kwargs)
        return self._keyer.plan.defaults[self.name] if value is NOT_GIVEN else value

    def find_value(self, args: Sequence[Any], kwargs: Mapping[str, Any], own: int = 0) -> Any:
        """Return the parameter's value in some arguments, or `NOT_GIVEN`.

        Args:
            own: number of leading positional arguments that are left out, such as `self`.
        """
        position = self._position()
        if position is not None and position - own < len(args):
            return args[position - own]
        return kwargs.get(self.name, NOT_GIVEN)

    def with_value(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any, own: int = 0
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with another value for the parameter."""
        position = self._position()
        if position is not None and position - own < len(args):
            at = position - own
            return (*args[:at], value, *args[at + 1 :]), dict(kwargs)
        return args, {**kwargs, self.name: value}

    def of_one_element(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the arguments with the element alone in place of a collection of one.

        Raises:
            OptionError: it is a collection of none or several.
        """
        value = self.value_in(args, kwargs)
        if not self.is_collection(value):
            return args, kwargs
        items = self.split(value).items
        if len(items) != 1:
            fix = "must be a single element: each has a key and an address of its own."
            raise OptionError(self.name, value, fix)
        return self.with_value(args, kwargs, items[0])

    def _position(self) -> int | None:
        """Return the parameter's position, counting `self`; None if it is keyword-only."""
        positional = self._keyer.plan.positional
        if self.name not in positional:
            return None
        return positional.index(self.name) + self._keyer.method

    def split(self, value: Any) -> Collection:
        """Return the items of a collection.

        Raises:
            OptionError: it is not a collection that can be split and rebuilt.
        """
        kind = type(value)
        if kind in _COLLECTION_TYPES:
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
            self.split(value)
            return True
        return False


# --- answers --------------------------------------------------------------------------------------


class Part(Wrapped):
    """The result for one element, as it is stored.

    Attributes:
        value: the result; None if there is none.
        kind: the kind of the whole that the function returned: `LIST`, `TUPLE`, `DICT` or `TABLE`.
        there: the function returned a result for this element.
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


class UnsplittableError(Exception):
    """The result of a function cannot be split by element, or cannot be assembled again."""


def split_result(answer: Any, elements: Sequence[Any], name: str) -> list[Part]:
    """Split the result of a function into one part for each element.

    Args:
        name: the parameter that holds the elements.

    Raises:
        UnsplittableError: it cannot be split.
    """
    if isinstance(answer, (list, tuple)):
        if len(answer) != len(elements):
            raise UnsplittableError(f"has {len(answer)} results for {len(elements)} elements")
        kind = TUPLE if isinstance(answer, tuple) else LIST
        return [Part(kind, value) for value in answer]
    try:
        if isinstance(answer, dict):
            _refuse_other_labels(answer, elements, name)
            return [
                Part(DICT, answer[one]) if one in answer else Part(DICT, None, False)
                for one in elements
            ]
        if type(answer).__module__.partition(".")[0] == "pandas" and hasattr(answer, "iloc"):
            at: dict[Any, list[int]] = {}
            for position, label in enumerate(answer.index.get_level_values(0).tolist()):
                at.setdefault(label, []).append(position)
            _refuse_other_labels(at, elements, name)
            return [Part(TABLE, answer.iloc[at.get(one, [])], one in at) for one in elements]
    except TypeError as error:
        raise UnsplittableError(f"cannot be divided by element: {error}") from None
    raise UnsplittableError("cannot be divided by element")


def _refuse_other_labels(labels: Iterable[Any], elements: Sequence[Any], name: str) -> None:
    """Refuse a result whose parts cannot be told apart, or with a label that is not an element."""
    known: dict[Any, Any] = {}
    for one in elements:
        first = known.setdefault(one, one)
        if first is not one:  # 1 and True, say: different keys here, the same key of a dict
            both = f"{shown(first)} and {shown(one)}"
            raise UnsplittableError(f"has one result for the equal elements {both}")
    other = next((label for label in labels if label not in known), NOT_GIVEN)
    if other is not NOT_GIVEN:
        raise UnsplittableError(f"has the key {shown(other)}, which is no element of `{name}`")


def join_parts(items: Sequence[Any], parts: Sequence[Part]) -> Any:
    """Assemble an answer in the order of the items; in a list, a repeated item is repeated.

    Raises:
        UnsplittableError: the function has returned results of different kinds.
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
    raise UnsplittableError(f"was a {' and a '.join(sorted(kinds))} for different elements")


def _one_table(tables: list[Any]) -> Any:
    """Concatenate several tables; empty ones contribute nothing, not even to the column types."""
    filled = [table for table in tables if len(table)]
    if len(filled) <= 1:
        return filled[0] if filled else tables[0]
    if len({type(table) for table in filled}) > 1:
        raise UnsplittableError("was a DataFrame and a Series for different elements")
    return sys.modules["pandas"].concat(filled)


# --- one call over a collection -------------------------------------------------------------------


class ElementCall:
    """One element of a call in progress.

    Attributes:
        at: its first position in the collection.
        job: the call for this element alone.
        pending_lookup: the lookup in the shared tier that was sent for it, or None.
        since: `FLIGHTS.ended_count` before it was looked up.
        missed: it was looked up, and the event of the miss was emitted.
    """

    __slots__ = ("at", "flight", "found", "job", "missed", "pending_lookup", "since")

    flight: Flight

    def __init__(self, at: int, job: Job) -> None:
        self.at = at
        self.job = job
        self.pending_lookup: PendingLookup | None = None
        self.since = 0
        self.missed = False
        self.found = Answer(Verdict(MISS, reasons.ABSENT))

    @property
    def key(self) -> str:
        return self.job.call.text


class Batch:
    """A call over a collection.

    Attributes:
        function: the function of the call; its `run` takes the whole collection.
        items: the elements in the caller's order.
        keys: the keys of the items, in the same order.
        calls: the calls of the elements by key, in the order of their first positions.
        parts: the results known so far, by key.
        keep: store the results.
        whole: a result for the whole collection that cannot be split, or `NOTHING`.
    """

    def __init__(
        self, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.function = function
        self.each = each
        self.args = args
        self.kwargs = kwargs
        self.collection = each.split(each.value_in(args, kwargs))
        self.items = self.collection.items
        self.keys: list[str] = []
        self.calls: dict[str, ElementCall] = {}
        self.parts: dict[str, Part] = {}
        self.keep = True
        self.whole: Any = NOTHING

    def make_keys(self) -> None:
        """Make the key of each element."""
        chain = self.function.chain()
        for at, item in enumerate(self.items):
            args, kwargs = self.each.with_value(self.args, self.kwargs, item)
            call = self.function.keyer.call(args, kwargs)
            self.keys.append(call.text)
            if call.text not in self.calls:
                job = Job(self.function, chain, call, args, kwargs)
                if self.function.cutoff:
                    alone = self.collection.select([at])
                    job.repeated = self.each.with_value(self.args, self.kwargs, alone)
                self.calls[call.text] = ElementCall(at, job)

    def job_for(self, elements: Sequence[ElementCall]) -> Job:
        """Make the call of the function over some elements."""
        chosen = self.collection.select([element.at for element in elements])
        args, kwargs = self.each.with_value(self.args, self.kwargs, chosen)
        first = elements[0].job
        return Job(first.function, first.chain, first.call, args, kwargs)

    def job_alone(self, element: ElementCall) -> Job:
        """Make a job that computes one element alone, for a refresh in the background."""
        function = copy.copy(self.function)
        run, chosen = function.run, self.job_for([element])
        item, name = self.items[element.at], self.each.name

        def one(*_: Any, **__: Any) -> Any:
            answer = run(*chosen.args, **chosen.kwargs)
            if inspect.isawaitable(answer):
                return _split_later(answer, item, name)
            return split_result(answer, [item], name)[0]

        function.run = one
        job = element.job
        return Job(function, job.chain, job.call, job.args, job.kwargs)

    def items_of(self, elements: Iterable[ElementCall]) -> list[Any]:
        return [self.items[element.at] for element in elements]

    def answer(self) -> Any:
        """Return the answer; all parts must be known."""
        return join_parts(self.items, [self.parts[key] for key in self.keys])

    def warn(self, answer: Any, fault: UnsplittableError) -> None:
        """Warn that results of this kind cannot be cached by element."""
        fix = (
            f"return a list or tuple aligned with `{self.each.name}`, or a dict, DataFrame or "
            "Series by element"
        )
        warn_not_stored(self.function, answer, str(fault), fix)


async def _split_later(answer: Any, element: Any, name: str) -> Part:
    return split_result(await answer, [element], name)[0]


async def make_batch(
    port: Port, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Batch:
    """Make a call over a collection, with its keys."""
    function.keyer.check_call(args, kwargs)
    await reload_live_if_due(port, function)
    made = await _with_keys(port, Batch(function, each, args, kwargs))
    if made.calls and await adopt_own_changes(port, next(iter(made.calls.values())).job):
        made = await _with_keys(port, Batch(function, each, args, kwargs))
    return made


async def _with_keys(port: Port, made: Batch) -> Batch:
    if len(made.items) > GENERATIONS_PER_STEP:
        await port.offload(made.make_keys)
    else:
        made.make_keys()
    return made


async def answer(
    port: Port, function: Function, each: Each, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Answer a call over a collection; return its value, or `Raised`."""
    return await answer_batch(port, await make_batch(port, function, each, args, kwargs))


async def answer_batch(port: Port, made: Batch) -> Any:
    """Answer a call over a collection whose keys are made; return its value, or `Raised`."""
    with excluded_from_own_time():
        return await _answer(port, made)


async def _answer(port: Port, made: Batch) -> Any:
    if not made.items:
        return await _compute_whole(port, made)
    begun = time.perf_counter()
    left = await _answer_from_first_tier(port, made)
    while left:
        left, value = await _answer_left(port, made, left, begun)
        if value is not NOTHING:
            return value
    await _free_calls(port, made)
    try:
        return made.answer()
    except UnsplittableError as fault:
        made.warn(next(iter(made.parts.values())).value, fault)
        return await _compute_whole(port, made)


async def _answer_left(
    port: Port, made: Batch, elements: Sequence[ElementCall], begun: float
) -> tuple[list[ElementCall], Any]:
    """Answer elements that the first tier has not answered.

    Returns:
        Those to look up again, and the value of the call, or `NOTHING` if it has to be assembled.
    """
    missing = await _look_up_all(port, made, elements, begun)
    led, joined, left = await _join_all(port, missing)
    try:
        ended = await _lead_and_wait(port, made, led, joined)
    finally:
        _forget_waits(*led, *joined)
    mine, steps = {element.key for element in led}, Steps(port)
    for element, result in ended:
        await steps.pause_if_due()
        value = await _value_of(port, element, result, element.key in mine, begun)
        if value is NOTHING:
            return [], await _compute_whole(port, made)
        if type(value) is Raised:
            return [], value
        if value is LOOK_UP_AGAIN:
            left.append(element)
        else:
            made.parts[element.key] = value
    return left, NOTHING


async def _free_calls(port: Port, made: Batch) -> None:
    """Free the calls of the elements in steps: all at once, 10,000 of them take 50 ms."""
    steps = Steps(port)
    while made.calls:
        await steps.pause_if_due()
        made.calls.popitem()


def _forget_waits(*elements: ElementCall) -> None:
    """Record that the computation around this call no longer waits for some elements."""
    for element in elements:
        FLIGHTS.forget_wait(element.flight)


async def _value_of(
    port: Port, element: ElementCall, result: FlightResult | None, leads: bool, begun: float
) -> Any:
    """Turn a result into a part, `Raised`, `LOOK_UP_AGAIN`, or `NOTHING` if the cache failed."""
    if result is None:
        return LOOK_UP_AGAIN
    if result.cache_failed:
        return NOTHING
    if not leads and result.error is None and result.encoded is None and result.valid:
        return LOOK_UP_AGAIN if result.entry is not None else NOTHING
    return await answer_from_flight(port, element.job, result, leads, begun)


async def _compute_whole(port: Port, made: Batch) -> Any:
    """Return the result of the function itself, since it cannot be cached by element."""
    if made.whole is not NOTHING:
        record_stamps(None)
        return made.whole
    chain = made.function.chain()
    call = Call("", made.function.keyer, (), (), ())
    outcome = await invoke(port, Job(made.function, chain, call, made.args, made.kwargs))
    record_stamps(None)
    return outcome.value if outcome.error is None else Raised(outcome.error)


# --- looking up -----------------------------------------------------------------------------------


async def _answer_from_first_tier(port: Port, made: Batch) -> list[ElementCall]:
    """Answer elements from the first tier, in few round trips; return those without an answer."""
    function, looked_up = made.function, []
    chain = function.chain()
    await chain.get_ready(port)
    steps = Steps(port)
    with sharing_round_trips():
        for element in made.calls.values():
            await steps.pause_if_due()
            element.since = FLIGHTS.ended_count
            begun = time.perf_counter()
            value = answer_from_first_tier(lambda: port, function, element.job.call, begun)
            if type(value) is Part:
                made.parts[element.key] = value
                continue
            of_first = value if type(value) is PendingLookup else None
            element.pending_lookup = of_first or chain.start_lookup(port, function.id, element.key)
            looked_up.append((element, of_first, begun))
    left = []
    for element, of_first, begun in looked_up:
        await steps.pause_if_due()
        if (pending := element.pending_lookup) is not None:
            pending.lookup.answer = await port.settle(pending.lookup.answer)
        if of_first is not None:
            value = answer_after_lookup(function, element.job.call, of_first, begun)
            if type(value) is Part:
                made.parts[element.key] = value
                continue
        if pending is not None and (
            pending.chain is not element.job.chain or pending.entry is not None
        ):
            element.pending_lookup = None
        left.append(element)
    return left


async def _look_up_all(
    port: Port, made: Batch, elements: Sequence[ElementCall], begun: float
) -> list[ElementCall]:
    """Look elements up; return those that have to be computed."""
    left, steps = [], Steps(port)
    for element in elements:
        await steps.pause_if_due()
        pending, element.pending_lookup = element.pending_lookup, None
        if pending is None:
            element.since = FLIGHTS.ended_count
        found, value = await look_up(
            *(port, element.job, begun, pending),
            was_missing=element.missed,
            refresh_job=partial(made.job_alone, element),
        )
        if value is not NOTHING:
            made.parts[element.key] = cast("Part", value)
            continue
        element.found = found
        if not element.missed:
            element.missed = True
            emit(element.job, events.MISS, reason=found.verdict.reason)
        left.append(element)
    return left


async def _join_all(
    port: Port, elements: Sequence[ElementCall]
) -> tuple[list[ElementCall], list[ElementCall], list[ElementCall]]:
    """Join the flights of elements; return those led, those to wait for, those to look up again.

    Raises:
        ReentryError: this call is part of the computation of one of them.
    """
    led: list[ElementCall] = []
    joined: list[ElementCall] = []
    again: list[ElementCall] = []
    steps = Steps(port)
    try:
        for element in elements:
            await steps.pause_if_due()
            refs = element.job.call.refs
            flight, leads = FLIGHTS.join_since(element.job.name, refs, element.since)
            if flight is None:
                again.append(element)
                continue
            element.flight = flight
            (led if leads else joined).append(element)
    except BaseException:
        for element in led:
            FLIGHTS.abandon(element.flight)
        _forget_waits(*led, *joined)
        raise
    return led, joined, again


# --- waiting --------------------------------------------------------------------------------------


class _FlightShare:
    """Handle of one of several flights that a task computes; the last cancelled one cancels it."""

    def __init__(self, name: str, wanted: set[str]) -> None:
        self._name = name
        self._wanted = wanted
        self.handle: Handle | None = None

    def cancel(self) -> None:
        self._wanted.discard(self._name)
        if not self._wanted and self.handle is not None:
            self.handle.cancel()

    def is_dead(self) -> bool:
        return self.handle is not None and self.handle.is_dead()


async def _lead_and_wait(
    port: Port, made: Batch, led: list[ElementCall], joined: list[ElementCall]
) -> list[tuple[ElementCall, FlightResult | None]]:
    """Compute the elements that are led here, then wait for the others; return all results."""
    waiting: list[tuple[Flight, Waiter]] = []
    try:
        if led and port.native:
            await _add_waiters(port, led, waiting)
            _spawn(port, made, led)
        elif led:
            await _lead_flights(port, made, led)
        await _add_waiters(port, joined, waiting)
        steps = Steps(port)
        while waiting:
            await steps.pause_if_due()
            flight, waiter = waiting[-1]
            await wait_until_over(port, flight, waiter)
            FLIGHTS.remove_waiter(flight, waiter)
            waiting.pop()
    finally:
        for flight, waiter in waiting:
            FLIGHTS.remove_waiter(flight, waiter)
        for element in led:
            if element.flight.handle is None:
                FLIGHTS.abandon(element.flight)
    return [(element, element.flight.result) for element in (*led, *joined)]


async def _add_waiters(
    port: Port, elements: Sequence[ElementCall], waiting: list[tuple[Flight, Waiter]]
) -> None:
    """Add the waiters of elements to `waiting`, whose owner removes them."""
    steps = Steps(port)
    for element in elements:
        await steps.pause_if_due()
        waiting.append((element.flight, FLIGHTS.add_waiter(element.flight, port)))


def _spawn(port: Port, made: Batch, led: list[ElementCall]) -> None:
    """Compute elements in a new task, which runs as long as a caller waits for one of them."""
    flights = [element.flight for element in led]
    wanted = {flight.name for flight in flights}
    shares = [_FlightShare(flight.name, wanted) for flight in flights]
    for flight, share in zip(flights, shares, strict=True):
        flight.handle = share

    def ended() -> None:
        for flight in flights:
            FLIGHTS.abandon(flight)

    handle = port.spawn(
        lambda port: _lead_flights(port, made, led), f"memo-{made.function.id}", ended
    )
    for share in shares:
        share.handle = handle


# --- computing ------------------------------------------------------------------------------------


async def _lead_flights(port: Port, made: Batch, led: list[ElementCall]) -> None:
    """Compute the elements that are led here; whatever happens, end their flights."""
    fault = False
    try:
        await _compute_with_leases(port, made, led)
    except Exception as error:  # a fault in memo: errors of the user's function are in the results
        emit(led[0].job, events.ERROR, reason="engine", detail=error_text(error))
        fault = True
    finally:
        for element in led:
            if not element.flight.over:
                FLIGHTS.finish(element.flight, FlightResult(cache_failed=True) if fault else None)


async def _compute_with_leases(port: Port, made: Batch, led: list[ElementCall]) -> None:
    """Compute the elements that no other process computes, in as few runs as possible.

    It waits for the others one at a time, and only while it holds no lease.
    """
    policy = made.function.policy
    if not policy.use_lock:
        await _finish_flights(port, await _compute(port, made, led))
        return
    limit = policy.lock_timeout
    end = None if limit is None else time.monotonic() + limit
    left = led
    while left:
        async with AsyncExitStack() as stack:  # releases all of them at its end
            leases = await _try_leases(port, left, stack)
            if not leases:
                await _wait_for_one(port, left[0], end, leases, stack)
            late = end is not None and time.monotonic() >= end
            flight_results = await _compute_missing(port, made, left, leases, late=late)
        await _finish_flights(port, flight_results)
        left = [element for element in left if not element.flight.over]


async def _compute_missing(
    port: Port, made: Batch, left: Sequence[ElementCall], leases: Mapping[str, Lease], *, late: bool
) -> list[tuple[ElementCall, FlightResult | None]]:
    """Compute the elements whose leases are held here, unless another process has stored them.

    Args:
        late: the lock timeout has passed, so compute the others as well.
    """
    flight_results: list[tuple[ElementCall, FlightResult | None]] = []
    wanted: list[ElementCall] = []
    for element in left:
        lease = leases.get(element.key)
        if lease is not None and await stored_by_another(port, element.job, lease, element.found):
            flight_results.append((element, None))
        elif lease is not None or late:
            wanted.append(element)
    if wanted:
        flight_results += await _compute(port, made, wanted)
    return flight_results


async def _finish_flights(
    port: Port, flight_results: Sequence[tuple[ElementCall, FlightResult | None]]
) -> None:
    """End the flights of these elements."""
    steps = Steps(port)
    for element, result in flight_results:
        await steps.pause_if_due()
        ended = result
        if result is not None and not result.cache_failed:
            ended = await close_flight(port, element.job, element.flight, result)
        FLIGHTS.finish(element.flight, ended)


async def _try_leases(
    port: Port, elements: Sequence[ElementCall], stack: AsyncExitStack
) -> dict[str, Lease]:
    """Take the leases that are free; return them by key."""
    leases: dict[str, Lease] = {}
    for element in elements:
        await _acquire(port, element, None, leases, stack)
    return leases


async def _wait_for_one(
    port: Port,
    element: ElementCall,
    end: float | None,
    leases: dict[str, Lease],
    stack: AsyncExitStack,
) -> None:
    """Wait for the lease of one element until it is free or the lock timeout has passed."""
    left = float("inf") if end is None else max(0.0, end - time.monotonic())
    await _acquire(port, element, left, leases, stack)


async def _acquire(
    port: Port,
    element: ElementCall,
    wait: float | None,
    leases: dict[str, Lease],
    stack: AsyncExitStack,
) -> None:
    """Take a lease if it is free or becomes free within `wait` seconds; None: do not wait."""
    job, policy = element.job, element.job.function.policy
    if wait is not None:
        policy = policy._replace(lock_timeout=None if wait == float("inf") else wait)
    lease = await acquire_lease(
        *(port, job.chain, job.name, policy, element.flight),
        refresh=wait is None,
        expected=job.function.history.last_duration,
    )
    if lease is not None and (lease.acquired or wait is not None):
        leases[element.key] = lease
        stack.push_async_callback(_release, port, lease, job)


async def _release(port: Port, lease: Lease, job: Job) -> None:
    await lease.release(port, job.chain.uploads.get(job.name))


async def _compute(
    port: Port, made: Batch, elements: list[ElementCall]
) -> list[tuple[ElementCall, FlightResult | None]]:
    """Run the function over some elements and store each result; return the results.

    Elements that can be revalidated are not computed.
    """
    renewed: list[tuple[ElementCall, FlightResult | None]] = []
    for element in elements:
        if element.found.verdict.renewable:
            result = await revalidate(port, element.job, element.flight, element.found)
            renewed += [] if result is None else [(element, result)]
    done = {element.key for element, _ in renewed}
    left = [element for element in elements if element.key not in done]
    return [*renewed, *(await _compute_unconfirmed(port, made, left) if left else ())]


async def _compute_unconfirmed(
    port: Port, made: Batch, elements: list[ElementCall]
) -> list[tuple[ElementCall, FlightResult | None]]:
    """Compute elements without revalidating any of them."""
    try:
        before = await before_run(port, [element.job for element in elements])
    except DependencyError as missing:
        return [(element, FlightResult(error=missing)) for element in elements]
    never_hits.warn_if_keys_differ(elements[0].job)
    ran, lead = await _run_once(port, made, elements)
    if ran.outcome.error is not None:
        with inside(lead):
            emit(elements[0].job, events.FAILED, reason=ran.outcome.error_name, seconds=ran.seconds)
        return await _failed_results(port, elements, before, ran)
    try:
        parts = split_result(ran.outcome.value, made.items_of(elements), made.each.name)
    except UnsplittableError as unfit:
        made.warn(ran.outcome.value, unfit)
        if len(elements) == len(made.items):
            made.whole = ran.outcome.value
        return [(element, FlightResult(cache_failed=True)) for element in elements]
    share = ran._replace(seconds=ran.seconds / len(elements))
    ready, steps = [], Steps(port)
    for element, part, one in zip(elements, parts, before, strict=True):
        await steps.pause_if_due()
        with inside(lead):  # a hook or an option that calls the function does not wait for this
            emit(element.job, events.COMPUTED, seconds=share.seconds)
            sealed = await prepare_result(port, element.flight, one, share, part, keep=made.keep)
        ready.append(sealed)
    return list(zip(elements, await store_prepared(port, ready), strict=True))


async def _run_once(port: Port, made: Batch, elements: Sequence[ElementCall]) -> tuple[Run, Flight]:
    """Run the function once over some elements; return the run, and the flight that it was."""
    whole = made.job_for(elements)
    lead = Flight(whole.name, (), background=False)
    for element in elements:  # a run that asks for one of its own elements is refused
        element.flight.call = element.job.call
        element.flight.waits_for.append(lead)
    try:
        return await run_once(port, whole, lead), lead
    finally:
        lead.over = True


async def _failed_results(
    port: Port, elements: Sequence[ElementCall], before: Sequence[BeforeRun], ran: Run
) -> list[tuple[ElementCall, FlightResult | None]]:
    """Return the results of a run that raised: old values if they may answer, else its error."""
    flight_results: list[tuple[ElementCall, FlightResult | None]] = []
    steps = Steps(port)
    for element, one in zip(elements, before, strict=True):
        await steps.pause_if_due()
        result = await failed_result(port, one, ran)
        if element.found.verdict.fallback and element.found.entry is not None:
            result = await fall_back(port, element.job, element.found, result)
        flight_results.append((element, result))
    return flight_results


# --- the other methods of a decorated function ----------------------------------------------------


async def read_stored(port: Port, made: Batch) -> Any:
    """Return the answer if all entries may be used now, else the first element that misses.

    If their results do not go together, return the `UnsplittableError` that says so.
    """
    steps = Steps(port)
    for element in made.calls.values():
        await steps.pause_if_due()
        value = await read_entry(port, element.job)
        if value is NOTHING:
            return element
        made.parts[element.key] = value
    try:
        return made.answer()
    except UnsplittableError as fault:
        return fault


async def peek(port: Port, made: Batch, default: Any) -> Any:
    """Return the answer if every element is stored and may be used now, else `default`."""
    if not made.items:
        return default
    steps = Steps(port)
    for element in made.calls.values():
        await steps.pause_if_due()
        value = await peek_entry(port, element.job)
        if value is NOTHING:
            return default
        made.parts[element.key] = value
    try:
        return made.answer()
    except UnsplittableError:
        return default


async def is_cached(port: Port, made: Batch) -> bool:
    """True if every element would be answered from the cache."""
    steps = Steps(port)
    for element in made.calls.values():
        await steps.pause_if_due()
        if not await has_usable_entry(port, element.job):
            return False
    return bool(made.calls)


async def refresh(port: Port, made: Batch, *, keep: bool = True) -> Any:
    """Compute every element in one run, store them, and return the answer, or `Raised`."""
    elements = list(made.calls.values())
    made.keep = keep
    if not elements:
        return await _compute_whole(port, made)
    steps = Steps(port)
    for element in elements:
        await steps.pause_if_due()
        element.flight = Flight(element.job.name, element.job.call.refs, background=False)
    with excluded_from_own_time():
        await _finish_flights(port, await _compute(port, made, elements))
    for element in elements:
        await steps.pause_if_due()
        result = element.flight.result
        if result is None or result.cache_failed:
            return await _compute_whole(port, made)
        record_flight_result(element.job, result)
        if result.error is not None:
            return Raised(result.error)
        made.parts[element.key] = result.value
    elements.clear()
    await _free_calls(port, made)
    return made.answer()


async def put(port: Port, made: Batch, value: Any) -> None:
    """Store the answer of a call element by element, with stamps taken now.

    Raises:
        OptionError: the value cannot be split by element.
    """
    elements = list(made.calls.values())
    whole = len(elements) == len(made.items)
    try:
        parts = split_result(
            value, made.items_of(elements) if whole else made.items, made.each.name
        )
    except UnsplittableError as fault:
        fix = f"{fault}; give one result per element."
        raise OptionError("value", value, fix) from None
    keys = [element.key for element in elements] if whole else made.keys
    by_key = dict(zip(keys, parts, strict=True))
    values = [by_key[element.key] for element in elements]
    if elements:
        await computing.put(port, [element.job for element in elements], values)
