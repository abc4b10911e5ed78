"""Settings: four layers, every value checked, every error with its setting, source and fix."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

from memo.errors import SettingError
from memo.settings import configuration

SECRET = "s3cr3t-of-the-tests-" * 2
DEFAULTS = {
    "redis_url": None,
    "size_limit": 10 * 2**30,
    "memory_limit": 256 * 2**20,
    "tiers": None,
    "read_strategy": "on_miss_or_error",
    "write_strategy": "write_through",
    "self_healing": True,
    "namespace": "memo",
    "coherence": "strict",
    "deadline": 0.25,
    "redis_value_limit": 64 * 2**20,
    "retention": 30 * 86_400.0,
    "enabled": True,
    "follow_threads": True,
    "live_file": None,
}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("MEMO_")]:
        monkeypatch.delenv(name)
    for kind in ("CACHE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / "home" / kind.lower()))
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    configuration.reset()
    yield
    configuration.reset()


def project(text: str, directory: Path | None = None) -> Path:
    path = (directory or Path.cwd()) / "pyproject.toml"
    path.write_text(textwrap.dedent(text))
    configuration.reload()
    return path


def wrong(**settings):
    with pytest.raises(SettingError) as caught:
        configuration.configure(**settings)
    return caught.value


class InADict:
    async def get(self, key): ...
    async def set(self, key, value, ttl=None): ...
    async def delete(self, key): ...
    async def clear(self): ...


# --- layers -----------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_specification(tmp_path):
    """With nothing set anywhere, every setting has the default of SPEC section 6."""
    settings = configuration.current()
    assert {name: getattr(settings, name) for name in DEFAULTS} == DEFAULTS
    assert settings.directory == tmp_path / "home" / "cache" / "jupyter-memo"
    assert len(settings.secrets) == 1
    assert set(settings.sources.values()) == {"default"}


def test_configure_wins_over_environment_over_project_over_default(monkeypatch):
    """The first of the four layers that has a setting wins, and `sources` names it."""
    path = project('[tool.memo]\nnamespace = "p"\nmemory_limit = "1 MiB"\ndeadline = 1\n')
    monkeypatch.setenv("MEMO_NAMESPACE", "e")
    monkeypatch.setenv("MEMO_MEMORY_LIMIT", "2MiB")
    configuration.reload()
    configuration.configure(namespace="c")
    settings = configuration.current()
    assert (settings.namespace, settings.memory_limit) == ("c", 2 << 20)
    assert (settings.deadline, settings.coherence) == (1.0, "strict")
    assert settings.sources["namespace"] == "configure()"
    assert settings.sources["memory_limit"] == "MEMO_MEMORY_LIMIT"
    assert settings.sources["deadline"] == f"[tool.memo] in {path}"
    assert settings.sources["coherence"] == "default"


def test_the_nearest_pyproject_counts_and_no_other(monkeypatch, tmp_path):
    """Only the first `pyproject.toml` upwards is read, also if it has no table for memo."""
    project('[tool.memo]\nnamespace = "outer"\n', tmp_path)
    inner = tmp_path / "project" / "notebooks"
    inner.mkdir()
    monkeypatch.chdir(inner)
    configuration.reload()
    assert configuration.current().namespace == "outer"
    project('[project]\nname = "memo-user"\n', tmp_path / "project")
    assert configuration.current().namespace == "memo"


def test_paths_of_a_project_count_from_the_project(monkeypatch, tmp_path):
    """A relative path in `pyproject.toml` means the same from every working directory below."""
    project('[tool.memo]\ndirectory = "cache"\nlive_file = "live.toml"\n', tmp_path)
    settings = configuration.current()
    assert settings.directory == tmp_path / "cache"
    assert settings.live_file == tmp_path / "live.toml"


def test_nothing_is_read_before_the_first_call(monkeypatch):
    """A wrong variable is no error at import; it is one at the first call, with its name."""
    monkeypatch.setenv("MEMO_DEADLINE", "soon")
    configuration.reload()
    with pytest.raises(SettingError, match=r"'deadline' \(from MEMO_DEADLINE\)"):
        configuration.current()


def test_import_reads_no_settings_and_loads_no_heavy_package(tmp_path):
    """Importing memo touches neither the environment's settings nor big libraries."""
    code = (
        "import sys, memo; from memo.settings import configuration as c; assert c._read is None;"
        "bad = {'redis','pandas','numpy','platformdirs','pydantic','tomllib','asyncio'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    environment = {**os.environ, "MEMO_DEADLINE": "never"}
    root = Path(configuration.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(root)},
    )


