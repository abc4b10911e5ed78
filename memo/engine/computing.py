"""Compute a call: take its stamps, run the function, and store the result."""

from __future__ import annotations

import time
import weakref
from binascii import b2a_base64
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self, TypeAlias

from memo.coordination.flights import FLIGHTS, Flight, FlightResult, inside
from memo.coordination.leases import lock_patience
from memo.engine import never_hits, replay, same_types, used_calls
from memo.engine.call import (
    Function,
    Job,
    Outcome,
    emit,
    error_text,
    warn_at_definition,
    writer_name,
)
from memo.engine.loading import OFFLOADED_STREAM_BYTES
from memo.engine.used_calls import USED_CALLS, Expiry, UsedCalls, shorten_stamps
from memo.errors import DependencyError, TierError, cut_to_user_frames, label, type_named
from memo.keys import instances
from memo.keys.fingerprint import own_changes
from memo.keys.fingerprint.held_values import IMMUTABLE_BUILTINS
from memo.keys.fingerprint.own_changes import BeforeComputation, Changes
from memo.keys.instances import ObjectBefore
from memo.keys.summaries import with_built_on, with_result
from memo.keys.values import value_digest
from memo.records import codec, seal
from memo.records.codec import Encoded
from memo.records.seal import Header
from memo.records.stamp_blocks import with_block
from memo.records.stamp_types import LOST, Generation, Ref, Result, Stamp, State, Times
from memo.runtime import events
from memo.runtime.blocking import BLOCKING
from memo.runtime.clock import SECOND
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port, Steps
from memo.runtime.reasons import UNREACHABLE
from memo.settings.options import INHERIT, Policy
from memo.stores.chain import Answer
from memo.stores.writing import EntryToStore
from memo.validity import results, stamps
from memo.validity.check import BORN_STALE, ttl_ns
from memo.validity.dependencies import MAX_ARGUMENT_BYTES
from memo.validity.stamps import TAGS

LIVE_TTL_RETENTION = 86_400 * SECOND
"""Shortest retention in nanoseconds of entries with a `ttl_key`, whose ttl may be raised later."""
ARGUMENTS_CHANGED = "arguments changed"
"""Reason for not storing a result: the arguments changed during the computation."""
STATE_CHANGED = "inputs changed"
"""Reason for not storing a result: state in its key changed while the function ran."""


async def compute(
    port: Port,
    job: Job,
    flight: Flight,
    *,
    background: bool = False,
    keep: bool = True,
    errors: bool = False,
) -> FlightResult:
    """Run the function and store its result.

    Args:
        background: no caller waits for it, so it is part of no other computation.
        keep: store the result.
        errors: also store an exception, if `cache_errors` names its type.
    """
    try:
        [before] = await before_run(port, [job], background=background)
    except DependencyError as error:
        return FlightResult(error=error)
    if background and not before.same_key:
        return FlightResult(cache_failed=True)
    never_hits.warn_if_keys_differ(job)
    ran = await run_once(port, job, flight, background=background)
    if ran.outcome.error is not None:
        result = await failed_result(port, before, ran)
        with inside(flight):  # a hook that calls the function again does not wait for this flight
            emit(job, events.FAILED, reason=ran.outcome.error_name, seconds=ran.seconds)
        sound = errors and before.same_key and ran.unchanged and not flight.detached
        return await _store_error(port, job, result, ran.seconds) if sound else result
    with inside(flight):  # nor do `__reduce__` and options such as `cache_if`
        emit(job, events.COMPUTED, seconds=ran.seconds)
        if background and not await has_same_key(port, job):
            return FlightResult(cache_failed=True)
        ready = await prepare_result(port, flight, before, ran, ran.outcome.value, keep=keep)
    [result] = await store_prepared(port, [ready])
    if keep:
        job.chain.latest_answers.record(job.call.text, before.started)
    return result


