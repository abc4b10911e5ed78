"""All that a cached function reaches is part of its code version, or listed as not tracked."""

from __future__ import annotations

import importlib
import itertools
import linecache
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_numbers = itertools.count()


class Notebook:
    """Cells that share one namespace, each with its source, as in a kernel."""

    def __init__(self) -> None:
        self.module = types.ModuleType(f"cells_{next(_numbers)}")
        sys.modules[self.module.__name__] = self.module

    def run(self, cell: str) -> None:
        """Run a cell."""
        cell = textwrap.dedent(cell)
        file = f"<cell {next(_numbers)}>"
        linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
        exec(compile(cell, file, "exec", dont_inherit=True), vars(self.module))

    def load(self, *cells: str) -> Any:
        """Run cells; the cached function that the last one defines."""
        for cell in cells:
            self.run(cell)
        return self.module.load

    def lost(self, *arguments: Any) -> str:
        """All that `explain` lists as not tracked."""
        return "\n".join(self.module.load.explain(*arguments).untracked)


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    """An empty notebook."""
    made = Notebook()
    yield made
    del sys.modules[made.module.__name__]


lazy = notebook
"""A second notebook, to be imported by the first."""


# --- modules that an alias points to -------------------------------------------------------------

ALIASES = {
    "standard library": ("import math as m", "import cmath as m", "m.sqrt(x)"),
    "a part of a package": ("import os.path as m", "import ntpath as m", "m.join(str(x), 'a')"),
    "installed": ("import numpy as m", "import scipy as m", "m.__name__, x"),
    "submodule": (
        "import urllib; import urllib.parse; m = urllib",
        "import email; import types; m = types.SimpleNamespace(parse=email)",
        "m.parse, x",
    ),
}


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_a_module_alias_counts_by_the_module_that_it_points_to(
    notebook: Notebook, alias: tuple[str, str, str]
) -> None:
    """`import math as m`, later `import cmath as m`, recomputes what calls `m.sqrt`."""
    first, second, body = alias
    load = notebook.load(
        f"import memo\n{first}", f"@memo.cache\ndef load(x):\n    return repr(({body}))"
    )
    before = load(4), load.key(4)
    notebook.run(second)
    after = load(4), load.key(4)
    assert before[1] != after[1]
    assert before[0] != after[0]
    notebook.run(first)
    assert load.key(4) == before[1]


def test_two_aliases_of_one_module_are_told_apart_from_two_modules(notebook: Notebook) -> None:
    """The alias counts together with its module, so swapping two aliases is seen."""
    load = notebook.load(
        "import memo, math as a, cmath as b",
        "@memo.cache\ndef load(x):\n    return repr((a.sqrt(x), b.sqrt(x)))",
    )
    before = load(4)
    notebook.run("a, b = b, a")
    assert load(4) != before


DISPATCHED = {
    "function": (
        "@functools.singledispatch\ndef kind(x):\n    return 'other'",
        "kind(x)",
        "@kind.register\ndef _(x: int):\n    return '{}'",
    ),
    "method": (
        (
            "class Kinds:\n    @functools.singledispatchmethod\n    def of(self, x):\n"
            "        return 'other'\nkinds = Kinds()"
        ),
        "kinds.of(x)",
        "@vars(Kinds)['of'].register\ndef _(self, x: int):\n    return '{}'",
    ),
}


@pytest.mark.parametrize("dispatched", DISPATCHED.values(), ids=DISPATCHED)
def test_an_implementation_that_is_registered_later_counts(
    notebook: Notebook, dispatched: tuple[str, str, str]
) -> None:
    """Another cell registers an implementation of a generic function, or replaces one."""
    generic, body, registered = dispatched
    load = notebook.load(
        f"import functools, memo\n{generic}", f"@memo.cache\ndef load(x):\n    return {body}"
    )
    assert load(1) == "other"
    for text in ("a number", "a whole number"):
        notebook.run(registered.format(text))
        assert load(1) == text
    assert load.is_cached(1)


