"""`%%cache`: what a cell reads and assigns, and cells that are replayed in a real kernel."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager
from kernels import Kernel, Shown

from memo.jupyter.cell_cache import find_names

SETUP = """
import asyncio, time, threading, sys, memo
from memo import cache
def ran():
    with open("runs") as file: return len(file.read())
def mark():
    with open("runs", "a") as file: file.write("x")
"""


@pytest.fixture(scope="module")
def _kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(_kernel: Kernel) -> Kernel:
    """A kernel with an empty cache, nothing counted, and no names but those of its prelude."""
    _kernel.run("%reset -f")
    _kernel.run(SETUP)
    _kernel.run("for one in memo.functions(): one.cache_clear()\nopen('runs', 'w').close()")
    _kernel.run("%cache_report off\n%cache_stats --reset")
    return _kernel


MARK = "mark()"
"""Code that counts the runs of a cell."""


def ran(kernel: Kernel) -> int:
    return int(kernel.run("print(ran())").stdout)


def twice(kernel: Kernel, cell: str) -> tuple[Shown, Shown]:
    """The output of a cell when it runs, and when it is replayed; fails unless it was."""
    before = ran(kernel)
    first = kernel.run(f"{cell}\n{MARK};")
    assert ran(kernel) == before + 1
    second = kernel.run(f"{cell}\n{MARK};")
    assert ran(kernel) == before + 1, "the cell ran again"
    return first, second


# --- names that a cell reads and assigns ----------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "reads", "assigned", "hidden"),
    [
        ("y = x", "x", "y", ""),
        ("x = 1\ny = x", "", "x y", ""),
        ("x = x + 1", "x", "x", ""),
        ("x += 1", "x", "x", ""),
        ("print(a.b.c[d])", "print a d", "", ""),
        ("a.b = 1\nc[0] = 2\nd.e[0].f = 3", "a c d", "a c d", ""),
        ("del x", "x", "x", ""),
        ("import a.b, c as d\nfrom e import f as g", "", "a d g", ""),
        ("[i for i in xs if i > n]", "xs n", "", ""),
        ("{k: v for k, vs in m for v in vs}", "m", "", ""),
        ("[(i, (lambda: i + n)()) for i in xs]", "xs n", "", ""),
        ("i = 0\n[i for i in range(3)]", "range", "i", ""),
        ("if c:\n  x = 1\nprint(x)", "c print x", "x", ""),
        ("if c:\n  x = 1\nelse:\n  x = 2\nprint(x)", "c print", "x", ""),
        ("if c:\n  x = 1\nelse:\n  raise E\nprint(x)", "c E print", "x", ""),
        ("for i in xs:\n  y = i\nprint(y)", "xs print", "i y", "y"),
        ("for i in xs:\n  print(i, t)\n  t = i", "xs print t", "i t", ""),
        ("while c:\n  y = 1\nprint(y)", "c print", "y", "y"),
        ("with open(p) as f:\n  d = f.read()\nprint(d)", "open p print", "f d", "d"),
        ("try:\n  x = f()\nexcept E as e:\n  print(e)\nprint(x)", "f E print x", "x", ""),
        ("try:\n  x = f()\nexcept E:\n  x = 0\nprint(x)", "f E print", "x", ""),
        ("try:\n  x\nexcept NameError:\n  x = 0\nx += 1", "x NameError", "x", ""),
        ("def f(a, b=d):\n  return a + g\ny = f(1)", "d g", "f y", ""),
        ("def f(*a: A, **k: B) -> R:\n  pass", "A B R", "f", ""),
        ("def f():\n  return g\ng = 1\nf()", "", "f g", "g"),
        ("def f(n):\n  return n and f(n - 1)", "", "f", "f"),
        ("def f():\n  global n\n  n = 1", "", "n f", ""),
        ("@d\nclass A(B):\n  x = y\n  def m(self):\n    return z", "d B y z", "A", ""),
        ("class A:\n  x: T\n  def m(self, a: U) -> V:\n    y: W = 1", "T U V", "A", ""),
        ("k = lambda q=w: q + v", "w v", "k", ""),
        ("(n := f()) + n", "f", "n", ""),
        ("match v:\n  case {'a': x, **r} if x > m:\n    print(x, r)", "v m print", "x r", ""),
        ("a, (b, *c) = z\na + b", "z", "a b c", ""),
        ("x: int = 1\ny: str", "int str", "x", ""),
        ("r = await f(a)", "f a", "r", ""),
        ("async for i in a:\n  pass\nasync with b as c:\n  c", "a b", "i c", ""),
        ("n = df.query('a > @m') + 'x@y'", "df m", "n", ""),
        ("m = 1\nn = df.query('a > @m')", "df", "m n", ""),
        ("duckdb.sql('select x from frame')", "duckdb frame", "", ""),
        ("say('a > @m from frame')", "say", "", ""),
        ("%time q = z * 2", "get_ipython z", "q", ""),
        ("%timeit -n 5 f(z)", "get_ipython n f z", "", ""),
        ("%%time\nw = z\n!ls {p}\nw", "get_ipython z ls p", "w", ""),
        ("a = !ls {p.name} $q", "get_ipython ls p name q", "a", ""),
        ("%env X=y", "get_ipython X y", "", ""),
    ],
)
def test_names_of_a_cell(source: str, reads: str, assigned: str, hidden: str) -> None:
    """Inputs are what a cell may read before it assigned it, outputs what it may assign."""
    found = find_names(ast.parse(TransformerManager().transform_cell(source)))
    assert set(found.reads) == set(reads.split())
    assert set(found.assigned) == set(assigned.split())
    assert found.hidden == set(hidden.split())


# --- replaying ------------------------------------------------------------------------------------


def test_a_cell_runs_once_and_is_replayed(kernel: Kernel) -> None:
    """Variables, prints, displays and the last value come back, and the cell does not run again."""
    kernel.run("x = 20")
    cell = f"""
        %%cache
        import sys
        from IPython.display import HTML, display
        {MARK}
        print("out", x)
        display(HTML("<b>shown</b>"))
        print("err", file=sys.stderr)
        y = x * 2
        f"the value is {{y}}"
    """
    first = kernel.run(cell)
    kernel.run("del y, HTML")
    second = kernel.run(cell)
    for shown in (first, second):
        assert shown.stdout == "out 20\n"
        assert shown.stderr == "err\n"
        assert shown.bundles[0]["text/html"] == "<b>shown</b>"
        assert shown.bundles[1]["text/plain"] == "'the value is 40'"
    assert kernel.run("print(y, HTML.__name__)").stdout == "40 HTML\n"
    assert ran(kernel) == 1
    stats = kernel.run("%cache_stats").text
    assert "1 hit · 1 miss" in stats
    assert "cell(y)" in stats


def test_the_annotations_of_a_cell_are_evaluated_as_in_any_other(kernel: Kernel) -> None:
    """They are texts only after `from __future__ import annotations`, in any earlier cell."""
    cell = """
        %%cache
        def double(n: int) -> int: return 2 * n
        print(double.__annotations__["n"])
    """
    assert kernel.run(cell).stdout == "<class 'int'>\n"
    kernel.run("from __future__ import annotations")
    shown = kernel.attempt(cell.replace("double", "twice"))
    kernel.run("get_ipython().compile.reset_compiler_flags()")
    assert shown.stdout == "int\n"


def test_cells_with_top_level_await(kernel: Kernel) -> None:
    """Top-level `await` works, and such a cell is replayed as well."""
    cell = f"""
        %%cache --ttl 1h
        await asyncio.sleep(0.01)
        {MARK}
        async def double(n):
            print("doubling")
            return 2 * n
        both = await asyncio.gather(double(1), double(2))
        both
    """
    for _ in range(2):
        shown = kernel.run(cell)
        assert shown.stdout == "doubling\ndoubling\n"
        assert shown.bundles[-1]["text/plain"] == "[2, 4]"
    assert ran(kernel) == 1
    assert kernel.run("print(both, await double(5))").stdout == "doubling\n[2, 4] 10\n"


@pytest.mark.parametrize("await_", ["", "await asyncio.sleep(0)\n"])
def test_an_exception_is_shown_and_nothing_is_stored(kernel: Kernel, await_: str) -> None:
    """A cell that raises shows the user's frames, keeps what it had assigned, and runs again."""
    kernel.run("later = 'old'")
    cell = f"%%cache\n{await_}{MARK}\nbefore = 1\nfor i in [0]:\n    later = 1 / i\nprint(later)"
    for count in (1, 2):
        shown = kernel.attempt(cell)
        assert shown.error.startswith("ZeroDivisionError")
        assert "later" in shown.error
        assert "memo/" not in shown.error
        assert ran(kernel) == count
    assert kernel.run("print(before, later)").stdout == "1 old\n"


