"""Data sets as dependencies: URLs, globs, and callables of the arguments; reachable or not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import pytest
from chaos import HangingUp
from checkout import ROOT
from waiting import await_until
from ways import PLACES, Way

import memo
from memo.errors import DependencyError, OptionError
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.native import native
from memo.testing import ManualClock, isolated, recording
from memo.validity import remote

RUNS: Counter[str] = Counter()
UNREACHABLE = "dependency unreachable"


class Server:
    """An HTTP server on loopback, whose pages the test sets.

    Attributes:
        pages: path -> content.
        etags, modified: path -> the header that tells its version, if it has one.
        asked: path -> how often, by method.
        wait_for: a request is answered when so many are there, or after 10 seconds.
        most: how many requests were there at the same time.
    """

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.modified: dict[str, str] = {}
        self.fails = False
        self.no_head = False
        self.asked: Counter[str] = Counter()
        self.wait_for = 1
        self.most = self._here = 0
        self._overlap = threading.Condition()
        self._http = _Web(("127.0.0.1", 0), partial(_Handler, self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), name="http")
        self._thread.start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/{path}"

    @contextmanager
    def overlapping(self) -> Iterator[None]:
        """Hold a request until others are there."""
        with self._overlap:
            self._here += 1
            self.most = max(self.most, self._here)
            self._overlap.notify_all()
            self._overlap.wait_for(lambda: self.most >= self.wait_for, 10.0)
        try:
            yield
        finally:
            with self._overlap:
                self._here -= 1

    def release(self) -> None:
        """Answer the requests that are held."""
        with self._overlap:
            self.wait_for = 1
            self._overlap.notify_all()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)


class _Web(ThreadingHTTPServer):
    request_queue_size = 64  # more than 5 connections may come at once


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: Server, *rest: Any) -> None:
        self.of = server
        super().__init__(*rest)

    def do_HEAD(self) -> None:
        with self.of.overlapping():
            self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path, of = self.path.lstrip("/"), self.of
        of.asked[f"{self.command} {path}"] += 1
        if of.fails:
            self.send_error(503)
            return
        if self.command == "HEAD" and of.no_head:
            self.send_error(501)
            return
        if path not in of.pages:
            self.send_error(404)
            return
        self.send_response(200)
        if path in of.etags:
            self.send_header("ETag", of.etags[path])
        if path in of.modified:
            self.send_header("Last-Modified", of.modified[path])
        self.send_header("Content-Length", str(len(of.pages[path])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(of.pages[path])

    def log_message(self, *_: Any) -> None:
        """Nothing on standard error."""


@pytest.fixture
def server() -> Iterator[Server]:
    RUNS.clear()
    made = Server()
    yield made
    made.close()


def counted(x: Any) -> int:
    RUNS["load"] += 1
    return RUNS["load"]


# --- http -----------------------------------------------------------------------------------------


def test_an_etag_that_changes(way: Way, place: str, server: Server) -> None:
    """A page is asked by `HEAD`; another ETag makes the entry invalid, the same one does not."""
    server.pages["EU.csv"], server.etags["EU.csv"] = b"1", '"a"'
    load = way.cached(counted, depends_on=server.url("{x}.csv"))
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    server.pages["EU.csv"] = b"the tag counts"
    assert way.call(load, "EU") == 1
    server.etags["EU.csv"] = '"b"'
    with recording() as events:
        assert way.call(load, "EU") == 2
    assert [event.reason for event in events if event.kind == "miss"] == ["dependency changed"]
    assert not server.asked["GET EU.csv"]


@pytest.mark.parametrize("count", [8, 20])
def test_sources_are_asked_at_the_same_time(
    way: Way, place: str, server: Server, count: int
) -> None:
    """Before a computation, and to judge an entry; at most 16 at once, and each of them once."""
    names = [f"{number}.csv" for number in range(count)]
    for name in names:
        server.pages[name], server.etags[name] = b"1", '"a"'
    server.wait_for = min(count, remote.CONCURRENT_QUERIES)
    load = way.cached(counted, depends_on=[server.url(name) for name in names])
    assert way.call(load, 1) == 1
    assert server.most == server.wait_for
    server.most = 0
    assert way.call(load, 1) == 1
    assert server.most == server.wait_for
    assert set(server.asked.values()) == {2}
    server.etags[names[-1]] = '"b"'
    assert way.call(load, 1) == 2


@pytest.mark.parametrize("warm", [True, False])
async def test_an_unrelated_call_does_not_wait_for_silent_sources(
    server: Server, warm: bool
) -> None:
    """Waiting for a network takes none of the threads for short work of async code."""
    count = 12
    for name in range(count):
        server.pages[str(name)], server.etags[str(name)] = b"1", '"a"'

    @memo.cache(ttl=60, version="1", depends_on=server.url("{x}"))
    async def far(x: int) -> int:
        return x

    @memo.cache(ttl=60, version="1")
    async def near(x: int) -> int:
        return x

    if warm:
        await asyncio.gather(*map(far, range(count)))
    server.wait_for, server.most = count + 1, 0
    waiting = [asyncio.create_task(far(name)) for name in range(count)]
    await await_until(lambda: server.most >= 8)
    assert await near(1) == 1
    assert not any(task.done() for task in waiting)
    server.release()
    assert await asyncio.gather(*waiting) == list(range(count))


async def test_a_silent_source_keeps_one_thread_waiting(server: Server) -> None:
    """However many callers it keeps waiting, other sources are asked meanwhile."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]

        @memo.cache(ttl=60, version="1", depends_on=f"http://127.0.0.1:{port}/x")
        async def far(x: int) -> int:
            return x

        @memo.cache(ttl=60, version="1", depends_on=server.url("{x}"))
        async def near(x: str) -> str:
            return x

        await near("warm")
        waiting = [asyncio.create_task(far(number)) for number in range(remote.CONCURRENT_QUERIES)]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert await near("EU") == "EU"
        assert not any(task.done() for task in waiting)
    assert await asyncio.gather(*waiting) == list(range(remote.CONCURRENT_QUERIES))


