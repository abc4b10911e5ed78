"""Addresses of Redis: parse a `redis_url` of any kind.

================================================= =================================================
`redis://user:password@host:6379/0`               one server (or Valkey)
`rediss://…`                                      the same over TLS
`unix:///run/redis.sock?db=0`                     a socket on this machine
`redis+sentinel://host:26379,host:26379/name/0`   the primary that Sentinels know as `name`
`redis+cluster://host:6379,host:6379`             a cluster, found through any of its nodes
`rediss+sentinel://…`, `rediss+cluster://…`       the same over TLS
================================================= =================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from memo.errors import nearest_hint, type_named
from memo.runtime.named_tuple import NamedTuple

SERVER, SENTINEL, CLUSTER, SOCKET = "server", "sentinel", "cluster", "socket"
_SCHEMES = {
    "redis": (SERVER, False),
    "rediss": (SERVER, True),
    "unix": (SOCKET, False),
    "redis+sentinel": (SENTINEL, False),
    "rediss+sentinel": (SENTINEL, True),
    "redis+cluster": (CLUSTER, False),
    "rediss+cluster": (CLUSTER, True),
}
_TLS_OPTIONS = (
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_password",
    "ssl_cert_reqs",
    "ssl_ca_certs",
    "ssl_ca_data",
    "ssl_check_hostname",
    "ssl_min_version",
    "ssl_ciphers",
)
_TEXT_OPTIONS = ("username", "password", "client_name", *_TLS_OPTIONS)
REDIS_OPTIONS = (
    *_TEXT_OPTIONS,
    "db",
    "credential_provider",
    "socket_keepalive",
    "socket_keepalive_options",
    "sentinel_kwargs",
    "address_remap",
)
"""Names that `redis_options` may contain: arguments of redis-py's clients."""
_NOT_OPTIONS = {
    "socket_timeout": "the setting `deadline` bounds an operation",
    "socket_connect_timeout": "memo bounds connecting itself",
    "retry": "memo does not retry; it falls back to the next tier",
    "retry_on_timeout": "memo does not retry; it falls back to the next tier",
    "retry_on_error": "memo does not retry; it falls back to the next tier",
    "protocol": "memo speaks RESP2",
    "decode_responses": "memo stores bytes",
    "host": "it belongs in redis_url",
    "port": "it belongs in redis_url",
    "path": "it belongs in redis_url",
    "unix_socket_path": "it belongs in redis_url, as unix:///run/redis.sock",
    "ssl": "write rediss:// in redis_url",
}
_QUERY_OPTIONS = ("db", *_TEXT_OPTIONS, "socket_keepalive")
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_CERTIFICATE_CHECKS = ("required", "optional", "none")
_PORTS = {SENTINEL: 26379}
_ESCAPES = "in a user or password, write `/` as %2F, `?` as %3F, `#` as %23, `@` as %40"
_MALFORMED = f"its host or port is malformed; a port is a number; {_ESCAPES}."


class Address(NamedTuple):
    """The address of a Redis.

    Attributes:
        kind: `SERVER`, `SOCKET`, `SENTINEL` or `CLUSTER`.
        hosts: (name, port) of the server, the Sentinels, or some nodes of the cluster.
        path: path of a socket.
        service: the name that Sentinels know the primary by.
        options: arguments of redis-py's client in the URL.
        tls: connect over TLS.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    service: str
    options: Mapping[str, Any]
    tls: bool

    @property
    def where(self) -> str:
        """The address for display, without user and password: `"127.0.0.1:6379/0"`."""
        db = self.options.get("db", 0)
        if self.kind == SOCKET:
            return f"{self.path}/{db}"
        hosts = ",".join(
            f"{f'[{name}]' if ':' in name else name}:{port}" for name, port in self.hosts
        )
        if self.kind == CLUSTER:
            return hosts
        return f"{hosts}/{self.service}/{db}" if self.service else f"{hosts}/{db}"


def parse(url: str) -> Address:
    """Parse a URL.

    Raises:
        ValueError: it is malformed; the text says what is wrong and how to write it, without user
            and password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(_MALFORMED) from None
    behind_host = f"{parts.path}{parts.query.partition('=')[0]}"
    if "#" in url or (parts.scheme != "unix" and "@" in behind_host):
        raise ValueError(_MALFORMED)
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"must begin with {', '.join(f'{name}://' for name in _SCHEMES)}.")
    kind, tls = _SCHEMES[parts.scheme]
    options = _query(parts.query)
    user, _, places = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    if name:
        options["username"] = unquote(name)
    if password:
        options["password"] = unquote(password)
    path = unquote(parts.path)
    if kind == SOCKET:
        if not path.strip("/"):
            raise ValueError("names no socket; write unix:///run/redis.sock")
        return Address(kind, (), path, "", options, tls)
    service, db = _path(kind, path.strip("/"))
    if db:
        options.setdefault("db", _database(db))
    if kind == CLUSTER and options.pop("db", 0):
        raise ValueError("a cluster has only database 0; leave the number out.")
    return Address(kind, _hosts(kind, places), "", service, options, tls)


