"""Compute a call: take its stamps, run the function once, and store the result."""

from __future__ import annotations

import time
import weakref
from binascii import b2a_base64
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from memo.engine import never_hits, replay, same_types, used_calls
from memo.engine.call import Function, Job, Outcome, Watched, emit, told, warn_of, writer
from memo.engine.coordination.flights import FLIGHTS, Flight, Landing, inside
from memo.engine.coordination.leases import patience
from memo.engine.loading import BIG
from memo.engine.used_calls import CURRENT, Life, Reads, bounded
from memo.errors import DependencyError, TierError, label, type_named, users
from memo.keys.encoding import canonical
from memo.keys.summaries import with_built, with_result
from memo.records import codec, seal
from memo.records.codec import Encoded
from memo.records.seal import Header
from memo.records.stamp_blocks import gathered
from memo.records.stamp_types import LOST, Generation, Ref, Result, Stamp, Times
from memo.runtime import events
from memo.runtime.blocking import BLOCKING
from memo.runtime.clock import SECOND
from memo.runtime.named_tuple import NamedTuple
from memo.runtime.port import Port
from memo.runtime.reasons import UNREACHABLE
from memo.settings.options import INHERIT, Policy
from memo.stores.chain import Answer, Item
from memo.validity import results, stamps
from memo.validity.check import BORN_STALE, ttl_ns
from memo.validity.stamps import TAGS

