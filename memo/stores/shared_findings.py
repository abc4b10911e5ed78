"""Findings about functions, which hosts share through a tier.

Rules of this module:

1.  Each finding is sealed with the writer's secret, together with the namespace, the function and
    its name; findings that the reader's secrets do not authenticate are ignored.
2.  The first host to write a finding decides; a different value for it is not accepted.
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

MAX_FINDINGS: Final = 256
"""Most findings that are kept for one function."""
_SEAL_CHARACTERS: Final = 64
"""Number of characters of the seal in front of a finding."""


class Findings:
    """The findings of hosts that share a tier.

    Args:
        tier: the tier that the hosts share; None: nothing is shared.
        namespace: part of what is sealed.
        secrets: they authenticate findings; the first one seals new ones.
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
        """Return all findings about a function, name -> value; None if the tier is down."""
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
            fields = await tier.findings(port, self._place(function, secret))
            for name, sealed in fields.items():
                value = sealed[_SEAL_CHARACTERS:]
                right = self._seal_value(secret, function, name, value)
                if compare_digest(_bytes(sealed), _bytes(right)):
                    found.setdefault(name, value)
        return found

    async def add(self, port: Port, function: str, findings: Mapping[str, str]) -> None:
        """Share findings about a function with the other hosts."""
        known = await self.of(port, function)
        if self._tier is None or known is None:
            return
        secret = self._secrets[0]
        room = max(0, MAX_FINDINGS - len(known))
        new = dict([one for one in findings.items() if one[0] not in known][:room])
        sealed = {name: self._seal_value(secret, function, name, new[name]) for name in new}
        try:
            await self._tier.add_findings(port, self._place(function, secret), sealed)
        except TierError as error:
            self._fault(self._tier.name, error)

    def _place(self, function: str, secret: Secret) -> str:
        return f"{{{function}}}:{secret.id.hex()}"

    def _seal_value(self, secret: Secret, function: str, name: str, value: str) -> str:
        text = json.dumps(["finding", self._namespace, function, name, value])
        return secret.seal(text.encode()).hex() + value


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
