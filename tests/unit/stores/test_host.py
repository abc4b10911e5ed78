"""The host: generations, journal and locks that processes share, whatever happens to the files."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import threading
import time
import warnings
from contextlib import closing

import pytest
from observed import calls_of
from ports import blocking, looping, run, start
from sqlite_damage import damage_file
from time_ahead import Ahead
from waiting import until

from memo.errors import TierError
from memo.records.stamp_types import LOST, Ref, State
from memo.runtime.blocking import BLOCKING, drive
from memo.stores.disk import cache_directory, file_locks, host_database, host_state, sqlite_file
from memo.stores.disk.host_state import Host
from memo.validity import stamps
from memo.validity.stamps import Turn

EU = ("region", "e" * 16)
US = ("region", "u" * 16)
REDIS = "redis here"
NOTE = f'{{"by": "me", "to": ["{REDIS}"]}}'
F = "f:module:load"
CALL = Ref(F, (EU,))
OTHER = Ref(F, (US,))


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def host(directory):
    host = Host(directory)
    yield host
    host.close()


@pytest.fixture
def second(directory, host):
    """Another host object on the same directory: connections and a mirror of its own."""
    second = Host(directory)
    yield second
    second.close()


def begin(host, *refs):
    return blocking(lambda port: host.generations.stamp_states(port, refs))


def turn(host, *turns, note="{}"):
    blocking(lambda port: host.generations.turn(port, turns, note))


IN_A_PROCESS = """
import sys
from pathlib import Path
from memo.runtime.blocking import BLOCKING, drive
from memo.stores.disk.host_state import Host
from memo.validity.stamps import Ref, Turn
host = Host(Path(sys.argv[1]))
F, EU = "f:module:load", ("region", "e" * 16)
CALL = Ref(F, (EU,))
"""


# --- visibility -----------------------------------------------------------------------------------


def test_a_turn_is_seen_at_once_by_other_connections(host, second):
    """A turn by one process is seen by the very next read of another, each of a thousand times."""
    begin(host, CALL)
    seen = set()
    for _ in range(1000):
        before = second.generations.read([CALL])
        assert before == host.generations.read([CALL])
        turn(host, Turn(F, (EU,)))
        now = second.generations.read([CALL])
        assert now != before
        seen.add(now[0].text)
    assert len(seen) == 1000


def test_a_turn_is_seen_at_once_by_other_processes(host, directory):
    """An invalidation made in another process is seen by the next read here, and the other way."""
    begin(host, CALL)
    code = IN_A_PROCESS + (
        "for line in sys.stdin:\n"
        "    print(host.generations.read([CALL])[0].text)\n"
        "    drive(host.generations.turn(BLOCKING, [Turn(F, (EU,))], ''))\n"
        "    print(host.generations.read([CALL])[0].text, flush=True)\n"
        "host.close()\n"
    )
    with start(code, directory) as process:
        for _ in range(50):
            turn(host, Turn(F))
            mine = host.generations.read([CALL])[0].text
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == mine
            theirs = process.stdout.readline().strip()
            assert host.generations.read([CALL])[0].text == theirs != mine
        process.stdin.close()
        assert process.wait() == 0


def test_reading_while_nothing_changes_touches_no_file(host):
    """A read asks the file nothing while the bell is silent and the tick has not passed."""
    begin(host, CALL)
    before = host.generations.read([CALL])
    host.host_database.check_at = time.monotonic() + 1000.0
    with calls_of(host_database.HostDatabase.refresh) as looked:
        assert host.generations.read([CALL]) == before
        assert not looked
        turn(host, Turn(F))
        assert host.generations.read([CALL]) != before
        assert looked


def test_a_writer_killed_before_the_bell_is_seen_after_the_tick(host, second):
    """A commit without a bell is noticed by the next read after the tick."""
    (before,) = begin(host, CALL)
    begin(second, CALL)
    bell, silent = second.host_database.bell, tuple(second.host_database.bell)
    turn(second, Turn(F))
    bell[0], bell[1] = silent
    host.host_database.check_at = 0.0  # it is time to look at the file again
    assert host.generations.read([CALL]) != [before]


def test_reading_costs_microseconds(host):
    """The read of a hit costs at most 10 µs (1 µs on a quiet machine), the journal less."""
    refs = [CALL, Ref("n"), Ref("p:x", (("@", "0" * 16),))]
    begin(host, *refs)
    turn(host, Turn(F, (EU,)))

    def best(function):
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            for _ in range(200):
                function()
            times.append((time.perf_counter() - begun) / 200)
        return min(times)

    assert best(lambda: host.generations.read(refs)) < 10e-6
    assert best(lambda: host.journal.has_due_rows_now(REDIS)) < 5e-6


def test_the_mirror_is_bounded_and_still_right(host, second, set_limits):
    """A mirror that was begun anew reads what it read before."""
    set_limits(mirror=10)
    refs = [Ref(f"t:{n}") for n in range(50)]
    states = begin(host, *refs)
    turn(second, Turn("t:7"))
    now = host.generations.read(refs)
    assert [a == b for a, b in zip(now, states, strict=True)].count(False) == 1
    assert second.generations.read(refs) == now


def test_threads_and_loops_share_one_host(host):
    """Readers in threads never see a token older than the last turn that has returned."""
    begin(host, CALL)
    latest, stop, wrong = [host.generations.read([CALL])[0].text], threading.Event(), []
    order: dict[str, int] = {latest[0]: 0}

    def reader():
        while not stop.is_set():
            least = order[latest[0]]
            text = looping(lambda port: host.generations.states(port, [CALL]))[0].text
            until(
                lambda text=text: text in order or stop.is_set()
            )  # turned, but not yet written down
            if order.get(text, least) < least:
                wrong.append(text)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(1, 200):
        turn(host, Turn(F))
        text = host.generations.read([CALL])[0].text
        order[text] = number
        latest[0] = text
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_processes_agree_on_a_fresh_token(directory):
    """Processes that begin one group at the same moment read the same token."""
    code = IN_A_PROCESS + (
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "print(drive(host.generations.stamp_states(BLOCKING, [CALL]))[0].text)\nhost.close()\n"
    )
    processes = [start(code, directory) for _ in range(6)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    seen = {process.communicate()[0] for process in processes}
    assert len(seen) == 1


def test_the_id_is_the_directorys(host, second, tmp_path):
    """All processes read the same id in one directory, and another in another."""
    assert len(host.id) == 16
    assert host.id == second.id
    elsewhere = Host(tmp_path / "elsewhere")
    assert elsewhere.id != host.id
    elsewhere.close()


# --- learning ------------------------------------------------------------------------------------


def test_the_host_learns_what_the_authority_reads(host, second):
    """Learned tokens are read by all processes on the host, `*`, fields and last alike."""
    before = host.generations.read([CALL])
    now = [State("s" * 16 + f"|region={EU[1]}:" + "t" * 16, "l" * 16)]
    host.generations.learn([CALL], before, now)
    assert host.generations.read([CALL]) == now == second.generations.read([CALL])


def test_the_host_does_not_learn_over_what_it_has_turned_since(host):
    """Learning is a compare-and-set: an invalidation in between is not undone."""
    before = begin(host, CALL)
    seen = host.generations.read([CALL])
    turn(host, Turn(F))
    now = host.generations.read([CALL])
    host.generations.learn([CALL], seen, [State("s" * 16, "")])
    assert host.generations.read([CALL]) == now != before


def test_the_host_does_not_learn_what_an_invalidation_on_its_way_will_change(host):
    """While a journalled invalidation is not known to have arrived, its groups learn nothing."""
    old = begin(host, CALL)
    row = host.journal.add([Turn(F, (EU,))], "{}")
    before = host.generations.read([CALL])
    host.generations.learn([CALL], before, old)
    assert host.generations.read([CALL]) == before
    host.journal.mark_done(row)
    host.generations.learn([CALL], before, old)  # read before it arrived: `old` may be too
    assert host.generations.read([CALL]) == before
    again = host.generations.read([CALL])
    host.generations.learn([CALL], again, [State("s" * 16, "l" * 16)])
    assert host.generations.read([CALL]) == [State("s" * 16, "l" * 16)]


def test_what_the_authority_has_lost_is_lost_here(host):
    """An authority that has lost a group takes it from the host too: a miss, never a revival."""
    before = begin(host, CALL)
    host.generations.learn([CALL], host.generations.read([CALL]), [LOST])
    assert host.generations.read([CALL, OTHER]) == [LOST, LOST]
    assert begin(host, CALL) != before


def test_several_refs_of_one_group_learn_together(host):
    """Refs of one group are judged against what the host read before any of them learned."""
    begin(host, CALL, OTHER)
    turn(host, Turn(F, (EU,)))
    before = host.generations.read([CALL, OTHER])
    star, last = "s" * 16, "l" * 16
    now = [State(f"{star}|region={EU[1]}:" + "x" * 16, last), State(star, last)]
    host.generations.learn([CALL, OTHER], before, now)
    assert host.generations.read([CALL, OTHER]) == now


def test_two_computations_of_one_function_learn_at_the_same_time(host):
    """A call that has learned does not keep another call of its function from learning."""
    begin(host, CALL, OTHER)
    turn(host, Turn(F, (EU,)), Turn(F, (US,)))
    mine, others = host.generations.read([CALL]), host.generations.read([OTHER])
    star, last = mine[0].text.partition("|")[0], "l" * 16
    eu = [State(f"{star}|region={EU[1]}:" + "x" * 16, last)]
    us = [State(f"{star}|region={US[1]}:" + "y" * 16, "an older one !!!")]
    host.generations.learn([CALL], mine, eu)
    host.generations.learn([OTHER], others, us)
    assert [state.text for state in host.generations.read([CALL, OTHER])] == [
        eu[0].text,
        us[0].text,
    ]
    assert host.generations.read([Ref(F, None)])[0].last == last, "it does not go back"


def test_a_call_does_not_learn_that_its_group_was_lost_after_another_has_learned_it(host):
    """A group that was lost before another call learned it again is not lost now."""
    begin(host, CALL, OTHER)
    mine, others = host.generations.read([CALL]), host.generations.read([OTHER])
    now = [State(mine[0].text, "l" * 16)]
    host.generations.learn([CALL], mine, now)
    host.generations.learn([OTHER], others, [LOST])
    assert host.generations.read([CALL]) == now


# --- journal -------------------------------------------------------------------------------------


def test_a_journalled_invalidation_turns_the_host_too(host, second):
    """`add` turns the host's generations, for all its processes, before anything is sent."""
    (before,) = begin(host, CALL)
    host.journal.add([Turn(F, (EU,))], '{"by": "me"}')
    assert second.generations.read([CALL]) != [before]
    assert blocking(lambda port: host.generations.notes(port, CALL)) == [
        (f"region={EU[1]}", '{"by": "me"}')
    ]


