"""The magics, in a real kernel and in a terminal: what each one displays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT
from kernels import TIMEOUT, Kernel
from redis_server import RedisServer
from waiting import until

import memo


@pytest.fixture(scope="module")
def _kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(_kernel: Kernel) -> Kernel:
    """A kernel in which nothing was counted yet, and nothing is reported."""
    _kernel.run("%cache_report off\n%cache_stats --reset")
    _kernel.updates.clear()
    return _kernel


# --- %cache_stats -------------------------------------------------------------------------------


def test_stats_before_anything_was_called(kernel: Kernel) -> None:
    """If there is nothing to show yet, the table says what to do."""
    shown = kernel.run("%cache_stats")
    assert len(shown.bundles) == 1
    assert "@cache" in shown.text
    assert "<code>@cache</code>" in shown.html


def test_stats_show_hits_and_misses(kernel: Kernel) -> None:
    """`%cache_stats` shows, for sync and async functions alike, what the cache did."""
    kernel.run("""
        @cache
        async def load_async(x):
            await asyncio.sleep(0.02)
            return x

        @cache
        def load_sync(x):
            return x

        for i in range(4):
            assert await load_async(1) == 1
            assert load_sync(2) == 2
    """)
    shown = kernel.run("%cache_stats")
    bundle = shown.bundles[0]
    assert set(bundle) == {"text/plain", "text/html"}
    assert "6 hits · 2 misses" in shown.text
    assert "load_async" in shown.text
    assert "load_sync" in shown.text
    assert "misses: not cached yet 1" in shown.text
    assert "6 hits · 2 misses" in shown.html
    assert "<table" in shown.html
    assert "not cached yet 1" in shown.html
    assert shown.html.count("<tr>") == 4  # titles, two functions, the total


def test_stats_name_the_tiers(kernel: Kernel) -> None:
    """Below the table stands what each tier says of itself, the disk with its budget."""
    kernel.run("""
        @cache
        def sized(x):
            return x
        sized(1), sized(1)
    """)
    shown = kernel.run("%cache_stats")
    line = next(line for line in shown.text.splitlines() if line.startswith("disk"))
    assert " of 10.0 GiB" in line
    assert "up" in line


def test_stats_tell_how_redis_is(kernel: Kernel, redis_server: RedisServer) -> None:
    """The table says in words if Redis is up, its breaker open, or invalidations wait for it."""
    kernel.run(f"""
        memo.configure(redis_url={redis_server.url!r})
        @cache
        def far(x): return x
        far(1)
    """)

    def line(tier: str) -> str:
        lines = kernel.run("%cache_stats").text.splitlines()
        return next((line for line in lines if line.startswith(tier)), "")

    try:
        assert "up" in line("redis").split()
        assert "not asked until" not in line("redis")
        redis_server.kill()
        kernel.run("far.invalidate()")
        assert "down" in line("redis")
        assert "not asked until it answers again" in line("redis")
        assert "1 invalidation on the way to Redis" in line("host")
        redis_server.restart()
        until(lambda: kernel.run("far(1)") and "on the way" not in line("host"))
        assert "not asked until" not in line("redis")
    finally:
        kernel.run("memo.configure(redis_url=None)")


def test_stats_of_some_functions(kernel: Kernel) -> None:
    """Patterns select functions; one that selects none names those that there are."""
    kernel.run("""
        @cache
        def north(x): return x
        @cache
        def south(x): return x
        north(1), south(1)
    """)
    shown = kernel.run("%cache_stats nor*")
    assert "north" in shown.text
    assert "south" not in shown.text
    wrong = kernel.attempt("%cache_stats west")
    assert not wrong.bundles
    assert "No cached function matches west" in wrong.stderr + wrong.error
    assert "north" in wrong.stderr + wrong.error


def test_stats_as_a_frame_and_as_json(kernel: Kernel) -> None:
    """`df = %cache_stats --frame` is a DataFrame, `--json` the text for other programs."""
    kernel.run("""
        @cache
        def framed(x): return x
        framed(1), framed(1)
    """)
    shown = kernel.run("""
        df = %cache_stats --frame
        print(type(df).__name__, df.loc["__main__:framed", "hits"])
    """)
    assert shown.stdout.split() == ["DataFrame", "1"]
    assert not shown.bundles
    shown = kernel.run("%cache_stats --json")
    assert json.loads(shown.text)["functions"]["__main__:framed"]["hits"] == 1


def test_stats_plot_is_svg(kernel: Kernel) -> None:
    """`--plot` draws hits, stale hits and misses; a terminal gets block characters."""
    kernel.run("""
        @cache
        def drawn(x): return x
        drawn(1), drawn(1)
    """)
    shown = kernel.run("%cache_stats --plot")
    assert "<svg" in shown.html
    assert "█" in shown.text
    assert "<svg" not in kernel.run("%cache_stats").html


def test_stats_of_many_functions_are_bounded(kernel: Kernel) -> None:
    """At most 30 rows, with how many there are and the flag that shows all."""
    kernel.run("""
        for at in range(35):
            cache(lambda x: x, name=f"m:many_{at}", version="1")(1)
    """)
    shown = kernel.run("%cache_stats m:*")
    assert shown.text.count("m:many_") == 30
    for one in (shown.text, shown.html):
        assert "30 of 35 functions; --limit 0 shows all." in one
    assert kernel.run("%cache_stats m:* --limit 0").text.count("m:many_") == 35


def test_stats_reset(kernel: Kernel) -> None:
    """`--reset` starts this kernel's counters at zero, and says so."""
    kernel.run("""
        @cache
        def counted(x): return x
        counted(1)
    """)
    assert "zero" in kernel.run("%cache_stats --reset").text
    assert "counted" not in kernel.run("%cache_stats").text


