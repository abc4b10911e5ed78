"""The wire: one question to Redis and its answer, for threads and for event loops.

Rules of this module:

1.  Connections belong to one process and, in async code, to one event loop.  A fork, or another
    loop, gets connections of its own.
2.  Every question passes the breaker.  After a refusal the caller who probes asks his own question,
    with little time; while Redis is silent a background job probes, so that it holds up nobody.
3.  Whatever goes wrong is a `TierError`; `TierUnavailable` where nothing would work.
4.  Commands that block (`BLMOVE`) have connections of their own.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import parse_qs, urlsplit

from memo.batches import Batch, Failure, signed
from memo.breaker import GARBLED, RATE, SILENT, Breaker, Fault
from memo.crews import Crews
from memo.errors import TierError
from memo.port import Port
from memo.scripts import Question, Script, pack
from memo.tiers import REDIS
from memo.transit import Sink

if TYPE_CHECKING:
    from memo.links import ThreadPool
    from memo.loops import LoopPool

T = TypeVar("T")
CONNECTIONS = 32
"""Connections at most, for each process or loop; as many again for commands that block."""
TOGETHER = 64 * 1024
"""Bytes up to which the parts of a command are sent in one piece."""
PROBE = 0.1
"""Seconds at most that a caller who probes may be held up."""
_PING = (pack(b"PING"),)


class NoScriptError(TierError):
    """Redis does not have a script yet, or no more."""


class Wire:
    """The way to one Redis.

    Args:
        url: `redis://`, `rediss://` or `unix://`; may hold user and password, which never show.
        deadline: seconds that a question may take in all.

    Attributes:
        where: the server, without user and password: `"127.0.0.1:6379/0"`.
        breaker: whether it is worth asking.
        outages: how often a question failed; unchanged since a moment: nothing was lost since.
        on_recover: called, and quick, when Redis answers again after a fault.
    """

    def __init__(self, url: str, deadline: float) -> None:
        self._url = url
        self.deadline = deadline
        self.where = place(url)
        self.breaker = Breaker(REDIS, self.where)
        self.outages = 0
        self.on_recover: list[Callable[[], None]] = []
        self._nonces = itertools.count()
        self._reset()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Wire {self.where}>"

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._threads: dict[bool, ThreadPool] = {}
        self._loops: dict[tuple[Any, bool], LoopPool] = {}
        self._crews = Crews()

    # --- asking ----------------------------------------------------------------------------------

    async def ask(
        self,
        port: Port,
        *parts: bytes | memoryview,
        parse: Callable[[Any], T],
        replies: int = 1,
        seconds: float | None = None,
        blocks: bool = False,
        body: Callable[[], Iterator[bytes | memoryview]] | None = None,
        sink: Sink | None = None,
    ) -> T:
        """Send packed commands and wait for their replies.

        Args:
            port: the caller's.
            parts: the bytes to send, in order.
            parse: makes of the reply what is asked for; raises where it is something else.
            replies: how many replies to read; more than one come as a list.
            seconds: the deadline, where it is not the usual one; what is sent and received may take
                its time at `RATE` on top.
            blocks: the command waits at the server.
            body, sink: see `Question`; over a blocking port only.  `seconds` is then for all.

        Raises:
            TierError: an error reply.
            TierUnavailable: no answer, none that can be understood, or the breaker is open.
        """
        size = sum(map(len, parts))
        if len(parts) > 1 and size <= TOGETHER and body is None:
            parts = (b"".join(parts),)
        seconds = (seconds or self.deadline) + size / RATE
        question = Question(parts, replies, seconds, blocks, body, sink)
        breaker = self.breaker
        if breaker.quiet:
            return await self._ask(port, question, parse)
        probe = breaker.admit()
        if probe and breaker.fault is SILENT:
            self._probe(port)
            raise breaker.unavailable()
        if probe:
            question = question._replace(seconds=min(seconds, PROBE))
        return await self._ask(port, question, parse, probe=probe)

    async def read(
        self,
        port: Port,
        commands: Sequence[bytes],
        *,
        parse: Callable[[list[Any]], T],
        shared: bool = True,
    ) -> T:
        """Send packed commands that only read, together with those of others who ask now.

        Args:
            port: the caller's.
            commands: what to send.
            parse: makes of the list of replies what is asked for.
            shared: False: by themselves, since the answer is big.

        Raises:
            TierError: as `ask`; an error reply to any of them.
        """
        if not (shared and self.breaker.quiet):
            return await self._read_unshared(port, commands, parse)
        answer = self.prompt(port, commands)
        if answer is None:
            place = (port.client(), False)
            pool = self._loops.get(place) or await self._loop_pool(port, place)
            answer = pool.ask(commands)
        return self.parsed(parse, await port.settle(answer))

    def prompt(self, port: Port, commands: Sequence[bytes]) -> Any:
        """As `read`, by a plain function; None where that takes a coroutine.

        Returns:
            What `port.settle` makes a list of replies or a `Failure` of, for `parsed`.
        """
        if not self.breaker.quiet:
            return None
        if not port.native:
            return self._crews.ask(self, commands)
        pool = self._loops.get((port.client(), False))
        return None if pool is None or not pool.kept else pool.road.ask(commands)

    def parsed(self, parse: Callable[[list[Any]], T], answer: Any) -> T:
        """What `parse` makes of replies.

        Raises:
            TierError: it is a `Failure`, or not what was asked for.
        """
        if type(answer) is Failure:
            raise answer.again()
        try:
            return parse(answer)
        except Exception as error:
            raise self._failed(_fault_of(error), probe=False) from None

    def read_alone(self, commands: Sequence[bytes]) -> list[Any] | Failure:
        """The replies to the commands of one who blocks, in an exchange of his own."""
        ping, nonce = signed()
        data = b"".join((*commands, ping))
        question = Question((data,), len(commands) + 1, self.deadline, False)
        threads = self._threads.get(False) or self._thread_pool(False)
        try:
            replies = _unsigned(threads.exchange(question, self.breaker.check), nonce)
        except TierError as error:
            return Failure(error)
        except Exception as error:
            return self._lost(error, threads)
        self.arrived()
        return replies

    def read_for(self, batch: Batch) -> None:
        """Send a batch for the threads that wait for it, and hand out what comes."""
        threads = self._threads.get(False) or self._thread_pool(False)
        question = Question((batch.packed(),), batch.missing, self.deadline, False)
        try:
            self.breaker.check()  # they have waited
            batch.replies = threads.exchange(question, self.breaker.check)
            if batch.land(self.explain):
                self.arrived()
        except TierError as error:
            batch.fail(Failure(error))
        except Exception as error:
            batch.fail(self._lost(error, threads))

    def _lost(self, error: Exception, threads: ThreadPool) -> Failure:
        fault = _fault_of(error)
        if fault is GARBLED:
            threads.flush()
        return Failure(self._failed(fault, probe=False))

    async def _read_unshared(
        self, port: Port, commands: Sequence[bytes], parse: Callable[[list[Any]], T]
    ) -> T:
        """As `read`, in an exchange of one's own."""
        ping, nonce = signed()
        count = len(commands) + 1
        return await self.ask(
            port, *commands, ping, parse=lambda all_: parse(_unsigned(all_, nonce)), replies=count
        )

    def explain(self, error: Exception) -> Failure:
        """What an exchange of many callers came to, counted once."""
        return Failure(self._failed(_fault_of(error), probe=False))

    def arrived(self) -> None:
        """An exchange of many callers went well."""
        if not self.breaker.quiet:
            self._recovered()

    def _recovered(self) -> None:
        self.breaker.succeeded()
        for hook in self.on_recover:
            hook()

    async def _ask(
        self, port: Port, question: Question, parse: Callable[[Any], T], *, probe: bool = False
    ) -> T:
        try:
            answer = parse(await self._exchange(port, question))
        except TierError:
            self._abandon(probe)
            raise
        except Exception as error:
            fault = _fault_of(error)
            if fault is GARBLED:
                self._flush(port, question.blocks)
            raise self._failed(fault, probe) from None
        except BaseException:
            self._abandon(probe)
            raise
        self.arrived()
        return answer

    async def _exchange(self, port: Port, question: Question) -> Any:
        answer = await self._exchanged(port, question)
        return answer if question.replies == 1 else _all_or_error(answer)

    async def _exchanged(self, port: Port, question: Question) -> Any:
        check = self.breaker.check
        if not port.native:
            threads = self._threads.get(question.blocks) or self._thread_pool(question.blocks)
            return threads.exchange(question, check)
        place = (port.client(), question.blocks)
        loop = self._loops.get(place) or await self._loop_pool(port, place)
        return await port.settle(loop.exchange(question, check))

    def _failed(self, fault: Fault, probe: bool) -> TierError:
        if fault.kind == "NOSCRIPT":
            self._abandon(probe)
            return NoScriptError(fault.text)
        self.outages += 1
        return self.breaker.failed(fault, probe=probe)

    def _abandon(self, probe: bool) -> None:
        if probe:
            self.breaker.abandoned()

    def _probe(self, port: Port) -> None:
        async def probe(port: Port) -> None:
            try:
                await self._ask(port, Question(_PING, 1, self.deadline, False), bool, probe=True)
            except TierError:
                return  # the breaker knows

        try:
            port.spawn(probe, "memo-probe")
        except RuntimeError:  # the interpreter is going down
            self.breaker.abandoned()

    async def run(
        self,
        port: Port,
        script: Script,
        keys: Sequence[bytes],
        *arguments: bytes,
        parse: Callable[[list[Any]], T],
        shared: bool = False,
    ) -> T:
        """Run a script.

        Args:
            port: the caller's.
            script: which.
            keys: its keys.
            arguments: those behind the nonce.
            parse: makes of its answer, behind the nonce, what is asked for.
            shared: it only reads, and is sent with what others ask now.

        Raises:
            TierError: as `ask`.
        """
        nonce = b"%d" % next(self._nonces)
        given = (nonce, *arguments)

        def mine(answer: list[Any]) -> T:
            if answer[0] != nonce:
                raise ValueError("the answer to another question")
            del answer[0]
            return parse(answer)

        command = script.by_digest(keys, given)
        try:
            if shared:
                return await self.read(port, (command,), parse=lambda replies: mine(replies[-1]))
            return await self.ask(port, command, parse=mine)
        except NoScriptError:
            if shared:  # many learn it at once: the text travels once for all
                known = (script.load(), command)
                return await self.read(port, known, parse=lambda replies: mine(replies[-1]))
            return await self.ask(port, script.by_text(keys, given), parse=mine)

    def here(self, work: Callable[[Port], Coroutine[Any, Any, T]]) -> T:
        """Ask in this thread, for work that has no port."""
        try:
            work(_HERE).send(None)
        except StopIteration as stop:
            answer: T = stop.value
            return answer
        raise AssertionError("a question suspended in a thread")

    async def reach(
        self, port: Port, *parts: bytes | memoryview, parse: Callable[[Any], T], replies: int = 1
    ) -> T:
        """As `ask`, whatever the breaker thinks."""
        question = Question(parts, replies, self.deadline, False)
        return await self._ask(port, question, parse, probe=self.breaker.open)

    # --- connections -----------------------------------------------------------------------------

    def _thread_pool(self, blocks: bool) -> ThreadPool:
        from memo.links import ThreadPool

        with self._lock:
            if blocks not in self._threads:
                self._threads[blocks] = ThreadPool(self._url, CONNECTIONS)
            return self._threads[blocks]

    async def _loop_pool(self, port: Port, place: tuple[Any, bool]) -> LoopPool:
        if not hasattr(
            sys.modules.get("memo.loops"), "LoopPool"
        ):  # half a second, which would hold up the loop
            await port.offload(import_module, "memo.loops")
        from memo.loops import LoopPool

        with self._lock:
            for key, pool in list(self._loops.items()):
                if pool.loop.is_closed():
                    pool.forget()
                    del self._loops[key]
            if place not in self._loops:
                home = weakref.proxy(self)
                ended = partial(self._loops.pop, place, None)
                self._loops[place] = LoopPool(self._url, CONNECTIONS, home, ended)
            return self._loops[place]

    def _flush(self, port: Port, blocks: bool) -> None:
        """Close the caller's idle connections: one of them may hold more than was asked for."""
        pool: LoopPool | ThreadPool | None = self._threads.get(blocks)
        if port.native:
            pool = self._loops.get((port.client(), blocks))
        if pool is not None:
            pool.flush()

    def close(self) -> None:
        """Close all connections: of threads at once, of loops as soon as they get to it."""
        threads, loops = self._take()
        for pool in threads:
            pool.close()
        for loop in loops:
            loop.close()

    async def aclose(self) -> None:
        """As `close`, and wait until those of the running loop are closed."""
        import asyncio

        threads, loops = self._take()
        for pool in threads:
            pool.close()
        for loop in loops:
            if loop.loop is asyncio.get_running_loop():
                await loop.aclose()
            else:
                loop.close()

    def _take(self) -> tuple[list[ThreadPool], list[LoopPool]]:
        with self._lock:
            threads, loops = list(self._threads.values()), list(self._loops.values())
            self._threads, self._loops = {}, {}
        return threads, loops

    def __del__(self) -> None:
        if getattr(self, "_loops", None) and not sys.is_finalizing():
            self.close()

    def _after_fork(self) -> None:
        _inherited.append((self._threads, self._loops))
        self._reset()