def test_a_row_is_due_when_it_failed_and_gone_when_it_is_done(host, second):
    """Rows on their way are not due; failed ones are, for every process, until they are done."""
    row = host.journal.add([Turn(F, (EU,)), Turn("t:x", (), True)], NOTE)
    assert not host.journal.has_due_rows_now(REDIS)
    assert host.journal.due_rows() == []
    host.journal.mark_failed(row)
    assert second.journal.has_due_rows_now(REDIS)
    assert second.journal.due_rows() == [(row, [Turn(F, (EU,)), Turn("t:x", (), True)], NOTE)]
    second.journal.mark_done(row)
    assert not host.journal.has_due_rows_now(REDIS)
    assert host.journal.due_rows() == []
    host.journal.mark_done(row)


def test_a_row_is_due_for_its_receivers_only(host, second):
    """A tier that is used is not held up by rows for one that is not; these stay."""
    for to in (REDIS, "redis elsewhere", "*"):
        host.journal.mark_failed(host.journal.add([Turn(F)], f'{{"to": ["{to}"]}}'))
    assert [row for row, _, _ in second.journal.due_rows()] == [1, 2, 3]
    assert [row for row, _, _ in second.journal.due_rows(REDIS)] == [1, 3]
    for row in (1, 3):
        assert second.journal.has_due_rows_now(REDIS)
        second.journal.mark_done(row)
    assert not second.journal.has_due_rows_now(REDIS)
    assert not second.journal.due_rows(REDIS)
    assert host.journal.has_due_rows_now("redis elsewhere")
    assert [row for row, _, _ in host.journal.due_rows("redis elsewhere")] == [2]


