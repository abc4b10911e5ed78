"""Cached functions in other processes: they find the same entries, under the same settings."""

from __future__ import annotations

import asyncio
import copy
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import worked
from callers import runs
from checkout import SUPPORT
from inside import inside
from ports import ROOT
from redis_server import RedisServer

import memo
from memo.settings import configuration
from memo.testing import isolated

PATHS = os.pathsep.join([str(ROOT), str(SUPPORT)])


@pytest.fixture(scope="module", autouse=True)
def trackers() -> None:
    """Start what Python and joblib start once and keep, before a test counts descriptors."""
    from multiprocessing import resource_tracker

    from joblib.externals.loky.backend import resource_tracker as of_loky

    resource_tracker.ensure_running()
    of_loky.ensure_running()


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import what the tests import."""
    monkeypatch.setenv("PYTHONPATH", PATHS)


def local() -> Any:
    """A cached function that no worker can import."""

    @memo.cache(use_lock=True, ttl=None)
    def slow(log: str, x: int) -> str:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return f"{x} by {os.getpid()}"

    return slow


FUNCTIONS = pytest.mark.parametrize("by", ["reference", "value"])


def function(by: str) -> Any:
    return worked.slow if by == "reference" else local()


def in_a_child(work: Callable[[], bytes], **settings: Any) -> bytes:
    """The answer of a forked process that has configured these settings."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            memo.configure(**settings)
            with os.fdopen(here, "wb") as file:
                file.write(work())
            code = 0
        finally:
            os._exit(code)
    os.close(here)
    with os.fdopen(there, "rb") as file:
        answer = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return answer


def through_cloudpickle(packed: bytes, *args: Any) -> Any:
    return cloudpickle.loads(packed)(*args)


# --- pickling ------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_round_trip(by: str, pickler: Any, log: Path) -> None:
    """Unpickled it is the function itself where that can be imported, else one with its entries."""
    f = function(by)
    again = pickler.loads(pickler.dumps(f))
    assert (again is f) == (by == "reference")
    assert again.function_id == f.function_id
    assert again.key(str(log), 1) == f.key(str(log), 1)
    assert again(str(log), 1) == f(str(log), 1)
    assert len(runs(log)) == 1
    assert inside(again).policy == inside(f).policy


@FUNCTIONS
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_what_using_changes_is_pickled(by: str, pickler: Any, log: Path) -> None:
    """A function with a mode, an age or a ttl of its own keeps them, also as a method."""
    used = function(by).using(ttl=lambda _: "5s").using(mode="only", max_age="1m")
    again = pickler.loads(pickler.dumps(used))
    with pytest.raises(memo.NotCachedError):
        again(str(log), 1)
    assert again.using(mode="refresh")(str(log), 1)
    [stored] = memo.entries(again)
    assert stored.ttl == 5
    assert inside(again).policy._replace(ttl=None) == inside(used).policy._replace(ttl=None)
    method = pickler.loads(pickler.dumps(worked.Service().method.using(mode="only")))
    with pytest.raises(memo.NotCachedError):
        method(5)


def test_copies_are_the_function_itself() -> None:
    """`copy` treats a cached function as it treats functions."""
    f = local()
    assert copy.copy(f) is f
    assert copy.deepcopy({"f": f})["f"] is f


@pytest.mark.parametrize("options", [{}, {"each": "xs"}], ids=["whole", "each"])
def test_a_decorator_above_can_be_pickled(options: dict[str, Any]) -> None:
    """A wrapper made with `functools.wraps` goes to workers with the function, also after calls."""

    @memo.cache(**options)
    def load(xs: list[int]) -> list[int]:
        return [2 * x for x in xs]

    @functools.wraps(load)
    def wrapper(xs: list[int]) -> list[int]:
        return load(xs)

    assert wrapper([1]) == load.using(max_age=60)([1]) == [2]
    assert cloudpickle.loads(cloudpickle.dumps(wrapper))([1, 2]) == [2, 4]


VERSIONS = {"rows": 1}