KEPT = 86_400 * SECOND
"""Shortest retention in nanoseconds of entries with a `ttl_key`, whose ttl may be raised later."""
CHANGED = "arguments changed"
"""Reason for not storing a result: the caller changed the arguments during the computation."""
STATE_CHANGED = "inputs changed"
"""Reason for not storing a result: state in its key changed while the function ran."""
ARGUMENTS = 64 * 1024
"""Most bytes of pickled arguments that an entry keeps, so that its call can be repeated."""
_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Types of arguments that are immutable."""


async def compute(
    port: Port,
    job: Job,
    flight: Flight,
    *,
    alone: bool = False,
    keep: bool = True,
    errors: bool = False,
) -> Landing:
    """Run the function once, and store its result.

    Args:
        alone: run in the background: no caller waits, so it is part of no other computation.
        keep: store the result.
        errors: also store an exception, if `cache_errors` names its type.
    """
    try:
        with patience(job.function.policy):
            own = await take_stamps(port, job)
    except DependencyError as error:
        return Landing(error=error)
    same = not (alone or port.native) or await is_same_call(port, job)
    if alone and not same:
        return Landing(fault=True)
    never_hits.notice(job)
    used_calls.carry_context()
    reads = Reads(background=alone or used_calls.in_background())
    started = job.chain.floors.start_time(job.call.text, job.chain.clock)
    flight.call, flight.expected = job.call, job.function.took
    arguments, watch = packed(job), await watch_tags(port, job)
    stands = Standing(job)
    with inside(flight, alone=alone), stands:
        outcome, cost = await run_once(port, job, reads, alone=alone)
    if own is not None and outcome.error is None:
        late = await late_stamps(port, job, outcome.value, watch)
        own = None if late is None else own + late
    known, used = await merged(port, job, reads, own)
    if outcome.error is not None:
        landing = Landing(error=outcome.error, used=used, known=known, started=started)
        sound = errors and same and stands.stands and not flight.detached
        return await _failed(port, job, landing, used if sound else None, cost)
    emit(job, events.COMPUTED, seconds=cost)
    if alone and not await is_same_call(port, job):
        return Landing(fault=True)
    job.chain.floors.rise(job.call.text, started)
    true = same and not flight.detached
    true = true and not (alone and await job.chain.turned(port, known))
    vouched = used if true and keep and stands.stands else None
    try:
        made = Made(outcome.value, vouched, started, cost, arguments, reads.life)
        landing = await store_result(port, job, made)
    except Exception as error:
        landing = unstored(job, outcome.value, error)
    if landing.entry is None:
        landing = landing._replace(used=used)
    return landing._replace(known=known + watch, started=started, true=true)


async def run_once(
    port: Port, job: Job, reads: Reads, *, alone: bool = False
) -> tuple[Outcome, float]:
    """Run the function once; return its outcome, and the seconds that it took.

    Args:
        reads: records what the function uses.
        alone: see `compute`.
    """
    token = CURRENT.set(reads)
    why = "refresh" if alone else ""
    emit(job, events.COMPUTE_STARTED, reason=why)
    begun = time.perf_counter()
    outcome: Outcome | None = None
    try:
        done = outcome = await invoke(port, job, silent=alone)
    finally:
        CURRENT.reset(token)
        reads.over = True
        ended = time.perf_counter()
        run_ended(job, reads.own_time(begun, ended), outcome, why)
    if done.error is None:
        job.function.took = ended - begun
    return done, ended - begun


def run_ended(job: Job, seconds: float, outcome: Outcome | None, why: str = "") -> None:
    """Emit the event that a run of the function has ended.

    Args:
        outcome: None if the run was interrupted or abandoned.
    """
    failed = events.INTERRUPTED
    if outcome is not None:
        failed = "" if outcome.error is None else type(outcome.error).__name__
    emit(job, events.COMPUTE_ENDED, reason=why, seconds=seconds, detail=failed)


def packed(job: Job) -> str:
    """Pickle the arguments of a call, before the function can change them, to repeat it later."""
    if not job.function.cutoff:
        return ""
    try:
        encoded = codec.encode((job.args, dict(job.kwargs)))
    except Exception:  # pickling may raise anything; such a call just cannot be repeated
        return ""
    if encoded.payload is not None or len(encoded.stream) > ARGUMENTS:
        return ""
    return b2a_base64(encoded.stream, newline=False).decode()


async def _with_result(
    port: Port, job: Job, value: Any, used: tuple[Stamp, ...], arguments: str
) -> tuple[Stamp, ...]:
    """Add the stamp that identifies the value, for a function with `cutoff=True`."""
    function = job.function
    if not function.cutoff:
        return used
    try:
        digest = (await port.offload(canonical.digest, value)).hex()
    except Exception as error:  # the value has no key, or its own methods raised
        function.cutoff = False
        said = (
            f"{function.id} has cutoff=True and returned {type_named(type(value))} that has no key "
            f"({str(error).rstrip('.')}); so what is built on it is computed again each time. "
            "Return a value with a key, give its type one with memo.register_key, or leave out "
            "cutoff."
        )
        warn_of(function.run, said)
        return used
    return (*used, Result(function.id, job.call.text, digest, arguments))


class Standing:
    """Watches the state in the key of a call while its computation runs.

    Attributes:
        stands: no state was changed by anything but the computation itself.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._watched: Watched | None = None
        self.stands = False

    def __enter__(self) -> Self:
        job = self._job
        try:
            self._watched = job.function.begin(job.call, job.args)
            self.stands = not job.call.code or job.function.code(job.args) == job.call.code
        except Exception as error:  # the values' own methods may raise anything
            emit(job, events.ERROR, reason=STATE_CHANGED, detail=told(error))
        return self

    def __exit__(self, *_: object) -> None:
        watched, self._watched = self._watched, None
        if watched is None:
            return
        job, others, said = self._job, "", ""
        try:
            found, said, learned = job.function.end(watched)
            others = ", ".join(found)
            if learned:
                findings, function = job.chain.findings, job.function.id
                BLOCKING.spawn(lambda port: findings.add(port, function, learned), "memo-tell")
        except Exception as error:
            others = told(error)
        self.stands = self.stands and not others
        if not self.stands:
            emit(job, events.ERROR, reason=STATE_CHANGED, detail=others)
        if said:
            warn_of_change(job, said)


def warn_of_change(job: Job, said: str) -> None:
    """Warn of state that the function changes itself."""
    try:
        warn_of(job.function.run, said)
    except UserWarning:  # warnings are errors here; the caller still gets the result
        emit(job, events.ERROR, reason=STATE_CHANGED, detail=said)


