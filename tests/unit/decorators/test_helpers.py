"""Methods of a cached function look like the function; errors end at the line that made them."""

import asyncio
import inspect
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memo
from memo import cache

PACKAGE = str(Path(memo.__file__).parent)


@cache(ttl="1h")
def load(region: str, year: int = 2024) -> list[str]:
    """Load a region."""
    return [region] * year


class Client:
    """A class with cached methods."""

    @cache
    def get(self, key: str) -> str:
        """Get a key."""
        return key

    @classmethod
    @cache
    def make(cls, key: str) -> str:
        """Make a key."""
        return key


def shown(function: Callable[..., Any]) -> str:
    """The arguments that a tooltip shows."""
    signature = inspect.signature(function)
    return str(signature.replace(return_annotation=inspect.Signature.empty))


CALL = "(region: str, year: int = 2024)"


@pytest.mark.parametrize(
    "name",
    [
        "key",
        "akey",
        "address",
        "aaddress",
        "refresh",
        "arefresh",
        "is_cached",
        "explain",
        "aexplain",
    ],
)
def test_a_helper_has_the_arguments_of_the_function(name: str) -> None:
    """Completion and tooltips show the function's arguments, not those of a wrapper."""
    method = getattr(load, name)
    assert shown(method) == CALL
    assert inspect.ismethod(method)
    assert method.__name__ == name
    assert method.__doc__


def test_arguments_that_select_entries_may_be_left_out() -> None:
    """The arguments of `invalidate` and `expire`, with the reason; those of `put` and `peek`."""
    selecting = "(region: str = <any>, year: int = <any>, *, reason='')"
    for name in ("invalidate", "ainvalidate", "expire", "aexpire"):
        assert shown(getattr(load, name)) == selecting
    assert shown(load.put) == "(value, /, region: str, year: int = 2024)"
    assert shown(load.peek) == "(region: str, year: int = 2024, *, default=None)"


def test_an_option_gives_way_to_an_argument_of_its_name() -> None:
    """A function that has an argument called `reason` or `default` shows its own."""

    @cache
    def told(reason: int, default: str = "x", **more: int) -> int:
        return reason

    assert shown(told.invalidate) == "(reason: int = <any>, default: str = <any>, **more: int)"
    assert shown(told.peek) == "(reason: int, default: str = 'x', **more: int)"


def test_helpers_of_methods_do_not_show_self() -> None:
    """On an object or its class, what is bound already is no argument any more."""
    client = Client()
    for bound in (client.get, client.get.key, client.get.refresh, Client.make, Client.make.key):
        assert shown(bound) == "(key: str)"
    assert shown(client.get.invalidate) == "(key: str = <any>, *, reason='')"
    assert shown(Client.make.invalidate) == "(key: str = <any>, *, reason='')"
    assert shown(client.get.put) == "(value, /, key: str)"
    assert shown(Client.get.key) == "(self, key: str)"
    assert client.get.key.__doc__ == load.key.__doc__
    assert client.get.__doc__ == "Get a key."


def test_no_signature_shows_how_types_are_passed_on() -> None:
    """IPython shows that of `__call__`, too: it says nothing of `ParamSpec`."""
    for one in (load, Client().get, load.using(ttl=5)):
        assert "P.args" not in f"{inspect.signature(one)} {inspect.signature(one.__call__)}"


def test_a_helper_can_be_sent_to_another_process() -> None:
    """It is a method like any other: equal to itself, and pickled by reference."""
    assert load.refresh == load.refresh
    assert pickle.loads(pickle.dumps(load.is_cached))("EU", 1) is False


def frames(error: BaseException) -> list[str]:
    """The files of memo's own in the traceback of an error."""
    found = traceback.extract_tb(error.__traceback__)
    return [f"{Path(f.filename).name}:{f.name}" for f in found if f.filename.startswith(PACKAGE)]