OTHER = """
import memo
from memo import cache
@cache
def elsewhere(x): return x
elsewhere(1), elsewhere(1), elsewhere(1)
"""


def test_stats_of_all_kernels(kernel: Kernel) -> None:
    """`--all` adds up every process that shares the cache, those that have ended included."""
    kernel.run("""
        @cache
        def here(x): return x
        here(1), here(1)
    """)
    path = kernel.home / "other.py"
    path.write_text(OTHER)
    done = kernel.run(f"""
        import subprocess, sys
        done = subprocess.run([sys.executable, {str(path)!r}], capture_output=True, text=True)
        print(done.returncode, done.stderr)
    """)
    assert done.stdout.split() == ["0"]
    everybody = kernel.run("%cache_stats --all")
    assert "elsewhere" in everybody.text
    assert "here" in everybody.text
    assert "processes" in everybody.text
    assert "elsewhere" not in kernel.run("%cache_stats").text


# --- %cache_clear, %cache_ls, %cache_explain ----------------------------------------------------


def test_clear_by_function_and_argument(kernel: Kernel) -> None:
    """`%cache_clear f --where region=EU` drops just those, and says what it dropped."""
    kernel.run("""
        calls = []
        @cache
        def sales(region, year):
            calls.append((region, year))
            return region
        def use():
            calls.clear()
            for region in ("EU", "US"):
                for year in (2023, 2024):
                    sales(region, year)
            print(sorted(calls))
        use()
    """)
    assert kernel.run("use()").stdout == "[]\n"
    shown = kernel.run("%cache_clear sales --where region=EU")
    assert "invalidated sales(region='EU')" in shown.text
    assert "disk" in shown.html
    dropped = shown.text.splitlines()[1]
    assert ": 2 entries on this host (" in shown.text
    assert "sales(region='EU', year=2023)" in dropped
    assert "sales(region='EU', year=2024)" in dropped
    again = kernel.run("%cache_clear sales --where region=EU")
    assert again.text.startswith("nothing matched sales(region='EU')")
    assert kernel.run("use()").stdout == "[('EU', 2023), ('EU', 2024)]\n"
    kernel.run("%cache_clear sales --where region=US --where year=2024")
    assert kernel.run("use()").stdout == "[('US', 2024)]\n"
    kernel.run("%cache_clear sales")
    assert kernel.run("use()").stdout.count("(") == 4


def test_clear_of_a_function_that_takes_a_reason(kernel: Kernel) -> None:
    """An argument called `reason` is selected by `--where` as any other, and otherwise left out."""
    kernel.run("""
        @cache
        def excused(name, reason="none"): return name
        excused("ann"), excused("bob", reason="ill")
    """)
    by_reason = kernel.run("%cache_clear excused --where reason=ill").text
    assert "excused(name='bob', reason='ill')" in by_reason
    assert "excused: 1 entry on this host" in kernel.run("%cache_clear excused").text