class BeforeRun(NamedTuple):
    """The facts about a call that are recorded before the function runs for it.

    Attributes:
        job: the call.
        own_stamps: its stamps; None if no tier knows what is valid.
        same_key: its arguments still give its key.
        started: when its computation begins, as in `Times`.
        arguments: see `pickled_arguments`.
        tag_watch: see `watch_tags`.
    """

    job: Job
    own_stamps: tuple[Stamp, ...] | None
    same_key: bool
    started: int
    arguments: str
    tag_watch: tuple[Generation, ...]


class Run(NamedTuple):
    """A finished run of the function.

    Attributes:
        outcome: its result or exception.
        seconds: how long it took.
        used_calls: the cached calls that it used.
        background: see `compute`.
        unchanged: nothing but the run itself changed the state in its key.
    """

    outcome: Outcome
    seconds: float
    used_calls: UsedCalls
    background: bool
    unchanged: bool


async def before_run(
    port: Port, jobs: Sequence[Job], *, background: bool = False
) -> list[BeforeRun]:
    """Prepare calls for one run of the function that answers all of them; take their stamps.

    The start times are taken last: of two runs in different processes, the one that begins first
    should have the earlier time (I2).

    Raises:
        DependencyError: a source that they depend on is missing.
    """
    with lock_patience(jobs[0].function.policy):
        taken = await take_stamps(port, jobs)
    watch = await watch_tags(port, jobs[0])
    checked, steps = [], Steps(port)
    for job in jobs:
        await steps.pause_if_due()
        same = not (background or port.native) or await has_same_key(port, job)
        checked.append((same, pickled_arguments(job)))
    return [
        BeforeRun(job, own, same, _start_time(job), arguments, watch)
        for job, own, (same, arguments) in zip(jobs, taken, checked, strict=True)
    ]


def _start_time(job: Job) -> int:
    return job.chain.latest_answers.start_time(job.call.text, job.chain.clock)


async def run_once(port: Port, job: Job, flight: Flight, *, background: bool = False) -> Run:
    """Run the function as the computation of a flight.

    Args:
        background: see `compute`.
    """
    used_calls.follow_threads()
    reads = UsedCalls(background=background or used_calls.in_background())
    flight.call, flight.expected_duration = job.call, job.function.history.last_duration
    watch, why = InputWatch(job), "refresh" if background else ""
    with inside(flight, background=background), watch:
        token = USED_CALLS.set(reads)
        emit(job, events.COMPUTE_STARTED, reason=why)
        begun, ended_by = time.perf_counter(), events.INTERRUPTED
        try:
            outcome = await invoke(port, job, silent=background)
            ended_by = outcome.error_name
        finally:
            with suppress(ValueError):  # a closed loop: this runs in the collector's context
                USED_CALLS.reset(token)
            reads.over = True
            ended = time.perf_counter()
            emit_run_ended(job, reads.own_time(begun, ended), ended_by, why)
    if outcome.error is None:
        job.function.history.last_duration = ended - begun
    return Run(outcome, ended - begun, reads, background, watch.unchanged)


def emit_run_ended(job: Job, seconds: float, ended_by: str, why: str = "") -> None:
    """Emit the event that a run of the function has ended.

    Args:
        ended_by: the name of the exception's type, or `INTERRUPTED`; `""` if it returned.
    """
    emit(job, events.COMPUTE_ENDED, reason=why, seconds=seconds, detail=ended_by)


async def failed_result(port: Port, before: BeforeRun, ran: Run) -> FlightResult:
    """Make the result of a call whose run raised."""
    known, used = await merged_stamps(port, before.job, ran.used_calls, before.own_stamps)
    return FlightResult(
        error=ran.outcome.error, stamps=used, known_stamps=known, started=before.started
    )


Prepared: TypeAlias = "tuple[FlightResult, Sealed | None]"
"""A result, and its sealed form; None if it is not to be stored."""


