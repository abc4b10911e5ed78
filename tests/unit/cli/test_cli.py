"""The command line: each command on a real cache, in a real process where that matters."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from checkout import ROOT
from click.testing import CliRunner
from redis_server import RedisServer

import memo
from memo.cli.commands import main
from memo.inspection import doctor
from memo.settings import configuration


@memo.cache(ttl="1h", key_prefix="cli", tags=["numbers"])
def squared(number: int) -> int:
    return number * number


@memo.cache(ttl=None)
def shouted(word: str) -> str:
    return word.upper()


def run(*args: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def levels(topic: str) -> dict[str, doctor.Finding]:
    return {one.level: one for one in doctor.examine() if one.topic == topic}


# --- the command itself -----------------------------------------------------------------------


def test_python_m_memo_is_the_command(cache_home):
    """`python -m memo` names itself and lists every command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "memo", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: memo" in done.stdout
    for command in ("demo", "stats", "ls", "clear", "doctor"):
        assert f"  {command} " in done.stdout


def test_a_wrong_setting_is_a_message_and_no_traceback(monkeypatch):
    """A mistake in the settings ends with the status 2 and says the fix."""
    monkeypatch.setenv("MEMO_SIZE_LIMIT", "big")
    configuration.reload()
    said = run("stats", status=2)
    assert "MEMO_SIZE_LIMIT" in said
    assert "10GiB" in said
    assert "Traceback" not in said


def test_output_that_is_not_utf_8_has_replacements(cache_home):
    """A character that the encoding of a pipe lacks is replaced, and the command goes on."""
    squared(7)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "memo", "ls"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "number=7" in done.stdout
    assert "????" in done.stdout


# --- ls ---------------------------------------------------------------------------------------


def test_ls_without_entries_says_so():
    """An empty cache is no error."""
    assert run("ls") == "No entries on this host.\n"


def test_ls_lists_what_was_stored():
    """Each entry: its function, its arguments, its age, its ttl and its cost."""
    squared(7)
    shouted("hello")
    said = run("ls")
    for part in ("squared", "number=7", "shouted", "hello", "never", "2 entries"):
        assert part in said


def test_ls_selects_and_limits():
    """A pattern selects functions, `--limit` the newest entries."""
    for number in range(3):
        squared(number)
    shouted("hello")
    assert "3 entries" in run("ls", "squared")
    assert "shouted" not in run("ls", "squared")
    said = run("ls", "squared", "--limit", "1")
    assert "1 of 3 entries; --limit 0 shows all." in said
    assert "3 entries" in run("ls", "squared", "--limit", "0")


def test_tables_fit_a_terminal_by_leaving_columns_out():
    """Eighty columns, whatever the names and the arguments are; what is not shown is named."""
    shouted("a long word " * 30)
    squared(7)
    for command in ("ls", "stats"):
        said = run(command)
        assert max(map(len, said.splitlines())) <= 80, said
    assert "Not shown: " in run("ls")
    assert "…" in run("ls")


def test_tables_are_styled_where_a_person_reads_them(monkeypatch):
    """A terminal gets bold titles; a pipe gets none of it."""
    squared(7)
    plain = {command: run(command) for command in ("ls", "stats")}
    monkeypatch.setenv("FORCE_COLOR", "1")
    for command, said in plain.items():
        assert "\x1b" not in said
        assert "\x1b[1mfunction " in run(command)


@pytest.mark.parametrize("columns", ["1", "7", "20"])
def test_a_very_narrow_terminal_is_no_error(monkeypatch, columns):
    """If nothing fits, lines are longer than the terminal is wide."""
    monkeypatch.setenv("COLUMNS", columns)
    squared(7)
    for command in ("ls", "stats", "graph", "doctor"):
        assert run(command)