def _path(kind: str, path: str) -> tuple[str, str]:
    """Return the service and the database in a URL's path."""
    if kind != SENTINEL:
        if path and not path.isdecimal():
            raise ValueError(
                "the part after the host must be the number of a database, as in .../0."
            )
        return "", path
    service, _, db = path.partition("/")
    if not service:
        raise ValueError(
            "names no service; write redis+sentinel://host:26379,host:26379/mymaster/0."
        )
    return service, db


def _hosts(kind: str, places: str) -> tuple[tuple[str, int], ...]:
    found = []
    for place in places.split(","):
        try:
            parts = urlsplit(f"//{place}")
            port = parts.port
        except ValueError:
            raise ValueError(_MALFORMED) from None
        if port == 0:
            raise ValueError("0 is not a port; Redis listens on 6379 by default.")
        found.append((parts.hostname or "localhost", port or _PORTS.get(kind, 6379)))
    if len(found) > 1 and kind == SERVER:
        raise ValueError(
            "names several servers; write redis+cluster:// for a cluster, redis+sentinel:// for "
            "Sentinels."
        )
    return tuple(found)


def _query(query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _QUERY_OPTIONS:
            raise ValueError(unknown_name_text(name, _QUERY_OPTIONS, "query parameter"))
        options[name] = _checked(name, value)
    return options


def _checked(name: str, value: Any) -> Any:
    """Return the value of an option as redis-py takes it.

    Raises:
        ValueError: redis-py would refuse it at each connection.
    """
    text = str(value).lower()
    if name == "db":
        return _database(text)
    if name in ("ssl_check_hostname", "socket_keepalive"):
        if text not in _TRUTHS:
            raise ValueError(f"{name} must be true or false.")
        return _TRUTHS[text]
    if name == "ssl_cert_reqs" and isinstance(value, str) and value not in _CERTIFICATE_CHECKS:
        raise ValueError(f"{name} must be one of {', '.join(_CERTIFICATE_CHECKS)}.")
    if name == "ssl_min_version" and isinstance(value, str):
        if not text.isdecimal():
            raise ValueError(f"{name} must be a number: 771 for TLS 1.2, 772 for TLS 1.3.")
        return int(text)
    if name == "credential_provider" and not hasattr(value, "get_credentials"):
        raise ValueError(f"{name} must be an object with get_credentials().")
    return value


def _database(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("db must be the number of a database, as in ?db=0.")
    return int(text)


def unknown_name_text(name: str, known: tuple[str, ...], what: str) -> str:
    """Return the text of the error about an unknown name, with the nearest known one."""
    if name in _NOT_OPTIONS:
        return f"{name!r} cannot be set: {_NOT_OPTIONS[name]}."
    near = nearest_hint(name, known) or f"; there are {', '.join(known)}."
    return f"there is no {what} {name!r}{near}"


def check_options(given: Any) -> dict[str, Any]:
    """Check `redis_options`, and return them: arguments of redis-py's clients.

    Raises:
        ValueError: it contains something else; the text says what.
    """
    if not isinstance(given, Mapping):  # its text may have a password in it, so it is not shown
        fix = "write configure(redis_options={...}) or the table [tool.memo.redis_options]."
        raise ValueError(  # noqa: TRY004
            f"{type_named(type(given))} is not a mapping of redis-py's connection arguments; {fix}"
        )
    for name in given:
        if name not in REDIS_OPTIONS:
            raise ValueError(unknown_name_text(str(name), REDIS_OPTIONS, "argument"))
    if given.get("credential_provider") and (given.get("username") or given.get("password")):
        raise ValueError("give either credential_provider, or username and password.")
    return {
        name: value if value is None else _checked(name, value) for name, value in given.items()
    }