async def prepare_result(
    port: Port, flight: Flight, before: BeforeRun, ran: Run, value: Any, *, keep: bool
) -> Prepared:
    """Seal the result of a call; if that fails, the caller gets the result all the same.

    Args:
        value: the result; with `each` it is only a part of the value that the run returned.
        keep: store it.
    """
    job, own = before.job, before.own_stamps
    if own is not None:
        late = await late_stamps(port, job, value, before.tag_watch)
        own = None if late is None else own + late
    known, used = await merged_stamps(port, job, ran.used_calls, own)
    job.function.history.backoff.pop(job.call.text, None)
    latest = job.chain.latest_answers
    if keep and not ran.background:  # until a refresh is stored, the old value answers
        latest.record(job.call.text, before.started)
    overtaken = latest.is_newer_than(job.call.text, before.started)  # by a refresh, say
    valid = before.same_key and not flight.detached
    if ran.background and valid:
        valid = not await job.chain.authorities.why_invalid(port, known)
    storable = used if valid and keep and ran.unchanged and not overtaken else None
    made = Computed(
        value,
        storable,
        before.started,
        ran.seconds,
        before.arguments,
        ran.used_calls.earliest_expiry,
    )
    try:
        sealed = await seal_result(port, job, made)
    except Exception as error:
        sealed = _report_unstored(job, value, error)
    result = FlightResult(
        value,
        encoded=sealed.encoded,
        valid=valid,
        stamps=used,
        known_stamps=known + before.tag_watch,
        started=before.started,
    )
    return result, sealed if type(sealed) is Sealed else None


async def store_prepared(port: Port, ready: Sequence[Prepared]) -> list[FlightResult]:
    """Store results together; return them with their entries."""
    flight_results = [result for result, _ in ready]
    wanted = {at: sealed for at, (_, sealed) in enumerate(ready) if sealed is not None}
    if not wanted:
        return flight_results
    try:
        entries = await store_sealed(port, list(wanted.values()))
    except Exception as error:
        job = next(iter(wanted.values())).job
        emit(job, events.ERROR, reason="store", detail=error_text(error))
        return [result._replace(encoded=None) for result in flight_results]
    for (at, sealed), entry in zip(wanted.items(), entries, strict=True):
        flight_results[at] = flight_results[at]._replace(entry=entry, stamps=sealed.header.stamps)
    return flight_results


async def put(port: Port, jobs: Sequence[Job], values: Sequence[Any]) -> None:
    """Store values as the results of calls of one function, with stamps taken now."""
    ready = []
    for job, value, before in zip(jobs, values, await before_run(port, jobs), strict=True):
        if before.own_stamps is None or not before.same_key:
            continue
        late = await late_stamps(port, job, value, before.tag_watch)
        if late is not None:
            own, arguments = before.own_stamps + late, before.arguments
            result = replay.Performed(value, ()) if job.function.replay else value
            made = Computed(result, own, before.started, arguments=arguments)
            sealed = await seal_result(port, job, made)
            ready += [sealed] if isinstance(sealed, Sealed) else []
    if ready:
        await store_sealed(port, ready)


def pickled_arguments(job: Job) -> str:
    """Pickle the arguments of a call of a `cutoff` function, to repeat the call later.

    It has to be done before the function runs, since that may change them.
    """
    if not job.function.cutoff:
        return ""
    args, kwargs = job.repeated or (job.args, job.kwargs)
    try:
        encoded = same_types.encode_arguments((args, dict(kwargs)))
    except Exception:  # pickling may raise anything; such a call just cannot be repeated
        return ""
    if encoded.payload is not None or len(encoded.stream) > MAX_ARGUMENT_BYTES:
        return ""
    return b2a_base64(encoded.stream, newline=False).decode()


async def _with_own_digest(
    port: Port, job: Job, value: Any, used: tuple[Stamp, ...], arguments: str
) -> tuple[Stamp, ...]:
    """For a function with `cutoff=True`, add the stamp that identifies the value."""
    function = job.function
    if not function.cutoff:
        return used
    try:
        digest = (await port.offload(value_digest, value)).hex()
    except Exception as error:  # the value has no key, or its own methods raised
        function.cutoff = False
        message = (
            f"{function.id} has cutoff=True and returned {type_named(type(value))} that has no key "
            f"({str(error).rstrip('.')}); so results built on it are computed again each time. "
            "Return a value with a key, give its type one with memo.register_key, or leave out "
            "cutoff."
        )
        warn_at_definition(function.run, message)
        return used
    return (*used, Result(function.id, job.call.text, digest, arguments))


