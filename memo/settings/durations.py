"""Durations as users write them: numbers of seconds, texts such as `"1h30m"`, timedeltas."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from memo.errors import OptionError
from memo.runtime import lazy_attributes

if TYPE_CHECKING:
    from datetime import timedelta as timedelta  # noqa: PLC0414 - annotations elsewhere name it
else:
    __getattr__ = lazy_attributes(__name__, {"timedelta": "datetime"})

_SECONDS_BY_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PART_PATTERN = r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)"
_DURATION_PATTERN = rf"(?a)\s*(?:{_PART_PATTERN}\s*)+"
MAX_LIFETIME_SECONDS = 4.6e9
"""Longest lifetime of an entry, stale windows included, in seconds."""


def seconds(
    option: str, value: Any, *, zero: bool = False, fix: str = "write None for no limit"
) -> float | None:
    """Return the seconds of a number, a `timedelta` or a text such as `"1h30m"`; None for None.

    Args:
        option: the name to use in the error.
        value: what the user wrote.  Units in a text: ms, s, m, h, d, w.
        zero: 0 is allowed.
        fix: what to write instead of a number that is out of range.

    Raises:
        OptionError: for 0 (unless allowed), negative, NaN, infinite, bool, and texts without units.
    """
    if value is None:
        return None
    least = "0 or more" if zero else "more than 0"
    number = _number_of_seconds(option, value, fix)
    if math.isnan(number) or math.isinf(number):
        raise OptionError(option, value, f"must be finite; {fix}.")
    if number > MAX_LIFETIME_SECONDS:
        raise OptionError(
            option, value, f"is more than {MAX_LIFETIME_SECONDS / 31_557_600:.0f} years; {fix}."
        )
    if number < 0 or (number == 0 and not zero):
        raise OptionError(option, value, f"must be {least}; {fix}.")
    return number


def _number_of_seconds(option: str, value: Any, fix: str) -> float:
    if isinstance(value, bool):
        raise OptionError(option, value, "is a bool; write a number of seconds.")
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            raise OptionError(option, value, f"is too large; {fix}.") from None
    if isinstance(value, str):
        if not re.fullmatch(_DURATION_PATTERN, value):
            bare = re.fullmatch(r"(?a)\s*[-+]?\d*\.?\d+\s*", value)
            wrong = (
                "has no units"
                if bare
                else f"is not a duration; the units are {', '.join(_SECONDS_BY_UNIT)}"
            )
            raise OptionError(option, value, f'{wrong}; write for instance "90s" or "1h30m".')
        return sum(
            float(number) * _SECONDS_BY_UNIT[unit]
            for number, unit in re.findall(_PART_PATTERN, value)
        )
    from datetime import timedelta

    if isinstance(value, timedelta):
        return value.total_seconds()
    raise OptionError(
        option, value, 'must be seconds, a timedelta, a text such as "1h30m", or None.'
    )