def test_a_copy_does_not_answer_for_the_original() -> None:
    """A copy has globals of its own, so the original's callables and names stay in use."""

    @memo.cache(ttl=None, version="1", name="tests:rows", depends_on=lambda: VERSIONS["rows"])
    def rows() -> int:
        return VERSIONS["rows"]

    copies = [pickle.loads(pickle.dumps(rows)) for _ in range(2)]
    assert rows not in copies
    assert rows() == copies[0]() == 1
    VERSIONS["rows"] = 2
    assert not rows.is_cached()
    assert rows() == 2
    assert [one for one in memo.functions() if one.function_id == "tests:rows"] == [rows]


KINDS = ["method", "of_class", "of_class_too", "static", "static_too"]


@pytest.mark.parametrize("name", KINDS)
def test_methods(name: str) -> None:
    """Methods of every kind are pickled, bound or not."""
    bound = getattr(worked.Service(), name)
    again = pickle.loads(pickle.dumps(bound))
    assert again(5) == bound(5)
    assert again.is_cached(5)
    of_class = getattr(worked.Service, name)
    pickle.loads(pickle.dumps(of_class))


def test_a_function_inside_a_result_takes_no_settings_along(tmp_path: Path) -> None:
    """A stored result that holds a cached function changes no settings."""
    f = local()

    @memo.cache
    def give() -> Any:
        return [f]

    def stored() -> bytes:
        give()
        return bytes(memo.records.codec.encode([f]).stream)

    packed = in_a_child(stored, directory=tmp_path / "zq7-other")
    assert b"zq7-other" not in packed
    pickle.loads(packed)
    assert configuration.current().sources["directory"] == "MEMO_DIRECTORY"


def test_recursive_functions_are_pickled_by_value() -> None:
    """Functions of a notebook that call themselves and each other are pickled too."""
    code = """
import pickle, cloudpickle, memo
@memo.cache
def even(n): return True if n == 0 else odd(n - 1)
@memo.cache
def odd(n): return False if n == 0 else even(n - 1)
@memo.cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
for pickler in (pickle, cloudpickle):
    for f, n in ((even, 10), (fib, 20)):
        again = pickler.loads(pickler.dumps(f))
        assert again is not f
        assert again.key(n) == f.key(n)
        print(again(n))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "6765"] * 2
    assert done.stderr == ""


ELSEWHERE = """
import sys
import cloudpickle
if sys.argv[1] == "pack":
    import memo

    def helper(x):
        return x + 1

    @memo.cache
    def load(x):
        return helper(x)

    with open(sys.argv[2], "wb") as file:
        file.write(cloudpickle.dumps(load))
else:
    load = cloudpickle.load(open(sys.argv[2], "rb"))