async def is_same_call(port: Port, job: Job) -> bool:
    """True if the arguments still make the key that the call had at first.

    The caller may change them while the computation waits, or runs in the background.
    """
    values = (*job.args, *job.kwargs.values())
    if _SCALARS.issuperset(map(type, values)):
        return True
    try:
        now = await port.offload(job.function.call, job.args, job.kwargs)
    except Exception:  # the changed arguments have no key, so the call is not the same
        now = None
    if now is not None and now.text == job.call.text:
        return True
    emit(job, events.ERROR, reason=CHANGED)
    return False


async def take_stamps(port: Port, job: Job) -> tuple[Stamp, ...] | None:
    """Take the stamps of a computation that is about to begin; None if no tier can be asked."""
    refs = job.call.refs
    asked, job.asked = job.asked, None
    try:
        states = await job.chain.authorities.begin(port, refs, asked)
    except TierError as error:
        emit(job, events.ERROR, reason=UNREACHABLE, detail=str(error))
        return None
    own: tuple[Stamp, ...] = tuple(map(Generation, refs, states))
    if job.function.depends is not None:
        own += await job.function.depends.take(port, job.args, job.kwargs)
    return own


async def merged(
    port: Port, job: Job, used: Reads, own: tuple[Stamp, ...] | None
) -> tuple[tuple[Stamp, ...], tuple[Stamp, ...] | None]:
    """Return the known stamps of a computation, and the same again if they are complete."""
    if not used.size and len(own or ()) <= stamps.READS:  # it used no other cached call
        return own or (), own if used.sound else None
    whole, sound = used.merged(own or ())
    absolute = whole.absolute()
    try:
        absolute = await bounded(port, job.chain, absolute)
    except TierError:
        sound = False
    readings = whole.readings()
    known = results.folded(absolute, readings) if readings else gathered(absolute, own or ())
    return known, known if sound and own is not None else None


async def watch_tags(port: Port, job: Job) -> tuple[Generation, ...]:
    """Take a stamp that changes with any tag, for a function whose tags depend on its result."""
    if not job.function.keyer.has_late_tags:
        return ()
    ref = Ref(TAGS)
    try:
        [state] = await job.chain.authorities.begin(port, [ref])
    except TierError:
        return (Generation(ref, LOST),)
    return (Generation(ref, state),)


async def late_stamps(
    port: Port, job: Job, result: Any, watch: tuple[Generation, ...]
) -> tuple[Generation, ...] | None:
    """Return the stamps of the tags that a result gives; None if a tag was turned meanwhile.

    The tags are read before `watch` is checked, and invalidating any tag turns `watch` first.  So
    if `watch` still holds, the tags were read before any invalidation.
    """
    function = job.function
    if not function.keyer.has_late_tags:
        return ()
    try:
        tags = function.keyer.late_tags(job.args, job.kwargs, replay.bare(result))
        refs = [Ref(stamps.group("t", tag)) for tag in tags]
        states = await job.chain.authorities.begin(port, refs)
        if await job.chain.turned(port, watch):
            return None
    except Exception as error:  # the user's callable raised, or no tier could be asked
        emit(job, events.ERROR, reason="tags", detail=told(error))
        if not isinstance(error, TierError):
            with suppress(UserWarning):  # warnings are errors here: the caller gets the result
                fault = f"has no tags ({told(error)})"
                warn_not_stored(function, result, fault, "correct its tags")
        return None
    return tuple(map(Generation, refs, states))


async def invoke(port: Port, job: Job, *, silent: bool = False) -> Outcome:
    """Call the user's function; its exceptions become an outcome, an interrupt is raised.

    Args:
        silent: record output for `replay` without showing it.
    """
    if not job.function.replay:
        return await _called(port, job)
    with replay.recording(silent=silent) as recorder:
        outcome = await _called(port, job)
    if outcome.error is not None or (not port.native and same_types.only_once(outcome.value)):
        return outcome
    return Outcome(replay.Performed(outcome.value, recorder.shown, live=True))


async def _called(port: Port, job: Job) -> Outcome:
    try:
        result = job.function.run(*job.args, **job.kwargs)
        return Outcome(await port.settle(result) if port.native else result)
    except Exception as error:
        return Outcome(error=users(error))
    except BaseException as error:
        if type(error).__name__ == "CancelledError" and not port.cancelled():
            return Outcome(error=users(error))
        raise