@pytest.mark.parametrize("offset", [6.0, -3600.0])
def test_a_row_whose_maker_died_is_due_after_five_seconds(host, directory, offset):
    """An unfinished row is due after 5 s, also when the wall clock was set back."""
    host.journal.add([Turn(F)], NOTE)
    clock = Ahead()
    clock.step(offset)
    later = Host(directory, clock)
    assert later.journal.has_due_rows_now(REDIS)
    assert len(later.journal.due_rows()) == 1
    later.close()


def test_the_journal_survives_a_kill(directory):
    """An invalidation that `add` has returned from is there after SIGKILL, and turned."""
    code = IN_A_PROCESS + (
        "print(drive(host.generations.stamp_states(BLOCKING, [CALL]))[0].text)\n"
        "print(host.journal.add([Turn(F, (EU,))], 'note'), flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with start(code, directory) as process:
        output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    text, row = output.split()
    clock = Ahead()
    clock.step(10)
    host = Host(directory, clock)
    assert host.journal.due_rows() == [(int(row), [Turn(F, (EU,))], "note")]
    assert host.generations.read([CALL])[0].text != text
    host.close()


def test_a_turn_is_synced_before_it_returns(host):
    """Turns and journal rows are committed with synchronous=FULL; begins without fsync."""

    def modes():
        (mode,) = host.host_database.file.writer.execute("PRAGMA synchronous").fetchone()
        commits = [one for one in statements if one == "COMMIT"]
        statements.clear()
        return mode, len(commits)

    statements = []
    begin(host, CALL)
    host.host_database.file.writer.set_trace_callback(statements.append)
    begin(host, Ref("t:x"))
    assert modes() == (1, 1)
    turn(host, Turn(F))
    assert modes() == (2, 1)
    begin(host, Ref("t:y"))
    assert modes() == (1, 1)
    host.journal.add([Turn(F)], "")
    assert modes() == (2, 1)
    host.host_database.file.writer.set_trace_callback(None)


# --- damage to the files --------------------------------------------------------------------------


def test_a_kill_at_any_moment_leaves_old_or_new(directory):
    """Workers that are killed in mid-turn leave generations that read, and never an old token."""
    host = Host(directory)
    begin(host, CALL)
    code = IN_A_PROCESS + (
        "while True:\n"
        "    drive(host.generations.turn(BLOCKING, [Turn(F, (EU,))], ''))\n"
        "    print(host.generations.read([CALL])[0].text, flush=True)\n"
    )
    seen: list[str] = []
    for number in range(8):
        with start(code, directory) as process:
            seen += [process.stdout.readline().strip() for _ in range(5 + number)]
            process.kill()
            seen += process.stdout.read().split("\n")[:-1]
        text = host.generations.read([CALL])[0].text
        assert text == seen[-1] or text not in seen
        seen.append(text)
    host.close()


@pytest.mark.parametrize("damage", ["garbage", "head", "empty", "half", "tables", "gone"])
@pytest.mark.parametrize("running", [True, False])
def test_a_damaged_file_loses_generations_and_revives_none(host, directory, damage, running):
    """After any damage to host.sqlite the next use works, and no older token comes back."""
    old = begin(host, CALL)
    for number in range(200):
        turn(host, Turn(f"t:{number}"))
    turn(host, Turn(F))
    new = host.generations.read([CALL])
    if not running:
        host.close()
    damage_file(directory / "host.sqlite", damage, "generations")
    host.host_database.check_at = 0.0  # it is time to look at the file again
    now = begin(host, CALL)
    assert now != old
    assert now[0].text
    turn(host, Turn(F))
    assert host.generations.read([CALL])[0].text not in (now[0].text, new[0].text)
    assert host.id


@pytest.mark.parametrize("lost", ["host.sqlite-wal", "host.sqlite"])
def test_lost_commits_are_noticed(directory, lost):
    """When the log of the last commits is gone, everything is lost rather than some of it old."""
    code = IN_A_PROCESS + (
        "print(drive(host.generations.stamp_states(BLOCKING, [CALL]))[0].text, flush=True)\n"
        "host.host_database.file.writer.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()\n"
        "drive(host.generations.turn(BLOCKING, [Turn(F)], ''))\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with start(code, directory) as process:
        old = process.communicate()[0].strip()
    (directory / lost).unlink()
    host = Host(directory)
    assert host.generations.read([CALL]) == [LOST]
    assert begin(host, CALL)[0].text != old
    host.close()


def test_the_journal_is_carried_over_from_a_damaged_file(host, directory):
    """Setting a damaged file aside keeps the journal rows that can still be read, as due."""
    host.journal.add([Turn(F)], "note")
    damage_file(directory / "host.sqlite", "tables", "generations")
    assert host.generations.read([CALL]) == [LOST]
    assert [(turns, note) for _, turns, note in host.journal.due_rows()] == [([Turn(F)], "note")]
    assert (directory / "host.sqlite.damaged").exists()


def test_a_directory_removed_while_running_is_made_anew(host, second, directory):
    """After `rm -rf` the next use works, and all processes meet in the new file."""
    begin(host, CALL)
    old = second.generations.read([CALL])
    run("import shutil, sys; shutil.rmtree(sys.argv[1])", directory)
    host.host_database.check_at = 0.0  # it is time to look at the file again
    assert host.generations.read([CALL]) == [LOST]
    new = begin(second, CALL)
    assert host.generations.read([CALL]) == new != old
    turn(host, Turn(F))
    assert second.generations.read([CALL]) == host.generations.read([CALL]) != new
    lock = host.lock("x")
    assert lock.try_acquire()
    lock.release()


def test_a_turn_right_after_a_removal_lands_in_the_new_file(host, second, directory):
    """An invalidation that follows `rm -rf` at once is in the file that all will read."""
    begin(host, CALL)
    begin(second, CALL)
    run("import shutil, sys; shutil.rmtree(sys.argv[1])", directory)
    (old,) = begin(Host(directory), CALL)
    host.host_database.check_at = time.monotonic() + 60
    turn(host, Turn(F))
    third = Host(directory)
    assert third.generations.read([CALL])[0].text not in ("", old.text)
    third.close()


def test_closing_what_was_replaced_leaves_the_new_file_alone(host, directory):
    """A connection to a removed file does not take the new file's log with it when it closes."""
    begin(host, CALL)
    for path in directory.glob("host.*"):
        path.unlink()
    code = IN_A_PROCESS + (
        "print(drive(host.generations.stamp_states(BLOCKING, [CALL]))[0].text, flush=True)\n"
        "sys.stdin.readline()\n"
        "drive(host.generations.turn(BLOCKING, [Turn(F)], ''))\n"
        "print(host.generations.read([CALL])[0].text, flush=True)\n"
        "import os; os._exit(0)\n"
    )
    with start(code, directory) as process:
        first = process.stdout.readline().strip()
        host.close()
        assert (directory / "host.sqlite-wal").exists()
        process.stdin.write("\n")
        process.stdin.flush()
        second = process.stdout.readline().strip()
    assert host.generations.read([CALL])[0].text == second != first


def test_a_locked_file_costs_a_quarter_of_a_second(host, directory):
    """A foreign lock is a `TierError` after at most 0.25 s (reads are not held up), then gone."""
    begin(host, CALL)
    other = sqlite3.connect(directory / "host.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    with pytest.raises(TierError):
        turn(host, Turn(F))
    assert time.monotonic() - begun < 0.25 + 1.0  # a busy machine
    host.host_database.check_at = 0.0  # it is time to look at the file again
    host.generations.read([CALL, Ref("t:new")])
    other.execute("ROLLBACK")
    other.close()
    turn(host, Turn(F))


def test_a_directory_that_cannot_be_used_is_a_tier_error(tmp_path):
    """A file where the directory should be: `TierError` at use; generations are its own."""
    path = tmp_path / "file"
    path.write_text("x")
    host = Host(path / "cache")
    assert host.generations.read([CALL]) == [LOST]
    for use in (
        lambda: turn(host, Turn(F)),
        lambda: host.journal.add([Turn(F)], ""),
        host.journal.due_rows,
        lambda: host.id,
        lambda: host.lock("x").try_acquire(),
    ):
        with warnings.catch_warnings(), pytest.raises(TierError):
            warnings.simplefilter("ignore", cache_directory.DirectoryWarning)
            use()
    begun = begin(host, CALL)
    assert begun == host.generations.read([CALL]) != [LOST]
    assert not host.journal.has_due_rows_now(REDIS)  # nothing was ever written down there
    host.close()


def test_everything_is_the_owners_only(host, directory):
    """Directories are 0700 and files 0600, whatever the umask and whatever they were before."""
    directory.chmod(0o777)
    mask = os.umask(0)
    try:
        begin(host, CALL)
        lock = host.lock("x")
        lock.try_acquire()
    finally:
        os.umask(mask)
    host.close()
    Host(directory).close()
    for path in (directory, *directory.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    lock.release()


def test_another_users_directory_is_refused(tmp_path):
    """A cache directory of another user, or behind another user's link, is not used."""
    if os.geteuid() != 0:
        pytest.fail("only root can give a directory away; run this test as root")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    _refused(theirs)
    assert list(theirs.iterdir()) == []
    (tmp_path / "mine").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "mine")
    assert Host(link).cache_directory.open() == cache_directory.WRITABLE
    os.chown(link, 12345, 12345, follow_symlinks=False)
    _refused(link)


def _refused(directory):
    place = Host(directory).cache_directory
    with (
        pytest.warns(cache_directory.DirectoryWarning, match="another user"),
        pytest.raises(TierError),
    ):
        place.open()
    assert place.health()["state"] == cache_directory.UNUSABLE


def test_a_link_in_the_place_of_a_file_is_not_followed(host, directory, tmp_path):
    """A symbolic link named host.sqlite is set aside, and its target is not touched."""
    target = tmp_path / "precious"
    target.write_bytes(b"")
    (directory / "host.sqlite").symlink_to(target)
    assert host.generations.read([CALL]) == [LOST]
    assert begin(host, CALL) == host.generations.read([CALL])
    assert (directory / "host.sqlite.damaged").is_symlink()
    assert target.read_bytes() == b""


# --- fork ----------------------------------------------------------------------------------------

FORK = (
    IN_A_PROCESS
    + """
import os
first = drive(host.generations.stamp_states(BLOCKING, [CALL]))[0].text
lock = host.lock("key")
assert lock.try_acquire("parent")
readable, writable = os.pipe()
go, went = os.pipe()
child = os.fork()
if not child:
    try:
        assert host.generations.read([CALL])[0].text == first
        assert lock.try_acquire("child") is False
        assert host.lock("key").holder() == "parent"
        os.write(writable, b"r")
        os.read(go, 1)
        assert host.lock("key").try_acquire("child")
        drive(host.generations.turn(BLOCKING, [Turn(F)], ""))
        second = host.generations.read([CALL])[0].text
        assert second != first
        os.write(writable, second.encode())
        host.close()
        os._exit(0)
    except BaseException as error:
        os.write(writable, f"!{error!r}".encode())
        os._exit(1)
assert os.read(readable, 1) == b"r"
lock.release()
if sys.argv[2] == "close":
    host.close()
os.write(went, b"g")
second = os.read(readable, 100).decode()
_, status = os.waitpid(child, 0)
assert host.generations.read([CALL])[0].text == second, second
host.close()
print(status, second)
"""
)


@pytest.mark.parametrize("parent", ["close", "stay"])
def test_a_fork_shares_nothing_but_the_files(directory, parent):
    """After a fork both see each other's turns, whichever closes; a lock stays the parent's."""
    status, second = run(FORK, directory, parent).split()
    assert status == "0"
    host = Host(directory)
    assert host.generations.read([CALL])[0].text == second
    host.close()


# --- locks ---------------------------------------------------------------------------------------


def test_one_holder_at_a_time(host, second):
    """No other gets a lock that is held, in this process or another; once free, any can."""
    lock, other = host.lock("key"), second.lock("key")
    assert lock.try_acquire("me")
    assert not other.try_acquire("you")
    assert not lock.try_acquire("me")
    another = host.lock("another")
    assert another.try_acquire()
    another.release()
    assert other.holder() == "me" == lock.holder()
    lock.release()
    assert other.holder() == ""
    assert other.try_acquire("you")
    assert lock.holder() == "you"
    lock.release()
    assert not lock.try_acquire()
    other.release()


def test_a_released_lock_leaves_no_file(host, directory):
    """The file of a lock goes with its release."""
    lock = host.lock("key")
    lock.try_acquire()
    assert len(list((directory / "locks").iterdir())) == 1
    lock.release()
    lock.release()
    assert list((directory / "locks").iterdir()) == []


def test_a_lock_is_free_when_its_holder_is_killed(host, directory):
    """The kernel frees the lock of a killed process at once; its text names no holder then."""
    code = IN_A_PROCESS + (
        "lock = host.lock('key')\nprint(lock.try_acquire('victim'), flush=True)\nsys.stdin.read()\n"
    )
    with start(code, directory) as process:
        assert process.stdout.readline() == "True\n"
        lock = host.lock("key")
        assert lock.holder() == "victim"
        assert not lock.try_acquire()
        process.kill()
        process.wait()
        assert lock.holder() == ""
        assert lock.try_acquire("heir")
        lock.release()


def test_a_lock_is_free_when_its_holder_is_gone_and_its_child_lives(host, directory):
    """A child that was forked while the lock was held does not keep it."""
    code = IN_A_PROCESS + (
        "import os\n"
        "lock = host.lock('key')\nassert lock.try_acquire('parent')\n"
        "if os.fork():\n    os._exit(0)\n"
        "print('child', flush=True)\nsys.stdin.read()\nos._exit(0)\n"
    )
    with start(code, directory) as process:
        assert process.stdout.readline() == "child\n"
        process.wait()
        lock = host.lock("key")
        assert lock.try_acquire("heir")
        lock.release()


def test_a_lock_on_a_file_that_was_unlinked_meanwhile_is_none(host):
    """Between opening and locking the file, its holder lets go and another takes the name."""
    first, late, third = (host.lock("key") for _ in range(3))
    assert first.try_acquire()
    taken = []

    def meanwhile():  # late has opened the file, and not yet locked it
        if not taken:
            first.release()
            taken.append(third.try_acquire())

    with calls_of(file_locks.flock, then=meanwhile):
        assert not late.try_acquire()
    assert taken == [True]
    third.release()


def test_locks_are_exclusive_under_contention(host):
    """Threads that take, release and unlink one lock in a hurry never hold it together."""
    inside, most, count = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, count
        done = 0
        while done < 100:
            lock = host.lock("key")
            if not lock.try_acquire():
                time.sleep(0)
                continue
            with guard:
                inside += 1
                most = max(most, inside)
            with guard:
                inside -= 1
                count += 1
            lock.release()
            done += 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 600)


def test_patience_is_what_is_promised():
    """The patience with foreign locks stays within the bounds on cost (I6)."""
    assert sqlite_file.WRITER_WAIT_SECONDS <= 0.25
    assert sqlite_file.READER_WAIT_SECONDS <= 0.05
    assert stamps.TOKEN_CHARACTERS == 16


# --- groups die ----------------------------------------------------------------------------------


def swept(host):
    return drive(host.generations.sweep(BLOCKING))


def names_of(directory):
    with closing(sqlite3.connect(directory / "host.sqlite")) as connection:
        return {
            table: {name for (name,) in connection.execute(f"SELECT name FROM {table}")}
            for table in ("groups", "generations", "lives")
        }


def test_a_group_is_forgotten_when_no_entry_can_name_it(directory):
    """Groups go when the longest ttl under them is over, not before, and then everywhere."""
    clock = Ahead()
    host, other = Host(directory, clock), Host(directory, clock)
    week, tag, gone = Ref("p:week"), Ref("t:tag"), Ref("t:never used")
    before = begin(host, week, tag)
    drive(host.generations.extend_life(BLOCKING, ["p:week"], 7 * 86400))
    turn(host, Turn(gone.group))
    assert other.generations.read([week, tag]) == before
    clock.step(3600)
    assert swept(host) == 1
    assert begin(other, week, tag) == before
    clock.step(2 * 86400)
    assert swept(host) == 1
    assert other.generations.read([week, tag]) == [before[0], LOST]
    assert all(names == {"p:week"} for names in names_of(directory).values())
    assert begin(other, tag) != before[1:]
    clock.step(10 * 86400)
    assert swept(other) == 2
    assert host.generations.read([week, tag]) == [LOST, LOST]
    host.close()
    other.close()


def test_what_has_no_ttl_keeps_its_groups(directory):
    """A group that an entry without a ttl names is not forgotten."""
    clock = Ahead()
    host = Host(directory, clock)
    before = begin(host, Ref("f:forever"))
    drive(host.generations.extend_life(BLOCKING, ["f:forever"], None))
    clock.step(1000 * 86400)
    assert swept(host) == 0
    assert host.generations.read([Ref("f:forever")]) == before
    host.close()


def test_groups_in_use_are_seldom_written(directory):
    """Stores and computations in a row renew the time of their groups once."""
    host = Host(directory)
    with calls_of(host_database.HostDatabase.write) as writes:
        for _ in range(50):
            begin(host, Ref("f:x"))
            drive(host.generations.extend_life(BLOCKING, ["f:x"], 30 * 86400))
    assert len(writes) == 2
    host.close()


def test_a_swept_group_is_not_learned_from_an_older_answer(directory):
    """An answer of a shared authority from before a sweep is not adopted after it."""
    clock = Ahead()
    host = Host(directory, clock)
    refs = [Ref("f:x")]
    before = host.generations.read(refs)
    turn(host, Turn("f:x"))
    clock.step(3600)
    swept(host)
    host.generations.learn(refs, before, [State("an older token", "")])
    assert host.generations.read(refs) == [LOST]
    host.close()


def test_an_invalidation_on_its_way_is_not_swept(directory):
    """A group stays while a shared tier has yet to hear of it."""
    clock = Ahead()
    host = Host(directory, clock)
    row = host.journal.add([Turn("p:x")], "{}")
    clock.step(86400)
    assert swept(host) == 0
    host.journal.mark_done(row)
    assert swept(host) == 1
    host.close()


def test_many_dead_groups_go_in_small_transactions(directory):
    """Sweeping holds the lock of writers for a part of the groups at a time."""
    clock = Ahead()
    host = Host(directory, clock)
    for at in range(0, 1200, 100):
        begin(host, *(Ref(f"t:{n}") for n in range(at, at + 100)))
    clock.step(3 * 86400)
    with calls_of(host_state.delete_groups, note=lambda given: len(given["groups"])) as held:
        assert swept(host) == 1200
    assert held == [500, 500, 200]
    host.close()
