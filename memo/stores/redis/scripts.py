"""Scripts: what Redis does in one step for memo.  Their text is in `*.lua`, beside this file.

Rules of the scripts:

1.  A script touches one key, or keys of one slot, and names them all.
2.  What it computes is what `generations` computes.
3.  One whose few bytes must get through a full Redis begins with a command that takes no memory
    (`HDEL`, `DEL`): Redis then lets the rest of it pass, so as not to leave it half done.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path

from memo.stores.redis.exchange import pack

_FOLDER = Path(__file__).parent / "lua"


class Script:
    """A Lua script that Redis keeps by its digest.

    Args:
        name: of its file.
    """

    __slots__ = ("_digest", "_text")

    def __init__(self, name: str) -> None:
        self._text = (_FOLDER / f"{name}.lua").read_bytes()
        self._digest = sha1(self._text, usedforsecurity=False).hexdigest().encode()

    def by_digest(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """The command that runs it where it is known."""
        return pack(b"EVALSHA", self._digest, b"%d" % len(keys), *keys, *arguments)

    def by_text(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """The command that makes it known and runs it."""
        return pack(b"EVAL", self._text, b"%d" % len(keys), *keys, *arguments)


BEGIN = Script("begin")
TURN = Script("turn")
LAST = Script("last")
SEED = Script("seed")
ACQUIRE = Script("acquire")
RENEW = Script("renew")
RELEASE = Script("release")
