"""Result stamps: the `cutoff` results that an entry was built on, which can be asked for again.

An entry has one flat list of stamps.  A `Result` refers to the positions of the stamps that it
stands for; all other stamps are absolute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memo.records.stamp_types import Result, Stamp
from memo.runtime.named_tuple import NamedTuple


class UsedResult(NamedTuple):
    """A result of a `cutoff` function that a computation used.

    Attributes:
        result: its stamp, without positions.
        stamps: the stamps that it stands for.
    """

    result: Result
    stamps: tuple[Stamp, ...]


def own_result(stamps: Iterable[Stamp]) -> Result | None:
    """Return the stamp with the digest of an entry's value; None without `cutoff`."""
    return next((s for s in stamps if type(s) is Result and not s.beneath), None)


def flatten(absolute: Iterable[Stamp], used: Iterable[UsedResult]) -> tuple[Stamp, ...]:
    """Return absolute stamps and used results as the one list that an entry stores.

    The absolute stamps come first, then those beneath the results (once each), then the results.
    """
    made: list[Stamp] = [*absolute]
    places: dict[Stamp, int] = {}
    directly: list[Stamp] = []  # kept apart, since another result may stand for one of them as well

    def place(stamp: Stamp) -> int:
        at = places.get(stamp)
        if at is None:
            at = places[stamp] = len(made)
            made.append(stamp)
        return at

    for result, stamps in used:
        moved: dict[int, int] = {}
        claimed = _claimed(stamps)
        for at, stamp in enumerate(stamps):
            if type(stamp) is not Result:
                moved[at] = place(stamp)
            elif stamp.beneath:
                beneath = tuple(moved[i] for i in stamp.beneath)
                moved[at] = place(stamp._replace(beneath=beneath, wave=0))
        beneath = tuple(to for at, to in moved.items() if at not in claimed)
        directly.append(result._replace(beneath=beneath))
    return (*made, *directly)


def unflatten(stamps: Sequence[Stamp]) -> tuple[list[Stamp], list[UsedResult]]:
    """Split the stamps of an entry into the absolute ones and the results it was built on."""
    claimed = _claimed(stamps)
    absolute: list[Stamp] = []
    used: list[UsedResult] = []
    for at, stamp in enumerate(stamps):
        if at in claimed or (type(stamp) is Result and not stamp.beneath):
            continue
        if type(stamp) is Result:
            used.append(UsedResult(stamp._replace(beneath=()), _beneath(stamps, stamp)))
        else:
            absolute.append(stamp)
    return absolute, used


def _claimed(stamps: Iterable[Stamp]) -> set[int]:
    return {at for stamp in stamps if type(stamp) is Result for at in stamp.beneath}


def _beneath(stamps: Sequence[Stamp], result: Result) -> tuple[Stamp, ...]:
    """Return the stamps that a result stands for, as an entry stores them."""
    wanted: set[int] = set()
    left = list(result.beneath)
    while left:
        at = left.pop()
        if at not in wanted:
            wanted.add(at)
            stamp = stamps[at]
            left += stamp.beneath if type(stamp) is Result else ()
    order = sorted(wanted)  # a result comes after the stamps that it stands for
    moved = {at: to for to, at in enumerate(order)}
    return tuple(_moved(stamps[at], moved) for at in order)


def _moved(stamp: Stamp, moved: Mapping[int, int]) -> Stamp:
    if type(stamp) is not Result:
        return stamp
    return stamp._replace(beneath=tuple(moved[at] for at in stamp.beneath))


def split_reasons(stamps: Sequence[Stamp], reasons: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the reasons of an entry's stamps into those of absolute stamps and those of results.

    Args:
        stamps: the stamps of an entry.
        reasons: why each of them does not hold, or `""`.  That of a result is ignored.
    """
    claimed = _claimed(stamps)
    of_results: dict[int, list[str]] = {}
    absolute: list[str] = []
    beneath: list[str] = []
    for at, stamp in enumerate(stamps):
        if type(stamp) is Result:
            own = [why for i in stamp.beneath for why in of_results.get(i, (reasons[i],)) if why]
            of_results[at] = own
            if at not in claimed:
                beneath += own
        elif at not in claimed and reasons[at]:
            absolute.append(reasons[at])
    return absolute, beneath