def test_clear_by_tag(kernel: Kernel) -> None:
    """`%cache_clear --tag t` drops the entries with that tag, of whatever function."""
    kernel.run("""
        calls = []
        @cache(tags=["daily"])
        def tagged(x):
            calls.append(x)
        tagged(1)
    """)
    shown = kernel.run("%cache_clear --tag daily").text
    assert "tag 'daily': 1 entry on this host" in shown
    assert "tagged(x=1)" in shown
    assert kernel.run("tagged(1); print(calls)").stdout == "[1, 1]\n"


def test_quotes_around_words_are_no_part_of_them(kernel: Kernel) -> None:
    """A word with a space is put in quotes, as in a shell; quotes of a value make it text."""
    kernel.run("""
        @cache(ttl=None, tags=["place:{x}"])
        def quoted(x): return x
        quoted("New York"); quoted("2"); quoted(2)
    """)
    assert "quoted" in kernel.run('%cache_stats "quoted"').text
    assert "1 entry" in kernel.run('%cache_ls --tag "place:New York"').text
    assert "1 entry" in kernel.run("""%cache_ls "quoted" --where 'x="2"'""").text
    assert "1 entry" in kernel.run('%cache_ls quoted --where x="2"').text
    assert "1 entry" in kernel.run("%cache_ls quoted --where x=2").text
    assert "1 entry" in kernel.run('%cache_ls quoted --where x="New York"').text
    assert "1 entry" in kernel.run('%cache_clear --tag="place:New York"').text
    assert "1 entry" in kernel.run('%cache_clear quoted --where x="2"').text
    kernel.run('%%cache --ttl "1h30m" --name "a cell" --tags "a, b"\nanswer = 1')
    assert "a cell()" in kernel.run("%cache_clear --tag b").text
    kernel.run("%%cache --ttl None\nanswer = 1")
    kernel.run('%%cache --name "a cell [1]"\nanswer = 1')
    assert "a cell [1]()" in kernel.run('%cache_clear "a cell [1]"').text, "it is no pattern"


def test_explain_reads_the_call_as_python(kernel: Kernel) -> None:
    """Braces in the call make a set, and are not replaced by the value of a name."""
    kernel.run("""
        @cache(ttl=None)
        def read_as_python(x): return x
        item = 5
        read_as_python({item})
    """)
    assert "hit (fresh)" in kernel.run("%cache_explain read_as_python({item})").text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%cache_clear nothing", "no cached function has this name"),
        ("%cache_clear known --where colour=red", "colour"),
        ("%cache_clear known --where colour", "--where region=EU"),
        ("%cache_clear known --tag t", "--tag cannot be combined"),
        ("%cache_ls known --where colour=red", "colour"),
        ("%cache_explain known", "Write a call"),
        ("%cache_explain known(", "Write a call"),
        ("%cache_explain len([])", "not a cached function"),
        ("%cache_explain nowhere(1)", "name 'nowhere' is not defined."),
        ("%cache_stats --colour", "%cache_stats has no --colour"),
        ("%cache_report perhaps", "perhaps"),
        ("%cache_explain known(undefined)", "name 'undefined' is not defined"),
        ("%cache_explain known(1, 2)", "but 2 were given"),
        ("%cache_stats 'known", "A quotation mark is not closed: 'known"),
        ("%cache_stats --limit -1", "must be a number"),
        ("%cache_ls --tier dsk", "did you mean 'disk'?"),
        ("%cache_clear --where colour", "--where region=EU"),
    ],
)
def test_mistakes_are_told_without_a_traceback(kernel: Kernel, line: str, said: str) -> None:
    """A mistake on a magic's line is one sentence that says what to write."""
    kernel.run("""
        @cache
        def known(x): return x
    """)
    shown = kernel.attempt(line)
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr + shown.error


