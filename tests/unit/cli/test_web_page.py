"""`memo ui`: the page is for this user's browser alone, and no value is loaded to show it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ui_process import Ui

from memo import cache
from memo.cli.commands import main


@pytest.fixture
def ui() -> Iterator[Ui]:
    made = Ui()
    yield made
    made.interrupt()


def test_it_listens_on_loopback_alone(ui: Ui) -> None:
    """Its address is 127.0.0.1, and its socket is bound to that."""
    assert ui.base.startswith("http://127.0.0.1:")
    hexed = f"0100007F:{ui.port:04X}"
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert [one for one in listening if one.endswith(hexed[-5:])] == [hexed]


def test_the_token_is_needed(ui: Ui) -> None:
    """Without it nothing of the cache is answered; a wrong one is none."""
    assert ui.get("/").status_code == 403
    assert ui.get("/state").status_code == 403
    assert ui.get("/state", **{"X-Memo-Token": "x" * len(ui.token)}).status_code == 403
    assert httpx.post(f"{ui.base}/do", json={}, trust_env=False).status_code == 403
    assert ui.get(f"/?token={ui.token}").status_code == 200
    assert ui.get("/state", **{"X-Memo-Token": ui.token}).status_code == 200


def test_other_hosts_and_pages_are_refused(ui: Ui) -> None:
    """A name that was rebound to this address, and a page from elsewhere, get nothing."""
    known = {"X-Memo-Token": ui.token}
    assert ui.get("/state", Host=f"evil.example:{ui.port}", **known).status_code == 403
    assert ui.get("/state", Host="127.0.0.1:1", **known).status_code == 403
    assert ui.get("/view.js", Host="evil.example").status_code == 403
    assert ui.get("/state", Origin="https://evil.example", **known).status_code == 403
    assert ui.do({}, Origin="null").status_code == 403
    assert ui.get("/state", Origin=ui.base, **known).status_code == 200
    assert ui.get("/state", Host=f"localhost:{ui.port}", **known).status_code == 200


def test_the_page_may_load_its_own_files_alone(ui: Ui) -> None:
    """The policy of the page forbids all that is not its own, and frames around it."""
    page = ui.get(f"/?token={ui.token}")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["referrer-policy"] == "no-referrer"
    assert ui.get("/view.js").status_code == 200
    assert ui.get("/../web_page.py").status_code in (403, 404)
    assert ui.get("/..%2Fweb_page.py").status_code == 404


def test_strange_messages_are_refused(ui: Ui) -> None:
    """A request that is too large or not JSON gets an answer, not a fault."""
    assert ui.do({"do": "show", "filter": "x" * 20_000}).status_code == 413
    known = {"X-Memo-Token": ui.token}
    bad = httpx.post(f"{ui.base}/do", content=b"{", headers=known, trust_env=False)
    assert bad.status_code == 400
    assert ui.do([1, 2]).status_code == 200


class Trap:
    """A value that leaves a mark wherever it is unpickled."""

    def __init__(self) -> None:
        self.rows = 3

    def __setstate__(self, state: Any) -> None:
        os.mkdir(os.environ["TRAP"])


def test_showing_an_entry_loads_no_value(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that would run code is listed, explained and invalidated without running it."""
    trap = tmp_path / "sprung"
    monkeypatch.setenv("TRAP", str(trap))

    @cache(name="trapped", version="1")
    def trapped(x: int) -> Trap:
        return Trap()

    trapped(1)
    if trap.exists():  # the process that computes may look whether its result loads
        trap.rmdir()
    ui = Ui()
    try:
        state = ui.get("/state", **{"X-Memo-Token": ui.token}).json()
        (row,) = state["entries"]["rows"]
        assert row["preview"].startswith("Trap")
        state = ui.do({"do": "explain", "key": row["key"]}).json()
        assert "trapped(x=1) is fresh" in state["said"][row["key"]]
        assert f": {row['preview']}." in state["said"][row["key"]], "also where the page is narrow"
        state = ui.do({"do": "refresh", "key": row["key"]}).json()
        assert "not in this process" in state["said"][row["key"]]
        state = ui.do({"do": "invalidate", "key": row["key"]}).json()
        assert "Invalidated trapped(x=1)" in state["said"][row["key"]]
    finally:
        ui.process.terminate()
        ui.process.communicate(timeout=20)
    assert not trap.exists()
    assert not trapped.is_cached(1)
    pickle.loads(pickle.dumps(Trap()))
    assert trap.exists(), "the trap works"


def test_a_port_that_is_taken_is_an_error(ui: Ui) -> None:
    """It says which port, and what to do."""
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["ui", "--no-browser", "--port", str(ui.port)])
    assert done.exit_code == 2
    assert str(ui.port) in done.output
    none = CliRunner().invoke(main, ["ui", "--no-browser", "--port", "99999"])
    assert (none.exit_code, "65535" in none.output) == (2, True)
