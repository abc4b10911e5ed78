"""Functions, entries, invalidations, secrets and errors as a person sees them."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inside import inside
from kernels import Kernel

import memo
from memo import cache, invalidate_cache
from memo.decorators import assembly
from memo.engine.explaining import list_headers
from memo.inspection.live_view import Model
from memo.keys.summaries import mask_address
from memo.metrics import formatting, rendering
from memo.runtime.blocking import BLOCKING, drive

HERE = Path(__file__).name


class Loaded(Exception):
    """A value was loaded."""


class Touchy:
    """A result that cannot be loaded unnoticed."""

    def __reduce__(self) -> Any:
        return _loaded, ()


def _loaded() -> Touchy:
    if "armed" in sys.argv:  # no global of this module: that would be an input of what is cached
        raise Loaded
    return Touchy()


# --- reprs ----------------------------------------------------------------------------------------


def test_reprs_load_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function, an entry, an explanation and an invalidation show as text and as HTML."""

    @cache(ttl="1h", name="etl:load")
    def load(region: str, year: int = 2024) -> Touchy:
        return Touchy()

    load("<EU>")
    monkeypatch.setattr(sys, "argv", ["armed"])
    chain = assembly.default_chain()
    entry = drive(chain.lookup(BLOCKING, "etl:load", load.key("<EU>"), inside(load).judge)).entry
    shown: dict[str, Any] = {
        "etl:load": load,
        "etl:load ": entry,
        "load:<EU>:2024": load.explain("<EU>"),
        "etl:load('<EU>')": load.invalidate("<EU>", reason="<new>"),
    }
    for text, one in shown.items():
        assert text in repr(one)
        html = one._repr_html_()
        assert html.startswith("<")
        assert "<EU>" not in html
        assert "<new>" not in html
    html = load._repr_html_()
    assert "etl:load" in html
    assert "= 2024) -&gt;" in html
    assert "1 h 00 min" in html
    assert "0 hits, 1 miss" in html
    assert "disk" in shown["etl:load('<EU>')"]._repr_html_()


# --- secrets --------------------------------------------------------------------------------------


def everything_shown(load: Any, *args: Any) -> str:
    """All that is shown of the entries of a function, and of what one does with them."""
    chain = assembly.default_chain()
    found = drive(list_headers(BLOCKING, chain, f"{chain.namespace}:"))
    model = Model()
    (row,) = model.state()["entries"]["rows"]
    model.press({"do": "refresh", "key": row["key"]})
    parts = [model.said, load.explain(*args), load.explain(*args[:-1], "other"), model.state()]
    parts += [
        formatting.table_text(rendering.entries(found, [0.0] * len(found), [0.0] * len(found))),
        load.explain(*args)._repr_html_(),
    ]
    model.press({"do": "invalidate", "key": row["key"]})
    parts += [model.said, *(rendering.address(header) for header, _ in found)]
    parts += [load.invalidate(*args), load.invalidate(token=args[-1])]
    return "\n".join(map(str, parts))


@pytest.mark.parametrize("resolver", [None, "key:{token}:{region}", ["token"]])
def test_secrets_are_masked_in_addresses(resolver: Any) -> None:
    """An argument that is named like a secret is masked wherever its address is shown."""

    @cache(name="etl:load", key_resolver=resolver)
    def load(region: str, token: str) -> str:
        return region

    load("EU", "hunter2")
    told = everything_shown(load, "EU", "hunter2")
    assert "hunter2" not in told
    assert "***" in told
    assert "hunter2" in load.address("EU", "hunter2")


def test_an_address_stays_exact() -> None:
    """Only the display is masked: the address itself invalidates."""

    @cache(name="etl:load")
    def load(region: str, token: str, year: int) -> str:
        return region

    load("EU", "hunter2", 2024), load("EU", "other", 2024)
    assert load.explain("EU", "hunter2", 2024).call == "load:EU:***:2024"
    memo.invalidate(key=load.address("EU", "hunter2", 2024))
    assert not load.is_cached("EU", "hunter2", 2024)
    assert load.is_cached("EU", "other", 2024)