class _Here:
    """All of a port that asking from a thread needs."""

    native = False

    def spawn(self, work: Callable[[Port], Any], name: str) -> None:
        """Turned down: the next one who asks with a port probes."""
        raise RuntimeError("no background here")


_HERE = cast("Port", _Here())


def place(url: str) -> str:
    """Where a URL leads, without user and password: `"host:port/db"` or `"path/db"`."""
    parts = urlsplit(url)
    db = parse_qs(parts.query).get("db", [""])[0]
    if parts.scheme == "unix":
        return f"{parts.path}/{db or 0}"
    db = db or parts.path.strip("/")
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}/{db or 0}"


def _unsigned(replies: list[Any], nonce: bytes) -> list[Any]:
    """The replies in front of a nonce, none of which is an error.

    Raises:
        ValueError: they are those to other commands.
    """
    if _all_or_error(replies).pop() != nonce:
        raise ValueError("the answer to another question")
    return replies


def _all_or_error(replies: list[Any]) -> list[Any]:
    """All replies; an error among them is raised only now that none is left unread."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _fault_of(error: Exception) -> Fault:
    from memo.links import fault_of

    return fault_of(error)


_all: weakref.WeakSet[Wire] = weakref.WeakSet()
_inherited: list[Any] = []
"""The connections of a parent process: kept, since to close them here would disturb them there."""


def _after_fork() -> None:
    for wire in list(_all):
        wire._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
