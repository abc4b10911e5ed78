"""The live configuration: three sources, no thread, and good values survive bad ones."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import pytest
from observed import calls_of

from memo.errors import OptionError
from memo.runtime import events
from memo.settings import configuration
from memo.settings.live_values import FILE_CHECK_SECONDS, SHARED_REFRESH_SECONDS, Live, load_file


class Time:
    """A clock that a test turns by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Time()


class Shared:
    """A shared source: what `live` returns is to be set."""

    values: Mapping[object, object] | None = None
    calls = 0

    def live(self) -> Mapping[object, object]:
        self.calls += 1
        return self.values or {}

    def publish(self, key: str, text: str | None) -> None:
        self.values = {name: one for name, one in (self.values or {}).items() if name != key}
        if text is not None:
            self.values |= {key: text}


class Sources:
    """The shared source of the live configuration; None: there is none."""

    shared: Shared | None = None

    def __call__(self) -> Shared | None:
        return self.shared

    def use(self, shared: Shared | None) -> None:
        """Change the source, as other settings do."""
        self.shared = shared
        configuration.reload()


@pytest.fixture
def sources():
    return Sources()


@pytest.fixture
def live(clock, sources):
    return Live(sources, clock)


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The live file; settings of this test only."""
    monkeypatch.setenv("MEMO_SECRET", "x" * 32)
    path = tmp_path / "live.toml"
    configuration.reset()
    configuration.configure(live_file=path)
    write(path, "")
    yield path
    configuration.reset()


@pytest.fixture
def errors():
    heard: list[events.Event] = []
    remove = events.on_event(lambda event: heard.append(event) if event.kind == "error" else None)
    yield heard
    remove()


_written = [int(time.time()) - 1000]


def write(path, text: str) -> None:
    """Write a file with an old time stamp that earlier readers have not seen."""
    path.write_text(text)
    _written[0] += 1
    os.utime(path, (_written[0], _written[0]))


def test_a_key_that_nobody_set_is_none(live):
    """Without a value the decorator's own ttl holds."""
    assert live.get("ttl.products") is None
    assert live.get("ttl.products", 5) == 5
    assert "ttl.products" not in live
    with pytest.raises(KeyError):
        live["ttl.products"]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (30, 30.0),
        (0.5, 0.5),
        ("1h30m", 5400.0),
        (timedelta(minutes=2), 120.0),
        (None, math.inf),
        ("none", math.inf),
        (math.inf, math.inf),
    ],
)
def test_values_are_ttls_in_all_their_forms(live, value, number):
    """Each form of a ttl is taken and answered in seconds; no expiry is infinity."""
    live["ttl.products"] = value
    assert live["ttl.products"] == number
    assert live.get("ttl.products") == number
    live["again"] = live["ttl.products"]
    assert live["again"] == number


@pytest.mark.parametrize("value", [0, -1, True, "5", "soon", float("nan"), -math.inf, [5], b"5s"])
def test_what_is_no_ttl_is_refused(live, value):
    """A wrong value is refused when it is set, and the old one stays."""
    live["ttl"] = 7
    with pytest.raises(OptionError, match=r"live\['ttl'\]"):
        live["ttl"] = value
    assert live["ttl"] == 7


@pytest.mark.parametrize("key", ["", "a..b", ".a", 5, None])
def test_what_is_no_key_is_refused(live, key):
    """A key is text, its parts separated by dots."""
    with pytest.raises(OptionError, match=r"ttl\.products"):
        live.set(key, 5)


def test_it_is_a_mapping(live):
    """It reads like any mapping, sorted by key."""
    live["b"] = 2
    live["a"] = "1m"
    assert dict(live) == {"a": 60.0, "b": 2.0}
    assert len(live) == 2
    assert list(live) == ["a", "b"]
    del live["a"]
    assert dict(live) == {"b": 2.0}
    with pytest.raises(KeyError):
        del live["a"]
    assert live.delete("a") is False
    assert live.delete("b") is True
    live["c"] = 1
    live.clear()
    assert len(live) == 0


def test_the_file_is_read_and_dots_go_into_tables(live, file):
    """Tables, dotted keys and quoted keys of TOML are the same keys here."""
    write(file, 'top = 1\n"a.b" = "2s"\n[ttl]\nproducts = 30\nforever = inf\nnever = "none"\n')
    assert dict(live) == {
        "top": 1.0,
        "a.b": 2.0,
        "ttl.products": 30.0,
        "ttl.forever": math.inf,
        "ttl.never": math.inf,
    }


def test_a_change_of_the_file_is_seen_at_the_next_look(live, file, clock):
    """A changed file acts at the next check, and costs nothing before."""
    write(file, "x = 1\n")
    assert live["x"] == 1
    write(file, "x = 2\n")
    clock.now += FILE_CHECK_SECONDS * 0.9
    assert live["x"] == 1
    clock.now += FILE_CHECK_SECONDS * 0.2
    assert live["x"] == 2
    file.unlink()
    clock.now += FILE_CHECK_SECONDS
    assert live.get("x") is None


def test_a_file_written_twice_within_one_tick_is_read_twice(live, file, clock):
    """A change that leaves size and time stamp as they were is seen while the file is young."""
    file.write_text("x = 1\n")
    stamp = time.time_ns()
    os.utime(file, ns=(stamp, stamp))
    assert live["x"] == 1
    file.write_text("x = 2\n")
    os.utime(file, ns=(stamp, stamp))
    clock.now += FILE_CHECK_SECONDS
    assert live["x"] == 2


def test_a_file_that_rests_is_not_read_again(live, file, clock):
    """A look at a file that did not change is one `stat`."""
    write(file, "x = 1\n")
    assert live["x"] == 1
    with calls_of(load_file) as read:
        clock.now += FILE_CHECK_SECONDS
        assert live["x"] == 1
    assert not read