def test_a_registered_method_whose_name_is_taken_again_counts(notebook: Notebook) -> None:
    """An edit of an implementation is seen though another one has its name (`_`)."""
    kinds = (
        "class Kinds:\n"
        "    @functools.singledispatchmethod\n    def of(self, x):\n        return 0\n"
        "    @of.register\n    def _(self, x: int):\n        return {}\n"
        "    @of.register\n    def _(self, x: str):\n        return 2"
    )
    load = notebook.load(
        f"import functools, memo\n{kinds.format(1)}",
        "@memo.cache\ndef load(x):\n    return Kinds().of(x)",
    )
    assert load(5) == 1
    notebook.run(kinds.format(10))
    assert load(5) == 10


def test_a_function_that_takes_the_place_of_a_library_function_is_followed(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function of one's own patched onto a library module is part of the code."""
    import fnmatch

    load = notebook.load(
        "import memo, fnmatch",
        "@memo.cache\ndef load(x):\n    return fnmatch.translate(x)",
    )
    plain = load("a")
    notebook.run("def mine(x):\n    return 'mine ' + x")
    monkeypatch.setattr(fnmatch, "translate", vars(notebook.module)["mine"])
    assert load("a") == "mine a"
    notebook.run("def mine(x):\n    return 'yours ' + x")
    monkeypatch.setattr(fnmatch, "translate", vars(notebook.module)["mine"])
    assert load("a") == "yours a"
    monkeypatch.undo()
    assert load("a") == plain


def test_a_method_patched_onto_a_library_class_is_followed(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`string.Formatter.mine = mine` counts where a function names the class."""
    import string

    load = notebook.load(
        "import memo, string",
        "@memo.cache\ndef load(x):\n    return string.Formatter().mine(x)",
    )
    for word in ("one", "two"):
        notebook.run(f"def mine(self, x):\n    return ('{word}', x)")
        monkeypatch.setattr(string.Formatter, "mine", vars(notebook.module)["mine"], raising=False)
        assert load(1) == (word, 1)


ACCESSORS = {
    "pandas": (
        "import pandas as lib",
        "lib.api.extensions.register_dataframe_accessor('mine')",
        "self.value = frame",
    ),
    "polars": (
        "import polars as lib",
        "lib.api.register_dataframe_namespace('mine')",
        "self.value = frame",
    ),
    "xarray": (
        "import xarray as lib",
        "lib.register_dataset_accessor('mine')",
        "self.value = frame",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(overrid|registration)")
@pytest.mark.parametrize("library", ACCESSORS)
def test_a_registered_accessor_is_followed(notebook: Notebook, library: str) -> None:
    """`frame.mine.answer()` depends on the accessor that is registered as `mine`."""
    imports, register, start = ACCESSORS[library]
    lib = importlib.import_module(library)
    make = lib.Dataset if library == "xarray" else lib.DataFrame

    def accessor(word: str) -> str:
        return f"""
            @{register}
            class Mine:
                def __init__(self, frame):
                    {start}
                def answer(self):
                    return {word!r}
            """

    load = notebook.load(
        f"import memo\n{imports}",
        accessor("one"),
        "@memo.cache\ndef load(frame):\n    return frame.mine.answer()",
    )
    try:
        assert load(make({"a": [1, 2]})) == "one"
        notebook.run(accessor("two"))
        assert load(make({"a": [1, 2]})) == "two"
        notebook.run(accessor("one"))
        assert load.is_cached(make({"a": [1, 2]}))
    finally:
        for kind in (getattr(lib, "Dataset", None), getattr(lib, "DataFrame", None)):
            if kind is not None and "mine" in vars(kind):
                del kind.mine


# --- classes -------------------------------------------------------------------------------------

CLASSES = {
    "partialmethod": (
        """
        import functools
        class Scale:
            def times(self, n, x):
                return n * x
            double = functools.partialmethod(times, {0})
        """,
        "Scale().double(x)",
        (2, 100),
    ),
    "partialmethod by keyword": (
        """
        import functools
        class Scale:
            def times(self, x, n=1):
                return n * x
            double = functools.partialmethod(times, n={0})
        """,
        "Scale().double(x)",
        (2, 100),
    ),
    "types.new_class": (
        """
        import types
        def times(self, x):
            return {0} * x
        Scale = types.new_class("Scale", (), {{}}, lambda names: names.update(times=times))
        """,
        "Scale().times(x)",
        (2, 100),
    ),
    "types.new_class with values only": (
        """
        import types
        Scale = types.new_class("Scale", (), {{}}, lambda names: names.update(n={0}))
        """,
        "Scale.n * x",
        (2, 100),
    ),
    "make_dataclass": (
        """
        import dataclasses
        def times(self, x):
            return {0} * x
        Scale = dataclasses.make_dataclass("Scale", [("n", int, 1)], namespace={{"times": times}})
        """,
        "Scale().times(x)",
        (2, 100),
    ),
    "make_dataclass, default": (
        """
        import dataclasses
        Scale = dataclasses.make_dataclass("Scale", [("n", int, {0})])
        """,
        "Scale().n * x",
        (2, 100),
    ),
    "dataclass, after its init": (
        """
        import dataclasses
        @dataclasses.dataclass
        class Scale:
            n: int = 1
            def __post_init__(self):
                self.n = {0}
        """,
        "Scale().n * x",
        (2, 100),
    ),
    "frozen dataclass, called": (
        """
        import dataclasses
        @dataclasses.dataclass(frozen=True)
        class Scale:
            n: int = 1
            def __call__(self, x):
                return {0} * x
        """,
        "Scale()(x)",
        (2, 100),
    ),
    "dataclass, own repr": (
        """
        import dataclasses
        @dataclasses.dataclass
        class Scale:
            n: int = 1
            def __repr__(self):
                return {0!r}
        """,
        "repr(Scale()) * x",
        ("a", "b"),
    ),
    "attrs, called": (
        """
        import attrs
        @attrs.define
        class Scale:
            n: int = 1
            def __call__(self, x):
                return {0} * x
        """,
        "Scale()(x)",
        (2, 100),
    ),
    "msgspec, default": (
        """
        import msgspec
        class Scale(msgspec.Struct):
            n: int = {0}
        """,
        "Scale().n * x",
        (2, 100),
    ),
    "msgspec, default factory": (
        """
        import msgspec
        class Scale(msgspec.Struct):
            n: list = msgspec.field(default_factory=lambda: [{0}])
        """,
        "Scale().n * x",
        (2, 100),
    ),
    "msgspec, rename": (
        """
        import msgspec
        class Scale(msgspec.Struct, rename={0!r}):
            some_name: int = 1
        """,
        "[msgspec.json.encode(Scale())] * x",
        ("camel", "pascal"),
    ),
    "msgspec, tag": (
        """
        import msgspec
        class Scale(msgspec.Struct, tag={0!r}):
            n: int = 1
        """,
        "[msgspec.json.encode(Scale())] * x",
        ("a", "b"),
    ),
    "match": (
        """
        class Scale:
            __match_args__ = {0}
            a, b = 1, 2
        def first(scale):
            match scale:
                case Scale(one, _):
                    return one
        """,
        "first(Scale()) * x",
        (("a", "b"), ("b", "a")),
    ),
    "hash": (
        """
        class Scale:
            def __hash__(self):
                return {0}
        """,
        "hash(Scale()) * x",
        (2, 100),
    ),
    "dataclass, options": (
        """
        import dataclasses
        @dataclasses.dataclass(order={0})
        class Scale:
            n: int = 1
        """,
        "['__lt__' in vars(Scale)] * x",
        (True, False),
    ),
    "dataclass, metadata": (
        """
        import dataclasses
        @dataclasses.dataclass
        class Scale:
            n: int = dataclasses.field(default=1, metadata={{"n": {0}}})
        """,
        "dataclasses.fields(Scale)[0].metadata['n'] * x",
        (2, 100),
    ),
    "enum, order": (
        """
        import enum
        class Scale:
            kind = enum.Enum("Kind", {0})
        """,
        "[one.name for one in Scale.kind] * x",
        ({"A": 1, "B": 2}, {"B": 2, "A": 1}),
    ),
    "enum, missing": (
        """
        import enum
        class Kind(enum.Enum):
            A, B = 1, 2
            @classmethod
            def _missing_(cls, value):
                return cls({0})
        class Scale:
            kind = Kind
        """,
        "[Scale.kind(9).name] * x",
        (1, 2),
    ),
    "flag, boundary": (
        """
        import enum
        class Kind(enum.Flag, boundary=enum.FlagBoundary({0!r})):
            A = 1
        class Scale:
            kind = Kind
        """,
        "[Scale.kind(9).value] * x",
        ("keep", "conform"),
    ),
    "TypedDict": (
        """
        import typing
        class Kind(typing.TypedDict, total={0}):
            a: int
        class Scale:
            kind = Kind
        """,
        "[Scale.kind.__total__] * x",
        (True, False),
    ),
    "pydantic, alias": (
        """
        import pydantic
        class Scale(pydantic.BaseModel):
            n: int = pydantic.Field(1, serialization_alias={0!r})
        """,
        "[Scale().model_dump(by_alias=True)] * x",
        ("a", "b"),
    ),
    "pydantic, dataclass": (
        """
        import pydantic.dataclasses
        @pydantic.dataclasses.dataclass(config={{"extra": {0!r}}})
        class Scale:
            n: int = 1
        """,
        "[Scale.__pydantic_config__['extra']] * x",
        ("ignore", "forbid"),
    ),
    "msgspec, constraint": (
        """
        import msgspec, typing
        class Scale(msgspec.Struct):
            n: typing.Annotated[int, msgspec.Meta(gt={0})] = 1
        """,
        "[msgspec.json.schema(Scale)] * x",
        (0, 5),
    ),
    "msgspec, defstruct": (
        """
        import msgspec
        Scale = msgspec.defstruct("Scale", [("n", int, {0})])
        """,
        "Scale().n * x",
        (2, 100),
    ),
}


@pytest.mark.parametrize("given", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("role", ["read", "argument"])
def test_a_changed_class_is_seen(
    notebook: Notebook, given: tuple[str, str, tuple[Any, Any]], role: str
) -> None:
    """A change of any class factory is seen where it is read, and in an argument."""
    made, used, (first, second) = given
    cell = textwrap.dedent(made)
    notebook.run("import memo")
    notebook.run(cell.format(first))
    if role == "read":
        load = notebook.load(f"@memo.cache\ndef load(x):\n    return {used}")
        before, _ = load(3), notebook.run(cell.format(second))
        after = load(3)
        notebook.run(cell.format(first))
        again = load(3)
        assert before != after
        assert before == again
    else:
        load = notebook.load("@memo.cache\ndef load(x):\n    return 1")
        keys = []
        for value in (first, second, first):
            notebook.run(cell.format(value))
            keys.append(load.key(notebook.module.Scale()))
        assert keys[0] != keys[1]
        assert keys[0] == keys[2]


NESTED = {
    "pydantic": """
        import pydantic
        class Item(pydantic.BaseModel):
            price: float = {0}
        class Order(pydantic.BaseModel):
            items: list[Item] | None = None
        """,
    "pydantic, as text": """
        import pydantic
        class Order(pydantic.BaseModel):
            items: "list[Item]"
        class Item(pydantic.BaseModel):
            price: float = {0}
            order: "Order | None" = None
        """,
    "msgspec": """
        import msgspec
        class Item(msgspec.Struct):
            price: float = {0}
        class Order(msgspec.Struct):
            item: Item
        """,
    "msgspec, as text": """
        import msgspec
        class Order(msgspec.Struct):
            items: "list[Item]"
        class Item(msgspec.Struct):
            price: float = {0}
        """,
    "attrs": """
        import attrs
        @attrs.define
        class Item:
            price: float = {0}
        @attrs.define
        class Order:
            item: Item
        """,
    "dataclass": """
        import dataclasses
        @dataclasses.dataclass
        class Item:
            price: float = {0}
        @dataclasses.dataclass
        class Order:
            item: Item
        """,
    "bound": """
        import pydantic, typing
        class Item(pydantic.BaseModel):
            price: float = {0}
        Any = typing.TypeVar("Any", bound=Item)
        class Order(pydantic.BaseModel, typing.Generic[Any]):
            item: Any
        """,
    "new type": """
        import pydantic, typing
        class Item(pydantic.BaseModel):
            price: float = {0}
        Bought = typing.NewType("Bought", Item)
        class Order(pydantic.BaseModel):
            item: Bought
        """,
}


@pytest.mark.parametrize("cell", NESTED.values(), ids=NESTED)
def test_the_classes_of_fields_are_followed(notebook: Notebook, cell: str) -> None:
    """A library that makes an `Order` from text makes its items as well."""
    cell = textwrap.dedent(cell)
    notebook.run(cell.format(1))
    load = notebook.load("import memo", "@memo.cache\ndef load(x):\n    return Order, x")
    before, _ = load.key(1), notebook.run(cell.format(2))
    assert load.key(1) != before
    notebook.run(cell.format(1))
    assert load.key(1) == before


FIXED = {
    "struct": "import struct\nfixed = struct.Struct({0!r})",
    "comparison": "import functools\nfixed = functools.cmp_to_key(lambda a, b: {0!r})",
    "decoder": "import msgspec, typing\nfixed = msgspec.json.Decoder(typing.Literal[{0!r}])",
    "adapter": "import pydantic, typing\nfixed = pydantic.TypeAdapter(typing.Literal[{0!r}])",
    "encoder": "import msgspec\nfixed = msgspec.msgpack.Encoder(enc_hook=lambda value: {0!r})",
}


@pytest.mark.parametrize("cell", FIXED.values(), ids=FIXED)
def test_an_object_that_was_made_with_other_settings_is_seen(notebook: Notebook, cell: str) -> None:
    """Objects written in C that are fixed by what they were made with count as globals."""
    notebook.run(cell.format("<i"))
    load = notebook.load("import memo", "@memo.cache\ndef load(x):\n    return fixed, x")
    before, _ = load.key(1), notebook.run(cell.format("<q"))
    assert load.key(1) != before
    notebook.run(cell.format("<i"))
    assert load.key(1) == before
    assert not load.explain(1).untracked


TASKS = {
    "task": "@app.task",
    "shared task": "@celery.shared_task(name)",  # an app keeps the first of a name
    "bound": "@app.task(bind=True)",
    "lazy": "@app.task(lazy=True)",
}


@pytest.mark.filterwarnings("ignore:.*already registered")
@pytest.mark.parametrize("decorator", TASKS.values(), ids=TASKS)
def test_the_body_of_a_celery_task_is_followed(notebook: Notebook, decorator: str) -> None:
    """A function that calls a Celery task depends on the task's body."""
    own = "self, " if "bind" in decorator else ""

    def task(word: str) -> str:
        app = f"app = celery.Celery('app{next(_numbers)}', set_as_current=False)"
        if "shared" in decorator:
            app = "app = celery.current_app; app.finalize()"
        named = decorator.replace("task(name)", f"task(name='task{next(_numbers)}')")
        return f"{app}\n{named}\ndef task({own}x):\n    return ({word!r}, x)"

    load = notebook.load(
        "import memo, celery", task("one"), "@memo.cache\ndef load(x):\n    return task(x)"
    )
    assert load(1) == ("one", 1)
    notebook.run(task("two"))
    assert load(1) == ("two", 1)
    notebook.run(task("one"))
    assert load.is_cached(1)


# --- code that cannot be followed -----------------------------------------------------------------


def test_the_getattr_of_a_module_is_followed_and_listed(
    notebook: Notebook, lazy: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that a module computes by `__getattr__` depends on that function."""
    monkeypatch.setitem(sys.modules, "lazy_settings", lazy.module)
    lazy.run("def __getattr__(name):\n    return (name, 1)")
    load = notebook.load(
        "import memo, lazy_settings",
        "@memo.cache\ndef load(x):\n    return lazy_settings.rate",
    )
    assert load(1) == ("rate", 1)
    assert "rate" in notebook.lost(1)
    assert "__getattr__" in notebook.lost(1)
    lazy.run("def __getattr__(name):\n    return (name, 2)")
    assert load(1) == ("rate", 2)
    lazy.run("rate = 3")
    assert load(1) == 3


ENVIRONMENT = {
    "item": ("import os", "os.environ['SOME_DIR']"),
    "get": ("import os", "os.environ.get('SOME_DIR', '/data')"),
    "getenv": ("import os", "os.getenv('SOME_DIR')"),
    "imported": ("from os import environ", "environ['SOME_DIR']"),
    "imported getenv": ("from os import getenv as get", "get('SOME_DIR')"),
    "imported inside": ("", "inner()"),
}


@pytest.mark.parametrize("how", ENVIRONMENT)
def test_environment_variables_that_the_code_reads_are_listed(notebook: Notebook, how: str) -> None:
    """`explain()` names each item of `os.environ` that the code reads."""
    imports, read = ENVIRONMENT[how]
    inner = "def inner():\n    import os\n    return os.environ.get('SOME_DIR')"
    load = notebook.load(
        f"import memo\n{imports}", inner, f"@memo.cache\ndef load(x):\n    return {read}, x"
    )
    lines = [one for one in load.explain(1).untracked if "environ" in one]
    assert len(lines) == 1
    assert "SOME_DIR" in lines[0]


def test_an_environment_variable_with_a_computed_name_is_listed(notebook: Notebook) -> None:
    """A name that is only known when the code runs is listed as such."""
    notebook.load(
        "import memo, os", "@memo.cache\ndef load(x):\n    return os.environ.get(x.upper())"
    )
    assert "os.environ" in notebook.lost("home")


VARIABLE = (
    "from contextvars import ContextVar\nimport memo\nuser = ContextVar('user', default='Ada')"
)
READ = {
    "a global": ("", "user.get()", "user"),
    "in a helper": ("def inner():\n    return user.get()", "inner()", "user"),
    "of a class": ("class A:\n    tenant = user", "A.tenant.get()", "A.tenant"),
    "passed on": ("def read(var):\n    return var.get()", "read(user)", "user"),
}
"""How a context variable is read -> (a cell before, what the function returns, the name)."""


@pytest.mark.parametrize("how", READ)
def test_a_context_variable_that_the_code_reads_is_named_once(notebook: Notebook, how: str) -> None:
    """Its values are not part of keys, so one user would get what was computed for another."""
    before, read, name = READ[how]
    load = notebook.load(VARIABLE, before, f"@memo.cache\ndef load(x):\n    return {read}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in (1, 1, 2):
            load(x)
    (said,) = [str(one.message) for one in caught]
    assert f"reads the context variable {name}, whose value is not part of the key" in said
    assert said.endswith("an argument") is (name != "user")
    assert ("ignore=['global:user']" in said) is (name == "user")


@pytest.mark.parametrize("uses", ["user.set(x), user.get()", "user.set(x)"])
def test_a_context_variable_that_the_code_sets_itself_is_no_input(
    notebook: Notebook, uses: str
) -> None:
    """There is no warning, which would fail the test."""
    assert notebook.load(VARIABLE, f"@memo.cache\ndef load(x):\n    return str(({uses}))")(1)


def test_a_context_variable_that_is_ignored_is_not_named(notebook: Notebook) -> None:
    """`ignore` says that it never affects the result; with a fixed version no code is read."""
    for option in ("ignore=['global:user']", "version='1'"):
        load = notebook.load(
            VARIABLE, f"@memo.cache({option})\ndef load(x):\n    return user.get()"
        )
        assert load(1) == "Ada"  # a warning would fail the test


# --- functions inside objects of libraries --------------------------------------------------------

WRAPT = """
@wrapt.decorator
def decorator(wrapped, instance, args, kwargs):
    return wrapped(*args, **kwargs) + {0}

@decorator
def inner():
    return {1} + helper()
"""
CURRIED = "@toolz.curry\ndef inner(a={0}, b={1}):\n    return a + b + helper()"


@pytest.mark.parametrize("text", [WRAPT, CURRIED], ids=["wrapt", "toolz"])
def test_a_function_that_a_library_has_decorated_is_followed(notebook: Notebook, text: str) -> None:
    """The function in the object, what it calls, and the decorator itself, if it is the user's."""
    helper = "def helper():\n    return {0}"
    load = notebook.load(
        "import memo, toolz, wrapt",
        helper.format(100),
        text.format(1, 10),
        "@memo.cache\ndef load(x):\n    return inner() + x",
    )
    assert load(1) == load(1) == 112
    assert load.cache_info().hits == 1
    notebook.run(text.format(1, 20))
    assert load(1) == 122
    notebook.run(text.format(2, 20))
    assert load(1) == 123
    notebook.run(helper.format(200))
    assert load(1) == 223


# --- variables that a text names ------------------------------------------------------------------

QUOTED = {
    "query": ("limit", "pd.DataFrame({'a': [1, 2, 3]}).query('a > @limit').a.sum()"),
    "eval": ("limit", "pd.DataFrame({'a': [1, 2, 3]}).eval(f'a * {x} + @limit').sum()"),
    "duckdb": ("frame", "duckdb.sql('select sum(a) from frame').fetchall()[0][0]"),
    "duckdb join": (
        "frame",
        "duckdb.sql('select sum(b.a) FROM (select 1) Join frame as b on true').fetchall()[0][0]",
    ),
}


@pytest.mark.filterwarnings("ignore:fetch_arrow_table")
@pytest.mark.parametrize("how", QUOTED)
def test_a_variable_that_a_text_names_is_followed(notebook: Notebook, how: str) -> None:
    """`frame.query("x > @limit")` and `duckdb.sql("... from frame")` read global variables."""
    name, read = QUOTED[how]
    value = "limit = {0}" if name == "limit" else "frame = pd.DataFrame({{'a': [{0}]}})"
    load = notebook.load(
        "import memo, duckdb\nimport pandas as pd",
        value.format(1),
        f"@memo.cache\ndef load(x):\n    return int({read})",
    )
    first = load(1)
    assert load(1) == first
    assert load.cache_info().hits == 1
    notebook.run(value.format(2))
    assert load(1) == load.__wrapped__(1) != first


# --- what is loaded besides ----------------------------------------------------------------------

MENTIONING = """
import sys
for name in sys.argv[1:]:
    __import__(name)
import memo
exec(open("names.py").read())
print(memo.cache(name="app:load")(load).key(1))
"""


def test_loaded_libraries_change_no_key(tmp_path: Path) -> None:
    """A key does not depend on which libraries the process has loaded, whatever names are used."""
    libraries = list(ACCESSORS)
    names: set[str] = set()
    for library in map(importlib.import_module, libraries):
        for kind in (getattr(library, one, object) for one in ("DataFrame", "Series", "Dataset")):
            names.update(name for base in kind.__mro__[:-1] for name in vars(base))
    body = "".join(f"    x.{name}\n" for name in sorted(names) if name.isidentifier())
    (tmp_path / "names.py").write_text(f"def load(x):\n{body}")

    def key(*loaded: str) -> str:
        command = [sys.executable, "-c", MENTIONING, *loaded]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    assert "x.get\n" in body
    assert len({key(), *(key(library) for library in libraries)}) == 1
