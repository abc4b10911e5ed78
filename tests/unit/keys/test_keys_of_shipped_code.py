"""Code that cloudpickle brings to a worker has the key there that it has in the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SENDER = '''
import dataclasses, enum, functools, json, sys
import cloudpickle, memo
memo.configure(directory=sys.argv[2])

LIMIT = 3

def helper(x):
    """Documented."""
    return min(x, LIMIT)  # a comment

def function(x, y=2):
    for one in range(x):
        if one > y:
            continue
        y += helper(one)
    return [f"{one:>{y}}" for one in range(x)], (lambda z: z + y)

def closure(n):
    def inner(x):
        return x + n
    return inner

@dataclasses.dataclass
class Data:
    n: int = 1
    names: list = dataclasses.field(default_factory=list)

    def twice(self):
        return helper(2 * self.n)

@dataclasses.dataclass(frozen=True)
class Frozen:
    n: int = 1

@dataclasses.dataclass(frozen=True)
class Called:
    n: int = 1

    def __call__(self, x):
        return self.n + x

    def __repr__(self):
        return f"called {self.n}"

class Plain:
    """A class."""
    kind = "plain"

    def __init__(self, n):
        self.n = n

    @property
    def more(self):
        return self.n + 1

    @staticmethod
    def fixed(x):
        return x

    @classmethod
    def made(cls):
        return cls(1)

class Derived(Plain):
    __slots__ = ("extra",)

    def fixed(self):
        return super().made()

class Colour(enum.Enum):
    RED = 1

values = {
    "lambda": lambda x: x + 1,
    "function": function,
    "closure": closure(3),
    "partial": functools.partial(function, y=3),
    "dataclass": Data(2),
    "frozen dataclass": Frozen(2),
    "dataclass that is called": Called(2),
    "instance": Plain(2),
    "derived": Derived(2),
    "method": Plain(2).made,
    "class": Plain,
    "dataclass itself": Data,
    "enum": Colour.RED,
    "in a list": [Plain(1), {"f": lambda: LIMIT}],
}
'''
KEYS = """
@memo.cache(version="1", name="shipped:load")
def load(x):
    return 1

print(json.dumps({name: load.key(value) for name, value in values.items()}))
"""
DUMP = "open(sys.argv[1], 'wb').write(cloudpickle.dumps(values))\n"
WORKER = """
import json, pickle, sys
import memo
memo.configure(directory=sys.argv[2])
values = pickle.load(open(sys.argv[1], "rb"))
"""


def run(folder: Path, name: str, text: str) -> dict[str, str]:
    script = folder / name
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "values"), str(folder / "cache")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    """The keys in the process that has the source, and in one that has pickles alone."""
    folder = tmp_path_factory.mktemp("shipped")
    here = run(folder, "notebook.py", SENDER + DUMP + KEYS)
    (folder / "notebook.py").unlink()
    return here, run(folder, "worker.py", WORKER + KEYS)


NAMES = (
    *("lambda", "function", "closure", "partial", "dataclass", "frozen dataclass", "instance"),
    "dataclass that is called",
    *("derived", "method", "class", "dataclass itself", "enum", "in a list"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_shares_entries_with_the_notebook(
    keys: tuple[dict[str, str], dict[str, str]], name: str
) -> None:
    """An argument with code of a notebook has one key, with its source and without."""
    here, there = keys
    assert here[name] == there[name]


def test_other_code_has_another_key(tmp_path: Path) -> None:
    """A change of a helper that the code reaches is seen."""
    before = run(tmp_path, "notebook.py", SENDER + KEYS)
    after = run(tmp_path, "notebook.py", SENDER.replace("min(x, LIMIT)", "max(x, LIMIT)") + KEYS)
    assert {name for name in NAMES if before[name] != after[name]} >= {"function", "dataclass"}
    assert before["lambda"] == after["lambda"]


def test_comments_and_layout_are_in_no_key(tmp_path: Path) -> None:
    """An edit that changes nothing of what is computed changes no key."""
    before = run(tmp_path, "notebook.py", SENDER + KEYS)
    edited = SENDER.replace("# a comment", "# another\n").replace('"""A class."""', '"""Other."""')
    assert run(tmp_path, "notebook.py", edited + KEYS) == before