async def test_callers_share_a_query_that_begins_after_they_asked(server: Server) -> None:
    """A caller does not get the answer to an earlier query: the source may have changed since."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    server.wait_for = 2

    def asked() -> asyncio.Task[Any]:
        return asyncio.create_task(remote.query_all(native(), [(server.url("EU"), False)]))

    first = asked()
    await await_until(lambda: server.most)
    others = [asked() for _ in range(3)]
    await asyncio.sleep(0)
    server.release()
    for found in await asyncio.gather(first, *others):
        assert list(found.values()) == ['etag:"a"']
    assert server.asked["HEAD EU"] == 2
    assert server.most == 1


def test_a_forked_child_asks_its_sources(server: Server) -> None:
    """The threads that queried them for its parent do not exist there."""
    names = [str(number) for number in range(remote.CONCURRENT_QUERIES)]
    for name in names:
        server.pages[name], server.etags[name] = b"1", '"a"'
    server.wait_for = len(names)  # so each of them has a thread
    load = memo.cache(ttl=60, depends_on=[server.url(name) for name in names])(lambda x: x)
    assert load(1) == 1
    child = os.fork()
    if child == 0:  # pragma: no cover - not seen from here
        signal.alarm(30)  # ends it if it hangs
        code = 1
        try:
            code = 0 if load(1) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_sources_of_what_was_used_are_asked_at_the_same_time(way: Way, server: Server) -> None:
    """With `cutoff` beneath it, too, an entry costs the time of one question, not of eight."""
    for name in range(8):
        server.pages[str(name)], server.etags[str(name)] = b"1", '"a"'
    inner = memo.cache(version="1", cutoff=True, depends_on=server.url("{x}"))(lambda x: int(x))
    outer = way.cached(lambda x: sum(map(inner, range(8))))
    assert way.call(outer, 1) == 28
    server.wait_for, server.most = 8, 0
    assert way.call(outer, 1) == 28
    assert server.most == 8
    server.etags["3"] = '"b"'
    with recording() as events:
        assert way.call(outer, 1) == 28
    assert "revalidated" in [event.kind for event in events]


def test_last_modified_where_there_is_no_etag(way: Way, place: str, server: Server) -> None:
    """Without an ETag the time and the length count."""
    server.pages["EU"], server.modified["EU"] = b"1", "Mon, 01 Jan 2024 00:00:00 GMT"
    load = way.cached(counted, depends_on=server.url("{x}"))
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    server.modified["EU"] = "Tue, 02 Jan 2024 00:00:00 GMT"
    assert way.call(load, "EU") == 2


@pytest.mark.parametrize("head", [True, False])
def test_the_content_where_a_server_tells_nothing(
    way: Way, place: str, server: Server, head: bool
) -> None:
    """Without either, or without `HEAD`, the content is read."""
    server.pages["EU"], server.no_head = b"1", not head
    load = way.cached(counted, depends_on=server.url("{x}"))
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    server.pages["EU"] = b"2"
    assert way.call(load, "EU") == 2


def test_by_content_another_etag_is_nothing(way: Way, place: str, server: Server) -> None:
    """`check="content"`: what is only touched is the same."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    load = way.cached(counted, depends_on=memo.File(server.url("{x}"), check="content"))
    way.call(load, "EU")
    server.etags["EU"] = '"b"'
    assert way.call(load, "EU") == 1
    server.pages["EU"] = b"2"
    assert way.call(load, "EU") == 2


