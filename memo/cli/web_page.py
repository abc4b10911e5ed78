"""`memo ui`: the live view as a local page, over every process that shares the directory.

It listens on the loopback address only.  Each request must name this host and port (`Host`, and
`Origin` if a browser sends one), and all but the page's own files need the token of the URL, so
that no other page and no other user can read or invalidate.  Values are never loaded: everything
shown comes from headers that this user's secret has authenticated.
"""

from __future__ import annotations

import secrets
import socket
import threading
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from memo.inspection.live_view import Model, page_file

HOST = "127.0.0.1"
TOKEN_HEADER = "X-Memo-Token"  # noqa: S105 - the name of the header
MAX_MESSAGE_BYTES = 10_000
"""Bytes of the largest message that a page may send."""
PAGE_FILES = {"view.js": "text/javascript", "view.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class LivePage:
    """The page and its two requests, for a server that listens on `HOST` and a port."""

    def __init__(self, token: str, port: int) -> None:
        self._token = token
        self._hosts = {f"{HOST}:{port}", f"localhost:{port}"}
        self._model = Model(shared=True)
        self._lock = threading.Lock()

    def application(self) -> Starlette:
        """The site as a Starlette application."""
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/state", self.state),
                Route("/do", self.do, methods=["POST"]),
                Route("/{name}", self.file),
            ]
        )

    def refusal(self, request: Request, *, needs_token: bool = True) -> Response | None:
        """Return the refusal of a request that is not from our page; None if it is."""
        origin = request.headers.get("origin")
        if request.headers.get("host") not in self._hosts:
            return _plain_response("This host is not served.", 403)
        if origin is not None and origin.removeprefix("http://") not in self._hosts:
            return _plain_response("Requests from other pages are not served.", 403)
        given = request.headers.get(TOKEN_HEADER) or request.query_params.get("token", "")
        if needs_token and not secrets.compare_digest(given.encode(), self._token.encode()):
            return _plain_response("Open the URL that memo ui printed: it has a token.", 403)
        return None

    def page(self, request: Request) -> Response:
        """The page."""
        return self.refusal(request) or Response(page_file("page.html"), 200, HEADERS, "text/html")

    def file(self, request: Request) -> Response:
        """Serve a file of the page, which contains nothing of the cache."""
        name = request.path_params["name"]
        if name not in PAGE_FILES:
            return _plain_response("Not found.", 404)
        refusal = self.refusal(request, needs_token=False)
        return refusal or Response(page_file(name), 200, HEADERS, PAGE_FILES[name])

    def state(self, request: Request) -> Response:
        """Return the state that the page draws."""
        return self.refusal(request) or self._answer(None)

    async def do(self, request: Request) -> Response:
        """Carry out a button's command, and answer with the new state."""
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        if int(request.headers.get("content-length") or MAX_MESSAGE_BYTES + 1) > MAX_MESSAGE_BYTES:
            return _plain_response("The message is too large.", 413)
        try:
            message: Any = await request.json()
        except ValueError:
            return _plain_response("The message is not JSON.", 400)
        return await run_in_threadpool(self._answer, message)

    def _answer(self, message: Any) -> Response:
        with self._lock:
            if message is not None:
                self._model.press(message)
            return JSONResponse(self._model.state(), 200, HEADERS)


def _plain_response(text: str, status: int) -> Response:
    return PlainTextResponse(text, status, HEADERS)


class Server:
    """The server of `memo ui`; its socket is bound at creation.

    Attributes:
        url: the page's address, with its token.
    """

    def __init__(self, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
            self._socket.listen()  # so that a browser that is faster than the start waits
            self._port = self._socket.getsockname()[1]
            self._application = LivePage(self.token, self._port).application()
        except BaseException:
            self._socket.close()
            raise
        self.url = f"http://{HOST}:{self._port}/?token={self.token}"

    def run(self) -> None:
        """Serve until the process is interrupted."""
        config = uvicorn.Config(
            self._application, log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(config).run(sockets=[self._socket])