class InputWatch:
    """Watches the state in the key of a call while its computation runs.

    Attributes:
        unchanged: nothing but the computation itself has changed that state.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._code_before: list[BeforeComputation] = []
        self._names: frozenset[str] = frozenset()
        self._self_before: ObjectBefore | None = None
        self._watching = False
        self.unchanged = False

    def __enter__(self) -> Self:
        job, keyer = self._job, self._job.function.keyer
        try:
            owner = keyer.owner(job.args)
            code, self._code_before, self._names = keyer.identity.begin(owner)
            if job.call.self_state.names:
                own = job.args[0]
                self._self_before = instances.record_before(own, keyer.state(own))
            self.unchanged = not job.call.code or code == job.call.code
            self._watching = True
        except Exception as error:  # the values' own methods may raise anything
            emit(job, events.ERROR, reason=STATE_CHANGED, detail=error_text(error))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._watching:
            return
        self._watching, others, warning = False, "", ""
        if self._code_before or self._self_before is not None:
            try:
                others, warning = self._changes()
            except Exception as error:
                others = error_text(error)
        self.unchanged = self.unchanged and not others
        if not self.unchanged:
            emit(self._job, events.ERROR, reason=STATE_CHANGED, detail=others)
        if warning:
            warn_of_change(self._job, warning)

    def _changes(self) -> tuple[str, str]:
        """Return the names of state that something else changed, and a warning, or `""`.

        State that the computation changed itself is left out of the key from now on.
        """
        function, identity = self._job.function, self._job.function.keyer.identity
        code = own_changes.changes_since(self._code_before, self._names)
        mine = (
            Changes() if self._self_before is None else instances.changes_since(self._self_before)
        )
        others = code.others + mine.others
        new = identity.note_own_changes((*code.own, *mine.own))
        warning = ""
        if new:
            warning = function.own_changes_warning(new)
            self._publish_own_changes({**code.originals, **mine.originals})
        elif others and identity.changes_often(others):
            warning = (
                f"{function.id} is not stored: {', '.join(others)} changed each time while it ran, "
                "and not under a name that its code sets. If the function changes that itself and "
                f"it does not affect the result, write {_ignore_option(others)}."
            )
        return ", ".join(others), warning

    def _publish_own_changes(self, originals: Mapping[str, str]) -> None:
        """Tell other processes and hosts which state the function changes itself."""
        function, shared = self._job.function, self._job.chain.shared_changes
        if not originals:
            return
        if function.publish_own_changes is not None:
            function.publish_own_changes(function.id, originals)
        BLOCKING.spawn(lambda port: shared.add(port, function.id, originals), "memo-tell")


def _ignore_option(others: Sequence[str]) -> str:
    """Return the `ignore=` option that leaves some state out of the key."""
    names = {one.partition("[")[0].partition(".")[0] for one in others}
    labels = sorted(name if name == "self" else f"global:{name}" for name in names)
    return f"ignore={labels!r}"


def warn_of_change(job: Job, message: str) -> None:
    """Warn that the function changes some state itself."""
    try:
        warn_at_definition(job.function.run, message)
    except UserWarning:  # warnings are errors here; the caller still gets the result
        emit(job, events.ERROR, reason=STATE_CHANGED, detail=message)


async def has_same_key(port: Port, job: Job) -> bool:
    """True if the arguments still give the key that they gave at first.

    The caller may change them while the computation waits or runs in the background.
    """
    values = (*job.args, *job.kwargs.values())
    if IMMUTABLE_BUILTINS.issuperset(map(type, values)):
        return True
    try:
        now = await port.offload(job.function.keyer.call, job.args, job.kwargs)
    except Exception:  # the changed arguments have no key, so the call is not the same
        now = None
    if now is not None and now.text == job.call.text:
        return True
    emit(job, events.ERROR, reason=ARGUMENTS_CHANGED)
    return False


GENERATIONS_PER_STEP = 256
"""Maximum number of generations whose states are read in one step before a computation."""


async def take_stamps(port: Port, jobs: Sequence[Job]) -> list[tuple[Stamp, ...] | None]:
    """Take the stamps of calls before they are computed; None if no tier knows what is valid."""
    chain, pending = jobs[0].chain, jobs[0].pending_lookup
    refs, steps = list(jobs[0].call.refs), Steps(port)
    if len(jobs) > 1:
        refs = await _all_refs(jobs, steps)
    if len(jobs) > 1 or len(refs) > GENERATIONS_PER_STEP:
        pending = None  # the lookup has read the states of one call only
    for job in jobs:
        job.pending_lookup = None
    states: dict[Ref, State] = {}
    try:
        for start in range(0, len(refs), GENERATIONS_PER_STEP):
            await steps.pause_if_due()
            some = refs[start : start + GENERATIONS_PER_STEP]
            states.update(
                zip(some, await chain.authorities.stamp_states(port, some, pending), strict=True)
            )
    except TierError as error:
        emit(jobs[0], events.ERROR, reason=UNREACHABLE, detail=str(error))
        return [None] * len(jobs)
    taken: list[tuple[Stamp, ...] | None] = []
    for job in jobs:
        await steps.pause_if_due()
        mine = job.call.refs
        own: tuple[Stamp, ...] = tuple(map(Generation, mine, map(states.__getitem__, mine)))
        if job.function.dependencies is not None:
            own += await job.function.dependencies.take(port, job.args, job.kwargs)
        taken.append(own)
    return taken


async def _all_refs(jobs: Iterable[Job], steps: Steps) -> list[Ref]:
    """Return the refs of calls, each once."""
    refs: dict[Ref, None] = {}
    for job in jobs:
        await steps.pause_if_due()
        refs.update(dict.fromkeys(job.call.refs))
    return list(refs)


async def merged_stamps(
    port: Port, job: Job, used: UsedCalls, own: tuple[Stamp, ...] | None
) -> tuple[tuple[Stamp, ...], tuple[Stamp, ...] | None]:
    """Return the known stamps of a computation, and the same again, or None if some are missing."""
    if not used.size and len(own or ()) <= stamps.MAX_REFS_PER_GROUP:  # it used no cached call
        return own or (), own if used.sound else None
    many = port.native and used.size > GENERATIONS_PER_STEP
    merge = partial(used.merge_with, own or ())
    whole, sound = await port.offload(merge) if many else merge()
    absolute = whole.absolute_stamps()
    try:
        absolute = await shorten_stamps(port, job.chain, absolute)
    except TierError:
        sound = False
    used_results = whole.used_results()
    if used_results:
        known = results.flatten(absolute, used_results)
    elif many:
        known = await port.offload(with_block, absolute, own or ())
    else:
        known = with_block(absolute, own or ())
    judge = job.chain.authorities.shared
    others = [f for chain, f in used.chains.items() if chain.authorities.shared is not judge]
    if others and not job.function.history.warned:
        await never_hits.warn_if_never_valid(port, job, known, others[0])
    return known, known if sound and own is not None else None


async def watch_tags(port: Port, job: Job) -> tuple[Generation, ...]:
    """Take a stamp that any tag invalidates, if the function's tags depend on its result."""
    if not job.function.keyer.has_late_tags:
        return ()
    ref = Ref(TAGS)
    try:
        [state] = await job.chain.authorities.stamp_states(port, [ref])
    except TierError:
        return (Generation(ref, LOST),)
    return (Generation(ref, state),)