def test_no_color_has_no_colors(monkeypatch):
    """`NO_COLOR` leaves colors out on a terminal, too."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32mok" in run("doctor")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in run("doctor")


def test_ls_as_html_is_a_page():
    """`--html` has every column, escaped, and looks right in a light and in a dark browser."""
    shouted("<b>hello")
    said = run("ls", "--html")
    assert said.startswith("<!doctype html>")
    assert "<table" in said
    assert "&lt;b&gt;hello" in said
    assert "<b>hello" not in said
    assert 'content="light dark"' in said


def test_ls_as_json_is_one_object_a_line():
    """For scripts: seconds and bytes, one entry a line."""
    before = time.time()
    squared(7)
    (line,) = run("ls", "--json").splitlines()
    facts = json.loads(line)
    assert facts["function"].endswith(":squared")
    assert facts["address"] == "cli:7"
    assert facts["arguments"] == {"number": "7"}
    assert facts["ttl"] == 3600
    assert before - 1 <= facts["finished"] <= time.time() + 1


@pytest.mark.parametrize("command", ["ls", "stats"])
def test_json_of_an_unknown_name(command):
    """A name that matches nothing gives the status 1 with `--json`, and no text among the JSON."""
    squared(7)
    done = CliRunner().invoke(main, [command, "sqared", "--json"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "did you mean 'test_cli:squared'?" in done.stderr


def test_ls_shows_nothing_that_our_secret_did_not_seal():
    """Entries of another secret are none of ours, and are not believed."""
    squared(7)
    with configuration.configure(secret="another secret of the tests: 32 bytes"):
        assert run("ls") == "No entries on this host.\n"


# --- clear ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        ("--prefix", "cli"),
        ("--tag", "numbers"),
        ("--key", "cli:7"),
        ("--function", squared.function_id),
    ],
)
def test_clear_makes_entries_untrue(target):
    """After `memo clear` the function computes again; other functions do not."""
    squared(7)
    shouted("hello")
    assert "1 entry on this host" in run("clear", *target)
    assert not squared.is_cached(7)
    assert shouted.is_cached("hello")


def test_clear_of_one_address_leaves_the_others():
    """An address matches exactly."""
    squared(7)
    squared(77)
    run("clear", "--key", "cli:7")
    assert not squared.is_cached(7)
    assert squared.is_cached(77)


def test_clear_all_asks_and_then_drops_everything():
    """`--all` asks first, then nothing is left, on disk neither."""
    squared(7)
    shouted("hello")
    asked = CliRunner().invoke(main, ["clear", "--all"], input="n\n")
    assert asked.exit_code == 1
    assert squared.is_cached(7)
    run("clear", "--all", "--yes")
    assert not squared.is_cached(7)
    assert not shouted.is_cached("hello")
    assert run("ls") == "No entries on this host.\n"
    assert "nothing matched" in run("clear", "--all", "--yes", status=1)


def test_clearing_everything_leaves_nothing(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generations go as well, on this host and in Redis; only that of the namespace stays."""
    monkeypatch.setenv("MEMO_DIRECTORY", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMO_REDIS_URL", redis_server.url)
    with memo.configure():
        load = memo.cache(lambda x: x, name="left:load", ttl=None, tags=["a", "user:{x}"])
        for x in range(20):
            load(x)
            memo.invalidate(tag=f"other:{x}")
        run("clear", "--all", "--yes")
        assert {name for name in redis_server.client().keys("*") if b":g:" in name} == {
            b"memo:2:g:{n}"
        }
        [file] = (tmp_path / "cache").rglob("host.sqlite")
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT name FROM groups").fetchall() == [("n",)]
        assert not load.is_cached(1)
        assert load(1) == 1
        assert load.is_cached(1)


@pytest.mark.parametrize("args", [(), ("--all", "--tag", "x"), ("--tag", "x", "--prefix", "y")])
def test_clear_wants_exactly_one_target(args):
    """Nothing is dropped by a call that does not say what."""
    assert "exactly one" in run("clear", *args, status=2)


# --- stats ------------------------------------------------------------------------------------


def test_stats_shows_every_process_of_the_directory(cache_home):
    """Calls of another process are counted, and selected by name."""
    code = "import memo\n@memo.cache\ndef counted(n): return n\ncounted(1); counted(1)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "counted" in run("stats")
    assert "counted" in run("stats", "counted")
    assert "did you mean" in run("stats", "countde", status=1)


def test_stats_of_many_functions_are_bounded():
    """At most 30 functions, unless more are asked for; the total and the headline are of all."""
    made = [memo.cache(lambda n: n, name=f"app:number_{at}", version="1") for at in range(40)]
    for one in made:
        one(1)
    said = run("stats")
    assert "40 misses" in said.splitlines()[0]
    assert said.count("app:number_") == 30
    assert said.count("Those that saved most: 30 of 40 functions; --limit 0 shows all.") == 1
    assert max(map(len, said.splitlines())) <= 80
    whole = run("stats", "--limit", "0")
    assert whole.count("app:number_") == 40
    assert "shows all" not in whole
    assert run("stats", "--limit", "3").count("app:number_") == 3
    assert run("stats", "--html").count("app:number_") == 2 * 30, "the name, and what it sorts by"
    assert repr(memo.stats()).count("app:number_") == 30
    assert "memo.stats().to_frame() shows all." in repr(memo.stats())


def test_stats_of_nothing_say_what_was_asked_for():
    """A name that matches no function is not said to mean that none was called."""
    squared(7)
    said = repr(memo.stats("nosuch"))
    assert "No function named nosuch was called." in said
    assert "No cached function" not in said


def test_stats_in_a_shell_tells_misses_after_an_edit_apart(tmp_path):
    """A script that ran, was edited and ran again: two processes, two reasons."""
    script = tmp_path / "edited.py"
    for added in (1, 2):
        script.write_text(f"import memo\n@memo.cache\ndef edited(n): return n + {added}\nedited(1)")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, script], check=True, env=environment)
    found = json.loads(run("stats", "--json"))
    (function,) = found["functions"].values()
    assert function["misses_by_reason"] == {"not cached yet": 1, "code changed": 1}
    assert "code changed 1" in run("stats")
    assert found["processes"] == 2, "the command itself called nothing"


