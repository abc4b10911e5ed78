"""The engine: what happens between a call and its answer, once, as coroutines over the port.

::

    call ──> look ──> fresh ─────────────────────────────> load ──> value
               │ ├──> stale ──> refresh in background ───> load ──> value
               │ └──> miss ──> lead or join a flight
               │                 │ lead: lease ──> stamps ──> compute ──> seal, store ──> value
               └─── again <──────┘ join: wait ──> a copy of what landed

Whatever the function returned reaches its caller: from the moment it has returned, every fault of
the cache is an event.  Its exceptions are its own.
"""

from __future__ import annotations

import copy
import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

from memo import codec, events, policy, seal, stamps
from memo.chain import Answer, Chain, make_note
from memo.clock import SECOND
from memo.errors import DependencyError, EntryError, MemoError, TierError
from memo.flights import (
    FLIGHTS,
    Flight,
    Landing,
    current_path,
    following,
    inside,
    refuse_reentry,
)
from memo.identity import Identity
from memo.keys import Call, Keyer
from memo.leases import Hold, hold, let_go
from memo.live import live
from memo.policy import FRESH, MISS, STALE, Policy, Times, Verdict, judge
from memo.port import Port
from memo.seal import Entry, Header
from memo.sources import Dependencies
from memo.stamps import Generation, Ref, Stamp, State, Turn
from memo.tiers import MEMORY, Source, Vouching

BACK_OFF = (1.0, 60.0)
"""Seconds before a failed refresh is tried again: the first, doubled each time, up to the last."""
SOON = 0.2
"""Seconds before a refresh that another process has begun is asked about again."""
KEPT = 86_400 * SECOND
"""Nanoseconds that entries of a function with a `ttl_key` are kept at least: it may be raised."""
WAITED_AT_LEAST = 0.001
"""Seconds of waiting for a lease below which it was free."""
LOOK_AGAIN = 0.5
"""Seconds after which one who waits sees whether the loop that computes is still there."""
BIG = 1 << 20
"""Bytes of a pickle stream from which it is loaded off the event loop."""
CHANGED = "arguments changed"
"""Why a result is not stored: the caller changed what it passed before the function was done."""
_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None)})
"""Types of arguments that nobody can change."""


@dataclass(slots=True)
class Function:
    """What the engine knows of a cached function.

    Attributes:
        id: `"module:qualname"`.
        run: the user's function.
        keyer: makes keys of its arguments.
        identity: its code version.
        policy: how its entries age.
        chain: gives the chain that holds its entries, as the settings are now.
        live_ttl: gives the live configuration's ttl in seconds, or None.
        manifest: writes down what a code version is made of, once.
        depends: gives the file and call stamps of one call, where it has any.
    """

    id: str
    run: Callable[..., Any]
    keyer: Keyer
    identity: Identity
    policy: Policy
    chain: Callable[[], Chain]
    live_ttl: Callable[[], float | None] = lambda: None
    depends: Dependencies | None = None
    manifest: Callable[[str, Callable[[], Mapping[str, str]]], None] | None = None
    backoff: dict[str, tuple[float, float]] = field(default_factory=dict)
    warned: bool = False

    def code(self, args: tuple[Any, ...]) -> str:
        """The code version for a call: a method's depends on the class that it is called on."""
        if not self.keyer.method or not args:
            return self.identity.digest()
        own = args[0]
        return self.identity.digest(own if isinstance(own, type) else type(own))

    def judge(self, times: Times) -> Verdict:
        return judge(times, self.policy, self.chain().clock, self.live_ttl())


class Job(NamedTuple):
    """One call on its way."""

    function: Function
    chain: Chain
    call: Call
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.chain.name(self.function.id, self.call.text)


class Raised:
    """The function raised: the wrapper raises it again, with the user's frames only."""

    __slots__ = ("error", "traceback")

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.traceback = error.__traceback__

    def again(self) -> BaseException:
        return self.error.with_traceback(self.traceback)


