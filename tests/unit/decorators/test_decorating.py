"""Decorating: the plain call, checked options, and what `dir` and signatures show."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
from inside import inside
from providers import InADict

import memo
from memo import OptionError, cache


def body(x: int = 0) -> int:
    return x


async def abody(x: int = 0) -> int:
    return x


async def test_the_plain_call() -> None:
    """`cache(f)` and `cache(f, ttl=5)` make a cached function, as joblib's `Memory.cache` does."""
    for function in (body, abody):
        assert inside(cache(function)).policy.ttl == 60
        assert inside(cache(function, ttl=5)).policy.ttl == 5
        assert cache(function, ttl="1h", key_prefix="p").address(3) == "p:3"
    assert cache(body, ttl=5)(3) == 3
    assert await cache(abody, ttl=5)(3) == 3
    with pytest.raises(OptionError, match="did you mean 'ttl'"):
        cache(body, tll=5)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match="ttl="):
        cache(body, ttl=0)


def test_an_object_with_cache_is_a_memory() -> None:
    """Code that calls `memory.cache(f, ignore=[...])`, as scikit-learn's pipelines do, works."""
    memory = types.SimpleNamespace(cache=memo.cache)
    runs: dict[str, int] = {}

    def fit(x: list[int], verbose: bool = False) -> int:
        runs["n"] = runs.get("n", 0) + 1
        return sum(x)

    cached = memory.cache(fit, ignore=["verbose"], version="1")
    assert cached([1, 2]) == cached([1, 2], verbose=True) == 3
    assert runs == {"n": 1}


def test_a_pipeline_of_scikit_learn_takes_it_for_its_memory() -> None:
    """With `memory=`, transformers that were fitted on equal data are not fitted again."""
    numpy = pytest.importorskip("numpy")
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    def made(parts: int = 3) -> Any:
        steps = [("scale", StandardScaler()), ("pca", PCA(parts)), ("fit", LogisticRegression())]
        return Pipeline(steps, memory=types.SimpleNamespace(cache=memo.cache))

    seen: list[str] = []
    kinds = ("hit", "computed", "error")
    stop = memo.on_event(lambda event: seen.append(event.kind) if event.kind in kinds else None)

    def told() -> list[str]:
        found, seen[:] = list(seen), []
        return found

    x = numpy.random.default_rng(0).normal(size=(60, 5))
    y = (x[:, 0] > 0).astype(int)
    try:
        first = made().fit(x, y).predict(x)
        assert told() == ["computed", "computed"]
        assert (made().fit(x, y).predict(x) == first).all()
        assert told() == ["hit", "hit"]
        made(2).fit(x, y)
        assert told() == ["hit", "computed"]
        made().fit(x + 1, y)
        assert told() == ["computed", "computed"]
        GridSearchCV(made(), {"fit__C": [1, 10]}, cv=2).fit(x, y)
        assert told() == ["computed"] * 4 + ["hit"] * 6
    finally:
        stop()


@pytest.mark.parametrize("prefix", ["products:{id}", "{", "a}b"])
def test_braces_in_a_prefix_are_refused(prefix: str) -> None:
    """A prefix is static: braces in it are a template in the wrong place."""
    with pytest.raises(OptionError, match="key_resolver"):
        cache(key_prefix=prefix)(body)


class Sync:
    def get(self, key: str) -> None: ...
    def set(self, key: str, value: bytes, ttl: float | None = None) -> None: ...
    def delete(self, key: str) -> None: ...
    def clear(self) -> None: ...


class NoTtl(InADict):
    async def set(self, key: str, value: bytes) -> None: ...  # type: ignore[override]


class NoClear:
    get, set, delete = InADict.get, InADict.set, InADict.delete


def test_providers_that_do_not_fit() -> None:
    """A provider whose methods do not fit is refused, and the error says what to pass instead."""
    import redis
    import redis.asyncio

    for client in (redis.Redis(), redis.asyncio.Redis()):
        with pytest.raises(OptionError, match=r"provider=.*configure\(redis_url="):
            cache(provider=client)(body)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match=r"get.*async def"):
        cache(provider=Sync())(body)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match=r"set\(key, value, ttl=None\)"):
        cache(provider=NoTtl())(body)
    with pytest.raises(OptionError, match="clear"):
        cache(provider=NoClear())(body)  # type: ignore[call-overload]
    cache(provider=InADict())(body)


def test_dir_shows_public_names_only() -> None:
    """`dir(memo)` is `__all__`, and all of it is there."""
    assert dir(memo) == sorted(memo.__all__)
    assert all(hasattr(memo, name) for name in memo.__all__)


def test_options_have_real_types() -> None:
    """No option of `cache` is annotated `Any` in the signature that tooltips show."""
    for decorator in (memo.cache, memo.invalidate_cache):
        for parameter in inspect.signature(decorator).parameters.values():
            assert parameter.annotation not in ("Any", Any, parameter.empty), parameter
