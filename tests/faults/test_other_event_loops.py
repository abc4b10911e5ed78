"""If no event loop of asyncio runs, the error says so and names what works there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
from kernels import Kernel

import memo

RAN: list[str] = []


@memo.cache
async def load(x: int) -> int:
    RAN.append("load")
    return x


@memo.invalidate_cache(functions=[load])
async def update() -> None:
    RAN.append("update")


@memo.cache
def plain(x: int) -> int:
    RAN.append("plain")
    return x


CALLS: dict[str, Callable[[], Awaitable[Any]]] = {
    "call": lambda: load(1),
    "key": lambda: load.akey(1),
    "refresh": lambda: load.arefresh(1),
    "peek": lambda: load.apeek(1),
    "is_cached": lambda: load.ais_cached(1),
    "put": lambda: load.aput(1, 1),
    "invalidate": lambda: load.ainvalidate(1),
    "explain": lambda: load.aexplain(1),
    "invalidator": update,
    "at module level": lambda: memo.ainvalidate(prefix="rows"),
    "drain": memo.drain,
}


@pytest.fixture(autouse=True)
def nothing_ran() -> None:
    RAN.clear()


@pytest.mark.parametrize("name", CALLS)
def test_under_trio_the_error_names_asyncio_and_the_sync_twin(name: str) -> None:
    """Under trio each async call is our error, before the function has run."""
    call = CALLS[name]

    async def main() -> None:
        with pytest.raises(memo.EventLoopError, match=r"asyncio, and trio runs .*`load.refresh"):
            await call()

    trio.run(main)
    assert RAN == []


def test_sync_functions_work_under_trio() -> None:
    """The fix that the error recommends works: a plain `def`, here and in a thread of trio's."""

    async def main() -> None:
        assert plain(1) == await trio.to_thread.run_sync(plain, 1) == 1
        assert plain.is_cached(1)

    trio.run(main)
    assert RAN == ["plain"]


def test_without_any_loop() -> None:
    """A coroutine that is driven by hand gets the error as well."""
    work = load(1)
    with pytest.raises(memo.EventLoopError, match="no asyncio loop runs here"):
        work.send(None)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


def test_a_loop_of_trio_inside_one_of_asyncio(kernel: Kernel) -> None:
    """In a kernel under `%autoawait trio`, whose own loop is asyncio's, it is the same error."""
    kernel.run("@cache\nasync def load(x): return x")
    kernel.run("%autoawait trio")
    assert kernel.attempt("await load(1)").error.startswith("EventLoopError")
    kernel.run("%autoawait asyncio")
    assert kernel.run("await load(1)").text == "1"
