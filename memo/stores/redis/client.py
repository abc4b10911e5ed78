"""The client: one Redis, used by threads and by event loops, behind a breaker.

Rules of this module:

1.  Connections belong to one process and, in async code, to one event loop.  After a fork, and on
    another loop, new connections are opened.
2.  Every exchange passes the breaker.  After a refused connection the probing caller has its own
    exchange with a short deadline; while Redis is silent a background job probes, so that no caller
    waits.
3.  Every fault is a `TierError`, or a `TierUnavailable` if no command would work.
4.  An exchange goes to one server.  In a cluster that is the one with its key; commands with keys
    on several servers are one exchange per server.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha1
from typing import TYPE_CHECKING, Any, TypeVar, cast

from memo.errors import TierError
from memo.records.payload_pieces import PayloadSink
from memo.runtime.port import SHARED_ROUND_TRIPS, Deferred, Port
from memo.settings.redis_urls import CLUSTER, SENTINEL, parse
from memo.stores.protocols import REDIS
from memo.stores.redis.scripts import NoScriptError, NoScriptsError, Script
from memo.stores.redis.transport.breaker import Breaker
from memo.stores.redis.transport.coalescing import Failure, ThreadBatch
from memo.stores.redis.transport.exchange import Exchange
from memo.stores.redis.transport.faults import GARBLED, SILENT, UNINTERRUPTED, WRITES_DENIED, Fault
from memo.stores.redis.transport.process_connections import ProcessConnections
from memo.stores.redis.transport.resp import Command, ErrorReply, command_bytes, pack, with_key

if TYPE_CHECKING:
    from memo.stores.redis.transport.loop_connections import LoopConnections
    from memo.stores.redis.transport.thread_connections import ThreadConnections

T = TypeVar("T")
PROBE_SECONDS = 0.1
"""Longest time in seconds that probing may delay a caller."""
_PROBE_COMMAND = pack(b"ECHO", b"")
_WRITES_REFUSED = "Hits go on; new results are stored on this host"
_MOVED, _ASK = "MOVED", "ASK"
_WRONG_SERVER = frozenset((_MOVED, _ASK, "READONLY"))
"""Error replies of a server that does not have the key, or no longer takes writes."""
_SCRIPTS_DENIED = ("NOPERM", "UNKNOWN")
"""Error replies of a server that does not let this user run scripts."""


class Client:
    """The client of one Redis.

    Args:
        url: see `redis_urls`; a user and password in it are never shown.
        deadline: seconds that an exchange may take in all.
        options: arguments of redis-py's clients, beyond those in the URL.

    Attributes:
        where: the server, without user and password: `"127.0.0.1:6379/0"`.
        connections: those of this process.
        breaker: decides whether the server may be asked.
        writes: decides whether the server may be asked to write.
        outages: number of failed exchanges.
        interruptions: number of `outages`, except replies of a server that runs on, and of
            connections that died while idle.  As long as it is the same, the server has not
            restarted.
        on_recover: called when Redis answers again after a fault; must be quick.
        scripts: True if the server runs scripts for this user; None: not known yet.
        knows_digests: True if scripts may be called by their digest.
    """

    def __init__(self, url: str, deadline: float, options: Mapping[str, Any] | None = None) -> None:
        self._address = parse(url)
        self.deadline = deadline
        self.where = self._address.where
        self.clustered = self._address.kind == CLUSTER
        self.breaker = Breaker(REDIS, self.where)
        self.writes = Breaker(REDIS, self.where, consequence=_WRITES_REFUSED)
        self.outages = 0
        self.interruptions = 0
        self.scripts: bool | None = None
        self.knows_digests = True
        self.on_recover: list[Callable[[], None]] = []
        self.connections = ProcessConnections(self._address, options or {}, self)

    def __repr__(self) -> str:
        return f"<Client {self.where}>"

    # --- lookups, which share exchanges ---------------------------------------------------------

    def start_lookup(self, port: Port, commands: Sequence[Command]) -> Any:
        """Begin a lookup from a plain function; None if that needs a coroutine.

        Args:
            commands: (key, packed command) of commands that only read.

        Returns:
            A future answer for `Port.settle`; `parse_answer` takes its result.
        """
        if not self.breaker.healthy:
            return None
        if not port.native:
            others = SHARED_ROUND_TRIPS.get()
            return (
                self._read_here(commands) if others is None else self._read_later(others, commands)
            )
        loop = self.connections.loops.get(port.loop)
        if loop is None or loop.look_up is None:
            return None
        try:
            return loop.look_up(commands)
        except Exception as error:  # a slot without a server
            return self.as_failure(error)

    async def get_ready(self, port: Port) -> None:
        """Connect an event loop, so that `start_lookup` can be used on it.

        Raises:
            TierError: it cannot be connected.
        """
        if port.native and self.breaker.healthy:
            loop = await self._loop(port)
            if loop.look_up is None:
                await self._record_faults_of(loop.get_ready())

    async def look_up(
        self, port: Port, commands: Sequence[Command], *, parse: Callable[[list[Any]], T]
    ) -> T:
        """Send commands and parse their replies; connects an event loop first if necessary.

        Raises:
            TierError: one of the replies is an error, or there is no answer.
        """
        if self.breaker.healthy:
            await self.get_ready(port)
            answer = self.start_lookup(port, commands)
            if answer is not None:
                return self.parse_answer(parse, await port.settle(answer))
        return parse(await self.ask_each(port, commands))

    def parse_answer(self, parse: Callable[[list[Any]], T], answer: Any) -> T:
        """Apply `parse` to replies.

        Raises:
            TierError: the answer is a failure, or the replies are not of the expected form.
        """
        new_error = getattr(answer, "new_error", None)
        if new_error is not None:
            raise new_error()
        try:
            return parse(answer)
        except Exception as error:
            raise self._record_fault(_fault_of(error), probe=False) from None

    def _read_later(self, others: dict[object, Any], commands: Sequence[Command]) -> Deferred:
        """Add lookups to a batch of this thread; return their future replies."""
        batch: ThreadBatch | None = others.get(self)
        if batch is None or batch.full:
            batch = others[self] = ThreadBatch(self._read_here)
        return batch.add(commands)

    def _read_here(self, commands: Sequence[Command]) -> Any:
        """Send lookups from this thread, to one server after the other; return the replies."""
        threads = self.connections.of_threads()
        try:
            if not self.clustered:
                exchange = Exchange(command_bytes(commands), len(commands), self.deadline)
                replies = threads.exchange(b"", exchange, self.breaker.check)
            else:
                replies = self._read_parts(threads, commands)
        except Exception as error:
            return self.as_failure(error)
        for reply in replies:
            if type(reply) is ErrorReply:
                return self.as_failure(with_key(reply, commands[replies.index(reply)][1]))
        if not self.breaker.healthy:
            self.record_recovery()
        return replies

    def _read_parts(self, threads: ThreadConnections, commands: Sequence[Command]) -> list[Any]:
        found: list[Any] = [None] * len(commands)
        for node, places in _group_by_server(threads.nodes(self.deadline), commands).items():
            exchange = Exchange([commands[p][1] for p in places], len(places), self.deadline)
            replies = threads.exchange(node, exchange, self.breaker.check)
            for place, reply in zip(places, replies, strict=True):
                found[place] = reply
        return found

    # --- exchanges -------------------------------------------------------------------------------

    async def ask(
        self,
        port: Port,
        *parts: bytes | memoryview,
        parse: Callable[[Any], T],
        key: Any = b"",
        replies: int = 1,
        seconds: float | None = None,
        writes: bool = False,
        blocks: bool = False,
        body: Callable[[], Iterator[bytes | memoryview]] | None = None,
        sink: PayloadSink | None = None,
    ) -> T:
        """Send packed commands and wait for their replies.

        Args:
            port: the caller's port.
            parts: the bytes to send, in order.
            parse: returns the result from the reply; raises if the reply has another form.
            key: selects the server; or the server itself.
            replies: number of replies; more than one are passed as a list.
            seconds: the deadline, if not the usual one; the time for transferring data at
                `MIN_BYTES_PER_SECOND` is added.
            writes: the commands write.
            blocks: the command waits at the server.
            body, sink: see `Exchange`; over a blocking port only.

        Raises:
            TierError: an error reply.
            TierUnavailable: no answer, a malformed one, or the breaker is open.
        """
        breaker = self.breaker
        seconds = seconds or self.deadline
        probe = False if breaker.healthy else breaker.admit()
        if probe and breaker.fault is SILENT:
            self._probe(port)
            raise breaker.unavailable()
        exchange = Exchange(
            parts, replies, min(seconds, PROBE_SECONDS) if probe else seconds, body, sink
        )
        send = partial(
            self._ask, port, key, exchange, parse, blocks=blocks, probe=probe, writes=writes
        )
        return await (self._ask_to_write(send, probe) if writes else send())

    async def _ask_to_write(self, send: Callable[[], Coroutine[Any, Any, T]], probe: bool) -> T:
        """Send commands that write, which pass the breaker for writes too.

        Args:
            send: sends the exchange.
            probe: it is the probe of the server's own breaker.
        """
        writes = self.writes
        try:
            probes_writes = False if writes.healthy else writes.admit()
        except TierError:
            self._abandon_probe(probe)
            raise
        try:
            answer = await send()
        except TierError as error:
            if error.kind in WRITES_DENIED:
                raise writes.record_refusal(error, probe=probes_writes) from None
            if probes_writes:
                writes.abandon_probe()
            raise
        except BaseException:
            if probes_writes:
                writes.abandon_probe()
            raise
        if not writes.healthy:
            writes.record_success()
        return answer

    async def ask_each(
        self, port: Port, commands: Sequence[Command], *, writes: bool = False
    ) -> list[Any]:
        """Return the replies to (key, packed command) pairs, with one exchange per server.

        Raises:
            TierError: as `ask`; or one of the replies is an error.
        """
        if not self.clustered:
            count = len(commands)
            replies = await self.ask(
                port, *command_bytes(commands), parse=_identity, replies=count, writes=writes
            )
            return replies if count > 1 else [replies]
        nodes = await self._nodes(port)
        found: list[Any] = [None] * len(commands)
        for node, places in _group_by_server(nodes, commands).items():
            data = [commands[place][1] for place in places]
            replies = await self.ask(
                port, *data, parse=_identity, key=node, replies=len(data), writes=writes
            )
            for place, reply in zip(places, replies if len(data) > 1 else [replies], strict=True):
                found[place] = reply
        return found

    async def nodes(self, port: Port) -> list[Any]:
        """Return a route to every server that has keys.

        Raises:
            TierError: the servers are not known.
        """
        return [b""] if not self.clustered else list((await self._nodes(port)).all())

    async def _nodes(self, port: Port) -> Any:
        if self.breaker.open:
            if self.breaker.admit():
                self._probe(port)
            raise self.breaker.unavailable()
        if not port.native:
            try:
                return self.connections.of_threads().nodes(self.deadline)
            except Exception as error:
                raise self._record_fault(_fault_of(error), probe=False) from None
        loop = await self._loop(port)
        if loop.look_up is None:
            await self._record_faults_of(loop.get_ready())
        return loop.nodes

    async def _record_faults_of(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            raise self._record_fault(_fault_of(error), probe=False) from None

    async def _ask(
        self,
        port: Port,
        key: Any,
        exchange: Exchange,
        parse: Callable[[Any], T],
        *,
        blocks: bool = False,
        probe: bool = False,
        writes: bool = False,
        reported: bool = False,
    ) -> T:
        try:
            replies = await self.run_exchange(port, key, exchange, blocks=blocks)
            if (wrong := exchange.first_error()) is not None:
                replies = await self._follow_redirection(port, exchange, wrong, blocks=blocks)
            answer = parse(replies[0] if exchange.count == 1 else replies)
        except TierError:
            self._abandon_probe(probe)
            raise
        except Exception as error:
            fault = _fault_of(error)
            raise self._record_fault(
                fault, probe, error, writes=writes, reported=reported
            ) from None
        except BaseException:
            self._abandon_probe(probe)
            raise
        if not self.breaker.healthy:
            self.record_recovery()
        return answer

    async def _follow_redirection(
        self, port: Port, exchange: Exchange, wrong: ErrorReply, *, blocks: bool
    ) -> list[Any]:
        """Repeat an exchange at the server that an error reply names; raises any other error.

        Args:
            wrong: the first error among the replies.
        """
        if not self.clustered or wrong.code not in (_MOVED, _ASK):
            raise wrong
        self.connections.reconnect()
        node = (await self._nodes(port)).redirect_target(wrong)
        if node is None:
            raise wrong
        first = (pack(b"ASKING"),) if wrong.code == _ASK else ()
        other = Exchange([*first, *exchange.given], exchange.count + len(first), exchange.seconds)
        replies = await self.run_exchange(port, node, other, blocks=blocks)
        if (still := other.first_error()) is not None:
            raise still
        return replies[len(first) :]

    async def run_exchange(
        self, port: Port, key: Any, exchange: Exchange, *, blocks: bool
    ) -> list[Any]:
        check = self.breaker.check
        if not port.native:
            threads = self.connections.of_threads(blocks=blocks)
            return threads.exchange(key, exchange, check, blocks=blocks)
        loop = await self._loop(port)
        return await loop.exchange(key, exchange, check, blocks=blocks)

    # --- outcomes --------------------------------------------------------------------------------

    def as_failure(self, error: Exception) -> Any:
        """Record the error of an exchange that several callers share; return it for all of them."""
        if isinstance(error, TierError):
            return Failure(error)
        return Failure(self._record_fault(_fault_of(error), probe=False, error=error))

    def record_recovery(self) -> None:
        """Record a success after a fault, and call the hooks of `on_recover`."""
        self.breaker.record_success()
        for hook in self.on_recover:
            hook()

    def record_replacement(self) -> None:
        """Record that a connection died while idle: the server may have restarted."""
        self.interruptions += 1

    def _record_fault(
        self,
        fault: Fault,
        probe: bool,
        error: BaseException | None = None,
        *,
        writes: bool = False,
        reported: bool = False,
    ) -> TierError:
        if fault.kind == "NOSCRIPT":
            self._abandon_probe(probe)
            return NoScriptError(fault.text)
        self.outages += 1
        self.interruptions += fault.kind not in UNINTERRUPTED
        if fault.down or (
            self._address.kind in (CLUSTER, SENTINEL) and fault.kind in _WRONG_SERVER
        ):
            self.connections.reconnect()
        if fault is GARBLED:
            self.connections.flush()
        reported = (
            reported
            or (writes and fault.kind in WRITES_DENIED)
            or (self.clustered and fault.kind in _WRONG_SERVER)
        )
        detail = "" if error is None else _detail_of(error)
        return self.breaker.record_fault(fault, probe=probe, detail=detail, reported=reported)

    def _abandon_probe(self, probe: bool) -> None:
        if probe:
            self.breaker.abandon_probe()

    def _probe(self, port: Port) -> None:
        async def probe(port: Port) -> None:
            try:
                exchange = Exchange((_PROBE_COMMAND,), 1, self.deadline)
                await self._ask(port, b"", exchange, len, probe=True)
            except TierError:
                return  # the breaker has recorded it

        try:
            port.spawn(probe, "memo-probe")
        except RuntimeError:  # the interpreter is shutting down
            self.breaker.abandon_probe()

    # --- scripts ---------------------------------------------------------------------------------

    async def run(
        self,
        port: Port,
        script: Script,
        keys: Sequence[bytes],
        *arguments: bytes,
        parse: Callable[[Any], T],
        then: Sequence[bytes] = (),
    ) -> T:
        """Run a script, whose keys lie on one server.

        Args:
            then: packed commands that follow in the same exchange, for the same server; `parse`
                gets the list of all replies.

        Raises:
            NoScriptsError: this server does not run scripts for this user.
            TierError: as `ask`.
        """
        if not self.scripts:
            await self._require_scripts(port)
        ask = partial(self.ask, parse=parse, key=keys[0], replies=1 + len(then), writes=True)
        if self.knows_digests:
            try:
                return await ask(port, script.by_digest(keys, arguments), *then)
            except NoScriptError:
                pass  # the source makes Redis cache it
        return await ask(port, script.by_text(keys, arguments), *then)

    async def run_each(
        self,
        port: Port,
        script: Script,
        calls: Sequence[tuple[Sequence[bytes], Sequence[bytes]]],
    ) -> list[Any]:
        """Run a script for several (keys, arguments), with one exchange per server."""
        if not self.scripts:
            await self._require_scripts(port)
        if self.knows_digests:
            digests = [(k[0], script.by_digest(k, a)) for k, a in calls]
            try:
                return await self.ask_each(port, digests, writes=True)
            except NoScriptError:
                pass  # the source makes Redis cache it
        texts = [(k[0], script.by_text(k, a)) for k, a in calls]
        return await self.ask_each(port, texts, writes=True)

    async def _require_scripts(self, port: Port) -> None:
        if not await self.runs_scripts(port):
            raise NoScriptsError(f"Redis at {self.where} runs no scripts for this user")

    async def runs_scripts(self, port: Port) -> bool:
        """True if the server runs scripts for this user; tried once, with one that does nothing."""
        if self.scripts is None:
            text = b"return 1"
            digest = sha1(text, usedforsecurity=False).hexdigest().encode()
            scripts = await self.allows(port, b"EVAL", text, b"0")
            self.knows_digests = scripts and await self.allows(port, b"EVALSHA", digest, b"0")
            self.scripts = scripts
        return self.scripts

    async def allows(self, port: Port, *words: bytes) -> bool:
        """True if the server lets this user send a command; raises any other error."""
        try:
            await self.ask(port, pack(*words), parse=_identity)
        except NoScriptError:
            return True
        except TierError as error:
            if error.kind not in _SCRIPTS_DENIED:
                raise
            return False
        return True

    # --- without a port, or without the breaker --------------------------------------------------

    def run_blocking(self, work: Callable[[Port], Coroutine[Any, Any, T]]) -> T:
        """Run a request in this thread, for a caller without a port."""
        try:
            work(_THREAD_PORT).send(None)
        except StopIteration as stop:
            answer: T = stop.value
            return answer
        raise AssertionError("a request suspended in a thread")

    async def ask_while_open(
        self,
        port: Port,
        *parts: bytes | memoryview,
        parse: Callable[[Any], T],
        replies: int = 1,
        key: Any = b"",
    ) -> T:
        """Like `ask`, but also while the breaker is open; no refused command is warned about."""
        exchange = Exchange(parts, replies, self.deadline)
        return await self._ask(port, key, exchange, parse, probe=self.breaker.open, reported=True)

    # --- connections -----------------------------------------------------------------------------

    async def _loop(self, port: Port) -> LoopConnections:
        try:
            return await self.connections.of_loop(port)
        except Exception as error:
            raise self._record_fault(_fault_of(error), probe=False, error=error) from None

    def close(self) -> None:
        """Close all connections: those of threads now, those of loops as soon as each loop can."""
        self.connections.close()

    async def aclose(self) -> None:
        """Like `close`, and wait until those of the running loop are closed."""
        await self.connections.aclose()


class _ThreadPort:
    """The part of a port that a request from a thread needs."""

    native = False

    def spawn(self, work: Callable[[Port], Any], name: str) -> None:
        """Start nothing: the next caller with a port probes."""
        raise RuntimeError("no background work here")


_THREAD_PORT = cast("Port", _ThreadPort())


def _identity(answer: Any) -> Any:
    return answer


def _group_by_server(nodes: Any, commands: Sequence[Command]) -> dict[Any, list[int]]:
    """Group the positions of commands by the server that has their key."""
    parts: dict[Any, list[int]] = {}
    for place, (key, _) in enumerate(commands):
        parts.setdefault(nodes.of(key), []).append(place)
    return parts


def _detail_of(error: BaseException) -> str:
    """Return the text of an error, without the clients that redis-py shows for each Sentinel."""
    return str(error).partition(" : <")[0]


def _fault_of(error: BaseException) -> Fault:
    from memo.stores.redis.transport.redis_errors import fault_of

    return fault_of(error)
