"""Every option of `cache` and `invalidate_cache`: its forms, and its errors at decoration."""

from __future__ import annotations

import functools
import inspect
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from inside import inside
from providers import InADict

import memo
from memo import cache, invalidate_cache
from memo.errors import OptionError
from memo.testing import recording


class Runs(list[Any]):
    """The calls that ran; all have one key, so that their content changes no function."""

    def __memo_key__(self) -> str:
        return "runs"


def sync_body(x: int = 0, y: int = 0) -> int:
    return x


async def async_body(x: int = 0, y: int = 0) -> int:
    return x


class AsyncAsked:
    """A callable whose answer would have to be awaited."""

    async def __call__(self, x: Any) -> int:
        return 5


bodies = pytest.mark.parametrize("body", [sync_body, async_body], ids=["sync", "async"])

SIGNATURE = (
    "(ttl=60, key_prefix=None, key_resolver=None, use_jitter=False, use_lock=False, "
    "lock_timeout=30, refresh_ahead=False, refresh_threshold=None, provider=None, ttl_key=None, "
    "*, tags=(), depends_on=(), check_every=0, ignore=(), version=None, stale_while_revalidate=0, "
    "stale_if_error=0, retry_after=0, soft_timeout=0, cache_errors=None, each=None, cutoff=False, "
    "name=None, "
    "cache_if=None, compress=None, replay=False)"
)


