"""Classification of errors: which fault of the server an exception or an error reply means."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

from redis import exceptions

from memo.stores.redis.transport import faults
from memo.stores.redis.transport.faults import REPLIES, Fault
from memo.stores.redis.transport.resp import ErrorReply, GarbledError


class MissingFileError(Exception):
    """A file that an option names does not exist."""


def fault_of(error: BaseException) -> Fault:
    """Classify an exception of redis-py, of an exchange, or of a layer below."""
    causes = list(_causes(error))
    if isinstance(error, exceptions.RedisClusterException):
        error = next((one for one in causes if isinstance(one, exceptions.RedisError)), error)
        if "cluster support disabled" in str(error):
            return faults.STANDALONE
    if isinstance(error, (ErrorReply, exceptions.RedisError)):
        fault = _fault_of_reply(error)
        if fault is not None:
            return fault
    if any(type(cause).__name__ == "MasterNotFoundError" for cause in causes):
        return REPLIES["MASTERS"]
    for fault, kinds in _FAULTS_BY_ERROR:
        if any(isinstance(cause, kinds) for cause in causes):
            return fault
    return faults.GARBLED


def _fault_of_reply(error: BaseException) -> Fault | None:
    """Classify an error by the code of a reply; None: it is none of an error reply."""
    code = str(getattr(error, "status_code", ""))
    if code not in REPLIES:
        code = _code(str(error)) or _CODE_BY_ERROR.get(type(error), "")
    if isinstance(error, exceptions.AuthenticationError) and "invalid" in str(error):
        code = "WRONGPASS"
    if code:
        return REPLIES[code]
    return faults.OTHER if isinstance(error, (ErrorReply, exceptions.ResponseError)) else None


_CODE_BY_ERROR: dict[type[BaseException], str] = {
    exceptions.OutOfMemoryError: "OOM",
    exceptions.ReadOnlyError: "READONLY",
    exceptions.BusyLoadingError: "LOADING",
    exceptions.NoPermissionError: "NOPERM",
    exceptions.MasterDownError: "MASTERDOWN",
    exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.MovedError: "MOVED",
    exceptions.AskError: "ASK",
    exceptions.TryAgainError: "TRYAGAIN",
    exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.AuthenticationError: "NOAUTH",
    exceptions.AuthenticationWrongNumberOfArgsError: "WRONGPASS",
}
"""The code of each exception of redis-py, which removes it from some texts."""


def _code(text: str) -> str:
    """Return the code of an error reply; `""` if it has none, or one that is not in `REPLIES`.

    Redis 6.2 hides the code of an error inside a script behind `ERR Error running script`.
    """
    if "invalid username-password" in text or "without any password" in text:
        return "WRONGPASS"
    if "Authentication required" in text:
        return "NOAUTH"
    if "DB index is out of range" in text:
        return "DATABASE"
    if "unknown command" in text.lower():
        return "UNKNOWN"
    if "max number of clients" in text:
        return "MAXCLIENTS"
    if "user executing the script" in text:
        return "NOPERM"
    words = (word.strip("-:") for word in text.split())
    return next((word for word in words if word in REPLIES), "")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_FAULTS_BY_ERROR: tuple[tuple[Fault, Any], ...] = (
    (REPLIES["CLUSTERDOWN"], exceptions.SlotNotCoveredError),
    (faults.MISSING_FILE, MissingFileError),
    (faults.INSECURE, ssl.SSLError),
    (faults.UNRESOLVED, socket.gaierror),
    (faults.REFUSED, (ConnectionRefusedError, FileNotFoundError, PermissionError)),
    (faults.SILENT, (TimeoutError, exceptions.TimeoutError)),
    (faults.CONNECTION_CLOSED, (ConnectionError, EOFError)),
    (faults.GARBLED, (exceptions.InvalidResponse, GarbledError)),
    (faults.REFUSED, OSError),  # no route to the host, no such network
    (faults.CONNECTION_CLOSED, exceptions.ConnectionError),
    (REPLIES["CLUSTERDOWN"], exceptions.RedisClusterException),  # no node has all slots, say
)