def test_addresses_without_secrets_are_shown_whole() -> None:
    """Nothing is masked where nothing is secret, also with colons in an argument."""

    @cache(name="etl:load", key_prefix="a:b")
    def load(path: str, year: int) -> str:
        return path

    load("c:d", 2024)
    assert load.explain("c:d", 2024).call == load.address("c:d", 2024) == "a:b:c:d:2024"

    @cache(name="etl:signed", key_prefix="a:b")
    def signed(path: str, token: str) -> str:
        return path

    assert signed.explain("c:d", "hunter2").call == "a:b:***"  # which part it is cannot be told


@pytest.mark.parametrize("summary", ['{"token": ["***"', '["***"]', '{"token": [], "a": "***"}'])
def test_an_unreadable_summary_masks_the_whole_address(summary: str) -> None:
    """Text that cannot be told apart from a secret is not shown."""
    assert mask_address("load:EU:hunter2", "load", summary, resolved=False) == "load:***"


# --- tracebacks -----------------------------------------------------------------------------------


def frames_of(call: Callable[[], Any]) -> list[str]:
    """The files of a call's traceback, from the call on, without those of asyncio."""
    with pytest.raises((KeyError, TypeError, memo.KeyingError)) as raised:
        call()
    found = [Path(f.filename) for f in traceback.extract_tb(raised.value.__traceback__)]
    return [path.name for path in found if path.parent.name != "asyncio"][2:]


def fails(x: Any) -> Any:
    raise KeyError(x)


async def afails(x: Any) -> Any:
    raise KeyError(x)


class Service:
    @cache(version="1")
    def load(self, x: int) -> Any:
        raise KeyError(x)


OURS = {"bound_functions.py", "cached_function.py", "invalidators.py"}


@pytest.mark.parametrize("replay", [False, True])
def test_tracebacks_show_the_users_frames(replay: bool) -> None:
    """Between the call and the function that raised there is at most one frame of memo's."""
    sync = cache(version="1", replay=replay)(fails)
    coro = cache(version="1", replay=replay)(afails)
    calls: list[Callable[[], Any]] = [
        lambda: sync(1),
        lambda: asyncio.run(coro(1)),
        lambda: Service().load(1),
        lambda: sync.refresh(1),
        lambda: coro.refresh(1),
        lambda: asyncio.run(coro.arefresh(1)),
        lambda: invalidate_cache(functions=[sync])(fails)(1),
        lambda: asyncio.run(invalidate_cache(functions=[sync])(afails)(1)),
    ]
    for call in calls:
        found = frames_of(call)
        assert found[-1] == HERE
        assert len([name for name in found if name != HERE]) <= 1, found
        assert set(found) <= {HERE} | OURS


def test_mistakes_in_a_call_are_seen_at_the_call() -> None:
    """Arguments that do not fit, or have no key, are an error without a frame of memo's."""
    sync, coro = cache(version="1")(fails), cache(version="1")(afails)
    for call in (
        lambda: sync(object()),
        lambda: sync(1, 2),
        lambda: asyncio.run(coro(object())),
        lambda: asyncio.run(coro(y=1)),
    ):
        assert frames_of(call) == []


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A real kernel with memo loaded."""
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


def test_tracebacks_in_a_notebook(kernel: Kernel) -> None:
    """In IPython no frame of memo's is shown at all, of functions, methods and coroutines."""
    kernel.run("""
        @cache(version="1")
        def fails(x): raise KeyError(x)
        @cache(version="1", replay=True)
        async def afails(x): raise KeyError(x)
        class Service:
            @cache(version="1")
            def load(self, x): raise KeyError(x)
        @memo.invalidate_cache(functions=[fails])
        def update(x): raise KeyError(x)
    """)
    for call in ("fails(1)", "await afails(1)", "Service().load(1)", "fails.refresh(1)",
                 "update(1)", "fails(object())"):  # fmt: skip
        shown = kernel.attempt(call).error
        assert shown.startswith(("KeyError", "KeyingError"))
        assert "memo/" not in shown, shown
        assert "engine" not in shown
