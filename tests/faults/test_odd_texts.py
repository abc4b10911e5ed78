"""Texts that have no encoding: they are cached, shown and invalidated as all others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memo
from memo.testing import isolated, recording

ODD = "a\ud800"


def test_a_lone_surrogate_stops_nothing() -> None:
    """Text without an encoding is invalidated like any other, and blocks no other invalidation."""
    odd = ODD
    runs: list[str] = []

    @memo.cache(ttl=None, tags=[odd])
    def tagged(x: int) -> int:
        runs.append("tagged")
        return x

    @memo.cache(ttl=None, key_prefix="users", key_resolver="users:{name}")
    def named(name: str) -> int:
        runs.append("named")
        return 1

    @memo.cache(ttl=None)
    def plain(x: int) -> int:
        runs.append("plain")
        return x

    with isolated(), recording() as seen:
        for _ in range(2):
            tagged(1), named(odd), plain(1)
        assert runs == ["tagged", "named", "plain"]
        assert memo.invalidate(tag=odd, reason=odd).complete
        assert memo.invalidate(prefix=odd).complete
        assert memo.invalidate(key=f"users:{odd}").complete
        for _ in range(2):
            tagged(1), named(odd), plain(1)
        assert runs == ["tagged", "named", "plain", "tagged", "named"]
    assert [event for event in seen if event.kind == "error"] == []


def of_text(**options: Any) -> Callable[[list[Any]], Any]:
    def made(runs: list[Any]) -> Any:
        @memo.cache(ttl=None, **options)
        def load(x: Any = 1, **kw: Any) -> int:
            runs.append(x)
            return 1

        return load

    return made


PLACES: dict[str, tuple[Callable[[list[Any]], Any], tuple[Any, ...], dict[str, Any]]] = {
    "name of a keyword": (of_text(), (), {ODD: 1}),
    "path": (of_text(), (Path("/data/\udcff"),), {}),
    "path in a tag": (of_text(tags=["of:{x}"]), (Path("/data/\udcff"),), {}),
    "text": (of_text(), (ODD,), {}),
    "address": (of_text(key_resolver="of:{x}"), (ODD,), {}),
    "name": (of_text(name=ODD), (), {}),
    "version": (of_text(version=ODD), (), {}),
    "prefix": (of_text(key_prefix=ODD), (), {}),
    "dependency": (of_text(depends_on=f"/data/{ODD}"), (), {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_odd_text_anywhere(place: str) -> None:
    """Wherever such a text stands, calls hit, and an invalidation acts; nothing else is touched."""
    make, args, kwargs = PLACES[place]
    runs: list[Any] = []

    @memo.cache(ttl=None)
    def plain() -> int:
        runs.append("plain")
        return 1

    with isolated(), recording() as seen:
        load = make(runs)
        load(*args, **kwargs), load(*args, **kwargs)
        assert len(runs) == 1
        assert load.invalidate(*args, **kwargs).matched == 1
        load(*args, **kwargs), plain(), plain()
        assert len(runs) == 3
        assert load.explain(*args, **kwargs).hit
        assert len(memo.entries(load)) == 1
        str(memo.stats()), repr(load), str(memo.entries())
    assert [event for event in seen if event.kind == "error"] == []


def test_a_script_whose_name_has_no_encoding(tmp_path: Path) -> None:
    """The functions of a script that is called so hit as well."""
    path = tmp_path / "load\udcff.py"
    path.write_text("import memo\n@memo.cache\ndef f(): return 1\nf()\nprint(f.is_cached())")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