async def encode(port: Port, job: Job, value: Any, verb: str = "returned") -> codec.Encoded | None:
    """Encode a result for storage; None, with an event and one warning, if it cannot be pickled.

    Args:
        verb: how the function gave it ("returned", "raised"), for the warning.
    """
    try:
        bare = replay.bare(value)
        return await port.offload(same_types.encode, value, bare, job.function.compress())
    except Exception as error:
        emit(job, events.ERROR, reason="unpicklable", detail=told(error))
        fault = f"cannot be pickled ({type(error).__name__})"
        if isinstance(error, codec.AlteredError):
            fault = error.of(type(replay.bare(value)))
        fix = "return plain data instead" if verb == "returned" else "raise one that can"
        warn_not_stored(job.function, value, fault, fix, verb)
        return None


def unstored(job: Job, value: Any, error: Exception) -> Landing:
    """Report a result that is not stored because a `ttl` or `cache_if` callable raised."""
    emit(job, events.ERROR, reason="store", detail=told(error))
    with suppress(UserWarning):  # warnings are errors here: the caller gets the result
        fault = f"cannot be stored ({told(error)})"
        warn_not_stored(job.function, value, fault, "correct its ttl or cache_if")
    return Landing(value)


def warn_not_stored(
    function: Function, value: Any, fault: str, fix: str, verb: str = "returned"
) -> None:
    """Warn once per function that its results are not stored, and why."""
    if not function.warned:
        function.warned = True
        said = (
            f"{label(function.id)} {verb} {type_named(type(replay.bare(value)))} that {fault}, "
            f"so it is computed at each call; {fix}"
        )
        warn_of(function.run, said)


class Made(NamedTuple):
    """A computed result, with what is known about its computation.

    Attributes:
        value: the result.
        used: its stamps; None if it must not be stored.
        started: when the computation began; see `Times`.
        cost: seconds that it took.
        arguments: the arguments of the call, pickled.
        life: lifetime of the used result that expires first.
    """

    value: Any
    used: tuple[Stamp, ...] | None
    started: int
    cost: float = 0.0
    arguments: str = ""
    life: Life | None = None


async def store_result(port: Port, job: Job, made: Made) -> Landing:
    """Encode, seal and store a result."""
    ready = await sealed_result(port, job, made)
    if isinstance(ready, Landing):
        return ready
    [entry] = await keep(port, [ready])
    return Landing(made.value, None, entry, ready.encoded, used=ready.header.stamps)


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


async def sealed_result(port: Port, job: Job, made: Made) -> Landing | Sealed:
    """Encode and seal a result; return a landing instead if it must not be stored."""
    value, used, started, cost, arguments, life = made
    function = job.function
    if not port.native and same_types.only_once(value):
        warn_not_stored(
            function, value, "can be awaited only once", "decorate the `async def` itself"
        )
        return Landing(value, used=used)
    encoded = await encode(port, job, value)
    if encoded is None:
        return Landing(value, used=used)
    result = replay.bare(value)
    wanted = function.policy.cache_if is None or function.policy.cache_if(result)
    if used is None or not wanted:
        return Landing(value, encoded=encoded, used=used)
    used = await _with_result(port, job, result, used, arguments)
    ttl = ttl_ns(function.policy, result, function.live_ttl(), _inherited(job, life))
    header = _header(job, encoded, used, started, cost, ttl)
    summary = with_result(header.summary, result)
    if life is not None and (ttl == BORN_STALE or function.policy.ttl == INHERIT):
        summary = with_built(summary, life.path(), life.until)
    header = header._replace(summary=summary)
    return await _sealed(port, job, header, encoded)


def _inherited(job: Job, life: Life | None) -> int | None:
    """Return the nanoseconds for which the results it was built on are still fresh, or None."""
    if life is None or not (life.stale or job.function.policy.ttl == INHERIT):
        return None
    return 0 if life.stale else max(0, life.until - job.chain.clock.wall_ns())


