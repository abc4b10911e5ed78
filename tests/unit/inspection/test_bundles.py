"""Bundles: entries as one sealed file, imported elsewhere or read as a tier."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from ways import Way

import memo
from memo import BundleError, OptionError, cache
from memo.cli.commands import main
from memo.stores.bundle_file import Bundle
from memo.testing import ManualClock, isolated, recording

KEY = "k" * 40
RUNS: list[Any] = []


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    RUNS.clear()


def body(x: Any) -> Any:
    RUNS.append(x)
    return np.full(50_000, x) if x == 9 else {"x": x}


def loads(way: Way, **options: Any) -> Any:
    return way.cached(body, tags=["t:{x}"], **options)


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bundle of three entries, one of them with a payload, made on a host of its own."""
    names = request.fixturenames
    way = request.getfixturevalue("way") if "way" in names else Way("sync")
    if "place" in names:
        request.getfixturevalue("place")
    path = tmp_path / "made.memo"
    with isolated():
        load = loads(way)
        for x in (1, 2, 9):
            way.call(load, x)
        made = memo.export_bundle(path, load, key=KEY, note="for you")
        assert (made.entries, made.functions) == (3, 1)
    RUNS.clear()
    return path


# --- export and import ----------------------------------------------------------------------------


def test_imported_entries_answer(way: Way, place: str, exported: Path) -> None:
    """On another host, with another secret, what was imported answers without a run."""
    done = memo.import_bundle(exported, key=KEY)
    assert (len(done.stored), done.other_code, done.expired) == (3, (), ())
    load = loads(way)
    assert way.call(load, 1) == {"x": 1}
    np.testing.assert_array_equal(way.call(load, 9), np.full(50_000, 9))
    assert RUNS == []
    assert "imported 3 entries" in repr(done)


def test_a_function_that_is_named_twice_is_exported_once(tmp_path: Path) -> None:
    """By itself and by its name, or by two names, its entries are in the bundle once."""
    load = cache(name="twice:named_twice")(body)
    load(1), load(2)
    names = [load, "named_twice", "twice:named_twice"]
    made = memo.export_bundle(tmp_path / "twice.memo", names, key=KEY)
    assert (made.entries, made.functions) == (2, 1)
    assert len(memo.import_bundle(made.path, key=KEY).stored) == 2


def test_imported_entries_are_invalidated(way: Way, place: str, exported: Path) -> None:
    """They obey invalidations by argument, tag and function like any entry."""
    memo.import_bundle(exported, key=KEY)
    load = loads(way)
    assert load.invalidate(1).matched == 1
    memo.invalidate(tag="t:2")
    for x in (1, 2, 9):
        way.call(load, x)
    assert RUNS == [1, 2]


def test_only_what_is_asked_for_is_exported(tmp_path: Path) -> None:
    """By function, argument and tag; what is not valid any more stays behind."""
    load = loads(Way("sync"))
    other = cache(name="tests:other", version="1")(lambda: 1)
    for x in (1, 2, 3):
        load(x)
    other()
    load.invalidate(3)
    path = tmp_path / "b"
    assert memo.export_bundle(path, key=KEY).entries == 3
    assert memo.export_bundle(path, "other", key=KEY).entries == 1
    assert memo.export_bundle(path, [load, other], key=KEY).functions == 2
    assert memo.export_bundle(path, load, where={"x": 2}, key=KEY).entries == 1
    assert memo.export_bundle(path, load, tag="t:1", key=KEY).entries == 1
    with pytest.raises(OptionError, match="no valid entry of this host matches, with the given x;"):
        memo.export_bundle(path, load, where={"x": 3}, key=KEY)
    with pytest.raises(OptionError, match="no valid entry of this host matches, with tag='u';"):
        memo.export_bundle(path, tag="u", key=KEY)
    with pytest.raises(OptionError, match="y"):
        memo.export_bundle(path, load, where={"y": 3}, key=KEY)
    with pytest.raises(OptionError, match="names no function"):
        memo.export_bundle(path, [], key=KEY)
    assert RUNS == [1, 2, 3]


def test_another_code_version_is_listed(exported: Path) -> None:
    """An entry that no call would find here is not imported, and is named."""

    @cache(name="tests:load", version="2")
    def load(x: int) -> Any:
        return x

    done = memo.import_bundle(exported, key=KEY)
    assert len(done.other_code) == 3
    assert "load(x=1): not imported: the function's code is different here" in repr(done)


