"""State that a computation changes itself is no input; changed by anything else, it is one."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import key_mutants
import pytest
from observed import calls_of
from redis_server import RedisServer

import memo

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path) -> Any:
    with memo.configure(directory=tmp_path / "cache"):
        yield


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module of some source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(source: str, name: str = "") -> types.ModuleType:
        name = name or f"state_{next(_numbers)}"
        head = "import collections, random, threading, time\nimport memo\n"
        (tmp_path / f"{name}.py").write_text(head + textwrap.dedent(source))
        __import__(name)
        return sys.modules[name]

    return make


Make = Callable[..., types.ModuleType]
API = """
class Api:
    def __init__(self):
        self.requests, self.base = 0, "x"
    def get(self, x):
        self.requests += 1
        return f"{self.base} {x}"
api = Api()
"""
CHANGES = {
    "counter of a client": (API, "return api.get(x)", "api.requests", "api.base = 'y'"),
    "counter that is read": (
        "n = 0",
        "global n; n += 1; return x, n * 0",
        "n",
        "n = 100",
    ),
    "array": ("arr = [0]", "arr[0] += 1; return x, len(arr)", "arr", "arr.append(1)"),
    "Counter": (
        "seen = collections.Counter()",
        "seen[x] += 1; return x, len(seen)",
        "seen",
        "seen['z'] = 3",
    ),
    "deque": (
        "log = collections.deque(maxlen=9)",
        "log.append(x); return x, log[0]",
        "log",
        "log.append('z')",
    ),
    "random generator": (
        "rng = random.Random(1)",
        "return x, rng.random()",
        "rng",
        "rng.seed(7)",
    ),
    "numpy generator": (
        "import numpy\nrng = numpy.random.default_rng(1)",
        "return x, float(rng.random())",
        "rng",
        "rng = numpy.random.default_rng(2)",
    ),
    "lazily created": (
        "config = {'size': 1}\nG = None",
        "global G\n    if G is None: G = dict(config)\n    return x, G['size']",
        "G",
        "G = {'size': 100}",
    ),
    "lazily created where nothing was": (
        "",
        "global G\n    try: G\n    except NameError: G = {'size': 1}\n    return x, G['size']",
        "G",
        "G = {'size': 100}",
    ),
    "rate limiter": (
        (
            "class Limiter:\n    def __init__(self):\n"
            "        self.tokens, self.last = 5.0, time.monotonic()\n"
            "    def take(self):\n        now = time.monotonic()\n"
            "        self.tokens = min(5.0, self.tokens + now - self.last) - 1\n"
            "        self.last = now\nlimiter = Limiter()"
        ),
        "limiter.take(); return x",
        "limiter.last",
        "limiter.last = 0.0",
    ),
    "attribute of a class": (
        "class C: calls = 0",
        "C.calls += 1; return x, C.calls * 0",
        "C.calls",
        "C.calls = 100",
    ),
    "attribute of its class": (
        (
            "class C:\n    n = 0\n    def count(self):\n        type(self).n += 1\n"
            "        self.__class__.m += 1\n        return self.n\n    m = 0\nc = C()"
        ),
        "return x, c.count() * 0 * C.m",
        "C.n",
        "C.n = 100",
    ),
    "set by name": (
        "class Box: pass\nbox = Box()\nbox.n = box.m = 0",
        (
            "setattr(box, 'n', box.n + 1); object.__setattr__(box, 'm', box.n)\n"
            "    return x, box.n * box.m * 0"
        ),
        "box.n",
        "box.n = 100",
    ),
    "captured": (
        (
            "def make():\n    n = 0\n    def count():\n        nonlocal n\n        n += 1\n"
            "        return n\n    def reset():\n        nonlocal n\n        n = 100\n"
            "    return count, reset\ncount, reset = make()"
        ),
        "count(); return x",
        "n",
        "reset()",
    ),
    "default": (
        "def bump(k, hits={}):\n    hits[k] = hits.get(k, 0) + 1\n    return len(hits)",
        "bump(x); return x",
        "hits",
        "bump.__defaults__[0]['z'] = 1",
    ),
}
KINDS = {
    "sync": "runs = []\n@memo.cache\ndef f(x):\n    runs.append(x)\n    {body}",
    "async": "runs = []\n@memo.cache\nasync def f(x):\n    runs.append(x)\n    {body}",
    "method": "runs = []\nclass K:\n  @memo.cache\n  def f(self, x):\n    runs.append(x)\n"
    "    {body}\nf = K().f",
}


def run(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value


def source(change: str, kind: str) -> str:
    setup, body, *_ = CHANGES[change]
    return f"{setup}\n{KINDS[kind].format(body=body)}"


def changing(change: str, kind: str, module: Make) -> Any:
    """A module whose `f` changes state; called twice with one argument, with its warnings."""
    made = module(source(change, kind))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = run(made.f(1))
        assert run(made.f(1)) == first
        run(made.f(2))
        run(made.f(2))
    made.told = [str(one.message) for one in told]
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_its_own_changes_leave_the_key(change: str, kind: str, module: Make) -> None:
    """A second call hits, after one warning that names what changes, as `explain` does."""
    made = changing(change, kind, module)
    assert made.runs == [1, 2]
    [told] = made.told
    name = CHANGES[change][2]
    assert f"changes {name}" in told or f", {name}" in told
    assert f"f() changes `{name}`: left out of its key" in made.f.explain(1).untracked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_anything_else_is_a_miss(change: str, kind: str, module: Make) -> None:
    """State that is set between two calls counts, so the call computes again."""
    made = changing(change, kind, module)
    exec(CHANGES[change][3], vars(made))
    run(made.f(1))
    run(made.f(1))
    assert made.runs == [1, 2, 1]


@pytest.mark.parametrize("change", ["counter of a client", "lazily created"])
def test_the_suite_notices_keys_of_what_is_there_now(
    change: str, module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: state counts as it is, not as it was before computations."""
    key_mutants.as_it_is_now(monkeypatch)
    assert changing(change, "sync", module).runs != [1, 2]


