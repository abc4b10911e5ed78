"""`memo.entries(...)`: what is stored, as records."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from observed import calls_of
from providers import InADict
from redis_server import RedisServer
from time_ahead import Ahead

import memo
from memo import OptionError, cache
from memo.inspection import inventory
from memo.metrics import formatting, rendering
from memo.records import seal
from memo.testing import ManualClock, isolated


def loads(name: str = "shop:load_rows", **options: Any) -> Any:
    @cache(name=name, version="1", **{"ttl": 3600, **options})
    def load(region: str, year: int = 2024) -> str:
        return f"{region} {year}"

    return load


@pytest.mark.parametrize("where", ["disk", "redis"])
def test_what_is_stored(where: str, request: pytest.FixtureRequest) -> None:
    """Each entry is a record with its function, arguments, state, times, size, tiers and tags."""
    url = request.getfixturevalue("redis_server").url if where == "redis" else None
    with memo.configure(redis_url=url, deadline=5):
        load = loads(tags=["sales"])
        load("EU")
        [entry] = memo.entries()
        assert entry.function == "shop:load_rows"
        assert entry.arguments == {"region": "'EU'", "year": "2024"}
        assert (entry.state, entry.tags, entry.ttl) == ("fresh", ("sales",), 3600)
        assert 0 <= entry.age < 60
        assert entry.size > 0
        assert entry.cost >= 0
        assert {"memory", "disk"} <= set(entry.tiers)
        assert memo.invalidate(key=entry.key).matched == 1
        assert [entry.state for entry in memo.entries()] == ["invalidated"]


def test_of_a_function_and_of_arguments() -> None:
    """A function is given itself or by any name that is shown; arguments select as elsewhere."""
    load, other = loads(), loads("shop:other")
    load("EU"), load("US"), load("EU", 2023), other("EU")
    for given in (load, "shop:load_rows", "load_rows"):
        assert len(memo.entries(given)) == 3
        assert len(memo.entries(given, region="EU")) == 2
        assert len(memo.entries(function=given, region="EU")) == 2
    assert len(memo.entries(load, region="EU", year=2023)) == 1
    assert len(memo.entries(region="EU")) == 3
    with pytest.raises(OptionError, match="land"):
        memo.entries(load, land="EU")
    with pytest.raises(OptionError, match="did you mean 'shop:load_rows'"):
        memo.entries("shop:laod_rows")
    with pytest.raises(OptionError, match="did you mean 'shop:load_rows'"):
        memo.entries(function="shop:laod_rows")


def test_of_a_path_that_is_annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `Annotated[str, memo.File]` is found by any way to write it, as in `invalidate`."""

    @cache(name="shop:read", version="1")
    def read(path: Annotated[str, memo.File], year: int = 2024) -> str:
        return Path(path).read_text()

    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("1")
    read("rows.csv")
    for path in ("rows.csv", "./rows.csv", str(tmp_path / "rows.csv")):
        assert len(memo.entries(read, path=path)) == 1
    assert memo.export_bundle("rows.memo", read, where={"path": "rows.csv"}).entries == 1
    assert memo.entries(read, path="other.csv") == []


def test_states() -> None:
    """An entry that was let expire is stale within its window, else expired."""
    load, swr = loads(), loads("shop:swr", stale_while_revalidate=60)
    load("EU"), swr("EU")
    memo.expire(function=load)
    memo.expire(function=swr)
    assert {e.function: e.state for e in memo.entries()} == {
        "shop:load_rows": "expired",
        "shop:swr": "stale",
    }


def test_a_state_is_the_verdict_of_the_next_call() -> None:
    """States go by the live ttl and by the current mode, as calls do, in either direction."""
    load, clock = loads(ttl="1h", ttl_key="ttl.rows"), ManualClock()
    with isolated(clock=clock):
        load("EU")
        clock.advance(100)
        seen = []
        for ttl, more in ((10, 0), (7200, 4000), (3600, 0), (math.inf, 0)):
            memo.live.set("ttl.rows", ttl)
            clock.advance(more)
            seen.append((load.is_cached("EU"), memo.entries(load)[0].state))
        assert seen == [(False, "expired"), (True, "fresh"), (False, "expired"), (True, "fresh")]
        with memo.mode(max_age=60):
            assert (load.is_cached("EU"), memo.entries(load)[0].state) == (False, "expired")