def test_explain_shows_what_explain_answers(kernel: Kernel) -> None:
    """`%cache_explain f(args)` shows `f.explain(args)`, evaluated where the user is."""
    kernel.run("""
        class Answer:
            def __init__(self, *facts): self.facts = facts
            def __repr__(self): return f"text {self.facts}"
            def _repr_html_(self): return f"<b>html {self.facts}</b>"
        class Tool:
            def explain(self, *args, **kwargs): return Answer(args, kwargs)
        tools, year = {"f": Tool()}, 2024
    """)
    shown = kernel.run('%cache_explain tools["f"]("EU", year=year + 1)')
    assert shown.text == "text (('EU',), {'year': 2025})"
    assert "<b>html" in shown.html
    assert kernel.run('%cache_explain await tools["f"](1)').text == "text ((1,), {})"


def test_ls_lists_entries(kernel: Kernel) -> None:
    """`%cache_ls` lists entries with their arguments, age, size and cost, also as a frame."""
    kernel.run("""
        @cache(ttl="1h")
        def listed(region, year):
            time.sleep(0.01)
            return "x" * 5000
        @cache
        def unlisted(x): return x
        listed("EU", 2024), listed("US", year=2024), unlisted(1)
    """)
    shown = kernel.run("%cache_ls listed")
    assert "2 entries" in shown.text
    assert "EU" in shown.text
    assert "year=2024" in shown.text
    assert "unlisted" not in shown.text
    assert "<table" in shown.html
    assert "1 min" not in shown.text.replace("59 min", "")
    frame = kernel.run("""
        df = %cache_ls listed --frame
        print(len(df), bool((df["size"] > 0).all()), bool((df["cost_seconds"] >= 0.01).all()))
    """)
    assert frame.stdout == "2 True True\n"
    gone = kernel.run("""
        listed.invalidate()
        df = %cache_ls listed --frame
        print(bool(df["expires_in_seconds"].isna().all()), bool((df["age_seconds"] > 0).all()))
    """)
    assert gone.stdout == "True True\n"
    assert "No entries on this host." in kernel.run("%cache_ls nothing_like_it").text
    assert "No entries on this host; did you mean 'listed'" in kernel.run("%cache_ls lisetd").text
    kernel.run("not_called = cache(lambda x: x, name='not_called')")
    assert kernel.run("%cache_ls not_called").text == "No entries on this host."


def test_ls_filters_and_orders(kernel: Kernel) -> None:
    """`%cache_ls` says which tiers hold an entry, and selects by argument, tag and tier."""
    kernel.run("""
        @cache(tags=["weekly"])
        def picked(region, size):
            return "x" * size
        @cache
        def other(region): return region
        picked("EU", 10), picked("EU", 9000), picked("US", 500), other("EU")
        df = %cache_ls --frame picked other
    """)

    def rows(options: str) -> list[str]:
        line = f"df = %cache_ls --frame picked other {options}"
        return kernel.run(f"{line}\nprint(list(df['arguments']))").stdout.strip()

    assert kernel.run("print(set(df['tier']))").stdout == "{'memory, disk'}\n"
    assert rows("--where size=500") == """["region='US', size=500"]"""
    assert rows("--where region=EU --tag weekly --by size") == (
        """["region='EU', size=9000", "region='EU', size=10"]"""
    )
    assert rows("--tier redis") == rows("--tag daily") == rows("--where colour=red") == "[]"
    assert len(rows("--tier memory --limit 1").split("size=")) <= 2
    shown = kernel.run("%cache_ls picked --by size --limit 1")
    assert "size=9000" in shown.text
    assert "1 of 3 entries; --limit 0 shows all." in shown.text
    assert "memory, disk" in shown.html


# --- %cache_report ------------------------------------------------------------------------------


def test_report_puts_a_line_under_each_cell(kernel: Kernel) -> None:
    """A cell that used the cache gets one line, below what it shows itself."""
    kernel.run("""
        @cache
        def slow(x):
            time.sleep(0.05)
            return x
    """)
    assert "on" in kernel.run("%cache_report on").text
    first = kernel.run("slow(1)")
    assert first.bundles[-1]["text/plain"] == "1 miss: slow() not cached yet"
    again = kernel.run("slow(1)\nslow(1)")
    assert len(again.bundles) == 2
    line = again.bundles[-1]
    assert line["text/plain"].startswith("2 hits (")
    assert " · saved " in line["text/plain"]
    assert "2 hits (" in line["text/html"]
    assert not kernel.run("1 + 1").bundles[1:]
    assert "off" in kernel.run("%cache_report off").text
    assert len(kernel.run("slow(1)").bundles) == 1