def test_inputs_are_keyed_by_value_and_by_code(kernel: Kernel) -> None:
    """Other values of what it reads run it again; so does an edited function; layout does not."""
    cell = f"%%cache\n{MARK}\ny = helper(table['a'])"
    kernel.run("def helper(n): return n + 1\ntable = {'a': 1, 'b': [1, 2]}")
    kernel.run(cell)
    kernel.run("table = {'a': 1, 'b': [1, 2]}\ndef helper(n):\n    # as before\n    return n + 1")
    kernel.run(f"%%cache\n{MARK}\n\n# a comment\ny = helper( table['a'] )")
    assert ran(kernel) == 1
    kernel.run("table['b'].append(3)")
    kernel.run(cell)
    assert ran(kernel) == 2
    kernel.run("def helper(n): return n + 2")
    kernel.run(cell)
    assert ran(kernel) == 3
    assert kernel.run("print(y)").stdout == "3\n"
    kernel.run(f"%%cache\n{MARK}\ny = helper(table['a']) + 1")
    assert ran(kernel) == 4


@pytest.mark.parametrize(
    "code", ["%time got = part + 1", "got = !echo {part}1", "got = !echo 1$part"]
)
def test_names_in_magics_and_shell_lines_are_inputs(kernel: Kernel, code: str) -> None:
    """A cell runs again when a name in a magic or in a shell line has another value."""
    shown = []
    for value in (1, 2, 1):
        kernel.run(f"part = {value}")
        kernel.run(f"%%cache\n{code}")
        shown.append(kernel.run("print(got)").stdout)
    assert shown[0] == shown[2] != shown[1]