@pytest.mark.parametrize("seed", range(15))
def test_everything_that_judges_an_entry_agrees(seed: int) -> None:
    """`is_cached`, `explain` and `entries` give one verdict, whatever has happened to an entry."""
    rng, clock, version = random.Random(seed), ManualClock(), [0]
    with isolated(clock=clock):
        base = memo.cache(ttl=None, name="base", version="1", cutoff=rng.random() < 0.5)(
            lambda: version[0]
        )
        load = memo.cache(
            name="load",
            version="1",
            ttl=rng.choice([None, 10, 100]),
            ttl_key=rng.choice([None, "ttl.load"]),
            stale_while_revalidate=rng.choice([0, 5, 50]),
            stale_if_error=rng.choice([0, 5, 50]),
            use_jitter=rng.random() < 0.3,
            depends_on=(lambda: version[0]) if rng.random() < 0.3 else None,
        )(lambda: base())
        load()
        steps: dict[str, Callable[[], Any]] = {
            "waited": lambda: clock.advance(rng.choice([1, 9, 20, 60])),
            "waited again": lambda: clock.advance(rng.choice([1, 9, 20, 60])),
            "live ttl": lambda: memo.live.set("ttl.load", rng.choice([5, 30, 7200, math.inf])),
            "expired": load.expire,
            "invalidated": load.invalidate,
            "expired beneath": base.expire,
            "invalidated beneath": base.invalidate,
            "changed": lambda: version.append(version.pop() + 1),
        }
        done = []
        for _ in range(6):
            done.append(rng.choice([*steps]))
            steps[done[-1]]()
            found = memo.entries(load)
            for entry in found:
                explained = load.explain()
                usable = entry.state in ("fresh", "stale")
                assert (explained.hit, load.is_cached()) == (usable, usable), (done, entry)
                assert explained.reason == entry.state or not usable, (done, entry)
                assert ("; fresh for" in str(explained)) <= (entry.state == "fresh"), done
                assert (entry.state == "in doubt") <= ("first checks" in str(explained)), done


def test_the_table_goes_by_the_clock_of_the_records() -> None:
    """Ages in the table are those of the records, also after the wall clock has stepped."""
    load, clock = loads(ttl="1h"), ManualClock()
    with isolated(clock=clock):
        load("EU")
        clock.advance(30)
        clock.step(86_400)
        found = memo.entries(load)
        assert found[0].age == pytest.approx(30, abs=1)
        assert re.search(r"fresh .*30\.\d s +59 min", str(found)), str(found)
        load.expire()
        assert re.search(r"expired .*30\.\d s +expired", str(memo.entries(load)))


def test_the_table_says_until_when_a_call_would_use_an_entry() -> None:
    """`expires in` goes by the ttl that judges an entry; one that is not valid has no such time."""
    load, clock = loads(ttl="1h", ttl_key="ttl.rows"), ManualClock()

    def shown() -> list[str]:
        table = inventory.table(inventory.items(inventory.Selection())[0])
        at = [table.titles.index(title) for title in ("state", "expires in")]
        return [table.rows[0][column].text for column in at]

    with isolated(clock=clock):
        load("EU")
        clock.advance(60)
        assert shown() == ["fresh", "59 min 00 s"]
        memo.live.set("ttl.rows", 100)
        assert shown() == ["fresh", "40.0 s"]
        memo.live.set("ttl.rows", math.inf)
        assert shown() == ["fresh", "never"]
        load.expire()
        assert shown() == ["expired", "expired"]
        load.invalidate()
        assert shown() == ["invalidated", formatting.DASH]


def test_as_a_frame_and_as_text() -> None:
    """`.to_frame()` gives one row for each entry, a column for each argument's fact."""
    load = loads()
    assert repr(memo.entries()) == "No entries."
    load("EU"), load("US")
    found = memo.entries()
    frame = found.to_frame()
    assert len(frame) == 2
    assert {"function", "arguments", "state", "age", "ttl", "size", "cost", "tiers", "tags"} <= {
        *frame.columns
    }
    assert "shop:load_rows" in repr(found)
    assert "<table" in found._repr_html_()


