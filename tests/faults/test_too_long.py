"""Times and names that are too long: refused where they are given, or shortened."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from inner_faults import failing
from redis_server import RedisServer

import memo
from memo.testing import isolated, recording


@pytest.mark.parametrize("ttl", [10**10, timedelta.max])
def test_a_ttl_that_no_entry_can_hold(ttl: Any) -> None:
    """A ttl past what the format holds is an error at decoration that names it."""
    with pytest.raises(memo.OptionError, match="ttl"):
        memo.cache(ttl=ttl)(lambda: 1)


@pytest.mark.parametrize(
    "options", [{"ttl": lambda _: 10**10}, {"cache_if": lambda _: 1 / 0}], ids=["ttl", "cache_if"]
)
def test_a_callable_that_keeps_results_from_being_stored(options: Any) -> None:
    """A mistake of a user's `ttl` or `cache_if` is reported once, and costs no result."""

    @memo.cache(**options)
    def load(x: int) -> int:
        return x

    with isolated():
        with pytest.warns(UserWarning, match=r"cannot be stored .*computed at each call") as caught:
            assert load(1) == 1
        assert len(caught) == 1
        with recording() as seen:
            assert load(1) == 1
    assert [event.reason for event in seen if event.kind == "error"] == ["store"]


@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_long_names_of_tags_and_addresses(size: int, redis_server: RedisServer) -> None:
    """Invalidations of very long tags and addresses act, quickly, and block no others."""
    long = "x" * size
    runs: list[str] = []

    @memo.cache(ttl=None, tags=["of:{name}"])
    def load(name: str) -> int:
        runs.append("load")
        return 1

    @memo.cache(ttl=None)
    def plain(x: int) -> int:
        runs.append("plain")
        return x

    with isolated(redis_url=redis_server.url), recording() as seen:
        load(long), plain(1)
        assert (
            memo.invalidate(tag=f"of:{long}", reason=long).matched <= 1
        )  # counted in bounded time
        load(long)
        assert memo.invalidate(key=load.address(long)).matched == 1
        load(long), load(long), plain(1)
        assert memo.invalidate(key=":" * size).matched == 0
        assert load(long) == plain(1) == 1
    assert runs == ["load", "plain", "load", "load"]
    assert [event for event in seen if event.kind == "error"] == []


def test_a_prefix_or_a_name_that_is_too_long() -> None:
    """Names that a person gives are refused where they are given."""
    with pytest.raises(memo.OptionError, match=r"key_prefix=.*1,001 characters"):
        memo.cache(key_prefix="x" * 1001)(len)
    with pytest.raises(memo.OptionError, match=r"key_prefix=.*1,001 characters"):
        memo.invalidate(prefix="x" * 1001)
    with pytest.raises(memo.OptionError, match=r"name=.*1,001 characters"):
        memo.cache(name="x" * 1001)


def test_what_can_never_be_written_is_refused() -> None:
    """A fault that lies in the invalidation itself is its caller's, and stops nothing else."""

    @memo.cache(ttl=None)
    def load() -> int:
        return 1

    with isolated():
        load()
        with failing("note", answer="\ud800"):
            with pytest.raises(memo.MemoError, match="surrogates"):
                load.invalidate()
            with pytest.warns(UserWarning, match="surrogates.*; so nothing was invalidated"):
                assert memo.invalidate_cache("rows")(lambda: 5)() == 5
        assert load.is_cached()
        assert load.invalidate().complete
        load()
        assert load.is_cached()