def test_what_was_read_is_kept(monkeypatch):
    """The environment is read once: a later change acts after `reload`, not in the middle."""
    assert configuration.current().namespace == "memo"
    monkeypatch.setenv("MEMO_NAMESPACE", "later")
    assert configuration.current().namespace == "memo"
    configuration.reload()
    assert configuration.current().namespace == "later"


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    """`MEMO_REDIS_URL=` is how a shell takes a variable back."""
    project('[tool.memo]\nnamespace = "p"\n')
    monkeypatch.setenv("MEMO_NAMESPACE", "")
    configuration.reload()
    assert configuration.current().namespace == "p"


# --- configure and restore --------------------------------------------------------------------


def test_with_configure_restores_what_it_set():
    """After the block every setting reads as before, nested blocks included."""
    configuration.configure(namespace="a")
    with configuration.configure(namespace="b", enabled=False):
        with configuration.configure(namespace="c"):
            assert configuration.current().namespace == "c"
            assert configuration.current().enabled is False
        assert configuration.current().namespace == "b"
    assert configuration.current().namespace == "a"
    assert configuration.current().enabled is True
    assert configuration.current().sources["enabled"] == "default"


def test_with_configure_restores_after_an_exception():
    """An exception inside the block takes nothing of the settings with it."""
    with pytest.raises(ZeroDivisionError), configuration.configure(enabled=False):
        1 / 0  # noqa: B018
    assert configuration.current().enabled is True


def test_a_block_takes_back_only_what_it_set_itself():
    """A setting configured for good inside a block stays after it."""
    with configuration.configure(namespace="inner"):
        configuration.configure(deadline="1s")
    assert configuration.current().deadline == 1.0
    assert configuration.current().namespace == "memo"


def test_a_wrong_value_sets_nothing():
    """`configure` checks everything before it sets anything."""
    wrong(namespace="fine", deadline=-1)
    assert configuration.current().namespace == "memo"


def test_none_overrides_an_outer_layer(monkeypatch):
    """`configure(redis_url=None)` turns Redis off, whatever the environment says."""
    monkeypatch.setenv("MEMO_REDIS_URL", "redis://cache")
    configuration.reload()
    assert configuration.current().redis_url == "redis://cache"
    with configuration.configure(redis_url=None):
        assert configuration.current().redis_url is None
    assert configuration.current().redis_url == "redis://cache"


def test_revision_changes_with_every_change():
    """Code that keeps something made of the settings can tell when it is out of date."""
    seen = {configuration.revision}
    with configuration.configure(enabled=False):
        seen.add(configuration.revision)
    seen.add(configuration.revision)
    configuration.reload()
    seen.add(configuration.revision)
    assert len(seen) == 4


def test_configure_is_safe_from_many_threads():
    """Threads that configure at once leave whole settings, each of them some thread's."""

    def work(number: int) -> None:
        for _ in range(50):
            configuration.configure(namespace=f"n{number}", memory_limit=number)
            settings = configuration.current()
            if settings.namespace != f"n{settings.memory_limit}":
                torn.append(settings)

    torn: list[configuration.Settings] = []
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn


@pytest.mark.timing
def test_current_costs_next_to_nothing():
    """After the first read, `current()` takes less than 0.2 µs."""
    configuration.current()
    best = min(_timed(configuration.current, 20_000) for _ in range(5))
    assert best < 0.2e-6


def _timed(function, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - begin) / times


# --- unknown names ----------------------------------------------------------------------------


def test_an_unknown_name_is_an_error_with_the_nearest_one():
    """A misspelt setting names what was meant."""
    error = wrong(redis_ulr="redis://x")
    assert error.setting == "redis_ulr"
    assert "configure()" in str(error)
    assert "did you mean 'redis_url'?" in str(error)


def test_an_unknown_name_unlike_any_lists_all():
    """A name that is like none of ours is answered with the list."""
    assert "redis_value_limit" in str(wrong(xyz=1))


def test_an_unknown_name_in_the_project_names_the_file():
    """A misspelt setting in `pyproject.toml` names the file."""
    path = project("[tool.memo]\nsize-limit = 1\n")
    with pytest.raises(SettingError, match="did you mean 'size_limit'") as caught:
        configuration.current()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("variable", ["MEMO_REDISURL", "MEMO_REDIS", "MEMO_NAME_SPACE"])
def test_a_misspelt_variable_is_an_error(monkeypatch, variable):
    """A variable that is nearly one of ours is a mistake, not silence."""
    monkeypatch.setenv(variable, "x")
    configuration.reload()
    with pytest.raises(SettingError, match="did you mean") as caught:
        configuration.current()
    assert variable in str(caught.value)


@pytest.mark.parametrize("variable", ["MEMO_EDITOR", "MEMO_TEST_REDIS_URL", "MEMOIZE"])
def test_variables_of_other_programs_are_left_alone(monkeypatch, variable):
    """Other programs are called memo as well; their variables are none of our business."""
    monkeypatch.setenv(variable, "x")
    configuration.reload()
    assert configuration.current().namespace == "memo"


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (2_000_000, 2_000_000),
        ("2000000", 2_000_000),
        ("10GiB", 10 << 30),
        ("256 MiB", 256 << 20),
        ("1.5 gib", 3 << 29),
        ("2MB", 2_000_000),
        ("1 TiB", 1 << 40),
        ("4096 KiB", 4 << 20),
    ],
)
def test_sizes_are_bytes_or_text_with_units(text, size):
    """Sizes are read to the byte: KiB are 1,024, kB are 1,000."""
    with configuration.configure(size_limit=text):
        assert configuration.current().size_limit == size


def test_a_negative_memory_limit_is_refused():
    """0 turns the memory tier off; less than that is a slip."""
    assert "less than 0" in str(wrong(memory_limit=-1))


@pytest.mark.parametrize("value", ["10G", "much", "-1", -1, 1.5, True, None, "", "1e9", 0, "1 KiB"])
def test_wrong_sizes_are_refused(value):
    """A size that could be misread, is negative, or is too small for a disk tier is an error."""
    error = wrong(size_limit=value)
    assert error.setting == "size_limit"
    assert "GiB" in str(error)


def test_memory_limit_may_be_zero():
    """0 turns the memory tier off."""
    with configuration.configure(memory_limit=0):
        assert configuration.current().memory_limit == 0


@pytest.mark.parametrize(
    ("value", "number"), [(0.5, 0.5), ("250ms", 0.25), ("0.1", 0.1), (timedelta(seconds=2), 2.0)]
)
def test_deadline_takes_seconds_and_text(value, number):
    """The deadline is seconds, or text with units."""
    with configuration.configure(deadline=value):
        assert configuration.current().deadline == number