def test_a_page_that_comes_and_goes(way: Way, place: str, server: Server) -> None:
    """That nothing is there is a state like any other."""
    load = way.cached(counted, depends_on=server.url("{x}"))
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    server.pages["EU"] = b"1"
    assert way.call(load, "EU") == 2
    del server.pages["EU"]
    assert way.call(load, "EU") == 3


def test_check_every_believes_for_a_while(way: Way, place: str, server: Server) -> None:
    """Within `check_every` no question is asked; without it each call asks."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    seldom = way.cached(counted, name="tests:seldom", depends_on=server.url("{x}"), check_every=60)
    for _ in range(3):
        assert way.call(seldom, "EU") == 1
    assert server.asked["HEAD EU"] == 1
    always = way.cached(counted, name="tests:always", depends_on=server.url("{x}"))
    way.call(always, "EU")
    before = server.asked["HEAD EU"]
    way.call(always, "EU"), way.call(always, "EU")
    assert server.asked["HEAD EU"] == before + 2


def test_unreachable_without_stale_if_error(way: Way, place: str, server: Server) -> None:
    """If a source cannot be asked, the function runs; an event says so."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    load = way.cached(counted, depends_on=server.url("{x}"))
    way.call(load, "EU")
    server.fails = True
    with recording() as events:
        assert way.call(load, "EU") == 2
    assert UNREACHABLE in [event.reason for event in events if event.kind == "error"]
    assert UNREACHABLE in [event.reason for event in events if event.kind == "miss"]