async def late_stamps(
    port: Port, job: Job, result: Any, watch: tuple[Generation, ...]
) -> tuple[Generation, ...] | None:
    """Take the stamps of tags that depend on the result; None if a tag was invalidated meanwhile.

    The tags are read before `watch` is checked, and invalidating any tag turns `watch` first.  So
    if `watch` still holds, the tags were read before any invalidation.
    """
    function = job.function
    if not function.keyer.has_late_tags:
        return ()
    try:
        tags = function.keyer.late_tags(job.args, job.kwargs, replay.unwrap(result))
        refs = [Ref(stamps.group("t", tag)) for tag in tags]
        states = await job.chain.authorities.stamp_states(port, refs)
        if await job.chain.authorities.why_invalid(port, watch):
            return None
    except Exception as error:  # the user's callable raised, or no tier could be reached
        emit(job, events.ERROR, reason="tags", detail=error_text(error))
        if not isinstance(error, TierError):
            with suppress(UserWarning):  # warnings are errors here: the caller gets the result
                fault = f"has no tags ({error_text(error)})"
                warn_not_stored(function, result, fault, "correct its tags")
        return None
    return tuple(map(Generation, refs, states))


def invoke(port: Port, job: Job, *, silent: bool = False) -> Coroutine[Any, Any, Outcome]:
    """Call the user's function; return its result or exception as an outcome, raise interrupts.

    Args:
        silent: record output for `replay` without showing it.
    """
    if job.function.replay:
        return _call_recorded(port, job, silent=silent)
    return _call_function(port, job)  # awaited by the caller: one frame less per recursion