def bare(function: Any) -> str:
    """A signature without its annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_signatures() -> None:
    """The names, their order and their defaults are those of the specification."""
    assert bare(cache) == SIGNATURE
    assert bare(invalidate_cache) == (
        "(key_prefix=None, key_resolver=None, provider=None, *, functions=(), match=(), tags=(), "
        "soft=False)"
    )
    assert "ttl: how long" in inspect.getdoc(cache)  # type: ignore[operator]


def test_bare_called_and_by_position() -> None:
    """`@cache`, `@cache()`, and the options of the specification by position."""
    assert inside(cache(sync_body)).policy.ttl == 60
    assert inside(cache()(sync_body)).policy.ttl == 60
    f = cache(90, "p", ["x"], True, True, 5, True, 0.5, InADict(), "k")(sync_body)
    policy = inside(f).policy
    assert (policy.ttl, policy.use_jitter, policy.use_lock, policy.lock_timeout) == (
        90,
        True,
        True,
        5,
    )
    assert (policy.refresh_ahead, policy.refresh_threshold, policy.ttl_key) == (True, 0.5, "k")
    assert f.address(3, 4) == "p:3"


def test_defaults() -> None:
    """Each default is the one that the specification gives."""
    policy = inside(cache(sync_body)).policy
    assert policy == memo.settings.options.Policy()
    assert (policy.ttl, policy.lock_timeout, policy.refresh_threshold) == (60, 30, 0.8)


GOOD: list[tuple[str, Any, str, Any]] = [
    ("ttl", 5, "ttl", 5.0),
    ("ttl", 0.25, "ttl", 0.25),
    ("ttl", timedelta(minutes=1), "ttl", 60.0),
    ("ttl", "1h30m", "ttl", 5400.0),
    ("ttl", "2w", "ttl", 1_209_600.0),
    ("ttl", "500 ms", "ttl", 0.5),
    ("ttl", None, "ttl", None),
    ("ttl", len, "ttl", len),
    ("lock_timeout", 0, "lock_timeout", 0.0),
    ("lock_timeout", "1m", "lock_timeout", 60.0),
    ("lock_timeout", None, "lock_timeout", None),
    ("stale_while_revalidate", "1h", "stale_while_revalidate", 3600.0),
    ("stale_while_revalidate", timedelta(days=1), "stale_while_revalidate", 86_400.0),
    ("stale_if_error", 0, "stale_if_error", 0.0),
    ("stale_if_error", "1d", "stale_if_error", 86_400.0),
    ("use_jitter", True, "use_jitter", True),
    ("use_lock", True, "use_lock", True),
    ("refresh_ahead", True, "refresh_ahead", True),
    ("ttl_key", "ttl.x", "ttl_key", "ttl.x"),
    ("cache_if", bool, "cache_if", bool),
]


@bodies
@pytest.mark.parametrize(
    ("option", "value", "field", "made"),
    GOOD,
    ids=[f"{row[0]}-{i}" for i, row in enumerate(GOOD)],
)
def test_accepted(body: Any, option: str, value: Any, field: str, made: Any) -> None:
    """Each form of an option is taken, and means what it says."""
    assert getattr(inside(cache(**{option: value})(body)).policy, field) == made


NOT_SECONDS: list[Any] = [
    -1,
    math.nan,
    math.inf,
    True,
    "5",
    "",
    "1h30",
    "an hour",
    b"5s",
    [5],
    10**400,
]
NOT_SECONDS += [timedelta(seconds=-1)]
NOT_TEXT = ["", "  ", 5, b"x", ["x"]]
NOT_TEXTS: list[Any] = ["x", 5, None, [5], [""], ["x", None]]
NOT_FLAGS: list[Any] = [1, 0, "yes", None]

BAD: list[tuple[str, Any]] = [
    *(("ttl", value) for value in [0, 0.0, timedelta(0), "0s", *NOT_SECONDS]),
    *(("ttl", value) for value in [lambda: 5, lambda a, b: 5, async_body, AsyncAsked()]),
    *(("lock_timeout", value) for value in NOT_SECONDS),
    *(("stale_while_revalidate", value) for value in [None, *NOT_SECONDS]),
    *(("stale_if_error", value) for value in [None, *NOT_SECONDS]),
    *(("use_jitter", value) for value in NOT_FLAGS),
    *(("use_lock", value) for value in NOT_FLAGS),
    *(("refresh_ahead", value) for value in NOT_FLAGS),
    *(("key_prefix", value) for value in [":", *NOT_TEXT]),
    *(("ttl_key", value) for value in NOT_TEXT),
    *(("version", value) for value in NOT_TEXT),
    *(("name", value) for value in NOT_TEXT),
    *(("ignore", value) for value in [["z"], *NOT_TEXTS]),
    *(("tags", value) for value in NOT_TEXTS),
    *(("tags", value) for value in [lambda z: ["a"], async_body, AsyncAsked()]),
    *(("cache_if", value) for value in [5, True, "x", lambda: True, async_body, AsyncAsked()]),
    *(
        ("key_resolver", value)
        for value in [5, "no placeholder", "{z}", "{0}", "{x", "{}", [], ["z"]]
    ),
    *(
        ("key_resolver", value)
        for value in [["x", "x"], "{x!z}", lambda z: z, lambda *a: a, async_body, AsyncAsked()]
    ),
    *(("provider", value) for value in [5, "redis", InADict, object()]),
    *(("depends_on", value) for value in [5, [5], [None]]),
]


def _ids(rows: list[tuple[str, Any]]) -> list[str]:
    """Ids that are the same in every process."""
    return [f"{option}-{i}" for i, (option, _) in enumerate(rows)]


@pytest.mark.parametrize("option", ["stale_while_revalidate", "stale_if_error"])
def test_a_window_is_never_told_to_have_no_limit(option: str) -> None:
    """The fix of a wrong window is one that is taken."""
    with pytest.raises(OptionError, match="must be 0 or more; 0 turns it off"):
        cache(**{option: -1})(len)
    cache(**{option: 0})(len)


@pytest.mark.parametrize("wrong", [-1, None])
def test_check_every_is_never_told_to_have_no_limit(wrong: Any) -> None:
    """Without a limit a source would never be asked again: 0 asks at each call, None is refused."""
    with pytest.raises(OptionError, match=r"check_every=.*; 0 asks at each call"):
        cache(depends_on="https://example.org/x", check_every=wrong)
    cache(depends_on="https://example.org/x", check_every=0)(len)


@bodies
@pytest.mark.parametrize(("option", "value"), BAD, ids=_ids(BAD))
def test_refused_at_decoration(body: Any, option: str, value: Any) -> None:
    """A wrong value is an error at decoration that names option, value and fix."""
    with pytest.raises(OptionError) as caught:
        cache(**{option: value})(body)
    error = caught.value
    assert error.option == option
    assert str(error).startswith(f"{option}=")
    assert len(error.fix) > 10
    shown = repr(error.value) if len(repr(error.value)) <= 80 else repr(error.value)[:20]
    assert shown in str(error)
    assert isinstance(error, ValueError)
    assert isinstance(error, TypeError)


@pytest.mark.parametrize("value", [0, 1, 1.5, -0.1, math.nan, math.inf, True, "0.5"], ids=str)
def test_refused_thresholds(value: Any) -> None:
    """A threshold is a fraction of the ttl between 0 and 1."""
    with pytest.raises(OptionError, match=r"refresh_threshold=.*between 0 and 1"):
        cache(refresh_ahead=True, refresh_threshold=value)


def test_contradictions() -> None:
    """Options that make no sense together are an error that says which one is missing."""
    with pytest.raises(OptionError, match=r"refresh_threshold=0\.5: needs refresh_ahead=True"):
        cache(refresh_threshold=0.5)
    with pytest.raises(OptionError, match="refresh_ahead=True: needs a ttl"):
        cache(ttl=None, refresh_ahead=True)
    cache(ttl=None, refresh_ahead=True, ttl_key="ttl.x")


@pytest.mark.parametrize("value", [[], ["x"], {"a": 1}], ids=["list", "names", "dict"])
def test_a_lone_value_is_no_function(value: Any) -> None:
    """`@cache(something)` that is neither a ttl nor a function is an error at once."""
    with pytest.raises(OptionError, match="ttl="):
        cache(value)


def test_unknown_option_is_a_type_error() -> None:
    """A misspelt option is an error, as for any function."""
    with pytest.raises(TypeError, match="tll=5: there is no such option; did you mean 'ttl'"):
        cache(tll=5)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="too many positional"):
        cache(*range(1, 14))  # type: ignore[call-overload]


async def test_unknown_option_of_an_async_helper_is_a_type_error() -> None:
    """It is the same error as for the sync twin, and names the nearest option."""
    with pytest.raises(TypeError, match="there is no such option; did you mean 'prefix'"):
        await memo.ainvalidate(prefx="p")  # type: ignore[call-arg]


# --- the effect of each option that no other file tests -------------------------------------------


@pytest.mark.parametrize("prefix", ["products", "products:"])
def test_key_prefix(prefix: str) -> None:
    """`"products"` and `"products:"` are one prefix, and functions may share it."""
    f = cache(key_prefix=prefix)(lambda x: x)
    g = cache(key_prefix="products")(lambda x, y=1: (x, y))
    f(1), g(1)
    assert f.address(1) == "products:1"
    assert g.address(1) == "products:1:1"
    memo.invalidate(prefix="products")
    assert not f.is_cached(1)
    assert not g.is_cached(1)


class Order:
    def __init__(self, number: int) -> None:
        self.number = number
        self.parts = {"a": [7, 8]}


@pytest.mark.parametrize(
    ("resolver", "address"),
    [
        (["order"], None),
        ("order:{order.number}", "orders:order:5"),
        ("{order.parts[a][1]}", "orders:8"),
        ("{order.number}:{user}", "orders:5:ann"),
        (lambda order: f"o{order.number}", "orders:o5"),
        (lambda order, user: (order.number, user), None),
        (lambda **everything: everything["user"], "orders:ann"),
    ],
    ids=["names", "template", "items", "two", "callable", "tuple", "kwargs"],
)
def test_key_resolver(resolver: Any, address: str | None) -> None:
    """A callable, a template or a list of names replaces the key; they give the address too."""
    runs = Runs()

    @cache(key_prefix="orders", key_resolver=resolver)
    def load(order: Order, user: str = "ann") -> int:
        runs.append(order.number)
        return order.number

    assert load(Order(5)) == load(Order(5), "ann") == 5
    assert runs == [5]
    if address is not None:
        assert load.address(Order(5)) == address
        memo.invalidate(key=address)
        assert not load.is_cached(Order(5))


def test_ignore() -> None:
    """An ignored argument is not in the key."""
    runs = Runs()

    @cache(ignore=["client"])
    def load(x: int, client: object = None) -> int:
        runs.append(x)
        return x

    assert load(1, object()) == load(1, client=object()) == load(1) == 1
    assert runs == [1]


def test_version_and_name() -> None:
    """`version` stands for the code, `name` for the place: together they are the identity."""
    one = cache(name="shared", version="1")(lambda x: "one")
    same = cache(name="shared", version="1")(lambda x: "another")
    newer = cache(name="shared", version="2")(lambda x: "newer")
    assert (one(1), same(1), newer(1)) == ("one", "one", "newer")
    assert one.function_id == "shared"
    one.invalidate()
    assert not newer.is_cached(1)


def test_tags() -> None:
    """Entries go by their tags, fixed ones and those of their arguments."""
    f = cache(tags=["reports"])(lambda x: x)
    g = cache(tags=lambda x: ["reports", f"x{x}"])(lambda x: -x)
    f(1), g(1), g(2)
    memo.invalidate(tag="x1")
    assert (f.is_cached(1), g.is_cached(1), g.is_cached(2)) == (True, False, True)
    memo.invalidate(tag="reports")
    assert (f.is_cached(1), g.is_cached(2)) == (False, False)


def test_depends_on(tmp_path: Path) -> None:
    """A file that changed, or a callable with a new answer, invalidates an entry."""
    source = tmp_path / "data.csv"
    source.write_text("1")
    state = Runs([1])

    @cache(depends_on=[source, lambda: len(state)])
    def load() -> str:
        return source.read_text()

    assert load() == "1"
    source.write_text("22")
    assert load() == "22"
    assert load.is_cached()
    state.append(2)
    assert not load.is_cached()


def test_cache_if() -> None:
    """A result that the predicate refuses is not stored; a predicate that raises is an event."""
    f = cache(cache_if=lambda rows: len(rows) > 0)(lambda n: [0] * n)
    f(0), f(2)
    assert (f.is_cached(0), f.is_cached(2)) == (False, True)
    g = cache(cache_if=lambda rows: rows.nonsense)(lambda n: [n])
    with recording() as seen:
        assert g(1) == [1]
    assert not g.is_cached(1)
    assert [event.reason for event in seen if event.kind == "error"] == ["store"]


def test_provider() -> None:
    """A store of the user's own, and a chain of the user's own, hold the entries."""
    provider = InADict()
    f = cache(provider=provider)(lambda x: x)
    assert f(1) == f(1) == 1
    assert len(provider.store) >= 1
    chain = memo.CacheFallbackFactory.create()
    g = cache(provider=chain)(lambda x: x)
    assert g(1) == g(1) == 1
    chain.close()


def test_provider_that_lacks_a_method() -> None:
    """The error names the methods that are missing."""

    class Half:
        async def get(self, key: str) -> None: ...

    with pytest.raises(OptionError, match=r"provider=.*(set|delete|clear)"):
        cache(provider=Half())  # type: ignore[call-overload]


# --- invalidate_cache ----------------------------------------------------------------------------

cached_target = cache(name="target")(lambda product_id, region="EU": (product_id, region))

BAD_INVALIDATIONS: list[tuple[str, dict[str, Any]]] = [
    ("key_prefix", {}),
    *(("key_prefix", {"key_prefix": value}) for value in [":", *NOT_TEXT]),
    *(("key_resolver", {"key_resolver": value}) for value in [5, "text", ["x"]]),
    ("key_resolver", {"key_prefix": "p", "key_resolver": 5}),
    *(("tags", {"tags": value}) for value in NOT_TEXTS),
    ("functions", {"functions": [sync_body]}),
    ("functions", {"functions": 5}),
    ("functions", {"functions": "target"}),
    ("match", {"functions": [cached_target], "match": "x"}),
    ("match", {"functions": [cached_target], "match": ["nothing"]}),
    ("match", {"functions": [cached_target], "match": ["region"]}),
    ("match", {"key_prefix": "p", "match": ["x"]}),
    *(("provider", {"key_prefix": "p", "provider": value}) for value in [5, InADict, "redis"]),
    ("key_resolver", {"key_resolver": lambda z: "a"}),
    ("key_resolver", {"key_resolver": lambda result, z: "a"}),
    ("key_resolver", {"key_resolver": lambda *a: "a"}),
    *(("key_resolver", {"key_resolver": value}) for value in [async_body, AsyncAsked()]),
]


@pytest.mark.parametrize(
    ("option", "options"),
    BAD_INVALIDATIONS,
    ids=[f"{option}-{i}" for i, (option, _) in enumerate(BAD_INVALIDATIONS)],
)
@bodies
def test_invalidate_cache_refuses(body: Any, option: str, options: dict[str, Any]) -> None:
    """A wrong option is an error at decoration that names it."""
    with pytest.raises(OptionError) as caught:
        invalidate_cache(**options)(body)
    assert caught.value.option == option
    assert str(caught.value).startswith(f"{option}=")


@pytest.mark.parametrize("value", [5, None, "x"], ids=str)
def test_invalidate_cache_decorates_functions(value: Any) -> None:
    """A value that is no function is refused with the line to write."""
    with pytest.raises(OptionError, match="function="):
        invalidate_cache(key_prefix="p")(value)


def test_invalidate_cache_is_called() -> None:
    """Bare `@invalidate_cache` would drop nothing: it is an error at decoration."""
    with pytest.raises(OptionError, match="key_prefix=") as caught:
        invalidate_cache(sync_body)  # type: ignore[arg-type]
    assert "write @invalidate_cache(key_prefix=" in str(caught.value)


@pytest.mark.parametrize("kind", [property, functools.cached_property])
def test_a_property_is_told_the_order(kind: Any) -> None:
    """`@cache` above `@property`: the error names the order that works."""
    for decorator in (cache, cache(ttl=5)):
        with pytest.raises(OptionError, match=f"write @{kind.__name__} above @cache"):
            decorator(kind(lambda self: 1))


def test_tags_of_a_result_that_cannot_be_told(tmp_path: Path) -> None:
    """The caller gets the result, and one warning says why it is not stored."""
    memo.configure(directory=tmp_path)

    @cache(tags=lambda result: [result["owner"]])
    def load(x: int) -> dict[str, int]:
        return {}

    with pytest.warns(UserWarning, match=r"returned a dict that has no tags .*correct its tags"):
        assert load(1) == {}
    assert load(1) == {}


@pytest.mark.parametrize("tag", ["user:{x}", "user:{result}", "{x!s:>1}", "user:{x}{{}}"])
def test_tags_to_invalidate_may_be_templates(tmp_path: Path, tag: str) -> None:
    """`invalidate_cache(tags=...)` fills in arguments and `result`, as `cache` does."""
    memo.configure(directory=tmp_path)
    written = tag.replace("result", "x")

    @cache(ttl=None, tags=[written])
    def load(x: int) -> int:
        return x

    @invalidate_cache(tags=[tag])
    def update(x: int) -> int:
        return x

    load(1), load(2)
    update(1)
    assert (load.is_cached(1), load.is_cached(2)) == (False, True)


def test_a_tag_to_invalidate_with_an_unknown_placeholder() -> None:
    """It is an error at decoration that lists the names there are."""
    with pytest.raises(OptionError, match=r"'uid' is not an argument .*x, result"):

        @invalidate_cache(tags=["user:{uid}"])
        def update(x: int) -> int:
            return x


def test_a_tag_to_invalidate_that_cannot_be_filled_in(tmp_path: Path) -> None:
    """The caller gets the result, everything is dropped, and a warning says so."""
    memo.configure(directory=tmp_path)

    @cache(ttl=None)
    def load(x: int) -> int:
        return x

    @invalidate_cache(tags=["user:{result[owner]}"])
    def update(x: int) -> dict[str, int]:
        return {}

    load(1)
    with pytest.warns(UserWarning, match="so everything was invalidated instead"):
        assert update(1) == {}
    assert not load.is_cached(1)