def test_what_only_redis_has(tmp_path: Path, redis_server: RedisServer) -> None:
    """Entries of another host are listed from Redis, with state and tiers, and can be selected."""
    load, other = loads(tags=["sales"]), loads("shop:other")
    with memo.configure(directory=tmp_path / "here", redis_url=redis_server.url, deadline=5):
        load("EU"), load("US"), other("EU")
    with memo.configure(directory=tmp_path / "there", redis_url=redis_server.url, deadline=5):
        other("EU"), other("US")
        assert len(memo.entries()) == 4
        assert memo.entries().missing == ""
        [entry] = memo.entries(load, region="EU")
        assert (entry.tiers, entry.state, entry.tags) == (("redis",), "fresh", ("sales",))
        assert {"memory", "redis", "disk"} == set(memo.entries(other)[0].tiers)
        assert memo.invalidate(key=entry.key, strict=True).matched == 1
        assert memo.entries(load, region="EU")[0].state == "invalidated"


def test_what_only_redis_has_is_found_by_the_name_that_is_shown(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    """A host that has nothing of a function takes each name of it that its tables show."""
    load = loads("far.py~0a1b2c3d:Shop.restock")
    with memo.configure(directory=tmp_path / "here", redis_url=redis_server.url, deadline=5):
        load("EU"), load("US")
    del load
    with memo.configure(directory=tmp_path / "there", redis_url=redis_server.url, deadline=5):
        shown = memo.entries()[0].function
        for name in (shown, "Shop.restock", "restock"):
            assert len(memo.entries(name, region="EU")) == 1
        with pytest.raises(OptionError, match=f"did you mean '{shown}'"):
            memo.entries("restok")
        assert memo.invalidate(function=shown, strict=True).matched == 2


def test_what_is_not_listed_is_said(
    tmp_path: Path, redis_server: RedisServer, ahead: Ahead
) -> None:
    """A list that may lack entries says which, in the answer, in text and in HTML."""
    load, own = loads(), loads("shop:own", provider=InADict())
    said = "Redis was not searched completely: some entries that only it has are missing here."
    with memo.configure(directory=tmp_path / "here", redis_url=redis_server.url, deadline=5):
        load("EU")
        with memo.configure(directory=tmp_path / "there"):
            assert len(memo.entries()) == 1
            with ahead.slow(0.3):  # the search is over before it begins
                found = memo.entries()
            assert (found, found.missing) == ([], said)
            assert repr(found) == f"No entries. {said}"
        with ahead.slow(0.3):
            assert said in repr(memo.entries())
            assert said in memo.entries()._repr_html_()
        redis_server.kill()
        assert memo.entries().missing.startswith("Redis did not answer: entries that only it")
    own("EU")
    assert repr(memo.entries(own)) == (
        "No entries. InADict cannot be listed: entries that only it has are missing here."
    )


def test_of_another_process() -> None:
    """Entries of functions that this process does not know are listed, and can be selected."""
    code = "import memo\n@memo.cache(ttl=None, name='jobs:nightly')\ndef f(x): return x\nf(1), f(2)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(memo.entries("nightly", x=1)) == 1
    assert memo.entries("nightly")[0].ttl is None


def test_the_newest_are_listed_without_reading_the_others() -> None:
    """`memo ls` opens as many records as it shows, however many there are; its count is of all."""
    few, many = loads("shop:few"), loads("shop:many")
    for number in range(200):
        many(str(number))
    for number in range(5):
        few(str(number))
    with calls_of(seal.open_record) as opened:
        shown, count = inventory.items(inventory.Selection(()), 10)
    assert count == 205
    assert [item.header.function for item in shown] == ["shop:few"] * 5 + ["shop:many"] * 5
    assert {item.tiers for item in shown} == {("memory", "disk")}
    assert 10 <= len(opened) <= 2 * 10
    shown, count = inventory.items(inventory.Selection(("many",)), 3)
    newest = [rendering.address(item.header) for item in shown]
    assert (newest, count) == (["many:199:2024", "many:198:2024", "many:197:2024"], 200)
    assert inventory.items(inventory.Selection(("nothing",)), 10) == ([], 0)