@pytest.mark.parametrize("value", [0, -1, "soon", None, True, float("nan"), "inf"])
def test_wrong_deadlines_are_refused(value):
    """A deadline that is no time above 0 is an error that shows how to write one."""
    assert "250ms" in str(wrong(deadline=value))


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://:pw@cache:6380/3",
        "rediss://user:pw@cache.example.org:6380/0?ssl_cert_reqs=none",
        "unix:///run/redis.sock?db=2",
        "redis://[::1]:6379/0",
    ],
)
def test_urls_of_redis_are_kept_as_they_are(url):
    """A good URL reaches the client unchanged."""
    with configuration.configure(redis_url=url):
        assert str(configuration.current().redis_url) == url


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://cache",
        "redis://cache:port",
        "redis://cache:0",
        "redis://cache:99999",
        "redis://cache/first",
        "unix://",
        "redis://[::1",
        "redis://cache?db=x",
        6379,
    ],
)
def test_wrong_urls_are_refused(url):
    """A URL that no client could use is an error at once, not at the first connection."""
    assert wrong(redis_url=url).setting == "redis_url"


@pytest.mark.parametrize("value", [True, "1", "true", "YES", "on", 1])
def test_truth_is_read_from_text(monkeypatch, value):
    """The usual spellings of true are true."""
    with configuration.configure(self_healing=value):
        assert configuration.current().self_healing is True


def test_enabled_from_the_environment(monkeypatch):
    """`MEMO_ENABLED=0` turns the cache off; other text is refused."""
    monkeypatch.setenv("MEMO_ENABLED", "0")
    configuration.reload()
    assert configuration.current().enabled is False
    monkeypatch.setenv("MEMO_ENABLED", "maybe")
    configuration.reload()
    with pytest.raises(SettingError, match="write true or false"):
        configuration.current()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("read_strategy", "on_hit"),
        ("write_strategy", "write_back"),
        ("coherence", "loose"),
        ("namespace", "a:b"),
        ("namespace", ""),
        ("namespace", "{x}"),
        ("namespace", "a b"),
        ("namespace", 5),
        ("directory", 5),
        ("redis_value_limit", "1GiB"),
        ("secret_file", "/nonexistent"),
    ],
)
def test_other_wrong_values_are_refused(name, value):
    """Every setting is checked, and the error names it."""
    error = wrong(**{name: value})
    assert error.setting == name
    assert "configure()" in str(error)


def test_tiers_are_names_or_objects(monkeypatch):
    """A chain is text, a list of names, or objects; an object of four async methods will do."""
    own = InADict()
    with configuration.configure(redis_url="redis://cache", tiers="memory, redis,disk"):
        assert configuration.current().tiers == ("memory", "redis", "disk")
    with configuration.configure(tiers=["memory", own]):
        assert configuration.current().tiers == ("memory", own)
    with configuration.configure(tiers=own):
        assert configuration.current().tiers == (own,)
    monkeypatch.setenv("MEMO_TIERS", "disk")
    configuration.reload()
    assert configuration.current().tiers == ("disk",)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("memory,disc", "'disc' is not a tier"),
        ("disk,disk", "twice"),
        ((), "is empty"),
        (InADict, "give an object: InADict()"),
        ([object()], "needs the async methods"),
    ],
)
def test_wrong_tiers_are_refused(value, part):
    """A value that cannot be a tier is refused with the fix."""
    assert part in str(wrong(tiers=value))


def test_redis_in_the_chain_needs_a_url(monkeypatch):
    """A chain that names Redis without one is an error with the source of the chain."""
    monkeypatch.setenv("MEMO_TIERS", "redis,disk")
    configuration.reload()
    with pytest.raises(SettingError, match=r"'tiers' \(from MEMO_TIERS\).*redis_url"):
        configuration.current()


def test_a_broken_project_file_is_an_error_only_if_it_speaks_of_memo():
    """Half-written TOML is an error where it may have settings of ours, and only there."""
    project("[tool.other\n")
    assert configuration.current().namespace == "memo"
    path = project("[tool.memo\n")
    with pytest.raises(SettingError, match="not valid TOML") as caught:
        configuration.current()
    assert str(path) in str(caught.value)


