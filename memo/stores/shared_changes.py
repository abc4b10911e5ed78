"""The state that functions change themselves, as all hosts know it: stored in the shared tier.

An *own change* has a name (the label and path of what changes) and a value (its original text); see
`memo.keys.fingerprint.own_changes`.  Rules of this module:

1.  Each is sealed with the writer's secret, together with the namespace, the function and its name;
    those that the reader's secrets do not authenticate are ignored.
2.  The first host to store an own change decides; a later value under its name is not accepted.
3.  The shared tier is asked once per process and function.  While it is down, nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from memo.errors import TierError
from memo.runtime.checksums import compare_digest
from memo.runtime.port import Port
from memo.settings.secret_keys import Secret
from memo.stores.protocols import ServerTier

MAX_SHARED_CHANGES: Final = 256
"""Maximum number of own changes that are stored for one function."""
_SEAL_CHARACTERS: Final = 64
"""Number of characters of the seal in front of a value."""


class SharedChanges:
    """The own changes of functions, as the hosts that share a tier have found them.

    Args:
        tier: the tier that the hosts share; None: nothing is shared.
        namespace: part of what is sealed.
        secrets: any of them authenticates; the first one seals.
        fault: reports a fault of the tier: its name, the error.
    """

    def __init__(
        self,
        tier: ServerTier | None,
        namespace: str,
        secrets: Sequence[Secret],
        fault: Callable[[str, TierError], None],
    ) -> None:
        self._tier = tier
        self._namespace = namespace
        self._secrets = secrets
        self._fault = fault
        self._known: dict[str, dict[str, str]] = {}

    async def of(self, port: Port, function: str) -> Mapping[str, str] | None:
        """Return the own changes of a function, name -> value; None if the tier is down."""
        if self._tier is None:
            return {}
        known = self._known.get(function)
        if known is None:
            try:
                known = await self._read(port, self._tier, function)
            except TierError as error:
                self._fault(self._tier.name, error)
                return None
            self._known[function] = known
        return known

    async def _read(self, port: Port, tier: ServerTier, function: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for secret in self._secrets:
            fields = await tier.own_changes(port, self._place(function, secret))
            for name, sealed in fields.items():
                value = sealed[_SEAL_CHARACTERS:]
                right = self._seal_value(secret, function, name, value)
                if compare_digest(_bytes(sealed), _bytes(right)):
                    found.setdefault(name, value)
        return found

    async def add(self, port: Port, function: str, own_changes: Mapping[str, str]) -> None:
        """Share own changes of a function with the other hosts."""
        known = await self.of(port, function)
        if self._tier is None or known is None:
            return
        secret = self._secrets[0]
        room = max(0, MAX_SHARED_CHANGES - len(known))
        new = dict([one for one in own_changes.items() if one[0] not in known][:room])
        sealed = {name: self._seal_value(secret, function, name, new[name]) for name in new}
        try:
            await self._tier.add_own_changes(port, self._place(function, secret), sealed)
        except TierError as error:
            self._fault(self._tier.name, error)

    def _place(self, function: str, secret: Secret) -> str:
        return f"{{{function}}}:{secret.id.hex()}"

    def _seal_value(self, secret: Secret, function: str, name: str, value: str) -> str:
        text = json.dumps(["own change", self._namespace, function, name, value])
        return secret.seal(text.encode()).hex() + value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