def test_report_under_cells_that_await(kernel: Kernel) -> None:
    """Top-level `await` changes nothing."""
    kernel.run("""
        @cache
        async def fetch(x):
            await asyncio.sleep(0.01)
            return x
    """)
    kernel.run("%cache_report on")
    first = kernel.run("r = await asyncio.gather(*(fetch(5) for _ in range(3)))")
    assert first.text == "1 miss: fetch() not cached yet · 2 shared"
    assert kernel.run("r = await fetch(5)").text.startswith("1 hit (")


def test_report_under_cells_that_raise(kernel: Kernel) -> None:
    """A cell that raised gets its line as well."""
    kernel.run("""
        @cache
        def broken(x):
            raise KeyError(x)
    """)
    kernel.run("%cache_report on")
    shown = kernel.attempt("broken(1)")
    assert "KeyError" in shown.error
    assert "1 raised" in shown.text


def test_report_says_which_code_changed(kernel: Kernel) -> None:
    """A miss after an edit names what was edited, in another cell as well."""
    kernel.run("""
        def clean(x): return x
        @cache
        def cleaned(x): return clean(x)
        cleaned(1)
    """)
    kernel.run("%cache_report on")
    kernel.run("def clean(x): return x + 1")
    line = kernel.run("cleaned(1)").bundles[-1]
    assert line["text/plain"] == "1 miss: code of clean() changed"
    assert "code of clean() changed" in line["text/html"]
    told = kernel.run("%cache_explain cleaned(2)")
    assert "x is 2; the nearest entry has 1" in told.text
    assert "x is 2; the nearest entry has 1" in told.html


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_report_follows_a_background_refresh(kernel: Kernel, kind: str) -> None:
    """A refresh that ends after its cell changes the line under that cell, in place."""
    wait = "await " if kind == "async def" else ""
    go = "await asyncio.to_thread(go.wait)" if kind == "async def" else "go.wait()"
    kernel.run(f"""
        go = threading.Event()
        @cache(ttl=None, stale_while_revalidate=3600)
        {kind} aging(x):
            {go}
            return x
        go.set()
        {wait}aging("{kind}")
        go.clear()
        aging.expire()
    """)
    kernel.run("%cache_report on")
    shown = kernel.run(f'{wait}aging("{kind}")')
    assert shown.bundles[-1]["text/plain"].startswith("1 stale")
    assert "refreshed" not in shown.bundles[-1]["text/plain"]
    kernel.run("go.set()")
    kernel.wait_for_update(lambda text: text.startswith("1 stale, refreshed"))


@pytest.mark.timing
def test_report_costs_hits_nothing(kernel: Kernel) -> None:
    """A cell that hits 1,000 times with the report on is at most 5 % slower than with it off."""
    kernel.run("""
        @cache
        def often(x): return x
        often(1)
        def measured():
            begin = time.perf_counter()
            for _ in range(1000): often(1)
            return time.perf_counter() - begin
        on, off = [], []
    """)
    for _ in range(15):
        kernel.run("%cache_report on")
        kernel.run("on.append(measured())")
        kernel.run("%cache_report off")
        kernel.run("off.append(measured())")
    ratio = float(kernel.run("print(min(on) / min(off))").stdout)
    assert ratio < 1.05


# --- Coming and going ---------------------------------------------------------------------------

STATE = """
import sys
POOLS = ("memo-offload", "memo-background")  # they end by themselves
def state():
    shell = get_ipython()
    return (
        {name: list(found) for name, found in shell.events.callbacks.items()},
        sorted(shell.magics_manager.magics["line"]),
        sorted(shell.magics_manager.magics["cell"]),
        sorted(shell.magics_manager.registry),
        [type(one).__name__ for one in shell.configurables],
        len(shell.Completer.custom_matchers),
        sorted(t.name for t in threading.enumerate() if not t.name.startswith(POOLS)),
        len(shell.input_transformers_cleanup),
        len(sys.modules["memo.metrics.recorder"].COUNTERS.listeners),
    )
"""