@pytest.mark.parametrize(
    "broken", ["x = \n", "x = 0\n", "x = true\n", "x = [1]\n", "x = '5'\n", "\xff"]
)
def test_a_broken_file_keeps_the_last_good_values(live, file, clock, errors, broken):
    """A half-saved file changes nothing, is one event, and is taken when it is whole again."""
    write(file, "x = 1\n")
    assert live["x"] == 1
    file.write_bytes(broken.encode("latin-1"))
    os.utime(file, (1, 1))
    for _ in range(3):
        clock.now += FILE_CHECK_SECONDS
        assert live["x"] == 1
    assert [event.reason for event in errors] == ["live configuration"]
    assert str(file) in errors[0].detail
    write(file, "x = 3\n")
    clock.now += FILE_CHECK_SECONDS
    assert live["x"] == 3
    assert len(errors) == 1


def test_a_young_broken_file_is_one_event_too(live, file, clock, errors):
    """A broken file that is looked at again and again complains once."""
    file.write_text("x = \n")
    for _ in range(3):
        clock.now += FILE_CHECK_SECONDS
        assert live.get("x") is None
    assert len(errors) == 1


def test_a_missing_file_is_one_event(live, file, clock, errors, caplog):
    """A live file that was named and is not there is said once, in the log as well."""
    file.unlink()
    for _ in range(3):
        clock.now += FILE_CHECK_SECONDS
        assert live.get("x") is None
    assert len(errors) == 1
    (said,) = (record.getMessage() for record in caplog.records if record.name == "memo.settings")
    assert said == f"memo: live_file {file} changes nothing: No such file or directory"
    assert live.file_fault() == "No such file or directory"
    write(file, "x = 1\n")
    assert live.file_fault() == ""


def test_another_file_acts_at_once(live, file, tmp_path):
    """`configure(live_file=...)` does not wait for the next look."""
    write(file, "x = 1\n")
    other = tmp_path / "other.toml"
    write(other, "x = 2\n")
    assert live["x"] == 1
    with configuration.configure(live_file=other):
        assert live["x"] == 2
    assert live["x"] == 1
    configuration.configure(live_file=None)
    assert live.get("x") is None


def test_this_process_wins_over_the_file_over_the_shared_source(live, file, clock, sources):
    """The nearest source wins; taking a value back uncovers the next one."""
    sources.use(Shared())
    sources.shared.values = {"x": "3"}
    live.refresh()
    assert live["x"] == 3
    write(file, "x = 2\n")
    clock.now += FILE_CHECK_SECONDS
    assert live["x"] == 2
    live["x"] = 1
    assert live["x"] == 1
    del live["x"]
    assert live["x"] == 2


def test_the_shared_source_is_due_when_it_is_old(live, clock, sources):
    """It is asked once per `SHARED_REFRESH_SECONDS`, however often `refresh` is called."""
    assert not live.due()
    shared = Shared()
    shared.values = {b"x": b"5.5", "y": "1h", "z": "none"}
    sources.use(shared)
    assert live.due()
    live.refresh()
    live.refresh()
    assert not live.due()
    assert dict(live) == {"x": 5.5, "y": 3600.0, "z": math.inf}
    clock.now += SHARED_REFRESH_SECONDS
    assert live.due()
    live.refresh()
    assert shared.calls == 2


def test_a_shared_source_that_fails_keeps_its_values(live, clock, errors, sources):
    """An outage is one event and changes nothing; a wrong value spoils only its own key."""
    answers: list[object] = [{"x": "1"}, OSError("gone"), OSError("gone"), {"x": "2", "y": "soon"}]

    class Failing(Shared):
        def live(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    sources.use(Failing())
    for expected in (1, 1, 1, 2):
        live.refresh()
        assert live["x"] == expected
        clock.now += SHARED_REFRESH_SECONDS
    assert "y" not in live
    assert len(errors) == 2


def test_a_slow_shared_source_stops_nobody_else(live, sources):
    """While one thread waits for the source, others read and set."""
    entered, leave = threading.Event(), threading.Event()

    class Slow(Shared):
        def live(self):
            entered.set()
            leave.wait(5)
            return {}

    sources.use(Slow())
    assert live.due()
    thread = threading.Thread(target=live.refresh)
    thread.start()
    assert entered.wait(10)
    live["x"] = 1
    assert live["x"] == 1
    assert thread.is_alive()
    leave.set()
    thread.join()


def test_setting_for_everybody_needs_a_shared_source(live, sources):
    """`shared=True` publishes what others can read; without a source it is an error."""
    with pytest.raises(OptionError, match="redis_url"):
        live.set("x", 1, shared=True)
    sources.use(Shared())
    live.set("x", "1h", shared=True)
    live.set("y", None, shared=True)
    live.refresh()
    assert dict(live) == {"x": 3600.0, "y": math.inf}
    assert live.delete("x", shared=True) is True
    live.refresh()
    assert dict(live) == {"y": math.inf}
    sources.use(None)
    assert dict(live) == {}
    assert not live.due()


@pytest.mark.timing
def test_a_look_up_costs_less_than_a_microsecond():
    """`get` on the hot path takes less than 1 µs."""
    live = Live()
    live["ttl.products"] = 30
    live.get("ttl.products")

    def timed() -> float:
        begin = time.perf_counter()
        for _ in range(20_000):
            live.get("ttl.products")
        return (time.perf_counter() - begin) / 20_000

    assert min(timed() for _ in range(5)) < 1e-6


def test_it_shows_what_is_set(live: Live) -> None:
    """The repr lists keys and seconds."""
    live["ttl.products"] = "1m"
    assert repr(live) == "<live {'ttl.products': 60.0}>"