def test_the_suite_notices_state_that_is_left_out_for_good(
    module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutant: what a computation has changed once never counts again, so an old value answers."""
    made = changing("lazily created", "sync", module)
    key_mutants.left_out_for_good(monkeypatch)
    made.G = {"size": 100}
    assert made.f(1) == (1, 1)


def test_a_value_that_another_thread_sets_meanwhile_is_not_stored(module: Make) -> None:
    """A global that changed while the function ran, and that it does not set, stays an input."""
    made = module(
        """
        threshold, hits, runs = 1, 0, []
        def during(): pass
        @memo.cache(ignore=["global:during"])
        def f(x):
            global hits
            hits += 1
            runs.append(x)
            during()
            return threshold, hits * 0
        """
    )
    limits: list[int] = []
    made.during = lambda: limits.append(1) or vars(made).update(limits=[len(limits)])
    made.limits = [0]
    made.f.invalidate()
    assert made.f(1) == (1, 0)
    assert made.f.is_cached(1), "what it does not read may change"
    container = module(
        """
        rows, runs = [1], []
        def during(): pass
        class K:
            def set(self): self.n = 1
        @memo.cache(ignore=["global:during"])
        def f(x):
            runs.append(x)
            K().set()
            during()
            return sum(rows)
        """
    )
    container.during = lambda: threading.Thread(target=container.rows.append, args=(1,)).run()
    assert container.f(1) == 2
    container.during = lambda: None
    assert container.f(1) == 2
    assert container.runs == [1, 1], "the first result was built on rows that changed meanwhile"
    assert container.f(1) == 2
    assert container.runs == [1, 1]


def test_what_always_changes_meanwhile_is_said(module: Make) -> None:
    """A change under another name than the code's own is told of once, with the way out."""
    made = module(
        """
        seen, runs = {}, []
        def bump(table, key): table[key] = table.get(key, 0) + 1
        @memo.cache
        def f(x):
            runs.append(x)
            bump(seen, x)
            return x
        """
    )
    made.f(1), made.f(1)
    with pytest.warns(UserWarning, match=r"seen changed each time .* ignore=\['global:seen'\]"):
        made.f(1)
    ignoring = memo.cache(ignore=["global:seen"])(made.f.__wrapped__)
    ignoring(1), ignoring(1)
    assert made.runs == [1, 1, 1, 1]
    assert "global:seen: is ignored" in ignoring.explain(1).untracked


@pytest.mark.filterwarnings("ignore:.*changes api.requests")
def test_a_name_to_ignore_that_is_not_read_is_told(module: Make) -> None:
    """`ignore=["global:apy"]` for a function that reads `api` says which globals it reads."""
    made = module(f"{API}\n@memo.cache(ignore=['global:apy'])\ndef f(x): return api.get(x)\n")
    with pytest.warns(UserWarning, match=r"'global:apy'.*global:api") as told:
        made.f(1)
    assert len([one for one in told if "apy" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*changes api.requests")
def test_one_object_under_two_names(module: Make) -> None:
    """A client that two modules import: what a computation of one changes is no change for both."""
    one = module(f"{API}\n@memo.cache\ndef f(x): return api.get(x)")
    name = one.__name__
    two = module(f"from {name} import api\nruns=[]\n@memo.cache\ndef g(x):\n runs.append(x)\n"
                 " return api.get(x)")  # fmt: skip
    for x in range(3):
        one.f(x)
        two.g(0)
    assert two.runs == [0]


@pytest.mark.filterwarnings("ignore:.*changes api.requests")
def test_many_at_once_share_one_key(module: Make) -> None:
    """Computations that run together, each of which counts, change no key of each other."""
    made = module(
        f"import asyncio\n{API}\nruns = []\n@memo.cache\nasync def f(x):\n    runs.append(x)\n"
        "    api.get(x)\n    await asyncio.sleep(0)\n    return api.get(x)\n"
    )

    async def main() -> None:
        await asyncio.gather(*(made.f(x % 10) for x in range(40)))
        await asyncio.gather(*(made.f(x) for x in range(10)))

    asyncio.run(main())
    assert sorted(made.runs) == list(range(10))


NESTED = """
class Client:
    def __init__(self, tenant): self.tenant, self.requests, self.log = tenant, 0, []
    def fetch(self, x):
        self.requests += 1
        self.log.append(x)
        return f"{self.tenant} {x}"
class Service:
    def __init__(self, tenant): self.client = Client(tenant)
    @memo.cache
    def get(self, x):
        runs.append(x)
        return self.client.fetch(x)
    @memo.cache
    def direct(self, x):
        runs.append(x)
        self.client.requests += 1
        return self.client.tenant
runs = []
"""


@pytest.mark.filterwarnings("ignore:.*changes self.client")
def test_counters_of_objects_in_attributes(module: Make) -> None:
    """`self.client.requests += 1` hits, also where a method of the client does it."""
    made = module(NESTED)
    a, b = made.Service("a"), made.Service("b")
    for _ in range(3):
        assert (a.get(1), b.get(1), a.direct(1), b.direct(1)) == ("a 1", "b 1", "a", "b")
    assert made.runs == [1, 1, 1, 1]
    assert "get() changes `self.client.requests`: left out of its key" in a.get.explain(1).untracked
    assert made.Service("a").get.is_cached(1)
    a.client.tenant = "c"
    assert (a.get(1), a.direct(1)) == ("c 1", "c")


# --- other processes ------------------------------------------------------------------------------


def other_process(folder: Path, code: str, directory: str = "cache", **settings: str) -> list[str]:
    """The words that another process prints, which shares the modules, and the cache directory."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "MEMO_DIRECTORY": str(folder / directory), "PYTHONPATH": os.pathsep.join(
            [str(folder), *sys.path]), **settings},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout.split()


SHARED = {
    "counter of a client": "s.api.requests = 17",
    "rate limiter": "s.limiter.last -= 3",
    "random generator": "s.rng.seed(99)",
    "counter that is read": "s.n = 5",
    "lazily created": "",
    "deque": "",
    "captured": "",
}


@pytest.mark.parametrize("kind", ["sync", "method"])
@pytest.mark.parametrize("change", SHARED)
@pytest.mark.filterwarnings("ignore:.*while it runs")
def test_other_processes_know_what_a_function_changes(
    change: str, kind: str, module: Make, tmp_path: Path
) -> None:
    """Counters that begin elsewhere there, and generators with another seed, are no inputs."""
    made = module(source(change, kind), "s")
    try:
        made.f(1), made.f(2)
        code = f"import s\n{SHARED[change]}\ns.f(1); s.f(2)\nprint(len(s.runs))"
        assert other_process(tmp_path, code) == ["0"]
    finally:
        del sys.modules["s"]


@pytest.mark.filterwarnings("ignore:.*while it runs")
def test_other_processes_keep_what_they_set_themselves(module: Make, tmp_path: Path) -> None:
    """State that another process sets before its first call is its own input, not a counter."""
    made = module(source("lazily created", "sync"), "s")
    try:
        made.f(1)
        code = "import s\ns.G = {'size': 100}\nprint(s.f(1)[1])\n"
        assert other_process(tmp_path, code) == ["100"]
        code = "import s\ns.config['size'] = 7\nprint(s.f(1)[1])\n"
        assert other_process(tmp_path, code) == ["7"]
    finally:
        del sys.modules["s"]


def test_what_the_code_no_longer_changes_is_an_input_again(module: Make, tmp_path: Path) -> None:
    """An attribute that an earlier version of the method counted up is not left out for good."""
    head = "class K:\n  def __init__(self, n): self.n, self.z = n, 0\n  @memo.cache\n"
    body = "  def f(self, x):\n    self.n += 1; self.z += 1; return x, self.n * 0"
    module(head + body, "s")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sys.modules["s"].K(0).f(1)
        module_path = tmp_path / "s.py"
        later = module_path.read_text().replace("self.n += 1; ", "").replace("self.n * 0", "self.n")
        module_path.write_text(later)
        assert other_process(tmp_path, "import s; print(s.K(17).f(1)[1])") == ["17"]
        assert other_process(tmp_path, "import s; print(s.K(18).f(1)[1])") == ["18"]
    finally:
        del sys.modules["s"]


def test_explain_names_what_other_processes_found(module: Make, tmp_path: Path) -> None:
    """In a process that only hits, `explain` says which state is left out."""
    made = module(source("rate limiter", "sync"), "s")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.f(1)
        code = "import s; print(*s.f.explain(1).untracked)"
        assert "f() changes `limiter.last`: left out of its key" in " ".join(
            other_process(tmp_path, code)
        )
    finally:
        del sys.modules["s"]


# --- other hosts ----------------------------------------------------------------------------------


def host(folder: Path, name: str, server: RedisServer, code: str) -> str:
    """The output of a process of another host: it shares the Redis and the secret alone."""
    shared = {
        "MEMO_REDIS_URL": server.url,
        "MEMO_SECRET": "of both hosts " * 4,
        "MEMO_DEADLINE": "5",
    }
    told = "\nimport asyncio\nassert asyncio.run(memo.drain(60))"  # what it has found is in Redis
    return " ".join(other_process(folder, f"import memo\n{code}{told}", name, **shared))


def write(folder: Path, body: str) -> None:
    """Write the module that both hosts import."""
    (folder / "s.py").write_text(
        f"import collections, random, threading, time\nimport memo\n{body}"
    )


EVERY_KIND = f"""
import asyncio
{CHANGES["rate limiter"][0]}
{CHANGES["counter of a client"][0]}
rng = random.Random()
runs = []
class K:
    def __init__(self): self.rng = random.Random()
    @memo.cache
    def f(self, x): runs.append(x); return self.rng.random()
@memo.cache
def plain(x): runs.append(x); limiter.take(); return x
@memo.cache
async def later(x): runs.append(x); limiter.take(); return x
@memo.cache
def items(x): runs.append(x); limiter.take(); yield x
@memo.cache(each="xs")
def each(xs): runs.append(xs); limiter.take(); return list(xs)
@memo.cache
def counting(x): runs.append(x); return api.get(x)
@memo.cache
def drawing(x): runs.append(x); return rng.random()
def calls():
    print(plain(1), asyncio.run(later(2)), *items(3), each([4, 5]), counting(6), drawing(7))
    print(K().f(8))
"""


def test_other_hosts_know_what_a_function_changes(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """State that one host has found out is left out of the keys of another, which runs nothing."""
    write(tmp_path, EVERY_KIND)
    first = host(tmp_path, "here", redis_server, "import s\ns.calls()\nprint(len(s.runs))")
    code = "import s\ns.api.requests = 17\ns.calls()\nprint(len(s.runs))"
    assert first.endswith(" 7")
    assert host(tmp_path, "there", redis_server, code) == f"{first[:-1]}0"


def test_another_host_warns_and_explains(tmp_path: Path, redis_server: RedisServer) -> None:
    """A host that leaves out what another has found says so once, and `explain` names it."""
    write(tmp_path, source("rate limiter", "sync"))
    host(tmp_path, "here", redis_server, "import s; s.f(1)")
    code = """
import s, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(s.f.is_cached(1)), s.f(1), s.f(1), s.f(2)
print(len(told), told[0].message)
print(*s.f.explain(1).untracked)
"""
    said = host(tmp_path, "there", redis_server, code)
    assert said.startswith(
        "True 1 s:f changes limiter.last, limiter.tokens while it runs, as another"
    )
    assert "f() changes `limiter.last`: left out of its key" in said


def test_what_another_secret_sealed_is_not_believed(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """Own changes in Redis count only if one of the reader's own secrets sealed them."""
    write(tmp_path, source("rate limiter", "sync"))
    host(tmp_path, "here", redis_server, "import s; s.f(1)")
    client = redis_server.client()
    [name] = client.keys("memo:2:c:*")
    assert client.ttl(name) > 86_400
    assert client.hlen(name) == 2
    for field, value in client.hgetall(name).items():
        client.hset(name, field, value[:64] + b"float 1.0")
    code = "import s; s.f(1); print(len(s.runs))"
    assert host(tmp_path, "there", redis_server, code) == "1"


def test_computations_of_one_class_that_begin_together() -> None:
    """Both results are stored: the end of one does not disturb the other."""
    both = threading.Barrier(2)

    def wait_for_the_other(given: Mapping[str, Any]) -> None:
        if given["key"] is Shop:
            with suppress(threading.BrokenBarrierError):
                both.wait(0.5)

    class Shop:
        def __init__(self) -> None:
            self.prices = {"apple": 2}

        @memo.cache
        def price(self, number: int) -> int:
            return self.prices["apple"] * number

    shop = Shop()
    threads = [threading.Thread(target=shop.price, args=[number]) for number in (1, 2)]
    table = weakref.WeakKeyDictionary
    with calls_of(table.__setitem__, table.__delitem__, note=wait_for_the_other):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert shop.price.is_cached(1)
    assert shop.price.is_cached(2)


FORKED = """
import os, signal, sys, threading
import memo
from memo.keys.fingerprint import own_changes

class Api:
    def __init__(self):
        self.requests = 0

    def get(self, x):
        self.requests += 1
        return x

api = Api()

@memo.cache
def load(x):
    return api.get(x)

def hold():
    with own_changes.REGISTRY.lock:
        held.set()
        threading.Event().wait()

memo.configure(directory=sys.argv[1])
load(1)
held = threading.Event()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(load(2) - 2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def test_a_child_forked_during_a_change(tmp_path: Path) -> None:
    """It does not wait for a lock that a thread of its parent held."""
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)]
    assert subprocess.check_output(command, text=True) == "0\n"


class Nested:
    """A counter beside a list that is nested deeper than any key allows."""

    def __init__(self, levels: int) -> None:
        self.calls = 0
        self.data: list[Any] = []
        for _ in range(levels):
            self.data = [self.data]


class Reader:
    def __init__(self) -> None:
        self.nested = Nested(3000)

    @memo.cache(ttl=60)
    def read(self, x: int) -> int:
        self.nested.calls += 1
        return len(self.nested.data)


@pytest.mark.timeout(120)  # it took minutes while each level was tried by itself
def test_a_change_beside_a_value_that_is_nested_too_deeply(tmp_path: Path) -> None:
    reader = Reader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            reader.read(1)
    assert reader.nested.calls == 1