def test_unloading_leaves_nothing_behind(kernel: Kernel) -> None:
    """After `%unload_ext memo` the shell is as it was: magics, callbacks, completers, threads."""
    kernel.run("%unload_ext memo")
    try:
        kernel.run(f"{STATE}\nbefore = state()")
        assert "cache_" not in kernel.run("print(before)").stdout
        assert kernel.run("print(before[-1])").stdout == "2\n", "what is under way; faults"
        kernel.run("%load_ext memo")
        kernel.run("memo.load_ipython_extension(get_ipython())")
        loaded = kernel.run("print(before == state(), 'cache_stats' in state()[1])")
        assert loaded.stdout == "False True\n"
        kernel.run("%cache_report on")
        kernel.run("%reload_ext memo")
        kernel.run("%unload_ext memo")
        left = kernel.run("""
            for a, b in zip(before, state()):
                if a != b: print(a, b)
        """)
        assert left.stdout == ""
        assert "not found" in kernel.attempt("%cache_stats").stderr
    finally:
        kernel.run("%load_ext memo")


def test_names_and_options_complete(kernel: Kernel) -> None:
    """Tab completes names of cached functions and the options of each magic."""
    kernel.run("""
        @cache
        def completed_name(x): return x
        @cache(name="my report.ipynb:completed")
        def renamed(x): return x
    """)

    def completions(code: str) -> list[str]:
        reply = kernel.client.complete(code, reply=True, timeout=TIMEOUT)
        return reply["content"]["matches"]

    assert "completed_name" in completions("%cache_stats comp")
    assert "completed_name" in completions("%cache_clear comp")
    assert "--plot" in completions("%cache_stats --pl")
    assert {"on", "off"} <= set(completions("%cache_report o"))
    assert "completed_name" in completions("%cache_explain comp")
    assert "completed_name" in completions("%cache_ls comp")
    assert "--where" in completions("%cache_ls --wh")
    assert "--outputs" in completions("%%cache --out")
    quoted = '"my report.ipynb:completed"'
    for line in ("my", '"my', '"my rep', '"a b" my', "--tag x 'my rep"):
        assert completions(f"%cache_stats {line}") == [quoted]
    assert quoted in completions('%cache_stats "a b" ')


def test_completion_offers_nothing_of_others(kernel: Kernel) -> None:
    """In a line of ours Tab offers our flags and names only: no magics and no names of IPython."""
    kernel.run("""
        @cache
        def recalled(x): return x
    """)

    def completions(code: str) -> list[str]:
        reply = kernel.client.complete(code, reply=True, timeout=TIMEOUT)
        return sorted(reply["content"]["matches"])

    wanted = sorted(["--all", "--plot", "--json", "--frame", "--limit", "--reset"])
    assert completions("%cache_stats --") == wanted
    assert completions("%cache_clear recal") == ["recalled"]
    assert completions("%cache_clear zzz") == ["zzz"]
    assert completions("%cache_clear rel") == ["rel"], "not IPython's %reload_ext"
    assert "print" in completions("%cache_explain recalled(prin")


@pytest.mark.parametrize("jedi", [True, False])
def test_memo_completes_to_its_public_names(kernel: Kernel, jedi: bool) -> None:
    """`memo.` and Tab give what the documentation has, and no module or helper of memo's."""
    kernel.run(f"get_ipython().Completer.use_jedi = {jedi}")
    reply = kernel.client.complete("memo.", reply=True, timeout=TIMEOUT)
    found = {name.removeprefix("memo").lstrip(".") for name in reply["content"]["matches"]}
    assert {name for name in found if not name.startswith("_")} == set(memo.__all__)


def test_wrong_flags_and_names_get_a_suggestion(kernel: Kernel) -> None:
    """A flag, a function and an option that are nearly right are told the right one."""
    kernel.run("""
        @cache
        def suggested(x): return x
        suggested(1)
    """)
    assert "did you mean '--plot'?" in kernel.attempt("%cache_stats --plto").stderr
    assert "did you mean 'suggested'?" in kernel.attempt("%cache_stats sugested").stderr
    assert "did you mean 'suggested'" in kernel.attempt("%cache_clear sugested").stderr
    raised = kernel.attempt("@cache(tll=5)\ndef f(x): return x").error
    assert "did you mean 'ttl'?" in raised