async def _call_recorded(port: Port, job: Job, *, silent: bool) -> Outcome:
    with replay.recording(silent=silent) as recorder:
        outcome = await _call_function(port, job)
    if outcome.error is not None or (
        not port.native and same_types.is_awaitable_once(outcome.value)
    ):
        return outcome
    return Outcome(replay.Performed(outcome.value, recorder.shown, live=True))


async def _call_function(port: Port, job: Job) -> Outcome:
    try:
        result = job.function.run(*job.args, **job.kwargs)
        return Outcome(await port.settle(result) if port.native else result)
    except Exception as error:
        return Outcome(error=cut_to_user_frames(error))
    except BaseException as error:
        if type(error).__name__ == "CancelledError" and not port.is_cancelled():
            return Outcome(error=cut_to_user_frames(error))
        raise


async def encode(port: Port, job: Job, value: Any, verb: str = "returned") -> codec.Encoded | None:
    """Encode a result for storage; None, after an event and a warning, if it cannot be pickled.

    Args:
        verb: "returned" or "raised", for the warning.
    """
    try:
        bare = replay.unwrap(value)
        return await port.offload(same_types.encode, value, bare, job.function.compress())
    except Exception as error:
        emit(job, events.ERROR, reason="unpicklable", detail=error_text(error))
        fault = f"cannot be pickled ({type(error).__name__})"
        if isinstance(error, codec.AlteredError):
            fault = error.of(type(replay.unwrap(value)))
        fix = "return plain data instead" if verb == "returned" else "raise one that can"
        warn_not_stored(job.function, value, fault, fix, verb)
        return None


def _report_unstored(job: Job, value: Any, error: Exception) -> FlightResult:
    """Report that a result is not stored because a `ttl` or `cache_if` callable raised."""
    emit(job, events.ERROR, reason="store", detail=error_text(error))
    with suppress(UserWarning):  # warnings are errors here: the caller gets the result
        fault = f"cannot be stored ({error_text(error)})"
        warn_not_stored(job.function, value, fault, "correct its ttl or cache_if")
    return FlightResult(value)


def warn_not_stored(
    function: Function, value: Any, fault: str, fix: str, verb: str = "returned"
) -> None:
    """Warn, once per function, that its results are not stored, and why."""
    if not function.history.warned:
        function.history.warned = True
        message = (
            f"{label(function.id)} {verb} {type_named(type(replay.unwrap(value)))} that {fault}, "
            f"so it is computed at each call; {fix}"
        )
        warn_at_definition(function.run, message)


class Computed(NamedTuple):
    """A result with the facts about its computation that its entry records.

    Attributes:
        value: the result.
        stamps: its stamps; None if it must not be stored.
        started: when the computation began; see `Times`.
        cost: seconds that it took.
        arguments: see `pickled_arguments`.
        earliest_expiry: expiry of the used result that expires first.
    """

    value: Any
    stamps: tuple[Stamp, ...] | None
    started: int
    cost: float = 0.0
    arguments: str = ""
    earliest_expiry: Expiry | None = None