def test_explain_names_what_cannot_be_asked(way: Way, server: Server) -> None:
    """It says which source that is, and the way out."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    load = way.cached(counted, depends_on=server.url("{x}"))
    way.call(load, "EU")
    server.fails = True
    said = str(load.explain("EU"))
    assert f"depends on {server.url('EU')}, which cannot be reached; with stale_if_error" in said


def test_entries_tell_what_cannot_be_asked(server: Server) -> None:
    """An entry whose source cannot be asked is listed as fresh only if the next call would hit."""
    strict = memo.cache(name="tests:strict", ttl=60, depends_on=server.url("{x}"))(counted)
    lenient = memo.cache(
        name="tests:lenient", ttl=60, depends_on=server.url("{x}"), stale_if_error=60
    )(counted)
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'
    strict("EU"), lenient("EU")
    states = [memo.entries(one)[0].state for one in (strict, lenient)]
    assert states == ["fresh", "fresh"]
    server.fails = True
    states = [memo.entries(one)[0].state for one in (strict, lenient)]
    assert (states, strict.is_cached("EU")) == (["unknown", "fresh"], False)
    assert lenient.is_cached("EU")


def test_an_expired_entry_stays_expired_while_its_source_cannot_be_asked(server: Server) -> None:
    """`memo.expire` counts as ever: the function runs, and the windows begin at the expiry."""
    clock = ManualClock()
    with isolated(clock=clock):
        server.pages["EU"], server.etags["EU"] = b"1", '"a"'

        @memo.cache(ttl=3600, stale_if_error=60, depends_on=server.url("{x}"), version="1")
        def load(x: str) -> int:
            if server.fails:
                raise OSError("no data")
            return counted(x)

        assert load("EU") == 1
        server.fails = True
        load.expire()
        with recording() as events:
            assert load("EU") == 1
        assert [event.kind for event in events if event.kind in ("hit", "failed")] == ["failed"]
        clock.advance(90)
        with pytest.raises(OSError, match="no data"):
            load("EU")


def test_a_silent_server_is_waited_for_once(way: Way) -> None:
    """A call that looks at several tiers does not wait for each; nor does the next one at once."""
    RUNS.clear()
    with HangingUp(after=1.2 * remote.SLOW_QUERY_SECONDS) as silent:
        load = way.cached(counted, depends_on=f"http://127.0.0.1:{silent.port}/x")
        assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 2]
    assert silent.accepted == 1


@pytest.mark.parametrize("at", PLACES)
def test_unreachable_with_stale_if_error(
    at: str, server: Server, request: pytest.FixtureRequest
) -> None:
    """Then the entry stays valid for its ttl; an event says so; past it the function runs."""
    clock, settings = ManualClock(), {}
    if at != "disk":
        settings["redis_url"] = request.getfixturevalue("redis_server").url
    with isolated(clock=clock, **settings):
        server.pages["EU"], server.etags["EU"] = b"1", '"a"'

        @memo.cache(ttl=60, stale_if_error=3600, depends_on=server.url("{x}"), version="1")
        def load(x: str) -> int:
            if server.fails and RUNS["load"]:
                raise OSError("no data")
            return counted(x)

        assert load("EU") == 1
        server.fails = True
        with recording() as events:
            assert load("EU") == 1
        assert UNREACHABLE in [event.reason for event in events if event.kind == "error"]
        assert "hit" in [event.kind for event in events]
        clock.advance(90)
        with recording() as events:
            assert load("EU") == 1  # the function ran, and raised: the old value instead
        assert "failed" in [event.kind for event in events]
        server.fails = False
        server.etags["EU"] = '"b"'
        assert load("EU") == 2


def test_no_secret_of_a_url_is_told(server: Server) -> None:
    """Events name a URL without user, password and query."""
    server.fails = True
    url = server.url("x?token=secret").replace("127.0.0.1", "me:secret@127.0.0.1")
    load = memo.cache(depends_on=url, ttl=None)(lambda: 1)
    with recording() as events:
        load()
    told = [event.detail for event in events if event.reason == UNREACHABLE]
    assert told
    assert "secret" not in "".join(told)


def test_an_argument_may_be_a_url(server: Server) -> None:
    """`Annotated[str, memo.File]` takes a URL as well."""
    server.pages["EU"], server.etags["EU"] = b"1", '"a"'

    @memo.cache(ttl=None, version="1")
    def load(path: Annotated[str, memo.File]) -> int:
        return counted(path)

    assert [load(server.url("EU")), load(server.url("EU"))] == [1, 1]
    server.etags["EU"] = '"b"'
    assert load(server.url("EU")) == 2


MALFORMED = "malformed; write https://host:port/path"


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "http://127.0.0.1:web/x", "https:///x", "https://a\u2100b/x"]
)
def test_a_malformed_url_is_refused_at_the_decoration(url: str) -> None:
    """The error names the URL and how to write it."""
    with pytest.raises(OptionError, match=MALFORMED) as refused:
        memo.cache(depends_on=url, ttl=None)(lambda: 1)
    assert url in str(refused.value)


@pytest.mark.parametrize("kind", ["template", "argument", "callable"])
def test_a_malformed_url_is_refused_at_the_call(way: Way, server: Server, kind: str) -> None:
    """Before the function runs; the error names the function and the URL, without its secrets."""
    bad = "http://me:secret@[{x}/y?token=secret"
    if kind == "argument":

        def body(x: Annotated[str, memo.File]) -> int:
            return counted(x)

        load = memo.cache(ttl=None, name="tests:malformed")(body)
        with pytest.raises(DependencyError, match=MALFORMED) as refused:
            load(bad.format(x=1))
    else:
        source = bad if kind == "template" else lambda x: memo.File(bad.format(x=x))
        load = way.cached(counted, name="tests:malformed", depends_on=[server.url("{x}"), source])
        with pytest.raises(DependencyError, match=MALFORMED) as refused:
            way.call(load, 1)
    assert "tests:malformed: http://[1/y is malformed" in str(refused.value)
    assert "secret" not in str(refused.value)
    assert not RUNS


def test_a_query_of_a_malformed_url_does_not_raise() -> None:
    """It runs in a thread of a pool: an entry of an earlier version may hold any URL."""
    urls = [f"http://me:secret@[{number}/x?token=secret" for number in range(20)]
    with recording() as events:
        found = drive(remote.query_all(BLOCKING, [(url, False) for url in urls]))
    assert set(found.values()) == {None}
    told = {event.detail for event in events if event.reason == UNREACHABLE}
    assert told == {f"http://[{number}/x: ValueError" for number in range(20)}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host:1/a@b?token=secret#c", "https://host:1/a@b"),
        ("memory://[ab]*/x", "memory://[ab]*/x"),
        ("simplecache::s3://me:secret@bucket/x", "simplecache::s3://bucket/x"),
        ("zip::x?secret", "zip::x"),
    ],
)
def test_a_url_for_display(url: str, shown: str) -> None:
    """Without user, password, query and fragment, whatever its scheme and its brackets."""
    assert remote.display_url(url) == shown


# --- fsspec ---------------------------------------------------------------------------------------


def test_a_glob_of_another_file_system(way: Way, place: str) -> None:
    """Any fsspec URL can be named: here its memory, by pattern and by argument."""
    import fsspec

    RUNS.clear()
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/EU/a.csv", b"1")
    load = way.cached(counted, depends_on="memory://bucket/{x}/*.csv")
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    files.pipe("/bucket/US/a.csv", b"1")
    assert way.call(load, "EU") == 1
    files.pipe("/bucket/EU/b.csv", b"1")
    assert way.call(load, "EU") == 2
    files.rm("/bucket/EU/a.csv")
    assert way.call(load, "EU") == 3
    files.rm("/bucket", recursive=True)
    assert way.call(load, "EU") == 4


S3 = """
import os, sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0); server.start()
host, port = server.get_host_and_port()
os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="x",
                  AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1")