def test_errors_of_memo_show_no_internals(kernel: Kernel) -> None:
    """The traceback of a mistake shows the line that has it, and none of memo's own."""
    raised = kernel.attempt("@cache(ttl=-5)\ndef f(x): return x").error
    assert "ttl=-5" in raised
    assert "memo/" not in raised
    kernel.run("""
        @cache
        def inside(x): return x
        @cache
        async def awaited_inside(x): return x
    """)
    for code, said in (
        ("with memo.mode('only'): inside(1)", "inside:1: miss (not cached yet)"),
        ("with memo.mode('only'): await awaited_inside(1)", "awaited_inside:1: miss"),
        ("memo.health(1)", "takes 0 positional arguments but 1 was given"),
        ("memo.File(3)", "must be a path"),
    ):
        raised = kernel.attempt(code).error
        assert said in raised
        assert "memo/" not in raised, raised
    raised = kernel.attempt("await memo.ainvalidate(function='no_such')").error
    assert "no cached function has this name" in raised
    assert "memo/" not in raised


def test_a_warning_points_at_the_function(kernel: Kernel) -> None:
    """A result that cannot be stored is warned about where its function is, not inside memo."""
    shown = kernel.run("""
        import threading
        @cache
        def lock(x): return threading.Lock()
        lock(1)
    """)
    assert "cannot be pickled" in shown.stderr
    assert "memo/" not in shown.stderr


def test_a_bare_cache_clear_asks(kernel: Kernel) -> None:
    """Without a name and without --all nothing is invalidated before a question is answered."""
    kernel.run("""
        @cache
        def asked_about(x): return x
        asked_about(1)
    """)
    kernel.client.allow_stdin = False
    try:
        refused = kernel.attempt("%cache_clear").stderr
    finally:
        kernel.client.allow_stdin = True
    assert "asked_about" in refused
    assert "--all" in refused
    assert kernel.run("print(asked_about.is_cached(1))").stdout == "True\n"
    for answer, left in (("n", "True"), ("y", "False")):
        kernel.attempt("%cache_clear", answer)
        assert kernel.run("print(asked_about.is_cached(1))").stdout == f"{left}\n"
    kernel.run("asked_about(1)")
    assert "1 entry" in kernel.run("%cache_clear --where x=1").text, "a selection needs no question"
    kernel.run("asked_about(1)")
    kernel.run("%cache_clear --all")
    assert kernel.run("print(asked_about.is_cached(1))").stdout == "False\n"


def test_entries_are_listed_with_their_state(kernel: Kernel) -> None:
    """`%cache_ls` says of each entry whether the next call would use it."""
    kernel.run("""
        @cache(ttl=3600)
        def listed_state(x): return x
        @cache(ttl=3600, stale_while_revalidate=60)
        def aged(x): return x
        listed_state(1); listed_state(2); aged(1)
        listed_state.invalidate(2)
        aged.expire()
    """)
    text = kernel.run("%cache_ls listed_state aged").text
    rows = {tuple(line.split()[:3]) for line in text.splitlines()}
    assert {("listed_state", "x=1", "fresh"), ("listed_state", "x=2", "invalidated")} <= rows
    assert ("aged", "x=1", "stale") in rows
    kernel.run("@cache(ttl=3600)\ndef listed_state(x): return x + 1")
    text = kernel.run("%cache_ls listed_state").text
    assert ["listed_state", "x=1", "outdated"] in [line.split()[:3] for line in text.splitlines()]


@pytest.mark.parametrize("name", ["stats", "clear", "explain", "ls", "report"])
def test_each_magic_has_help(kernel: Kernel, name: str) -> None:
    """`%magic?` says what it does and lists its options."""
    code = f"%cache_{name}"
    reply = kernel.client.inspect(code, len(code), reply=True, timeout=TIMEOUT)
    text = reply["content"]["data"]["text/plain"]
    assert f"%cache_{name}" in text
    assert len(text) > 150


TERMINAL = """
from memo import cache
%load_ext memo
@cache
def f(x): return x

%cache_report on
f(1)
f(1)
%cache_stats
"""


def test_in_a_terminal(tmp_path: Path) -> None:
    """IPython in a terminal shows the same as plain text."""
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "--simple-prompt"],
        input=TERMINAL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
    )
    assert "1 miss: f() not cached yet" in done.stdout, done.stdout + done.stderr
    assert "1 hit (" in done.stdout
    assert "1 hit · 1 miss" in done.stdout
    assert "median hit" in done.stdout
    assert "<table" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