def test_expired_entries_are_listed(tmp_path: Path) -> None:
    """An entry past its ttl is not imported; the others go on ageing."""
    path, clock = tmp_path / "b", ManualClock()
    with isolated(clock=clock):
        Way("sync").cached(body, ttl=10)(1)
        memo.export_bundle(path, key=KEY)
    clock.advance(6)
    with isolated(clock=clock):
        assert len(memo.import_bundle(path, key=KEY).stored) == 1
        clock.advance(6)
        Way("sync").cached(body, ttl=10)(1)
    with isolated(clock=clock):
        done = memo.import_bundle(path, key=KEY)
        assert (len(done.stored), len(done.expired)) == (0, 1)
    assert RUNS == [1, 1]


def test_a_later_result_is_not_replaced(tmp_path: Path) -> None:
    """A result that this host has computed since is not replaced by an older one, and is named."""
    load = loads(Way("sync"))
    load(1), load(2)
    memo.export_bundle(tmp_path / "b", load, key=KEY)
    load.put("later", 1)
    load.invalidate(2)
    done = memo.import_bundle(tmp_path / "b", key=KEY)
    assert (len(done.older), len(done.stored)) == (1, 1)
    assert "load(x=1): not imported: a later result is here already" in repr(done)
    assert (load(1), load(2)) == ("later", {"x": 2})
    assert RUNS == [1, 2]


def test_only_what_a_call_would_use_is_exported(tmp_path: Path) -> None:
    """An entry that the present ttl of its function refuses, here a live one, is not exported."""
    path, clock = tmp_path / "b", ManualClock()
    with isolated(clock=clock):
        load = memo.cache(ttl=3600, ttl_key="ttl.load", version="1")(body)
        load(1)
        clock.advance(100)
        assert memo.export_bundle(path, load, key=KEY).entries == 1
        memo.live.set("ttl.load", 10)
        with pytest.raises(memo.OptionError, match="no valid entry"):
            memo.export_bundle(path, load, key=KEY)


def test_files_that_differ_are_listed(tmp_path: Path) -> None:
    """An entry that depends on a file which is another one here does not answer, and is named."""
    path, data = tmp_path / "b", tmp_path / "data"
    data.write_text("a")
    with isolated():
        Way("sync").cached(body, depends_on=data)(1)
        memo.export_bundle(path, key=KEY)
    data.write_text("another")
    done = memo.import_bundle(path, key=KEY)
    assert len(done.changed) == 1
    assert "is different here" in repr(done)
    Way("sync").cached(body, depends_on=data)(1)
    assert RUNS == [1, 1]


def test_streams_and_exceptions_travel(tmp_path: Path) -> None:
    """Stored streams and remembered exceptions are entries like others."""

    @cache(name="tests:rows", version="1")
    def rows() -> Iterator[int]:
        RUNS.append("rows")
        yield from range(3)

    @cache(name="tests:bad", version="1", cache_errors={KeyError: 60})
    def bad() -> None:
        RUNS.append("bad")
        raise KeyError("no")

    def use() -> None:
        assert list(rows()) == [0, 1, 2]
        with pytest.raises(KeyError):
            bad()

    with isolated():
        use()
        memo.export_bundle(tmp_path / "b", key=KEY)
    with isolated():
        memo.import_bundle(tmp_path / "b", key=KEY)
        use()
    assert RUNS == ["rows", "bad"]


# --- trust ----------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_trusted(exported: Path) -> None:
    """The error shows where the file says that it comes from, and asks for the key."""
    with pytest.raises(BundleError) as caught:
        memo.import_bundle(exported)
    said = str(caught.value)
    assert "import_bundle(path, key=...)" in said
    assert "NOT VERIFIED" in said
    assert "note: for you" in said
    assert "load: 3 entries" in said
    assert "not verified" in repr(memo.Bundle(exported))


@pytest.mark.parametrize("key", ["x" * 40, "short"])
def test_another_key(exported: Path, key: str) -> None:
    """Another key opens nothing."""
    with pytest.raises(BundleError, match=r"another key|at least 32"):
        memo.import_bundle(exported, key=key)