def test_what_it_changes_in_place_comes_back(kernel: Kernel) -> None:
    """An input that a cell changes in place is an output, however the cell changed it."""
    cell = f"%%cache\n{MARK}\nimport random\nrows.append(4)\ntotal = sum(rows)"
    for _ in range(2):
        kernel.run("rows = [1, 2, 3]")
        kernel.run(cell)
        assert kernel.run("print(rows, total)").stdout == "[1, 2, 3, 4] 10\n"
    assert ran(kernel) == 1


@pytest.mark.parametrize(
    "code", ["%time renewed = 2", "exec('renewed = 2')", "from renewing import *", "renew()"]
)
def test_a_known_name_that_it_assigns_by_other_means_comes_back(kernel: Kernel, code: str) -> None:
    """A name with a value from before counts as well where only running shows its assignment."""
    kernel.run("""
        import sys, types
        sys.modules["renewing"] = types.ModuleType("renewing")
        sys.modules["renewing"].renewed = 2
        def renew():
            global renewed
            renewed = 2
    """)
    for _ in range(2):
        kernel.run("renewed = 1")
        kernel.run(f"%%cache\n{code}")
        assert kernel.run("print(renewed)").stdout == "2\n"


def test_what_it_deletes_is_gone(kernel: Kernel) -> None:
    """A name that the cell deletes is deleted by a replay too."""
    cell = f"%%cache\n{MARK}\nkept = len(big)\ndel big"
    for _ in range(2):
        kernel.run("big = 'abc'")
        kernel.run(cell)
        assert kernel.run("print(kept, 'big' in globals())").stdout == "3 False\n"
    assert ran(kernel) == 1


def test_leftovers_of_loops_are_no_inputs(kernel: Kernel) -> None:
    """A variable of a loop is neither an input nor a value that no key knows."""
    cell = f"%%cache\n{MARK}\nfor item in items:\n    last = item\nprint(last)"
    kernel.run("items = [1, 2]")
    kernel.run(cell)
    kernel.run("last = 'something else'")
    assert kernel.run(cell).stdout == "2\n"
    assert ran(kernel) == 1
    kernel.run("items = []; last = 'left over'")
    assert kernel.attempt(cell).error.startswith("NameError")
    assert kernel.run("print(last)").stdout == "left over\n"


