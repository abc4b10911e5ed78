"""The kinds of faults of a server, with the texts that explain them."""

from __future__ import annotations

from memo.runtime.named_tuple import NamedTuple


class Fault(NamedTuple):
    """A kind of fault of a server; its texts contain no secret.

    Attributes:
        kind: one word: `"refused"`, `"silent"`, or the code of an error reply such as `"OOM"`.
        text: the rest of a sentence that begins with the server.
        fix: what to do about it, as a whole sentence.
        down: no command works while this lasts, so callers should not ask.
        at_once: one such fault opens the breaker.
    """

    kind: str
    text: str
    fix: str
    down: bool = True
    at_once: bool = False


_FIX_START = "Start it, or correct redis_url."
_FIX_SLOW = (
    "Check whether it is overloaded or behind a firewall; MEMO_DEADLINE sets how long memo waits."
)
_FIX_LOGIN = "Put the right user and password in redis_url: redis://user:password@host:6379/0."
_FIX_SENTINEL = "Correct the name in redis_url, or check the Sentinels."
_FIX_CLUSTER = "Write redis+cluster:// in redis_url, so that the whole cluster is used."

REFUSED = Fault("refused", "refuses connections", _FIX_START, at_once=True)
UNRESOLVED = Fault("unresolved", "has a name that cannot be resolved", _FIX_START, at_once=True)
SILENT = Fault("silent", "does not answer in time", _FIX_SLOW, at_once=True)
CONNECTION_CLOSED = Fault("closed", "closes the connection in the middle", "See its log.")
GARBLED = Fault("garbled", "answers with something that is not RESP", "Correct redis_url.")
STANDALONE = Fault("standalone", "is no cluster", "Write redis:// in redis_url.", at_once=True)
_FIX_TLS = "Correct the certificates (redis_options: ssl_ca_certs, ssl_certfile), or the scheme."
INSECURE = Fault("tls", "fails the TLS handshake", _FIX_TLS, at_once=True)
MISSING_FILE = Fault(
    "file", "cannot be reached, since a file is missing", "Correct the path.", at_once=True
)
OTHER = Fault("ERR", "answers with an error", "See its log.", down=False)

REPLIES = {
    fault.kind: fault
    for fault in (
        Fault("OOM", "is full and evicts nothing", "Set maxmemory-policy allkeys-lfu.", down=False),
        Fault("READONLY", "is a read-only replica", "Name the primary in redis_url.", down=False),
        Fault("LOADING", "is still loading its data", "Wait until it is done.", at_once=True),
        Fault("NOAUTH", "asks for a password", _FIX_LOGIN, at_once=True),
        Fault("WRONGPASS", "refuses this user or password", _FIX_LOGIN, at_once=True),
        Fault("NOPERM", "forbids this user a command or key", "Extend its ACL.", down=False),
        Fault("MISCONF", "cannot save, and refuses writes", "See its disk and log.", down=False),
        Fault("BUSY", "is stuck in a script", "Send it SCRIPT KILL.", at_once=True),
        Fault("NOREPLICAS", "has too few replicas to write", "Repair the replicas.", down=False),
        Fault("MASTERDOWN", "has lost its primary", "Repair the primary.", at_once=True),
        Fault("CLUSTERDOWN", "is a cluster that is down", "Check its nodes.", at_once=True),
        Fault("MOVED", "is one node of a cluster", _FIX_CLUSTER, down=False),
        Fault("ASK", "is one node of a cluster", _FIX_CLUSTER, down=False),
        Fault("TRYAGAIN", "is moving a slot", "Wait until it is done.", down=False),
        Fault("CROSSSLOT", "is one node of a cluster", _FIX_CLUSTER, down=False),
        Fault("UNKNOWN", "does not have a command", "See docs/deployments.md.", down=False),
        Fault("DATABASE", "does not have that database", "Correct redis_url.", at_once=True),
        Fault("MASTERS", "has Sentinels that know no primary", _FIX_SENTINEL, at_once=True),
        Fault("DENIED", "runs in protected mode", "Set a password or bind address.", at_once=True),
        Fault("MAXCLIENTS", "has too many clients", "Raise maxclients.", at_once=True),
        Fault(
            "WRONGTYPE", "has another program's value at a key of memo", "Delete it.", down=False
        ),
        Fault("NOSCRIPT", "does not know a script", "Nothing: it is sent again.", down=False),
    )
}
"""Error replies of Redis by their code."""


WRITES_DENIED = frozenset(("READONLY", "NOREPLICAS", "MISCONF", "NOPERM"))
"""Faults of a server that can still be read.  `OOM` is not one of them: invalidations and leases
still work on a full Redis."""
UNINTERRUPTED = frozenset(("OOM", "NOPERM", "MISCONF", "NOREPLICAS", "UNKNOWN", "WRONGTYPE"))
"""Error replies of a server that runs on: it has neither restarted nor failed over."""