class Outcome(NamedTuple):
    """What the function did: it returned `value`, or raised `error`."""

    value: Any = None
    error: BaseException | None = None

    def __repr__(self) -> str:
        return f"<Outcome {type(self.value if self.error is None else self.error).__name__}>"


_AGAIN = object()
_NOTHING = object()


# --- reads: what a computation used of other cached functions ------------------------------------


class Reads:
    """The stamps of every cached call that a computation made: they become stamps of its own.

    Attributes:
        sound: nothing is missing, and nothing changed under the computation.
        over: the computation has ended; what a thread of it still reads is no part of it.
    """

    __slots__ = ("_others", "_states", "over", "sound")

    def __init__(self) -> None:
        self._states: dict[Ref, State] = {}
        self._others: dict[Stamp, None] = {}
        self.sound = True
        self.over = False

    def add(self, new: Iterable[Stamp]) -> None:
        for stamp in new:
            if type(stamp) is Generation:
                if self._states.setdefault(stamp.ref, stamp.state).text != stamp.state.text:
                    self.sound = False
            else:
                self._others.setdefault(stamp)

    def all(self) -> tuple[Stamp, ...]:
        states = self._states.copy()  # in one step: threads may still add
        return (*map(Generation, states.keys(), states.values()), *self._others.copy())

    def merged(self, own: Iterable[Stamp]) -> tuple[tuple[Stamp, ...], bool]:
        """A computation's own stamps with those of what it used; whether nothing is missing."""
        whole = Reads()
        whole.add(own)
        whole.add(self.all())
        return whole.all(), self.sound and whole.sound


async def _bounded(port: Port, chain: Chain, known: tuple[Stamp, ...]) -> tuple[Stamp, ...]:
    """Stamps in which one on anything in a group stands for more than `stamps.READS` of it.

    It is read in one step with those that it stands for, and stands for them if they still hold.

    Raises:
        TierError: nobody can tell.
    """
    groups: dict[str, list[Generation]] = {}
    for stamp in known:
        if type(stamp) is Generation:
            groups.setdefault(stamp.ref.group, []).append(stamp)
    big = [name for name, members in groups.items() if len(members) > stamps.READS]
    if not big:
        return known
    wholes = [Ref(name, None) for name in big]
    members = [stamp for name in big for stamp in groups[name]]
    states = await chain.states(port, [*wholes, *(stamp.ref for stamp in members)])
    now = zip(members, states[len(big) :], strict=True)
    changed = [stamp for stamp, state in now if stamp.state.text != state.text]
    kept = [s for s in known if type(s) is not Generation or s.ref.group not in big]
    return (*kept, *map(Generation, wholes, states), *changed[:1])


class Carried(NamedTuple):
    """What a thread must know of the computation that starts it."""

    reads: Reads
    path: tuple[Flight, ...]


def carried() -> Carried | None:
    """What a thread that is started here must be told; None: no computation runs here."""
    reads = _reads.get()
    return None if reads is None or reads.over else Carried(reads, current_path())


