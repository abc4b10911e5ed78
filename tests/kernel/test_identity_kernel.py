"""Code versions in a real kernel: an edit of any cell is seen by the next call."""

from __future__ import annotations

import itertools
import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")

START = """
import memo.keys.call_keys
from memo.keys.fingerprint.function_version import Identity, function_id, stable
"""
SECONDS = 60.0
_later = itertools.count()


class Kernel:
    """A kernel of its own, and what its cells answer."""

    def __init__(self, folder: Path, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3",
            cwd=str(folder),
            env={**os.environ, "PYTHONPATH": path, **environment},
            startup_timeout=SECONDS,
        )
        self.run(START)

    def run(self, cell: str) -> str:
        """Run a cell; what it prints."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self.client.execute_interactive(
            textwrap.dedent(cell), timeout=SECONDS, output_hook=hear
        )
        assert reply["content"]["status"] == "ok", reply["content"]
        return "".join(printed).strip()

    def digest(self) -> str:
        """The code version of `f` now, by the identity that was made when `f` was defined."""
        return self.run("print(identity.digest())")

    def define(self, *cells: str) -> None:
        """Run cells, the last of which defines `f`, as a decorator would see it."""
        for cell in cells:
            self.run(cell)
        self.run("identity = Identity(f)")

    def stop(self) -> None:
        """End it, with its channels."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()


@pytest.fixture(scope="module")
def _kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.stop()


@pytest.fixture
def kernel(_kernel: Kernel) -> Kernel:
    """The kernel of the module, with nothing defined."""
    _kernel.run("%reset -f")
    _kernel.run(START)
    return _kernel