import boto3, memo
s3 = boto3.client("s3"); s3.create_bucket(Bucket="data")
put = lambda name, text: s3.put_object(Bucket="data", Key=name, Body=text)
put("EU/a.csv", b"1"); put("US/a.csv", b"1")
runs = []
@memo.cache(ttl=None, depends_on="s3://data/{region}/*.csv", stale_if_error="1h")
def load(region):
    runs.append(region)
    return len(runs)
said = [load("EU"), load("EU")]
put("US/a.csv", b"2"); said.append(load("EU"))
put("EU/a.csv", b"2"); said.append(load("EU"))
put("EU/a.csv", b"2"); said.append(load("EU"))
put("EU/b.csv", b"3"); said.append(load("EU"))
events = []; memo.on_event(lambda e: events.append(e.reason))
server.stop(); said.append(load("EU"))
print(said, "dependency unreachable" in events, flush=True)
os._exit(0)
"""


def test_s3(tmp_path: Path) -> None:
    """Objects are told by their ETag: a new one in the glob counts, the same content does not."""
    done = subprocess.run(
        [sys.executable, "-c", S3],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "MEMO_DIRECTORY": str(tmp_path / "s3")},
        timeout=100,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["[1, 1, 1, 2, 2, 3, 3] True"], done.stderr


def test_a_scheme_that_nothing_knows_is_refused() -> None:
    """The mistake is seen at decoration."""
    with pytest.raises(OptionError, match="knows no scheme s4://"):
        memo.cache(depends_on="s4://bucket/x")(lambda: 1)


# --- files and callables --------------------------------------------------------------------------


def test_another_word_for_check_is_refused() -> None:
    """The error names what there is."""
    with pytest.raises(OptionError, match='must be "time" or "content"'):
        memo.File("x", check="mtime")  # type: ignore[arg-type]


def test_a_callable_gets_the_arguments_that_it_declares(way: Way, place: str) -> None:
    """It is asked for the call at hand, when it is stored and when it is judged."""
    RUNS.clear()
    versions = {"EU": 1, "US": 1}
    load = way.cached(counted, depends_on=lambda x: versions[x])
    assert [way.call(load, "EU"), way.call(load, "US"), way.call(load, "EU")] == [1, 2, 1]
    versions["US"] = 2
    assert way.call(load, "EU") == 1
    assert way.call(load, "US") == 3


def test_a_callable_that_takes_all(way: Way, place: str) -> None:
    """`**kwargs` gets every argument, and defaults need not be given."""
    RUNS.clear()
    seen: list[Any] = []

    def version(**given: Any) -> int:
        seen.append(given)
        return 1

    load = way.cached(counted, depends_on=[version, lambda x, scale=2: scale])
    way.call(load, "EU")
    assert seen[0] == {"x": "EU"}


def test_a_callable_judges_what_was_built_on_it(way: Way, place: str) -> None:
    """The arguments lie in the entry, so that an outer entry can be judged by them as well."""
    RUNS.clear()
    versions = {"EU": 1}
    base = way.cached(counted, depends_on=lambda x: versions[x])
    if way.name == "async":

        @memo.cache(ttl=None, version="1")
        async def outer() -> Any:
            return await base("EU")

        built: Any = outer
    else:

        @memo.cache(ttl=None, version="1")
        def also_outer() -> Any:
            return base("EU")

        built = also_outer
    assert [way.call(built), way.call(built)] == [1, 1]
    versions["EU"] = 2
    assert way.call(built) == 2


def test_a_callable_that_takes_what_is_no_argument() -> None:
    """The error names the arguments that there are."""
    with pytest.raises(OptionError, match="takes 'y', which is not an argument; there are x"):

        @memo.cache(depends_on=lambda y: y)
        def load(x: int) -> int:
            return x


def test_a_callable_whose_arguments_cannot_be_stored() -> None:
    """The error says what to declare instead."""

    @memo.cache(depends_on=lambda x: 1, ignore=["x"])
    def load(x: Any) -> int:
        return 1

    with pytest.raises(DependencyError, match="declare smaller ones, such as an id"):
        load(threading.Lock())


@pytest.mark.parametrize("kind", ["path", "file", "list"])
def test_the_files_in_a_callables_answer_count(
    way: Way, place: str, tmp_path: Path, kind: str
) -> None:
    """A callable may tell which file a call reads: then its content is what matters."""
    RUNS.clear()

    def source(x: str) -> Any:
        path = tmp_path / f"{x}.csv"
        return {"path": path, "file": memo.File(path, check="content"), "list": [path]}[kind]

    (tmp_path / "EU.csv").write_text("1")
    load = way.cached(counted, depends_on=source)
    assert [way.call(load, "EU"), way.call(load, "EU")] == [1, 1]
    (tmp_path / "EU.csv").write_text("2 and more")
    assert [way.call(load, "EU"), way.call(load, "EU")] == [2, 2]
