"""The plan of a call: which cached calls beneath it would run, without running any.

A call is expected to use what it used when it was computed last, which its entry tells, valid or
not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from memo.engine.call import Function
from memo.engine.explaining import Step, headers
from memo.errors import label
from memo.keys.summaries import RESULT
from memo.metrics import rendering
from memo.records.seal import Header
from memo.records.stamp_types import Generation, Ref, Stamp
from memo.runtime.clock import SECOND
from memo.runtime.port import Port
from memo.settings.options import Policy
from memo.stores.chain import Answer, Chain
from memo.validity import lifetimes, results
from memo.validity.check import Judge
from memo.validity.lifetimes import MISS, STALE

HIT, REFRESH, REVALIDATE, COMPUTE = "hit", "hit, then refresh", "revalidate", "compute"
STEPS = 1000
"""Most steps of a plan."""


class Planner:
    """Makes the plan of one call.

    Args:
        port, chain: where it looks.
        functions: those of this process, by identity.
    """

    def __init__(self, port: Port, chain: Chain, functions: Mapping[str, Function]) -> None:
        self._port = port
        self._chain = chain
        self._functions = functions
        self._listed: dict[str, list[Header]] = {}
        self._seen: set[str] = set()
        self.steps: list[Step] = []

    async def add(self, function: str, key: str, shown: str = "", depth: int = 0) -> None:
        """Add the steps of a call, and of those beneath it.

        Args:
            shown: its address for people, where the caller knows it.
        """
        if key in self._seen or len(self.steps) >= STEPS:
            return
        self._seen.add(key)
        known = self._functions.get(function)
        judge = _by_age(self._chain) if known is None else known.judge
        found = await self._chain.lookup(self._port, function, key, judge)
        last = await self._last(function, key)
        does = _does(found)
        self.steps.append(
            Step(
                shown or (label(function) if last is None else rendering.address(last)),
                function,
                does,
                "" if does == HIT else found.verdict.reason,
                None if last is None else last.times.cost / SECOND,
                depth,
            )
        )
        if last is None or does in (HIT, REFRESH):
            return
        for inner, inner_key in await self._beneath(last, only_doubtful=does == REVALIDATE):
            await self.add(inner, inner_key, depth=depth + 1)

    async def like(self, function: str, key: str, shown: str, summary: str) -> None:
        """As `add`, of a call that may have no entry: then of the latest with equal arguments."""
        await self.add(function, key, shown)
        if self.steps[-1].seconds is not None:
            return
        wanted = _arguments(summary)
        same = [one for one in await self._all(function) if _arguments(one.summary) == wanted]
        if not same:
            return
        last = max(same, key=lambda header: header.times.finished)
        self.steps[-1] = self.steps[-1]._replace(seconds=last.times.cost / SECOND)
        for inner, inner_key in await self._beneath(last, only_doubtful=False):
            await self.add(inner, inner_key, depth=1)

    async def _last(self, function: str, key: str) -> Header | None:
        return await self._chain.stored(self._port, self._chain.name(function, key))

    async def _all(self, function: str) -> list[Header]:
        if function not in self._listed:
            self._listed[function] = await headers(self._port, self._chain, function)
        return self._listed[function]

    async def _beneath(self, header: Header, *, only_doubtful: bool) -> list[tuple[str, str]]:
        """The calls that an entry was built on directly: function and key of each."""
        absolute, readings = results.unfolded(header.stamps)
        if only_doubtful:
            doubts = await self._chain.doubtful(self._port, readings)
            readings = [one for one, doubt in zip(readings, doubts, strict=True) if doubt]
        asked = [(one.result.function, one.result.key) for one in readings]
        return asked if only_doubtful else [*await self._plainly(header, absolute), *asked]

    async def _plainly(self, header: Header, absolute: Iterable[Stamp]) -> list[tuple[str, str]]:
        """Those among them that have no cutoff, whose entries are known by their generations."""
        wanted = [ref for ref in _calls(absolute) if ref != _own(header)]
        found: dict[Ref, Header] = {}
        for ref in wanted:
            for one in await self._all(ref.group[2:]):
                before = found.get(ref)
                if _own(one) == ref and (before is None or before.times < one.times):
                    found[ref] = one
        inner = {ref for one in found.values() for ref in _calls(one.stamps) if ref != _own(one)}
        return [(one.function, one.key) for ref, one in found.items() if ref not in inner]


def _calls(known: Iterable[Stamp]) -> list[Ref]:
    """The generations of single calls among some stamps."""
    refs = [stamp.ref for stamp in known if type(stamp) is Generation]
    return [ref for ref in refs if ref.group.startswith("f:") and ref.arguments is not None]


def _own(header: Header) -> Ref | None:
    name = f"f:{header.function}"
    return next((ref for ref in _calls(header.stamps) if ref.group == name), None)


def _arguments(summary: str) -> dict[str, str]:
    found = json.loads(summary)
    return {name: pair[1] for name, pair in found.items() if not name.startswith(RESULT[:1])}


def _by_age(chain: Chain) -> Judge:
    """How the entries of a function that this process does not have are judged."""
    policy = Policy(ttl=None)
    return lambda times, *_: lifetimes.judge(times, policy, chain.clock)


def _does(found: Answer) -> str:
    if found.verdict.kind == MISS:
        return REVALIDATE if found.verdict.renewable else COMPUTE
    return REFRESH if found.verdict.kind == STALE else HIT