EDITS = {
    "helper": ("def h(x): return x", "def h(x): return -x", "def f(x): return h(x)"),
    "helper's helper": (
        "def deep(x): return x",
        "def deep(x): return -x",
        "def h(x): return deep(x)\ndef f(x): return h(x)",
    ),
    "global": ("LIMIT = 3", "LIMIT = 4", "def f(x): return x * LIMIT"),
    "dict": ("C = {'a': 1}", "C['a'] = 2", "def f(x): return C['a']"),
    "class": (
        "class C:\n    def g(self): return 1",
        "class C:\n    def g(self): return 2",
        "def f(x): return C().g()",
    ),
    "base class": (
        "class B:\n    def g(self): return 1\nclass C(B): pass",
        "class B:\n    def g(self): return 2\nclass C(B): pass",
        "def f(x): return C().g()",
    ),
    "class attribute": (
        "class C:\n    A = 1",
        "C.A = 2",
        "def f(x): return C.A",
    ),
    "lambda": ("h = lambda x: x", "h = lambda x: -x", "def f(x): return h(x)"),
    "partial": (
        "import functools\ndef g(a, x): return a\nh = functools.partial(g, 1)",
        "h = functools.partial(g, 2)",
        "def f(x): return h(x)",
    ),
    "closure": (
        "def make(n):\n    def g(x): return x * n\n    return g\nh = make(2)",
        "h = make(3)",
        "def f(x): return h(x)",
    ),
    "decorated helper": (
        "import functools\n@functools.lru_cache\ndef h(x): return x",
        "import functools\n@functools.lru_cache\ndef h(x): return -x",
        "def f(x): return h(x)",
    ),
    "frame": (
        "import pandas as pd\ndf = pd.DataFrame({'a': [1, 2, 3]})",
        "df.loc[0, 'a'] = 9",
        "def f(x): return df.a.sum() + x",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_in_another_cell(kernel: Kernel, edit: str) -> None:
    """An edit in another cell is seen without running the caller's; undone, the old is back."""
    before, after, cell = EDITS[edit]
    kernel.define(before, cell)
    old = kernel.digest()
    kernel.run(before)
    assert kernel.digest() == old, "running an identical cell again changes nothing"
    kernel.run(after)
    assert kernel.digest() != old
    kernel.run(before)
    assert kernel.digest() == old


COSMETIC = {
    "comment": "def h(x):\n    # better\n    return x  # yes",
    "docstring": 'def h(x):\n    """What it does."""\n    return x',
    "layout": "def h( x ):\n\n    return (\n        x\n    )",
    "moved": "A = 1\n\n\n\ndef other(): pass\n\ndef h(x):\n    return x",
    "rest of the cell": "print('hello')\nunrelated = [1]\ndef h(x):\n    return x\nunrelated.pop()",
    "magic in the cell": "%pwd\ndef h(x):\n    return x",
    "top-level await": "import asyncio\nawait asyncio.sleep(0)\ndef h(x):\n    return x",
}


@pytest.mark.parametrize("edit", COSMETIC)
def test_cosmetic_edit(kernel: Kernel, edit: str) -> None:
    """Comments, docstrings, layout, moved lines and the rest of the cell change nothing."""
    kernel.define("def h(x):\n    return x", "def f(x): return h(x)")
    old = kernel.digest()
    kernel.run(COSMETIC[edit])
    assert kernel.digest() == old
    assert "return x" in kernel.run("print(identity.parts()['__main__:h'])")


def test_function_itself(kernel: Kernel) -> None:
    """A function defined anew with another body is another; with the old body, the old one."""
    kernel.define("def f(x): return x")
    old = kernel.digest()
    kernel.define("def f(x): return x + 1")
    assert kernel.digest() != old
    kernel.define("def f(x):\n    'again'\n    return x")
    assert kernel.digest() == old


def test_magic_inside_a_function(kernel: Kernel) -> None:
    """A function that uses a magic has a source all the same."""
    kernel.define("def f(x):\n    here = %pwd\n    return here, x")
    assert "run_line_magic" in kernel.run("print(identity.parts()['__main__:f'])")


def test_methods(kernel: Kernel) -> None:
    """A change of what a method reaches through `self` is seen when the class's cell runs again."""
    cell = """
    class Service:
        def load(self, x): return self.parse(x)
        def parse(self, x): return {n}
        def unrelated(self): return {m}
    f = Service.load
    """
    digests = []
    for n, m in ((1, 1), (1, 2), (2, 2), (1, 1)):
        kernel.define(cell.format(n=n, m=m))
        digests.append(kernel.digest())
    assert digests[0] == digests[1] == digests[3] != digests[2]


class Edited:
    """A module of its own name, so that `%autoreload` knows nothing of it yet."""

    def __init__(self, folder: Path, kernel: Kernel, source: str) -> None:
        self.number = next(_later)
        self.name = f"helpers{self.number}"
        self.file = folder / f"{self.name}.py"
        self.write(source)
        kernel.run(f"import sys; sys.path.insert(0, {str(folder)!r})")

    def write(self, source: str) -> None:
        """Write it, newer than before."""
        self.file.write_text(source)
        late = time.time() + 5 * next(_later)
        os.utime(self.file, (late, late))


IMPORTS = ("from {m} import h", "import {m}", "import {m} as m", "def f(x): pass")
READERS = (
    "def f(x): return h(x)",
    "def f(x): return {m}.h(x)",
    "def f(x): return m.h(x)",
    "def f(x):\n    from {m} import h\n    return h(x)",
)
LAYOUT = """
def deep(x):
    'doc'
    while x > 9:   # a comment
        x = (x -
             1)
    x = sum([part
             for part in [x]
             if part and part != 7])
    return x{0}

def h(x): return deep(x)
"""


@pytest.mark.parametrize("how", range(4))
@pytest.mark.parametrize("autoreload", [True, False])
def test_module_edited(tmp_path: Path, kernel: Kernel, how: int, autoreload: bool) -> None:
    """An edited module is seen after `%autoreload` or `reload`; undone, the old is back."""
    module = Edited(tmp_path, kernel, LAYOUT.format(""))
    kernel.run("%load_ext autoreload")
    kernel.run(f"%autoreload {2 if autoreload else 0}")
    kernel.define(IMPORTS[how].format(m=module.name), READERS[how].format(m=module.name))
    reload = "pass"
    if not autoreload:
        reload = f"import importlib, sys; importlib.reload(sys.modules[{module.name!r}])"
    if how == 0 and not autoreload:
        reload += f"\nfrom {module.name} import h"
    old = kernel.digest()
    module.write("# new\n" + LAYOUT.format("").replace("'doc'", "'another'"))
    kernel.run(reload)
    assert kernel.digest() == old
    module.write(LAYOUT.format(" * 2"))
    kernel.run(reload)
    assert kernel.digest() != old
    module.write(LAYOUT.format("") + "# back\n")
    kernel.run(reload)
    assert kernel.digest() == old
    kernel.run("%autoreload 0")


def test_class_under_autoreload(tmp_path: Path, kernel: Kernel) -> None:
    """Methods that `%autoreload` patches into a class that was imported by name are seen."""
    source = (
        "class C:\n    def load(self): return self.g()\n"
        "    def g(self):\n        while False: pass\n        return {n}  # same\n"
    )
    module = Edited(tmp_path, kernel, source.format(n=1))
    kernel.run("%load_ext autoreload\n%autoreload 2")
    kernel.define(f"from {module.name} import C", "f = C.load")
    old = kernel.digest()
    module.write(source.format(n=2))
    changed = kernel.digest()
    assert changed != old
    assert "return 2" in kernel.run(f"print(identity.parts()['{module.name}:C.g'])")
    module.write(source.format(n=1))
    assert kernel.digest() == old
    kernel.run("%autoreload 0")


def test_computations(tmp_path: Path, kernel: Kernel) -> None:
    """Counted by computations: an edit is one more, running cells again and undoing it are none."""
    kernel.run(f"""
        import memo
        memo.configure(directory={str(tmp_path / "cache")!r}, secret={"0123456789abcdef" * 4!r})
        ran = []
    """)
    kernel.run("def h(x): return x")
    caller = "@memo.cache(ttl=600)\ndef f(x):\n    ran.append(x)\n    return h(x)"
    kernel.run(caller)
    told = []
    for cell in (
        "pass",
        "pass",
        "def h(x): return x  # same",
        caller,
        "def h(x): return -x",
        "pass",
        "def h(x): return x",
    ):
        kernel.run(cell)
        told.append(kernel.run("print(f(3), len(ran))"))
    assert told == ["3 1", "3 1", "3 1", "3 1", "-3 2", "-3 2", "3 2"]


CELLS = (
    "import functools\nWORDS = {'a', 'b', 'c'}\nLIMIT = 3",
    "class Model:\n    n = 2\n    def fit(self, x): return x in {'p', 'q', 'r'}",
    "def h(x, k=frozenset({'u', 'v'})): return functools.reduce(max, WORDS) + LIMIT",
    "def f(x): return h(x), Model().fit(x)",
)


def test_kernels_agree(tmp_path: Path, kernel: Kernel) -> None:
    """A kernel that starts anew has the digests of the last one, in whatever order cells ran."""
    kernel.define(*CELLS)
    told = kernel.digest()
    other = Kernel(tmp_path, PYTHONHASHSEED="7")
    try:
        other.define(CELLS[3], CELLS[2], CELLS[1], CELLS[0], CELLS[0])
        assert other.digest() == told
    finally:
        other.stop()


def test_notebooks_are_told_apart(tmp_path: Path, kernel: Kernel) -> None:
    """A kernel that knows its notebook puts it into the names of its functions."""
    other = Kernel(tmp_path, JPY_SESSION_NAME=str(tmp_path / "one.ipynb"))
    try:
        told = []
        for one in (kernel, other):
            one.run("def f(x): return x")
            told.append(one.run("print(function_id(f))"))
        assert told[0] == "__main__:f"
        assert told[1].startswith("one.ipynb~")
    finally:
        other.stop()
