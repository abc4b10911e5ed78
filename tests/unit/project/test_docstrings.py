"""References in docstrings exist, and the English is about things where no person is meant."""

from __future__ import annotations

import ast
import importlib
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

FILES = sorted((ROOT / "memo").rglob("*.py"))
MODULES = {path.stem for path in FILES if path.stem != "__init__"}
REFERENCE = re.compile(rf"`(memo(?:\.\w+)+|(?:{'|'.join(sorted(MODULES))})\.(?!py\b)\w+)`")
"""`memo.module.name`, and `module.name` for a module of memo."""


def references() -> Iterator[tuple[Path, str]]:
    for path in FILES:
        for name in REFERENCE.findall(path.read_text("utf-8")):
            yield path.relative_to(ROOT), name


def found(name: str) -> bool:
    """True if a dotted name is a module of memo, or something in one."""
    parts = name.split(".")
    if parts[0] != "memo":
        modules = [path for path in FILES if path.stem == parts[0]]
        return any(hasattr(module(path), parts[1]) for path in modules)
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        return value is not None
    return False


def module(path: Path) -> object:
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize(("path", "name"), list(references()), ids=str)
def test_what_is_referred_to_is_there(path: Path, name: str) -> None:
    """A dotted name in backticks is the name of something that exists."""
    assert found(name) or name.startswith("memo.live"), f"{path}: {name}"


TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PERSONS = re.compile(
    r"\b(who|whom|whoever|he|him|his|no one|(?:no|every|some|any)(?:body|one))\b", re.IGNORECASE
)
PEOPLE = {
    "**Anyone who has the secret can run code in every kernel that shares it.**",
    "| **secret** | the key that authenticates entries; everyone with it can run code",
    "**several tenants who do not trust each other share one process.**",
}
"""Sentences in which a person is meant."""


def words_of(path: Path) -> str:
    """The prose of a page; of a module its docstrings, comments and texts of messages."""
    if path.suffix == ".md":
        return path.read_text("utf-8")
    with tokenize.open(path) as file:
        comments = [
            token.string
            for token in tokenize.generate_tokens(file.readline)
            if token.type == tokenize.COMMENT
        ]
    constants = [
        node.value
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    return "\n".join([*comments, *constants])


def test_code_is_no_person() -> None:
    """A caller, a thread or a lookup is named as such; "who" and "nobody" are people."""
    found = []
    for path in [*TEXTS, *FILES]:
        if not PERSONS.search(path.read_text("utf-8")):
            continue  # most files, and a tokenizer is slow
        text = " ".join(words_of(path).split())
        for sentence in PEOPLE:
            text = text.replace(sentence, "")
        found += [
            f"{path.relative_to(ROOT)}: ...{text[max(0, at.start() - 40) : at.end() + 40]}..."
            for at in PERSONS.finditer(text)
        ]
    assert found == []


def test_the_sentences_about_people_are_there() -> None:
    """Each sentence that is allowed to name a person is in the documentation."""
    text = " ".join(" ".join(path.read_text("utf-8").split()) for path in TEXTS)
    assert [sentence for sentence in PEOPLE if sentence not in text] == []


def test_docstrings_begin_with_what_a_thing_does() -> None:
    """The first word of a docstring is no question word: its first line stands by itself."""
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
        for line in path.read_text("utf-8").splitlines()
        if re.match(r'\s*r?"""(What|Who|Where|Whether|Which)\b', line)
    ]
    assert found == []


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def listed(doc: str) -> list[str]:
    """The arguments and attributes that a docstring lists."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?: {4}.*\n|\n)+)", f"{doc}\n", re.MULTILINE)
    items = re.findall(r"^ {4}([\w*][\w*, ]*)(?: \(.*\))?:", "".join(sections), re.MULTILINE)
    return [name.strip(" *") for item in items for name in item.split(",")]


def names_in(node: ast.AST) -> set[str]:
    """Each name that code assigns, defines or takes."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.arg):
            found.add(part.arg)
        elif isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
            found.add(part.id if isinstance(part, ast.Name) else part.attr)
        elif isinstance(part, FUNCTIONS):
            found.add(part.name)
    return found


def documented_names_missing_in(source: str) -> list[str]:
    definitions: dict[str, list[ast.AST]] = {}  # the overloads of a function together
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            definitions.setdefault(node.name, []).append(node)
    missing = []
    for name, nodes in definitions.items():
        said = [item for node in nodes for item in listed(ast.get_docstring(node) or "")]
        there = set().union(*map(names_in, nodes)) if said else set()
        missing += [f"{name}: {item}" for item in said if item not in there]
    return missing


def test_a_docstring_lists_what_is_there() -> None:
    """Its `Args` and `Attributes` are names of the function or class, not those of last month."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
        if re.search(r"^ *(Args|Attributes):$", path.read_text("utf-8"), re.MULTILINE)
        for name in documented_names_missing_in(path.read_text("utf-8"))
    ]
    assert found == []


def test_a_docstring_that_lists_what_is_gone_is_found() -> None:
    """A renamed attribute and a removed argument are both named."""
    source = '''
class Entry:
    """An entry.

    Attributes:
        left_out, lost: parts without a key.
    """

    left_out: int = 0

    def read(self, at):
        """Read it.

        Args:
            at: the time.
            deep (bool): all of it.
        """
'''
    assert documented_names_missing_in(source) == ["Entry: lost", "read: deep"]