def test_functions_that_it_defines_live_in_the_notebook(kernel: Kernel) -> None:
    """After a replay a function defined in the cell sees the notebook's names as they are now."""
    cell = f"%%cache\n{MARK}\ndef scaled(n, by=2):\n    return n * by * factor"
    kernel.run("factor = 1")
    kernel.run(cell)
    kernel.run("del scaled")
    kernel.run(cell)
    assert ran(kernel) == 1
    assert kernel.run("factor = 10\nprint(scaled(3))").stdout == "60\n"


def test_inputs_without_a_key_are_left_out(kernel: Kernel) -> None:
    """A lock or a client that the cell reads is left out of its key, and `--explain` says so."""
    kernel.run("lock, n = threading.Lock(), 1")
    cell = f"%%cache\n{MARK}\nwith lock:\n    y = n"
    kernel.run(cell)
    kernel.run("lock = threading.Lock()")
    kernel.run(cell)
    assert ran(kernel) == 1
    told = kernel.run(cell.replace("%%cache", "%%cache --explain")).text
    assert "hit" in told
    assert "not tracked: lock" in told


def test_what_cannot_be_stored_is_named(kernel: Kernel) -> None:
    """An output that cannot be pickled is named with the fix, and the fix works."""
    cell = f"%%cache\n{MARK}\nwith open('runs') as file:\n    data = file.read()[:0] + 'd'"
    for count in (1, 2):
        shown = kernel.run(cell)
        assert "file (a TextIOWrapper) cannot be pickled" in shown.stderr
        assert "--outputs data" in shown.stderr
        assert ran(kernel) == count
    for _ in range(2):
        assert kernel.run(cell.replace("%%cache", "%%cache --outputs data")).stderr == ""
    assert ran(kernel) == 3
    assert kernel.run("print(data)").stdout == "d\n"


def test_a_value_that_cannot_be_stored_is_replayed_as_it_looked(kernel: Kernel) -> None:
    """The last expression is shown by a replay even where its value cannot be pickled."""
    cell = f"%%cache\n{MARK}\nx = 1\n(n for n in range(3))"
    for _ in range(2):
        shown = kernel.run(cell)
        assert shown.bundles[-1]["text/plain"].startswith("<generator object")
    assert ran(kernel) == 1


def test_a_semicolon_silences(kernel: Kernel) -> None:
    """A cell that ends in `;` shows no value, the first time and when it is replayed."""
    first, second = twice(kernel, "%%cache\nx = 1\nx")
    assert not first.bundles
    assert not second.bundles


def test_a_semicolon_in_a_comment_does_not_silence(kernel: Kernel) -> None:
    """As in any other cell, the last token that is no comment decides."""
    assert kernel.run("%%cache\n5 + 5  # ten;").text == "10"
    assert not kernel.run("%%cache\n6 + 6;  # twelve").text


def test_options_choose_inputs_and_outputs(kernel: Kernel) -> None:
    """`--inputs` are the only names that matter, `--outputs` the only ones that come back."""
    kernel.run("a = b = 1")
    cell = f"%%cache --inputs a --outputs c --name chosen\n{MARK}\nc = a + b\nd = c"
    kernel.run(cell)
    kernel.run("b = 2; c = d = None")
    kernel.run(cell)
    assert ran(kernel) == 1
    assert kernel.run("print(c, d)").stdout == "2 None\n"
    assert "chosen" in kernel.run("%cache_stats").text
    kernel.run("a = 2")
    kernel.run(cell)
    assert ran(kernel) == 2
    kernel.run(cell.replace("--outputs c", "--outputs d"))
    assert ran(kernel) == 3
    assert kernel.run("print(d)").stdout == "4\n"


def test_force_ttl_and_tags(kernel: Kernel) -> None:
    """`--force` runs it now; an entry ends with its `--ttl`; its `--tags` invalidate it."""
    cell = f"%%cache --ttl 1h --tags daily,sales\n{MARK}\ny = 1"
    kernel.run(cell)
    kernel.run(cell)
    assert ran(kernel) == 1
    kernel.run("""
        from inside import set_clock
        from memo.testing import ManualClock
        clock = ManualClock()
        set_clock(clock)
        clock.advance(3601)
    """)
    kernel.run(cell)
    assert ran(kernel) == 2
    tagged = cell.replace("--ttl 1h", "")
    kernel.run(tagged)
    kernel.run("memo.invalidate(tag='sales')")
    kernel.run(tagged)
    assert ran(kernel) >= 3
    count = ran(kernel)
    kernel.run(tagged.replace("%%cache", "%%cache --force"))
    assert ran(kernel) == count + 1
    kernel.run(tagged)
    assert ran(kernel) == count + 1