def carry(given: Carried, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `work`, in another thread, as part of the computation that started it."""
    token = _reads.set(given.reads)
    try:
        with following(given.path):
            return work(*args, **kwargs)
    finally:
        _reads.reset(token)


def nothing() -> None:
    """What is done before a computation where no driver wants anything."""


prepare: Callable[[], None] = nothing
"""Called before every computation; the drivers put `carry_context` here."""

_reads: ContextVar[Reads | None] = ContextVar("memo_reads", default=None)


def _read(used: Iterable[Stamp] | None) -> None:
    """Tell the computation around this call, if any, what it has just used."""
    reads = _reads.get()
    if reads is not None and not reads.over:
        if used is None:
            reads.sound = False
        else:
            reads.add(used)


# --- answers -------------------------------------------------------------------------------------


def at_once(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value of a call from the memory tier, or the `Call` that `answer` has to go on with.

    A plain function, so that the commonest hit costs neither coroutine nor port.
    """
    begun = time.perf_counter()
    call = function.keyer.call(function.code(args), args, kwargs)
    chain = function.chain()
    entry = chain.quick(function.id, call.text)
    if entry is None or len(entry.stream) > BIG:
        return call
    if function.policy.ttl_key is not None and live.due():
        return call
    if function.judge(entry.header.times).kind != FRESH:
        return call
    try:
        return _quick(chain, function, call, entry, begun)
    except EntryError:
        return call  # `look` meets it again, and says so


async def answer(
    port: Port, function: Function, call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The value of a call that `at_once` could not answer, or `Raised`."""
    begun = time.perf_counter()
    if function.policy.ttl_key is not None and live.due():
        await port.offload(live.refresh)
    job = Job(function, function.chain(), call, args, kwargs)
    missed = False
    while True:
        since = FLIGHTS.landed
        found, value = await look(port, job)
        if value is not _NOTHING:
            _hit(port, job, found, begun)
            return value
        if not missed:
            missed = True
            _emit(job, events.MISS, reason=found.verdict.reason)
        value = await _lead_or_join(port, job, found, since)
        if value is not _AGAIN:
            return value


def _quick(chain: Chain, function: Function, call: Call, entry: Entry, begun: float) -> Any:
    """Answer from the memory tier, without suspending: the entry was decoded here before."""
    value = codec.decode(entry.stream, None, ())
    chain.raise_floor(call.text, entry.header.times.started)
    reads = _reads.get()
    if reads is not None:
        reads.add(entry.header.stamps)
    events.emit(
        events.Event(
            events.HIT,
            function.id,
            call.text,
            MEMORY,
            "",
            time.perf_counter() - begun,
            entry.size,
            entry.header.times.cost / SECOND,
        )
    )
    return value


async def look(port: Port, job: Job) -> tuple[Answer, Any]:
    """The chain's answer, and the value when there is a usable one."""
    found = await job.chain.lookup(port, job.function.id, job.call.text, job.function.judge)
    if found.verdict.kind == MISS or found.entry is None:
        return found, _NOTHING
    try:
        return found, await load(port, found)
    except (EntryError, TierError) as error:
        reason = error.reason if isinstance(error, EntryError) else policy.PAYLOAD_MISSING
        _emit(job, events.ERROR, tier=found.tier, reason=reason, detail=str(error))
        return Answer(Verdict(MISS, reason), found.entry), _NOTHING


async def load(port: Port, found: Answer) -> Any:
    """The value of an answer.

    Raises:
        EntryError: it does not load, or its payload is not what was sealed.
        TierError: its payload is gone.
    """
    entry = found.entry
    assert entry is not None
    if port.native and (len(entry.stream) > BIG or _must_verify(found)):
        return await port.offload(_load, entry, found)
    return _load(entry, found)


def _load(entry: Entry, found: Answer) -> Any:
    table = entry.header.buffers
    if not table:
        return codec.decode(entry.stream, None, ())
    assert found.source is not None
    view = found.source.open(seal.payload_size(table))
    if _must_verify(found):
        _verify(found.source, view, table)
    return codec.decode(entry.stream, view, table)


def _verify(source: Source, view: memoryview, table: tuple[seal.Buffer, ...]) -> None:
    """See that a payload has its digest, by a voucher if there is one, else byte by byte.

    Raises:
        EntryError: it has not.
    """
    digest = seal.payload_digest(table)
    vouching = source if isinstance(source, Vouching) else None
    if vouching is None or not vouching.vouched(digest):
        if not codec.is_whole(view, table):
            raise EntryError(policy.UNREADABLE, "a payload does not have its digest")
        if vouching is not None:
            vouching.vouch(digest)
    _verified[(source.identity, digest)] = None
    if len(_verified) > 4096:
        _verified.pop(next(iter(_verified)))


_verified: dict[tuple[Any, bytes], None] = {}


def _must_verify(found: Answer) -> bool:
    if found.source is None or found.entry is None:
        return False
    identity = found.source.identity
    digest = seal.payload_digest(found.entry.header.buffers)
    return identity is None or (identity, digest) not in _verified


def _hit(port: Port, job: Job, found: Answer, begun: float) -> None:
    assert found.entry is not None
    header = found.entry.header
    job.chain.raise_floor(job.call.text, header.times.started)
    _read(header.stamps)
    stale = found.verdict.kind == STALE
    events.emit(
        events.Event(
            events.STALE if stale else events.HIT,
            job.function.id,
            job.call.text,
            found.tier,
            found.verdict.reason,
            time.perf_counter() - begun,
            found.entry.size,
            header.times.cost / SECOND,
        )
    )
    if stale:
        _refresh_soon(port, job)


async def _lead_or_join(port: Port, job: Job, found: Answer, since: int) -> Any:
    name = job.name
    flight, leads = FLIGHTS.join(name, job.call.refs)
    if leads and FLIGHTS.landed_since(name, since):
        FLIGHTS.land(flight, None)
        FLIGHTS.part(flight)
        return _AGAIN
    try:
        if leads and not port.native:
            await _fly(port, job, flight, found)
        else:
            await _wait(port, job, flight, found, leads)
    finally:
        FLIGHTS.part(flight)
    landing = flight.landing
    if landing is None:
        return _AGAIN
    return await _disembark(port, job, landing, leads)


async def _wait(port: Port, job: Job, flight: Flight, found: Answer, leads: bool) -> None:
    """Wait until a flight has landed, or can never land."""
    waiter = FLIGHTS.board(flight, port)
    try:
        if leads:
            flight.handle = port.spawn(
                lambda port: _fly(port, job, flight, found),
                f"memo-{job.function.id}",
                lambda: FLIGHTS.abandon(flight),
            )
        while not await port.wait(waiter, None if leads else LOOK_AGAIN):
            if FLIGHTS.lost(flight):
                await let_go(port, flight)
    finally:
        FLIGHTS.leave(flight, waiter)


async def _disembark(port: Port, job: Job, landing: Landing, leads: bool) -> Any:
    """What a landing means for one of those who waited."""
    if landing.fault:
        return await _alone(port, job)
    if leads:
        _read(landing.used)
        return Raised(landing.error) if landing.error is not None else landing.value
    if not landing.true:
        return _AGAIN
    if landing.error is not None:
        _read(landing.used)
        _emit(job, events.COALESCED, reason=type(landing.error).__name__)
        return Raised(landing.error)
    if job.chain.older(job.call.text, landing.started):
        return _AGAIN
    if landing.encoded is None:
        return await _alone(port, job)
    value = await _copy(port, job, landing.encoded)
    if value is _NOTHING:
        return await _alone(port, job)
    cost = landing.entry.header.times.cost / SECOND if landing.entry else 0.0
    _emit(job, events.COALESCED, saved=cost)
    _read(landing.used)
    return value


async def _copy(port: Port, job: Job, encoded: codec.Encoded) -> Any:
    """A joiner's own copy of a result that has just been computed."""

    def make() -> Any:
        payload: memoryview | None = None
        table: tuple[seal.Buffer, ...] = ()
        if encoded.payload is not None:
            table = encoded.payload.table
            payload = memoryview(bytearray(codec.aligned(encoded.payload)))
        return codec.decode(encoded.stream, payload, table)

    try:
        return await port.offload(make)
    except EntryError as error:
        _emit(job, events.ERROR, reason=error.reason, detail=str(error))
        return _NOTHING


async def _alone(port: Port, job: Job) -> Any:
    """Compute for one caller only: the result cannot be copied, or the cache is out of order."""
    started = job.chain.start_time(job.call.text)
    outcome = await _invoke(port, job)
    _read(None)
    if outcome.error is None:
        job.chain.raise_floor(job.call.text, started)
    return Raised(outcome.error) if outcome.error is not None else outcome.value


# --- computing -----------------------------------------------------------------------------------


async def _fly(port: Port, job: Job, flight: Flight, found: Answer) -> None:
    """Compute for everybody on board, and end the flight, however it ends."""
    landing: Landing | None = None
    try:
        landing = await _land(port, job, flight, found)
    except Exception as error:  # ours, since the user's are in the landing
        _emit(job, events.ERROR, reason="engine", detail=_told(error))
        landing = Landing(fault=True)
    finally:
        FLIGHTS.land(flight, landing)


async def _land(port: Port, job: Job, flight: Flight, found: Answer) -> Landing | None:
    """A landing; None: look again, somebody else has computed it in the meantime."""
    held = await hold(port, job.chain, job.name, job.function.policy, flight)
    try:
        if held is not None and await _done_by_another(port, job, held, found.entry):
            return None
        landing = await compute(port, job, flight)
    finally:
        if held is not None:
            await held.release(port)
    if landing.error is not None and found.verdict.fallback and found.entry is not None:
        landing = await _fall_back(port, job, found, landing)
    return await _close(port, job, flight, landing)


async def _done_by_another(port: Port, job: Job, held: Hold, bad: Entry | None = None) -> bool:
    """Whether somebody stored a fresh result before this process got the lease.

    Args:
        bad: an entry that could not be used: only a later one counts.
    """
    if held.mine and held.waited >= WAITED_AT_LEAST:
        _emit(job, events.WAITED, seconds=held.waited)
    found = await job.chain.lookup(port, job.function.id, job.call.text, job.function.judge)
    if found.verdict.kind != policy.FRESH or found.entry is None:
        return False
    return bad is None or found.entry.header.times.started > bad.header.times.started


async def _close(port: Port, job: Job, flight: Flight, landing: Landing) -> Landing:
    """Let nobody join any more; then see whether an invalidation overtook the computation.

    Whoever joined did so before this look, so what it finds true is true for all of them (I1).
    """
    if FLIGHTS.close(flight) and landing.known and landing.true:
        return landing._replace(true=not await job.chain.turned(port, landing.known))
    return landing


async def _fall_back(port: Port, job: Job, found: Answer, landing: Landing) -> Landing:
    """The old value instead of an error (`stale_if_error`), unless it was invalidated meanwhile."""
    assert found.entry is not None
    if await job.chain.untrue(port, found.entry):
        return landing
    try:
        value = await load(port, found)
    except (EntryError, TierError):
        return landing
    started, used = found.entry.header.times.started, found.entry.header.stamps
    job.chain.raise_floor(job.call.text, started)
    _emit(job, events.STALE, tier=found.tier, reason=f"error: {type(landing.error).__name__}")
    encoded = await _encode(port, job, value)
    return Landing(value, None, found.entry, encoded, used=used, known=used, started=started)


async def compute(port: Port, job: Job, flight: Flight, *, alone: bool = False) -> Landing:
    """Run the function once, and keep what it returned.

    Args:
        alone: in the background: nobody waits for it, so it is part of no other computation.
    """
    try:
        own = await _stamps(port, job)
    except DependencyError as error:
        return Landing(error=error)
    same = not (alone or port.native) or await _is_same_call(port, job)
    if alone and not same:
        return Landing(fault=True)
    prepare()
    reads = Reads()
    started = job.chain.start_time(job.call.text)
    with inside(flight, alone=alone):
        token = _reads.set(reads)
        why = "refresh" if alone else ""
        _emit(job, events.COMPUTE_STARTED, reason=why)
        clock = time.perf_counter()
        try:
            outcome = await _invoke(port, job)
        finally:
            _reads.reset(token)
            reads.over = True
            _emit(job, events.COMPUTE_ENDED, reason=why)
        cost = time.perf_counter() - clock
    known, sound = reads.merged(own or ())
    try:
        known = await _bounded(port, job.chain, known)
    except TierError:
        sound = False
    used = known if sound and own is not None else None
    if outcome.error is not None:
        _emit(job, events.FAILED, reason=type(outcome.error).__name__, seconds=cost)
        return Landing(error=outcome.error, used=used, known=known, started=started)
    _emit(job, events.COMPUTED, seconds=cost)
    if alone and not await _is_same_call(port, job):
        return Landing(fault=True)
    job.chain.raise_floor(job.call.text, started)
    true = same and not flight.detached
    true = true and not (alone and await job.chain.turned(port, known))
    try:
        landing = await _keep(port, job, outcome.value, used if true else None, started, cost)
    except Exception as error:
        _emit(job, events.ERROR, reason="store", detail=_told(error))
        landing = Landing(outcome.value)
    return landing._replace(used=used, known=known, started=started, true=true)


async def _is_same_call(port: Port, job: Job) -> bool:
    """Whether the arguments, which the caller has too, still make the key of the call.

    While a computation waits for its turn, and all the more in the background, the caller goes on.
    """
    values = (*job.args, *job.kwargs.values())
    if _SCALARS.issuperset(map(type, values)):
        return True
    keyer, code = job.function.keyer, job.function.code(job.args)
    try:
        now = await port.offload(keyer.call, code, job.args, job.kwargs)
    except Exception:  # what cannot be keyed any more is another call
        now = None
    if now is not None and now.text == job.call.text:
        return True
    _emit(job, events.ERROR, reason=CHANGED)
    return False


async def _stamps(port: Port, job: Job) -> tuple[Stamp, ...] | None:
    """The stamps of a computation that is about to begin; None: nobody can tell what is true."""
    refs = job.call.refs
    try:
        states = await job.chain.begin(port, refs)
    except TierError as error:
        _emit(job, events.ERROR, reason=policy.UNREACHABLE, detail=str(error))
        return None
    own: tuple[Stamp, ...] = tuple(map(Generation, refs, states))
    if job.function.depends is not None:
        own += await job.function.depends.take(port, job.args, job.kwargs)
    return own


async def _invoke(port: Port, job: Job) -> Outcome:
    """Call the user's function; its exceptions are an outcome, an interrupt is not."""
    try:
        result = job.function.run(*job.args, **job.kwargs)
        return Outcome(await port.settle(result) if port.native else result)
    except Exception as error:
        return Outcome(error=_users(error))
    except BaseException as error:
        if type(error).__name__ == "CancelledError" and not port.cancelled():
            return Outcome(error=_users(error))
        raise


def _users(error: BaseException) -> BaseException:
    """An exception whose traceback begins at the user's first frame."""
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__package__") == "memo":
        frames = frames.tb_next
    return error.with_traceback(frames or error.__traceback__)


async def _encode(port: Port, job: Job, value: Any) -> codec.Encoded | None:
    try:
        return await port.offload(codec.encode, value)
    except Exception as error:
        _emit(job, events.ERROR, reason="unpicklable", detail=_told(error))
        fault = f"cannot be pickled ({type(error).__name__})"
        _warn(job.function, value, fault, "return plain data instead")
        return None


def _warn(function: Function, value: Any, fault: str, mend: str) -> None:
    """Say once per function that its results are not stored, and why."""
    if not function.warned:
        function.warned = True
        warnings.warn(
            f"{function.id} returned a {type(value).__name__} that {fault}, "
            f"so it is computed at each call; {mend}",
            stacklevel=2,
        )


async def _keep(
    port: Port,
    job: Job,
    value: Any,
    used: tuple[Stamp, ...] | None,
    started: int,
    cost: float,
) -> Landing:
    """Encode, seal and store a result."""
    chain, function = job.chain, job.function
    if not port.native and inspect.isawaitable(value):
        _warn(function, value, "can be awaited only once", "decorate the `async def` itself")
        return Landing(value, used=used)
    encoded = await _encode(port, job, value)
    if encoded is None:
        return Landing(value, used=used)
    wanted = function.policy.cache_if is None or function.policy.cache_if(value)
    if used is None or not wanted:
        return Landing(value, encoded=encoded, used=used)
    ttl = policy.ttl_ns(function.policy, value, function.live_ttl())
    times = Times(
        started,
        max(started, chain.clock.wall_ns()),
        chain.clock.boot_id,
        chain.clock.boot_ns(),
        ttl,
        _grace(function.policy, ttl),
        int(cost * SECOND),
    )
    header = Header(
        chain.namespace,
        job.call.text,
        function.id,
        function.code(job.args),
        job.call.address,
        encoded.codec,
        _writer(),
        job.call.summary,
        times,
        used,
        encoded.payload.table if encoded.payload else (),
    )
    if len(encoded.stream) > BIG:
        record = await port.offload(seal.pack, header, encoded.stream, chain.secrets[0])
    else:
        record = seal.pack(header, encoded.stream, chain.secrets[0])
    stored = await chain.store(port, job.name, record, encoded.payload, times)
    size = len(record) + (encoded.payload.size if encoded.payload else 0)
    _emit(job, events.STORED, tier=",".join(stored), size=size)
    chain.raise_floor(job.call.text, started)
    if function.manifest is not None:
        await port.offload(function.manifest, header.code, function.identity.parts)
    entry = seal.entry(header, memoryview(encoded.stream), record)
    chain.remember(job.name, entry)
    return Landing(value, None, entry, encoded, used=used)


def _grace(policy: Policy, ttl: int) -> int:
    """Nanoseconds past its ttl for which an entry is kept."""
    grace = int(policy.grace * SECOND)
    return grace if policy.ttl_key is None or ttl < 0 else max(grace, KEPT - ttl)


def _writer() -> str:
    return f"{os.uname().nodename}/{os.getpid()}"


# --- refreshing ----------------------------------------------------------------------------------


def _refresh_soon(port: Port, job: Job) -> None:
    """Refresh a stale value in the background, unless somebody does or it failed just now."""
    until, _ = job.function.backoff.get(job.call.text, (0.0, 0.0))
    if time.monotonic() < until:
        return
    flight, leads = FLIGHTS.join(job.name, job.call.refs, background=True)
    if leads:
        flight.handle = port.spawn(
            lambda port: _refresh(port, job, flight),
            f"memo-refresh-{job.function.id}",
            lambda: FLIGHTS.abandon(flight),
        )
    elif FLIGHTS.lost(flight):
        port.spawn(lambda port: let_go(port, flight), "memo-let-go")


async def _refresh(port: Port, job: Job, flight: Flight) -> None:
    landing: Landing | None = None
    begun = time.perf_counter()
    _emit(job, events.REFRESH_STARTED)
    kind, reason = events.REFRESH_FAILED, "dropped"
    try:
        held = await hold(port, job.chain, job.name, job.function.policy, flight, refresh=True)
        assert held is not None
        try:
            if held.mine and not await _done_elsewhere(port, job):
                landing = await compute(port, job, flight, alone=True)
                landing = await _close(port, job, flight, landing)
        finally:
            await held.release(port)
        kind, reason = _refresh_ended(job, landing)
    finally:
        FLIGHTS.land(flight, landing)
        _emit(job, kind, reason=reason, seconds=time.perf_counter() - begun)


async def _done_elsewhere(port: Port, job: Job) -> bool:
    """Whether another process has refreshed it: then what our memory tier has gives way to that."""
    front, *others = job.chain.tiers
    if front.name != MEMORY or not others:
        return False
    behind = copy.copy(job.chain)
    behind.tiers = tuple(others)
    found = await behind.lookup(port, job.function.id, job.call.text, job.function.judge)
    if found.verdict.kind == FRESH:
        await front.drop(port, job.name)
    return found.verdict.kind == FRESH


def _refresh_ended(job: Job, landing: Landing | None) -> tuple[str, str]:
    """The kind and the reason of the event that ends a refresh; sets the back-off."""
    backoff, key = job.function.backoff, job.call.text
    if landing is None:  # who has it will have done it soon: do not ask at every stale answer
        backoff[key] = (time.monotonic() + SOON, 0.0)
        return events.REFRESH_DONE, "by another process"
    if landing.fault:
        return events.REFRESH_FAILED, CHANGED
    if landing.error is None:
        backoff.pop(key, None)
        if not landing.true:
            return events.REFRESH_FAILED, policy.INVALIDATED
        return events.REFRESH_DONE, ""
    pause = min(BACK_OFF[1], max(BACK_OFF[0], backoff.get(key, (0.0, 0.0))[1] * 2))
    if len(backoff) > 4096:
        backoff.clear()
    backoff[key] = (time.monotonic() + pause, pause)
    return events.REFRESH_FAILED, type(landing.error).__name__


# --- what the decorated function can do besides --------------------------------------------------


async def _job(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Job:
    if function.policy.ttl_key is not None and live.due():
        await port.offload(live.refresh)
    call = function.keyer.call(function.code(args), args, kwargs)
    return Job(function, function.chain(), call, args, kwargs)


async def refresh(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Compute now, store, and give the value (or `Raised`).

    Raises:
        ReentryError: the computation of this very key asks for it.
    """
    job = await _job(port, function, args, kwargs)
    call = job.call
    refuse_reentry(job.name)
    flight = Flight(job.name, call.refs, background=False)
    try:
        landing = await compute(port, job, flight)
    finally:
        flight.over = True
    _read(landing.used)
    return Raised(landing.error) if landing.error is not None else landing.value


async def peek(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], default: Any
) -> Any:
    """The stored value if it may be used now, else `default`; never computes."""
    job = await _job(port, function, args, kwargs)
    found, value = await look(port, job)
    if value is _NOTHING:
        return default
    assert found.entry is not None
    job.chain.raise_floor(job.call.text, found.entry.header.times.started)
    _read(found.entry.header.stamps)
    return value


async def is_cached(
    port: Port, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Would this call be answered from the cache?  Does not load the value."""
    job = await _job(port, function, args, kwargs)
    found = await job.chain.lookup(port, function.id, job.call.text, function.judge)
    return found.verdict.kind != MISS


class Invalidation(NamedTuple):
    """How an invalidation went.

    Attributes:
        target: what was invalidated, for people.
        tiers: tier -> `"done"`, or why not and what happens now.
        reason: the caller's.
    """

    target: str
    tiers: Mapping[str, str]
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether every tier has it already."""
        return all(how == "done" for how in self.tiers.values())

    def __repr__(self) -> str:
        how = ", ".join(f"{tier}: {what}" for tier, what in self.tiers.items())
        return f"<invalidated {self.target} ({how})>"


async def invalidate(
    port: Port, chains: Iterable[Chain], turns: Iterable[Turn], target: str, reason: str = ""
) -> Invalidation:
    """Make entries untrue, in every chain that may hold them."""
    wanted = tuple(turns)
    note = make_note(reason, _writer())
    tiers: dict[str, str] = {}
    for chain in chains:
        for tier, how in (await chain.turn(port, wanted, note)).items():
            if tiers.get(tier, "done") == "done":
                tiers[tier] = how
    FLIGHTS.detach(wanted)
    for function in {_function_of(turn): None for turn in wanted} or ("",):
        about = _about(wanted)
        events.emit(events.Event(events.INVALIDATED, function, reason=reason, detail=about))
    return Invalidation(target, tiers, reason)


def _about(turns: Iterable[Turn]) -> str:
    """What an invalidation names, without any argument's value: groups, and names of arguments."""
    return ", ".join(
        f"{turn.group} by {stamps.shape(turn.arguments)}" if turn.arguments else turn.group
        for turn in turns
    )


def _function_of(turn: Turn) -> str:
    """The function that an invalidation is about; `""` for a prefix, a tag or a namespace."""
    return turn.group[2:] if turn.group.startswith("f:") else ""


def _told(error: BaseException) -> str:
    """An error for an event: an error of others may quote a value, so only where it was raised."""
    text = str(error) if isinstance(error, MemoError) else _raised_at(error)
    return f"{type(error).__name__}: {text}"


def _raised_at(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    return "" if frames is None else f"{frames.tb_frame.f_code.co_filename}:{frames.tb_lineno}"


def _emit(job: Job, kind: str, **facts: Any) -> None:
    events.emit(events.Event(kind, job.function.id, job.call.text, **facts))