MISTAKES: dict[str, Callable[[], Any]] = {
    "cache": lambda: cache(tll=1),  # type: ignore[call-overload]
    "decorating": lambda: cache(key_resolver="{nobody}")(lambda x: x),
    "configure": lambda: memo.configure(redis_ur="x"),  # type: ignore[call-arg]
    "a value of configure": lambda: memo.configure(size_limit="x"),
    "invalidate": lambda: memo.invalidate(function="laod"),
    "expire": lambda: memo.expire(prefix="a", tag="b"),
    "ainvalidate": lambda: asyncio.run(memo.ainvalidate(function="laod")),
    "aexpire": lambda: asyncio.run(memo.aexpire()),
    "strict": lambda: memo.invalidate(prefix="no such prefix", strict=True),
    "invalidate_cache": lambda: memo.invalidate_cache(),
    "explain": lambda: memo.explain("laod"),
    "entries": lambda: memo.entries(load, regoin="x"),
    "mode": lambda: memo.mode("refersh"),  # type: ignore[arg-type]
    "using": lambda: load.using(max_age="5 parsecs"),
    "f.invalidate": lambda: load.invalidate(regoin="x"),
    "a predicate": lambda: load.invalidate(region=lambda region: True),
    "f.key": lambda: load.key(),  # type: ignore[call-arg]
    "f.peek": lambda: load.peek(yeer=1),
    "f.put": lambda: load.put(1, object()),  # type: ignore[arg-type]
    "f.is_cached": lambda: load.is_cached(object()),  # type: ignore[arg-type]
    "f.explain": lambda: load.explain(object()),  # type: ignore[arg-type]
    "f.refresh": lambda: load.refresh(object()),  # type: ignore[arg-type]
    "f.arefresh": lambda: asyncio.run(load.arefresh(object())),  # type: ignore[arg-type]
    "a call": lambda: load(object()),  # type: ignore[arg-type]
    "a method": lambda: Client().get(object()),  # type: ignore[arg-type]
    "a method's helper": lambda: Client().get.invalidate(kye=1),
    "register_key": lambda: memo.register_key(1, len),  # type: ignore[arg-type]
    "stable": lambda: memo.stable(1),  # type: ignore[type-var]
    "File": lambda: memo.File("x", chek="content"),  # type: ignore[call-arg]
    "Chain": lambda: memo.Chain([1]),  # type: ignore[list-item]
    "graph": lambda: memo.graph(grup=True),  # type: ignore[call-arg]
    "live": lambda: memo.live.set("a", -1),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_shown_where_it_was_made(name: str) -> None:
    """The traceback of an error of memo ends in the caller's line, with no frame of memo's own."""
    with pytest.raises((memo.MemoError, TypeError)) as raised:
        MISTAKES[name]()
    assert frames(raised.value) == []
    assert raised.value.__cause__ is None or raised.value.__suppress_context__


def test_errors_of_the_function_keep_its_frames() -> None:
    """The traceback of a computation begins at its own line, also through a helper."""

    @cache
    def fails(x: int) -> int:
        return deeper(x)

    def deeper(x: int) -> int:
        raise ZeroDivisionError(x)

    with pytest.raises(ZeroDivisionError) as raised:
        fails.refresh(1)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-2:] == ["fails", "deeper"]


def test_a_mistake_inside_a_computation_keeps_the_way_to_it() -> None:
    """A wrong call of memo in a cached function is shown with the function's frames."""

    @cache
    def outer(x: int) -> Any:
        return memo.explain("laod")

    with pytest.raises(memo.OptionError) as raised:
        outer.refresh(1)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert "outer" in names


def test_errors_name_functions_as_tables_do() -> None:
    """The identity of a script's or notebook's function has a digest, which no message shows."""

    def load_rows(table: object) -> int:
        return 1

    load_rows.__module__, load_rows.__qualname__ = "__main__", "load_rows"
    cached = cache(name="nb.ipynb~0123abcd:load_rows")(load_rows)
    with pytest.raises(memo.KeyingError, match=r"^nb\.ipynb:load_rows"):
        cached(object())