def test_a_changed_bundle_is_refused(exported: Path) -> None:
    """After any changed bit, be it in a payload or in a gap, nothing is stored."""
    whole = exported.read_bytes()
    for at in (*range(0, len(whole), max(1, len(whole) // 100)), len(whole) - 1):
        exported.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BundleError):
            memo.import_bundle(exported, key=KEY)
    assert not memo.entries()
    exported.write_bytes(whole + b"x")
    with pytest.raises(BundleError, match="is longer"):
        memo.import_bundle(exported, key=KEY)


def test_a_bundle_names_what_was_changed(exported: Path) -> None:
    """The error names the entries, and a bundle of another format is called that."""
    whole = bytearray(exported.read_bytes())
    at = whole.rindex(b"load")
    whole[at] ^= 1
    exported.write_bytes(whole)
    with pytest.raises(BundleError, match=r"was changed since it was made: tests:load\(x=\d\)\."):
        memo.import_bundle(exported, key=KEY)
    exported.write_bytes(b"\x89bundle9" + whole[8:])
    with pytest.raises(BundleError, match="another format"):
        memo.Bundle(exported)


@pytest.mark.parametrize("size", [0, 10, 56, 300, 3000, -1])
def test_a_cut_bundle_is_refused(exported: Path, size: int) -> None:
    """A file that is cut short is no bundle."""
    exported.write_bytes(exported.read_bytes()[:size])
    with pytest.raises(BundleError):
        memo.import_bundle(exported, key=KEY)


def test_the_key_may_come_with_a_bundle_that_was_looked_at(exported: Path) -> None:
    """`import_bundle` takes the key too when it is given a `Bundle` that has none."""
    with pytest.raises(BundleError, match="another key"):
        memo.import_bundle(memo.Bundle(exported), key="x" * 40)
    assert memo.import_bundle(memo.Bundle(exported), key=KEY).stored
    assert memo.import_bundle(memo.Bundle(exported, KEY)).stored


def test_a_fresh_key_is_made(tmp_path: Path) -> None:
    """Without a key one is made; it is in the answer and not in its text."""
    loads(Way("sync"))(1)
    made = memo.export_bundle(tmp_path / "b")
    assert made.generated
    assert made.key not in repr(made)
    assert made.key.encode() not in (tmp_path / "b").read_bytes()
    assert memo.import_bundle(tmp_path / "b", key=made.key).stored
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600


def test_the_key_may_come_from_the_environment(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`MEMO_BUNDLE_KEY` is the key where none is given."""
    monkeypatch.setenv("MEMO_BUNDLE_KEY", KEY)
    assert memo.import_bundle(exported).stored


def test_a_bundle_holds_no_secret_of_its_host(exported: Path) -> None:
    """The host's own secret neither seals it nor is in it."""
    bundle = Bundle(exported, KEY)
    ids = {secret.id for secret in memo.settings.configuration.current().secrets}
    data = exported.read_bytes()
    assert not any(one in data for one in ids)
    assert bundle.verified


# --- as a tier ------------------------------------------------------------------------------------


def mounted(path: Path, place: str, **settings: Any) -> None:
    redis = ["redis"] if place != "disk" else []
    memo.configure(tiers=["memory", *redis, "disk", memo.Bundle(path, KEY)], **settings)


def test_a_bundle_is_a_tier(way: Way, place: str, exported: Path) -> None:
    """Its entries answer; the rest is computed and stored elsewhere; the file stays as it is."""
    before = exported.read_bytes()
    mounted(exported, place)
    load = loads(way)
    with recording() as heard:
        assert way.call(load, 1) == {"x": 1}
        way.call(load, 9)
        way.call(load, 3)
        way.call(load, 3)
    assert RUNS == [3]
    assert [e.tier for e in heard if e.kind == "hit"][:2] == ["bundle", "bundle"]
    stored = [e.tier for e in heard if e.kind == "stored"]
    assert len(stored) == 1
    assert "bundle" not in stored[0]
    assert exported.read_bytes() == before
    assert not [e for e in heard if e.kind == "error"]


def test_an_invalidation_counts_for_a_tier(way: Way, place: str, exported: Path) -> None:
    """An entry invalidated here does not come back from the bundle, in no later process either."""
    mounted(exported, place)
    load = loads(way)
    way.call(load, 1)
    load.invalidate(1)
    way.call(load, 1)
    assert RUNS == [1]
    load.invalidate(2)
    memo.configure(tiers=["disk", memo.Bundle(exported, KEY)])
    memo.decorators.assembly.reset()
    mounted(exported, place)
    way.call(load, 2)
    way.call(load, 9)
    assert RUNS == [1, 2]


@pytest.mark.parametrize("lost", ["damaged", "of another secret"])
def test_an_invalidation_counts_where_the_recorded_states_are_lost(
    exported: Path, lost: str
) -> None:
    """If the states of the first use cannot be read, later ones are recorded in their place."""
    mounted(exported, "disk")
    load = loads(Way("sync"))
    load(1)
    if lost == "damaged":
        directory = memo.settings.configuration.current().directory
        for path in directory.rglob("bundles/*.json"):
            path.write_bytes(b"")
    else:
        memo.configure(secret="s" * 40)
    memo.decorators.assembly.reset()
    mounted(exported, "disk")
    load(1)
    load.invalidate(2)
    memo.decorators.assembly.reset()
    mounted(exported, "disk")
    load(2)
    assert RUNS == [2]


def test_a_tier_needs_its_key(exported: Path) -> None:
    """Without it the first call says so, and shows where the bundle comes from."""
    memo.configure(tiers=["disk", memo.Bundle(exported)])
    with pytest.raises(BundleError, match=r"not verified.*MEMO_BUNDLE_KEY"):
        loads(Way("sync"))(1)


def test_a_bundle_that_goes_away(way: Way, exported: Path) -> None:
    """Calls go on without it, with an event."""
    mounted(exported, "disk")
    os.unlink(exported)
    with recording() as heard:
        assert way.call(loads(way), 1) == {"x": 1}
    assert RUNS == [1]
    assert [e.tier for e in heard if e.kind == "error"][:1] == ["bundle"]


def test_clear_leaves_a_bundle_alone(exported: Path) -> None:
    """`cache_clear` invalidates its entries, and removes nothing of it."""
    mounted(exported, "disk")
    load = loads(Way("sync"))
    load.cache_clear()
    load(1)
    assert RUNS == [1]
    assert len(Bundle(exported, KEY).items) == 3


def test_async_code_uses_a_bundle(exported: Path) -> None:
    """Many lookups at once."""
    mounted(exported, "disk")
    load = loads(Way("async"))

    async def main() -> list[Any]:
        return list(await asyncio.gather(*(load(1) for _ in range(20))))

    assert asyncio.run(main()) == [{"x": 1}] * 20
    assert RUNS == []


# --- the command line -----------------------------------------------------------------------------


def test_a_user_without_a_name_can_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run as users that have a number only; it is stated as the origin."""

    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    loads(Way("sync"))(1)
    made = memo.export_bundle(tmp_path / "b.memo", key=KEY)
    assert Bundle(made.path, KEY).origin.by.startswith(f"{os.getuid()}@")


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """A bundle that cannot be written and a file without a key end in one line with the name."""
    loads(Way("sync"))(1)
    keys = tmp_path / "keys"
    for content in (b"\n", b"\xff\xfe"):
        keys.write_bytes(content)
        args = ["export", str(tmp_path / "b.memo"), "--key-file", str(keys)]
        done = CliRunner().invoke(main, args)
        assert (done.exit_code, f"--key-file {keys} has no key" in done.output) == (2, True)
    done = CliRunner().invoke(main, ["export", str(tmp_path / "missing" / "b.memo")])
    assert done.exit_code == 1
    assert f"{tmp_path}/missing/b.memo cannot be written: No such file" in done.output


def test_the_command_line(tmp_path: Path) -> None:
    """`memo export` prints a key once; `memo import` shows the origin, asks, and lists."""
    load = loads(Way("sync"))
    load(1)
    path = str(tmp_path / "b")
    name = repr(load).split()[1]
    done = CliRunner().invoke(main, ["export", path, name, "--note", "hello"])
    assert done.exit_code == 0, done.output
    assert "exported 1 entry of 1 function" in done.output
    key = done.output.partition("key: ")[2].split()[0]
    load.invalidate()
    refused = CliRunner().invoke(main, ["import", path], input=f"{key}\nn\n")
    assert refused.exit_code == 1
    assert "NOT VERIFIED" in refused.output
    assert "note: hello" in refused.output
    assert not load.is_cached(1)
    (tmp_path / "key").write_text(f"{key}\n")
    taken = CliRunner().invoke(main, ["import", path, "--key-file", str(tmp_path / "key"), "-y"])
    assert taken.exit_code == 0, taken.output
    assert "sealed with this key" in taken.output
    assert "imported 1 entry" in taken.output
    assert load.is_cached(1)
    wrong = CliRunner().invoke(main, ["import", path], input=f"{'z' * 40}\n")
    assert wrong.exit_code == 2
    assert "another key" in wrong.output