async def store_result(port: Port, job: Job, made: Computed) -> FlightResult:
    """Encode, seal and store a result."""
    ready = await seal_result(port, job, made)
    if isinstance(ready, FlightResult):
        return ready
    [entry] = await store_sealed(port, [ready])
    return FlightResult(made.value, None, entry, ready.encoded, stamps=ready.header.stamps)


class Sealed(NamedTuple):
    """A result that is ready to be stored.

    Attributes:
        job: the call.
        header: the header of its entry.
        encoded: the encoded result.
        record: header and pickle stream, sealed.
    """

    job: Job
    header: Header
    encoded: Encoded
    record: bytes


async def seal_result(port: Port, job: Job, made: Computed) -> FlightResult | Sealed:
    """Encode and seal a result; if it must not be stored, return a `FlightResult` instead."""
    value, used, started, cost, arguments, life = made
    function = job.function
    if not port.native and same_types.is_awaitable_once(value):
        warn_not_stored(
            function, value, "can be awaited only once", "decorate the `async def` itself"
        )
        return FlightResult(value, stamps=used)
    encoded = await encode(port, job, value)
    if encoded is None:
        return FlightResult(value, stamps=used)
    result = replay.unwrap(value)
    wanted = function.policy.cache_if is None or function.policy.cache_if(result)
    if used is None or not wanted:
        return FlightResult(value, encoded=encoded, stamps=used)
    used = await _with_own_digest(port, job, result, used, arguments)
    ttl = ttl_ns(function.policy, result, function.live_ttl(), _inherited_ttl(job, life))
    header = _header(job, encoded, used, started, cost, ttl)
    summary = with_result(header.summary, result)
    if life is not None and (ttl == BORN_STALE or function.policy.ttl == INHERIT):
        summary = with_built_on(summary, life.describe(), life.until)
    header = header._replace(summary=summary)
    return await _seal(port, job, header, encoded)


def _inherited_ttl(job: Job, life: Expiry | None) -> int | None:
    """Return how many nanoseconds the used results stay fresh; None if that sets no limit."""
    if life is None or not (life.stale or job.function.policy.ttl == INHERIT):
        return None
    return 0 if life.stale else max(0, life.until - job.chain.clock.wall_ns())


async def _store_error(port: Port, job: Job, result: FlightResult, cost: float) -> FlightResult:
    """Store an exception if `cache_errors` names its type; return the result."""
    error, stamps = result.error, result.stamps
    assert error is not None
    ttl = job.function.policy.error_ttl(error)
    if stamps is None or ttl is None:
        return result
    try:
        encoded = await encode(port, job, error, "raised")
        if encoded is None:
            return result
        header = _header(job, encoded, stamps, result.started, cost, ttl)
        header = header._replace(
            summary=with_result(header.summary, error, raised=True),
            times=header.times._replace(grace=0),
            flags=header.flags | seal.RAISED,
        )
        await store_sealed(port, [await _seal(port, job, header, encoded)])
    except Exception as fault:
        emit(job, events.ERROR, reason="store", detail=error_text(fault))
    return result


async def store_with_new_stamps(
    port: Port, job: Job, found: Answer, known: tuple[Stamp, ...]
) -> seal.Entry:
    """Store an entry again in every tier, with new stamps and its old age.

    Raises:
        TierError: its payload is gone.
    """
    old = found.entry
    assert old is not None
    header = old.header._replace(stamps=known)
    payload = None
    if header.buffers:
        assert found.source is not None
        payload = codec.payload_of(found.source.open(seal.payload_size(header.buffers)), header)
    encoded = Encoded(bytes(old.stream), payload, header.codec, header.flags)
    [entry] = await store_sealed(port, [await _seal(port, job, header, encoded)])
    return entry


async def _seal(port: Port, job: Job, header: Header, encoded: Encoded) -> Sealed:
    secret = job.chain.secrets[0]
    if len(encoded.stream) > OFFLOADED_STREAM_BYTES:
        record = await port.offload(seal.pack, header, encoded.stream, secret)
    else:
        record = seal.pack(header, encoded.stream, secret)
    return Sealed(job, header, encoded, record)


ENTRIES_PER_STEP = 512
"""Maximum number of entries that are stored in one step; the tiers store fewer in one batch."""