def test_stats_as_json():
    """For scripts: the snapshot as JSON."""
    squared(7)
    squared(7)
    functions = json.loads(run("stats", "--json"))["functions"]
    assert any(name.endswith(":squared") for name in functions)


# --- doctor -----------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_where_nothing_is():
    """A fresh set-up passes, and says where everything is."""
    squared(7)
    said = run("doctor")
    assert "fail" not in said
    for topic in ("python", "settings", "secret", "directory", "disk", "clock", "journal"):
        assert f" {topic} " in said


def test_doctor_before_the_first_use():
    """Before anything was stored there is nothing to complain of."""
    assert {one.level for one in doctor.examine()} <= {doctor.GOOD, doctor.NOTE}


def test_doctor_names_a_wrong_setting(monkeypatch):
    """A wrong setting is the finding that hides all others; status 1."""
    monkeypatch.setenv("MEMO_DEADLINE", "soon")
    configuration.reload()
    said = run("doctor", status=1)
    assert "MEMO_DEADLINE" in said
    assert "250ms" in said


def test_doctor_finds_open_modes_and_links(cache_home):
    """Files that others can reach, and links, are found and named with the fix."""
    squared(7)
    open_file = cache_home / "open"
    open_file.write_text("x")
    open_file.chmod(0o644)
    link = cache_home / "link"
    link.symlink_to("/etc/hostname")
    found = levels("directory")
    assert str(open_file) in found[doctor.WARN].said
    assert "chmod -R go=" in found[doctor.WARN].fix
    assert str(link) in found[doctor.FAIL].said


@pytest.mark.filterwarnings("ignore:memo. the cache directory")
def test_a_directory_that_is_a_file_is_named(tmp_path):
    """`memo doctor` says that it is none, and `memo stats` what the disk tier reports."""
    file = tmp_path / "file"
    file.touch()
    with memo.configure(directory=file):
        assert levels("directory")[doctor.FAIL].said == f"{file} is not a directory"
        assert "cannot be used" in levels("disk")[doctor.FAIL].said
        said = " ".join(run("stats").split())
    assert "down · error" in said
    assert said.count("cannot be used") == 1


def test_doctor_finds_leftovers(cache_home):
    """Leftovers of a killed process are named with the command that removes them."""
    squared(7)
    old = cache_home / "x.tmp"
    old.touch(mode=0o600)
    os.utime(old, (1, 1))
    (cache_home / "young.tmp").touch(mode=0o600)
    finding = levels("leftovers")[doctor.WARN]
    assert str(old) in finding.fix
    assert "young" not in finding.said


def test_doctor_finds_a_secret_that_cannot_be_kept(monkeypatch, tmp_path):
    """A home without a place for the secret is a failure with the fix."""
    monkeypatch.delenv("MEMO_SECRET")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    configuration.reload()
    assert "MEMO_SECRET_FILE" in levels("secret")[doctor.FAIL].fix


def test_doctor_finds_a_disk_that_is_too_small():
    """A budget that the disk does not have is found before it is used up."""
    with configuration.configure(size_limit="1000000 TiB"):
        assert "free" in levels("disk")[doctor.WARN].said


def test_doctor_finds_that_caching_is_off():
    """`enabled = false` is easily forgotten."""
    with configuration.configure(enabled=False):
        assert "off" in levels("settings")[doctor.WARN].said


def test_doctor_finds_a_mode_and_a_live_file_without_effect(tmp_path):
    """A mode that is left set, and a live file that cannot be read, are warnings."""
    for mode in ("off", "refresh", "only"):
        with memo.configure(mode=mode):
            assert f"mode is {mode} (from configure())" in levels("settings")[doctor.WARN].said
    with memo.configure(live_file=tmp_path / "live.toml"):
        said = levels("settings")[doctor.WARN].said
    assert said == f"live_file {tmp_path}/live.toml changes nothing: No such file or directory"


def test_doctor_tells_the_version_of_redis(redis_server):
    """A Redis that works is named with its version."""
    with configuration.configure(redis_url=redis_server.url):
        assert "version" in levels("redis")[doctor.GOOD].said


def test_doctor_finds_a_redis_that_is_away(redis_server):
    """A Redis that cannot be reached is a failure; no password is shown."""
    redis_server.stop()
    url = redis_server.url.replace("redis://", "redis://user:hunter2@")
    with configuration.configure(redis_url=url):
        finding = levels("redis")[doctor.FAIL]
    assert "hunter2" not in str(finding)
    assert "redis_url" in finding.fix


def test_doctor_finds_invalidations_that_wait(redis_server):
    """Invalidations that have not reached Redis yet are counted."""
    with configuration.configure(redis_url=redis_server.url):
        squared(7)
        redis_server.stop()
        squared.invalidate(7)
        assert "1 invalidation" in levels("journal")[doctor.WARN].said


def test_doctor_as_json():
    """For scripts: level, topic, what was found, what to do."""
    findings = json.loads(run("doctor", "--json"))
    assert {"level", "topic", "said", "fix"} == set(findings[0])