async def _failed(
    port: Port, job: Job, landing: Landing, vouched: tuple[Stamp, ...] | None, cost: float
) -> Landing:
    """Return the landing of a computation that raised; store the error if `cache_errors` names it.

    Args:
        vouched: the stamps of the exception; None if it must not be stored.
    """
    error = landing.error
    assert error is not None
    emit(job, events.FAILED, reason=type(error).__name__, seconds=cost)
    ttl = job.function.policy.error_ttl(error)
    if vouched is None or ttl is None:
        return landing
    try:
        encoded = await encode(port, job, error, "raised")
        if encoded is None:
            return landing
        header = _header(job, encoded, vouched, landing.started, cost, ttl)
        header = header._replace(
            summary=with_result(header.summary, error, raised=True),
            times=header.times._replace(grace=0),
            flags=header.flags | seal.RAISED,
        )
        await keep(port, [await _sealed(port, job, header, encoded)])
    except Exception as fault:
        emit(job, events.ERROR, reason="store", detail=told(fault))
    return landing


async def keep_renewed(port: Port, job: Job, found: Answer, known: tuple[Stamp, ...]) -> seal.Entry:
    """Store an entry again in every tier with new stamps; its age stays the same.

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
    [entry] = await keep(port, [await _sealed(port, job, header, encoded)])
    return entry


async def _sealed(port: Port, job: Job, header: Header, encoded: Encoded) -> Sealed:
    secret = job.chain.secrets[0]
    if len(encoded.stream) > BIG:
        record = await port.offload(seal.pack, header, encoded.stream, secret)
    else:
        record = seal.pack(header, encoded.stream, secret)
    return Sealed(job, header, encoded, record)


async def keep(port: Port, made: Sequence[Sealed]) -> list[seal.Entry]:
    """Store results of one function, and record the manifest of their code version."""
    chain, function, code = made[0].job.chain, made[0].job.function, made[0].header.code
    items = [Item(one.job.name, one.record, one.encoded.payload, one.header.times) for one in made]
    with patience(function.policy):
        stored = await chain.store_all(port, items)
        await chain.keep_groups(port, [(one.header.stamps, one.header.times) for one in made])
    for (job, header, encoded, record), tiers in zip(made, stored, strict=True):
        size = len(record) + (encoded.payload.size if encoded.payload else 0)
        follows = "redis follows" if chain.uploads.get(job.name) else ""
        emit(job, events.STORED, tier=",".join(tiers), size=size, detail=follows)
        chain.floors.rise(job.call.text, header.times.started)
    if function.manifest is not None and function.noted != (weakref.ref(chain), code):
        kept = await port.offload(function.manifest, code, function.identity.parts)
        function.noted = (weakref.ref(chain), code) if kept else None
    return [seal.entry(h, memoryview(encoded.stream), record) for _, h, encoded, record in made]


def _header(
    job: Job, encoded: Encoded, used: tuple[Stamp, ...], started: int, cost: float, ttl: int
) -> Header:
    """Return the header of a result that was just computed.

    Args:
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
        _told_address(job.call.address),
        encoded.codec,
        writer(),
        job.call.summary,
        times,
        used,
        encoded.payload.table if encoded.payload else (),
        encoded.flags,
    )


def _told_address(address: str) -> str:
    """Shorten a long address for the header, with a visible mark."""
    data = address[: seal.LONGEST + 1].encode("utf-8", "replace")
    if len(data) <= seal.LONGEST:
        return data.decode()
    return data[: seal.LONGEST - 8].decode("utf-8", "ignore") + "…"


def _grace(policy: Policy, ttl: int) -> int:
    """Return for how many nanoseconds past its ttl an entry is kept."""
    grace = int(policy.grace * SECOND)
    return grace if policy.ttl_key is None or ttl < 0 else max(grace, KEPT - ttl)


async def close(port: Port, job: Job, flight: Flight, landing: Landing) -> Landing:
    """Close the flight to new callers, then check whether an invalidation overtook it.

    All callers joined before this check, so its result holds for all of them (I1).
    """
    if FLIGHTS.close(flight) and landing.known and landing.true:
        return landing._replace(true=not await job.chain.turned(port, landing.known))
    return landing
