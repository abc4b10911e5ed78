"""A running `memo ui`, and requests to it."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import httpx


class Ui:
    """A running `memo ui`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "memo", "ui", "--no-browser"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        parts = urlsplit(self.url)
        self.base = f"{parts.scheme}://{parts.netloc}"
        self.port = parts.port
        self.token = parts.query.partition("=")[2]

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(f"{self.base}{path}", headers=headers, timeout=30, trust_env=False)

    def do(self, message: Any, **headers: str) -> httpx.Response:
        headers = {"X-Memo-Token": self.token, **headers}
        url = f"{self.base}/do"
        return httpx.post(url, json=message, headers=headers, timeout=30, trust_env=False)

    def interrupt(self) -> None:
        """Press Ctrl-C until it ends: Python drops one that comes while it frees an object."""
        for _ in range(10):
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                continue
            return
        raise AssertionError("Ctrl-C does not end it")