@pytest.mark.parametrize("await_", ["", "await asyncio.sleep(0)\n"])
def test_explain_runs_nothing(kernel: Kernel, await_: str) -> None:
    """`--explain` says whether the cell would run and why, and does not run it."""
    kernel.run("threshold = 3")
    cell = f"%%cache\n{await_}{MARK}\nabove = threshold + 1"
    explain = cell.replace("%%cache", "%%cache --explain")
    assert "not cached yet" in kernel.run(explain).text
    kernel.run(cell)
    assert "hit" in kernel.run(explain).text
    kernel.run("threshold = 5")
    assert "threshold is 5; the nearest entry has 3" in kernel.run(explain).text
    kernel.run("threshold = 3")
    edited = kernel.run(explain + " + 1")
    assert "code changed" in edited.text
    assert "+above = threshold + 1 + 1" in edited.text
    assert ran(kernel) == 1


def test_a_cell_depends_on_what_its_cached_calls_read(kernel: Kernel) -> None:
    """Invalidating a cached function makes the cells built on it run again."""
    kernel.run("@cache\ndef raw(region): return region")
    cell = f"%%cache\n{MARK}\nframe = raw('EU')"
    kernel.run(cell)
    kernel.run(cell)
    assert ran(kernel) == 1
    kernel.run("raw.invalidate('US')")
    kernel.run(cell)
    assert ran(kernel) == 1
    kernel.run("raw.invalidate('EU')")
    kernel.run(cell)
    assert ran(kernel) == 2


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%cache --ttl 5x\ny = 1", "ttl='5x'"),
        ("%%cache --inputs nothing\ny = 1", "nothing"),
        ("%%cache --colour\ny = 1", "%%cache has no --colour"),
        ("%%cache\ny = (", "never closed"),
    ],
)
def test_mistakes_are_told(kernel: Kernel, cell: str, said: str) -> None:
    """A mistake on the line of `%%cache`, or in the cell, is said in words."""
    shown = kernel.attempt(cell)
    assert said in shown.stderr + shown.error


@pytest.mark.parametrize(
    ("body", "line"),
    [("x = 1\ny = = 2", 3), ("await later(", 2), ("return 5", 2), ("for i in []\n    pass", 2)],
)
def test_a_syntax_error_is_shown_as_in_any_other_cell(kernel: Kernel, body: str, line: int) -> None:
    """The line of the cell and the mistake in it, and no frame of memo's or IPython's."""
    shown = re.sub(r"\x1b\[[\d;]*m", "", kernel.attempt(f"%%cache\n{body}").error)
    assert shown.startswith("SyntaxError")
    assert re.search(rf"Cell In\[\d+\], line {line}\n", shown), shown
    assert body.splitlines()[line - 2].strip() in shown
    assert "memo" not in shown
    assert "interactiveshell" not in shown
    assert "run_cell_magic" not in shown


def test_help_and_magics_in_cells(kernel: Kernel) -> None:
    """`%%cache?` helps; magics and shell lines work inside of a cell."""
    assert "--outputs" in kernel.run("print(get_ipython().object_inspect_text('%%cache'))").stdout
    for _ in range(2):
        shown = kernel.run(f"%%cache\n{MARK}\nfound = !echo hello\n%who_ls str\nfound")
        assert "hello" in shown.bundles[-1]["text/plain"]
    assert ran(kernel) == 1


def test_another_kernel_replays_it(kernel: Kernel, tmp_path: Path) -> None:
    """A cell that one kernel ran is replayed by another that shares the cache."""
    kernel.run("base = [1, 2, 3]")
    cell = f"%%cache\n{MARK}\ntotal = sum(base)\nprint('summed')"
    kernel.run(cell)
    other = Kernel(kernel.home)
    try:
        other.run(f"{SETUP}\nbase = [1, 2, 3]")
        assert other.run(cell).stdout == "summed\n"
        assert other.run("print(total)").stdout == "6\n"
    finally:
        other.close()
    assert ran(kernel) == 1