print(load.key(1), load(1))
"""


def test_a_worker_without_the_source_has_the_same_keys(tmp_path: Path) -> None:
    """A function pickled by value keeps its code version without a file of its code."""
    script, packed = tmp_path / "script.py", tmp_path / "packed"

    def there(verb: str, text: str) -> str:
        script.write_text(text)
        return subprocess.check_output([sys.executable, script, verb, packed], text=True)

    first = there("pack", ELSEWHERE)
    loading = ELSEWHERE.partition("else:")[2].replace("\n    ", "\n")
    assert there("load", f"import sys, cloudpickle{loading}") == first


def test_many_functions_of_a_notebook_are_pickled_in_linear_time() -> None:
    """Thirty cached functions that all reach each other are pickled in well under a second."""
    lines = ["import pickle, time, memo"]
    for i in range(30):
        calls = ", ".join(f"f{j}" for j in range(30))
        lines.append(f"@memo.cache\ndef f{i}(x): return [{calls}] and x")
    lines.append("begun = time.process_time(); pickle.loads(pickle.dumps(f0))")
    lines.append("print(time.process_time() - begun)")
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2.0


# --- settings ------------------------------------------------------------------------------------


def packed_elsewhere(f: Any, **settings: Any) -> bytes:
    """A function as another process with these settings sends it."""
    return in_a_child(lambda: cloudpickle.dumps(f), **settings)


@FUNCTIONS
def test_settings_travel(by: str, tmp_path: Path) -> None:
    """Settings that the parent configured count in a worker, above its environment."""
    packed = packed_elsewhere(function(by), directory=tmp_path / "there", memory_limit=0)
    assert configuration.current().directory != tmp_path / "there"
    pickle.loads(packed)
    assert configuration.current().directory == tmp_path / "there"
    assert configuration.current().sources["directory"] == "configure() of another process"
    assert configuration.current().memory_limit == 0
    configuration.reset()
    later = packed_elsewhere(worked.slow, directory=tmp_path / "later")
    pickle.loads(packed)
    pickle.loads(later)
    assert configuration.current().directory == tmp_path / "later"
    assert configuration.current().sources["memory_limit"] == "default"


def test_a_worker_that_configures_itself_keeps_that(tmp_path: Path) -> None:
    """`configure` in the worker wins over what comes with a function."""
    packed = packed_elsewhere(worked.slow, directory=tmp_path / "there", memory_limit=0)
    with memo.configure(directory=tmp_path / "here"):
        pickle.loads(packed)
        assert configuration.current().directory == tmp_path / "here"
        assert configuration.current().memory_limit == 0


def test_own_settings_do_not_come_back(tmp_path: Path) -> None:
    """A function that is unpickled where it was pickled changes no settings there."""
    with memo.configure(directory=tmp_path / "one"):
        packed = cloudpickle.dumps(worked.slow)
    pickle.loads(packed)
    assert configuration.current().directory != tmp_path / "one"


@FUNCTIONS
def test_no_secret_travels(by: str) -> None:
    """Neither the secret nor a password leaves the process inside a function."""
    secret = "my own secret of the very best kind"
    with memo.configure(secret=secret, redis_url="redis://:hunter2@127.0.0.1:1/0"):
        packed = cloudpickle.dumps(function(by))
        held = configuration.current().secrets[0]
    assert secret.encode() not in packed
    assert b"hunter2" not in packed
    assert held.id not in packed


# --- pools ---------------------------------------------------------------------------------------


@FUNCTIONS
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_process_pool(by: str, method: str, log: Path, tmp_path: Path) -> None:
    """Of the workers of a pool one computes; all find the parent's entries and settings."""
    f = function(by)
    context = multiprocessing.get_context(method)
    with memo.configure(directory=tmp_path / "configured"):
        own = f(str(log), 0)
        with ProcessPoolExecutor(3, mp_context=context) as pool:
            assert pool.submit(f, str(log), 0).result() == own
            results = {task.result() for task in [pool.submit(f, str(log), 1) for _ in range(6)]}
            places = pool.submit(worked.where, f).result()
        assert len(results) == 1
        assert f(str(log), 1) in results
        assert len(runs(log)) == 2
    assert places[0] == str(tmp_path / "configured")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_worker_follows_its_parent(log: Path, tmp_path: Path) -> None:
    """Settings that the parent changes after the fork reach its workers with the next function."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        with memo.configure(directory=tmp_path / "one"):
            first = pool.submit(worked.slow, str(log), 1).result()
            assert worked.slow(str(log), 1) == first
        with memo.configure(directory=tmp_path / "two"):
            second = pool.submit(worked.slow, str(log), 1).result()
            assert worked.slow(str(log), 1) == second
        assert len(runs(log)) == 2


SCRIPT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import memo

@memo.cache(use_lock=True)
def load(x):
    with open(sys.argv[1], "a") as file:
        file.write("run\\n")
    time.sleep(0.2)
    return x * 2

@memo.cache(use_lock=True)
async def aload(x):
    with open(sys.argv[1], "a") as file:
        file.write("run\\n")
    return x * 3

def both(x):
    import asyncio
    return load(x), asyncio.run(aload(x))

if __name__ == "__main__":
    with ProcessPoolExecutor(3, mp_context=get_context(sys.argv[2])) as pool:
        print(list(pool.map(load, [1] * 6)), list(pool.map(both, [1] * 6)))
    print(load(1), load.is_cached(1), aload.is_cached(1))
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_pool_of_a_script(method: str, log: Path, tmp_path: Path) -> None:
    """Functions of a script that runs as `__main__` work in its pool, as plain functions do."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(log), method],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        # not `configure`, which reaches a worker with its first cached function: `both` is none
        env={**os.environ, "MEMO_DIRECTORY": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{[2] * 6} {[(2, 3)] * 6}", "2 True True"]
    assert len(runs(log)) == 2


@FUNCTIONS
def test_joblib(by: str, log: Path, tmp_path: Path) -> None:
    """Workers of joblib (loky) compute once together, under the parent's settings."""
    import joblib
    from joblib.externals.loky import get_reusable_executor

    f = function(by)
    with memo.configure(directory=tmp_path / "configured"):
        try:
            with joblib.parallel_config(backend="loky", n_jobs=3):
                results = joblib.Parallel()(joblib.delayed(f)(str(log), 1) for _ in range(6))
        finally:
            get_reusable_executor().shutdown(wait=True)
        assert len(set(results)) == 1
        assert f(str(log), 1) == results[0]
    assert len(runs(log)) == 1


DASK = """
import os, sys, time
import memo
from distributed import Client, LocalCluster
from worked import slow, where

def main():
    log, directory, url = sys.argv[1:4]
    memo.configure(directory=directory, redis_url=url or None)

    @memo.cache(use_lock=True)
    def load(x):
        with open(log, "a") as file:
            file.write("run\\n")
        time.sleep(0.5)
        return x, os.getpid()

    @memo.cache(use_lock=True)
    async def aload(x):
        with open(log, "a") as file:
            file.write("run\\n")
        return x

    with LocalCluster(n_workers=3, threads_per_worker=2, processes=True,
                      dashboard_address=None) as cluster, Client(cluster) as client:
        tasks = [client.submit(load, 1, pure=False) for _ in range(12)]
        print(len(set(client.gather(tasks))))
        print(load(1) == tasks[0].result())
        tasks = [client.submit(slow, log, 2, pure=False) for _ in range(12)]
        print(len(set(client.gather(tasks))))
        print({place[0] for place in client.run(where, slow).values()} == {directory})
        print(client.gather([client.submit(aload, 3, pure=False) for _ in range(4)]))
        load.invalidate()
        print(client.submit(load.is_cached, 1, pure=False).result())

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("shared", ["redis", "disk"])
def test_dask(shared: str, log: Path, tmp_path: Path, redis_server: RedisServer) -> None:
    """One computation for the workers of a real `LocalCluster`, and one answer for all."""
    script = tmp_path / "cluster.py"
    script.write_text(DASK)
    url = redis_server.url if shared == "redis" else ""
    done = subprocess.run(
        [sys.executable, str(script), str(log), str(tmp_path / "cache"), url],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1", "True", "1", "True", "[3, 3, 3, 3]", "False"], (
        done.stderr
    )
    assert len(runs(log)) == 3


async def test_async_function_from_a_pickle(log: Path) -> None:
    """An `async def` comes back as one."""

    @memo.cache(ttl=None)
    async def load(x: int) -> int:
        await asyncio.sleep(0)
        return x

    again = cloudpickle.loads(cloudpickle.dumps(load))
    assert await load(3) == 3
    assert await again.ais_cached(3)
    assert await again(3) == 3


def test_isolated_function_of_a_function_with_options() -> None:
    """Options that are functions travel with it."""
    f = memo.cache(key_resolver=lambda x: f"id:{x}", tags=lambda x: [f"t{x}"], cache_if=bool)(
        lambda x: x
    )
    with isolated():
        again = cloudpickle.loads(cloudpickle.dumps(f))
        again(4)
        assert f.is_cached(4)
        memo.invalidate(tag="t4")
        assert not again.is_cached(4)
