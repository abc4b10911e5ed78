"""The scripts in Lua, from `lua/*.lua`, that change several values in Redis atomically.

Rules of the scripts:

1.  A script uses one key, or keys of one slot, and names them all.
2.  It computes the same as `validity.generations`.
3.  A script that must work on a full Redis begins with a command that takes no memory (`HDEL`,
    `DEL`): Redis then lets the rest pass, so that no script is left half done.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path

from memo.errors import TierError
from memo.stores.redis.transport.resp import pack

_LUA_FOLDER = Path(__file__).parent / "lua"


class Script:
    """A Lua script that Redis caches by its digest.

    Args:
        name: the name of its file.
    """

    __slots__ = ("_digest", "_text")

    def __init__(self, name: str) -> None:
        self._text = (_LUA_FOLDER / f"{name}.lua").read_bytes()
        self._digest = sha1(self._text, usedforsecurity=False).hexdigest().encode()

    def by_digest(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """Return the command that runs it if Redis has it cached."""
        return pack(b"EVALSHA", self._digest, b"%d" % len(keys), *keys, *arguments)

    def by_text(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """Return the command that runs it and caches it."""
        return pack(b"EVAL", self._text, b"%d" % len(keys), *keys, *arguments)


CREATE_GROUP = Script("create_group")
TURN = Script("turn")
EXTEND_LIFE = Script("extend_life")
SEED = Script("seed")
ACQUIRE = Script("acquire")
RENEW = Script("renew")
RELEASE = Script("release")


class NoScriptError(TierError):
    """Redis does not have a script in its cache."""


class NoScriptsError(TierError):
    """Redis does not let this user run scripts at all."""