def test_a_project_table_that_is_none_is_refused():
    """`tool.memo = 1` is no table."""
    project("[tool]\nmemo = 1\n")
    with pytest.raises(SettingError, match="must be a table"):
        configuration.current()


def test_a_removed_working_directory_is_no_error(monkeypatch, tmp_path):
    """A notebook whose directory was deleted has no project, and works."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    configuration.reload()
    assert configuration.current().namespace == "memo"


def test_directory_is_absolute_and_knows_the_home(monkeypatch, tmp_path):
    """`~` and relative paths are resolved when they are read, and never again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with configuration.configure(directory="~/cache"):
        assert configuration.current().directory == tmp_path / "cache"
    with configuration.configure(directory="here"):
        assert configuration.current().directory == Path.cwd() / "here"


# --- nothing leaks ----------------------------------------------------------------------------


def test_no_password_and_no_secret_is_ever_shown():
    """Neither the repr of the settings nor that of the URL has user, password, query or secret."""
    url = "redis://user:hunter2@cache:6379/0?password=hunter3"
    with configuration.configure(redis_url=url, secret=SECRET):
        shown = (
            repr(configuration.current())
            + repr(configuration.current().redis_url)
            + repr(configuration.configure())
        )
    for hidden in ("hunter2", "hunter3", "user:", SECRET):
        assert hidden not in shown
    assert "redis://***@cache:6379/0?***" in shown


@pytest.mark.parametrize("url", ["redis://u:hunter2@host:port", "http://u:hunter2@host"])
def test_no_password_is_in_an_error(url):
    """An error about a URL names what is wrong, and not the URL."""
    shown = "".join(traceback.format_exception(wrong(redis_url=url)))
    assert "SettingError" in shown
    assert "hunter2" not in shown


# --- secrets as settings ----------------------------------------------------------------------


def test_the_secret_comes_from_the_first_layer_that_has_one(monkeypatch, tmp_path):
    """Argument, then MEMO_SECRET, then MEMO_SECRET_FILE, then the generated file."""
    path = tmp_path / "secret"
    path.write_text("f" * 40)
    path.chmod(0o600)
    ids = [configuration.current().secrets[0].id]
    monkeypatch.setenv("MEMO_SECRET_FILE", str(path))
    configuration.reload()
    ids.append(configuration.current().secrets[0].id)
    assert configuration.current().sources["secrets"] == "MEMO_SECRET_FILE"
    monkeypatch.setenv("MEMO_SECRET", "e" * 40)
    configuration.reload()
    ids.append(configuration.current().secrets[0].id)
    configuration.configure(secret="c" * 40)
    ids.append(configuration.current().secrets[0].id)
    configuration.configure(secret_file=path)
    assert configuration.current().secrets[0].id == ids[1]
    assert len(set(ids)) == 4
    for both in (
        {"secret": "c" * 40, "secret_file": path},
        {"secret_file": path, "secret": "c" * 40},
    ):
        configuration.configure(**both)
        assert configuration.current().secrets[0].id == ids[3]


def test_a_secret_in_a_readable_project_file_is_refused(tmp_path):
    """A secret in a `pyproject.toml` that others can read is none."""
    path = project(f'[tool.memo]\nsecret = "{SECRET}"\n')
    path.chmod(0o644)
    with pytest.raises(SettingError, match="chmod 600"):
        configuration.current()
    path.chmod(0o600)
    assert len(configuration.current().secrets) == 1


def test_a_forked_child_can_configure():
    """A process forked while another thread holds the lock is not stuck in it."""
    with configuration._lock:
        child = os.fork()
        if child == 0:
            held = threading.Thread(
                target=configuration.configure, kwargs={"enabled": False}, daemon=True
            )
            held.start()
            held.join(5)
            os._exit(1 if held.is_alive() else 0)
        assert os.waitpid(child, 0)[1] == 0