async def store_sealed(port: Port, made: Sequence[Sealed]) -> list[seal.Entry]:
    """Store results of one function, and record the manifest of their code version."""
    entries, steps = [], Steps(port)
    for start in range(0, len(made), ENTRIES_PER_STEP):
        await steps.pause_if_due()
        entries += await _store_some(port, made[start : start + ENTRIES_PER_STEP])
    return entries


async def _store_some(port: Port, made: Sequence[Sealed]) -> list[seal.Entry]:
    chain, function, code = made[0].job.chain, made[0].job.function, made[0].header.code
    items = [
        EntryToStore(one.job.name, one.record, one.encoded.payload, one.header.times)
        for one in made
    ]
    with lock_patience(function.policy):
        stored = await chain.writer.store_all(port, items)
        await chain.writer.keep_groups(
            port, [(one.header.stamps, one.header.times) for one in made]
        )
    for (job, header, encoded, record), tiers in zip(made, stored, strict=True):
        size = len(record) + (encoded.payload.size if encoded.payload else 0)
        follows = "redis follows" if chain.uploads.get(job.name) else ""
        emit(job, events.STORED, tier=",".join(tiers), size=size, detail=follows)
        chain.latest_answers.record(job.call.text, header.times.started)
    if function.record_manifest is not None and function.history.last_manifest != (
        weakref.ref(chain),
        code,
    ):
        kept = await port.offload(function.record_manifest, code, function.keyer.identity.parts)
        function.history.last_manifest = (weakref.ref(chain), code) if kept else None
    return [seal.entry(h, memoryview(encoded.stream), record) for _, h, encoded, record in made]


def _header(
    job: Job, encoded: Encoded, used: tuple[Stamp, ...], started: int, cost: float, ttl: int
) -> Header:
    """Make the header of a result that was just computed.

    Args:
        used: its stamps.
        started: when the computation began; see `Times`.
        cost: seconds that it took.
        ttl: lifetime in nanoseconds; see `Times`.
    """
    function, clock = job.function, job.chain.clock
    times = Times(
        started,
        max(started, clock.wall_ns()),
        clock.boot_id,
        clock.boot_ns(),
        ttl,
        _grace(function.policy, ttl),
        int(cost * SECOND),
    )
    return Header(
        job.chain.namespace,
        job.call.text,
        function.id,
        job.call.code,
        _fitting_address(job.call.address),
        encoded.codec,
        writer_name(),
        job.call.summary,
        times,
        used,
        encoded.payload.table if encoded.payload else (),
        encoded.flags,
    )


def _fitting_address(address: str) -> str:
    """Shorten a long address for the header, with a visible mark."""
    data = address[: seal.MAX_HEADER_TEXT_BYTES + 1].encode("utf-8", "replace")
    if len(data) <= seal.MAX_HEADER_TEXT_BYTES:
        return data.decode()
    return data[: seal.MAX_HEADER_TEXT_BYTES - 8].decode("utf-8", "ignore") + "…"


def _grace(policy: Policy, ttl: int) -> int:
    """Return how many nanoseconds past its ttl an entry is kept."""
    grace = int(policy.grace * SECOND)
    return grace if policy.ttl_key is None or ttl < 0 else max(grace, LIVE_TTL_RETENTION - ttl)


async def close_flight(port: Port, job: Job, flight: Flight, result: FlightResult) -> FlightResult:
    """Close the flight to new callers, then check whether an invalidation overtook it.

    All callers joined before this check, so its result holds for all of them (I1).  They make
    their copies later, when the leader's caller may already have changed its value (I8).
    """
    joined = FLIGHTS.close(flight)
    if joined and result.encoded is not None and result.encoded.payload is not None:
        try:
            result = result._replace(encoded=await port.offload(codec.detached, result.encoded))
        except MemoryError:  # each caller that joined computes alone
            result = result._replace(encoded=None)
    if joined and result.known_stamps and result.valid:
        return result._replace(
            valid=not await job.chain.authorities.why_invalid(port, result.known_stamps)
        )
    return result
