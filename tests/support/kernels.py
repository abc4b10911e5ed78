"""A real kernel with memo loaded, and what its cells show."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from checkout import ROOT, SUPPORT
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager

TIMEOUT = 60
PRELUDE = """
import asyncio, time, threading
import memo
from memo import cache
%load_ext memo
"""


class Shown(NamedTuple):
    """Output of a cell: mime bundles in order, streams, and an error's name if it had one."""

    bundles: list[dict[str, Any]]
    stdout: str
    stderr: str
    error: str

    @property
    def text(self) -> str:
        return "\n".join(bundle.get("text/plain", "") for bundle in self.bundles)

    @property
    def html(self) -> str:
        return "\n".join(bundle.get("text/html", "") for bundle in self.bundles)


class Kernel:
    """A real kernel with memo loaded, its own cache, and what it shows."""

    def __init__(self, home: Path) -> None:
        self.home = home
        env = {k: v for k, v in os.environ.items() if not k.startswith("MEMO_")}
        env.update(
            PYTHONPATH=os.pathsep.join((str(ROOT), str(SUPPORT))),
            MEMO_DIRECTORY=str(home / "memo"),
            MEMO_SECRET="s" * 64,
            IPYTHONDIR=str(home / "ipython"),
            JUPYTER_RUNTIME_DIR=str(home / "runtime"),
            PYTHONWARNINGS="error::ResourceWarning",
        )
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=env, cwd=str(home))
        self.client: BlockingKernelClient = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=TIMEOUT)
        self.updates: dict[str, list[dict[str, Any]]] = {}
        self.has_cells = True
        self.run(PRELUDE)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()

    def run(self, code: str) -> Shown:
        """Run a cell; fails when it raised."""
        shown = self.attempt(code)
        assert not shown.error, shown.error
        return shown

    def attempt(self, code: str, answer: str | None = None) -> Shown:
        """Run a cell, which may raise, and answer the question that it asks."""
        code = textwrap.dedent(code).strip()
        wanted = self._execute(code)
        if answer is not None:
            self.client.get_stdin_msg(timeout=TIMEOUT)
            self.client.input(answer)
        bundles, out, error = [], {"stdout": "", "stderr": ""}, ""
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT)
            kind, content = message["msg_type"], message["content"]
            if kind == "update_display_data":
                self._update(content)
            if message["parent_header"].get("msg_id") != wanted:
                continue
            if kind in ("display_data", "execute_result"):
                bundles.append(content["data"])
            elif kind == "stream":
                out[content["name"]] += content["text"]
            elif kind == "error":
                error = "\n".join([content["ename"], *content["traceback"]])
            elif kind == "status" and content["execution_state"] == "idle":
                return Shown(bundles, **out, error=error)

    def _execute(self, code: str) -> str:
        """Ask for a cell as JupyterLab and Notebook 7 do: the message names it."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": self.client.allow_stdin,
            "stop_on_error": True,
        }
        metadata = {"cellId": "a-cell"} if self.has_cells else {}
        message = self.client.session.msg("execute_request", content, metadata=metadata)
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def _update(self, content: dict[str, Any]) -> None:
        name = content["transient"]["display_id"]
        self.updates.setdefault(name, []).append(content["data"])

    def wait_for_update(self, wanted: Callable[[str], bool]) -> None:
        """Wait until a display of an earlier cell has become what is wanted."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            latest = [bundles[-1] for bundles in self.updates.values()]
            if any(wanted(bundle["text/plain"]) for bundle in latest):
                assert all("text/html" in bundle for bundle in latest)
                return
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except Exception as error:  # the queue is empty
                if type(error).__name__ != "Empty":
                    raise
                continue
            if message["msg_type"] == "update_display_data":
                self._update(message["content"])
        raise AssertionError(f"no such update: {self.updates}")
