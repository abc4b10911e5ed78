"""Statistics, entries and reports as plain text, as HTML and as drawings.

Everything here is a pure function of frozen numbers.  The colours of the plot are readable in light
and dark themes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from memo.errors import label
from memo.keys import summaries
from memo.keys.summaries import BUILT_ON, RESOLVED, RESULT_SHAPE, SPECIAL_PREFIX
from memo.metrics.formatting import (
    SEPARATOR,
    TIMES,
    Cell,
    Styled,
    Table,
    counts_text,
    duration,
    number,
    percent,
    quantity,
    shown_part,
    size,
    table_html,
    table_lines,
    with_style,
    wrap,
)
from memo.records.seal import COMPRESSED, Header
from memo.records.stamp_types import ADDRESS, Generation
from memo.runtime.clock import SECOND
from memo.runtime.events import FAILED_REFRESH, REFRESHED, REFRESHED_ELSEWHERE, REFRESHING
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    from memo.metrics.recorder import Span
    from memo.metrics.snapshots import Counts, FunctionStats, Point, Stats, TierStats

NO_CALLS = "No cached function was called yet. Put @cache above a function and call it."
FUNCTIONS_SHOWN = 30
"""Functions of a table, unless another number is given."""
MAX_BARS = 96
"""Maximum number of bars of a plot."""
PLOT_COLOURS = {"hits": "#3a9d5d", "stale": "#c98a00", "misses": "#c9503f"}
"""The contrast against white and against JupyterLab's dark grey is above 3 : 1 for each."""


# --- Statistics ---------------------------------------------------------------------------------


class _Column(NamedTuple):
    title: str
    cell: Callable[[FunctionStats], Cell]
    always: bool = False


def _hits(stats: FunctionStats) -> Cell:
    return Cell(number(stats.hits), stats.hits, counts_text(stats.hits_by_tier))


def _stale(stats: FunctionStats) -> Cell:
    return Cell(number(stats.stale), stats.stale)


def _misses(stats: FunctionStats) -> Cell:
    return Cell(number(stats.misses), stats.misses, counts_text(stats.misses_by_reason))


def _refreshes(stats: FunctionStats) -> Cell:
    running, failed = stats.refreshes_running, stats.refreshes_failed
    notes = [f"{running} running"] * bool(running) + [f"{failed} failed"] * bool(failed)
    count = stats.refreshes_done + running + failed
    return Cell(number(stats.refreshes_done), count, SEPARATOR.join(notes))


def _coalesced(stats: FunctionStats) -> Cell:
    return Cell(number(stats.coalesced), stats.coalesced)


def _revalidated(stats: FunctionStats) -> Cell:
    return Cell(number(stats.revalidated), stats.revalidated)


def _errors(stats: FunctionStats) -> Cell:
    return Cell(number(stats.errors), stats.errors, counts_text(stats.errors_by_reason))


def _raised(stats: FunctionStats) -> Cell:
    return Cell(number(stats.failed), stats.failed, counts_text(stats.failed_by_type))


def _rate(stats: FunctionStats) -> Cell:
    rate = stats.hit_rate
    return Cell(percent(rate), "" if rate is None else rate)


def _read(stats: FunctionStats) -> Cell:
    return Cell(size(stats.bytes_read), stats.bytes_read)


def _stored(stats: FunctionStats) -> Cell:
    return Cell(size(stats.bytes_stored), stats.bytes_stored)


def _median(stats: FunctionStats) -> Cell:
    value = stats.median_hit
    return Cell(duration(value), "" if value is None else value)


def _waited(stats: FunctionStats) -> Cell:
    return Cell(duration(stats.wait_seconds), stats.wait_seconds)


def _computed(stats: FunctionStats) -> Cell:
    return Cell(duration(stats.compute_seconds), stats.compute_seconds)


def _saved(stats: FunctionStats) -> Cell:
    return Cell(duration(stats.saved), stats.saved)


_COLUMNS = (
    _Column("hits", _hits, True),
    _Column("stale", _stale),
    _Column("misses", _misses, True),
    _Column("answered", _rate, True),
    _Column("saved", _saved, True),
    _Column("computing", _computed, True),
    _Column("median hit", _median, True),
    _Column("refreshed", _refreshes),
    _Column("shared", _coalesced),
    _Column("revalidated", _revalidated),
    _Column("waited", _waited),
    _Column("raised", _raised),
    _Column("cache errors", _errors),
    _Column("read", _read),
    _Column("stored", _stored),
)


_SPARE_COLUMNS = (
    *("read", "stored", "median hit", "waited", "refreshed", "answered"),
    *("raised", "cache errors", "computing", "shared", "revalidated", "stale", "saved"),
)
"""Columns that are left out first if a table is too wide."""


def table(stats: Stats, limit: int = 0) -> Table:
    """Return one row per function, those that saved most first; columns of zeros are left out.

    Args:
        stats: the statistics to show.
        limit: maximum number of rows, the total not counted; 0: all.
    """
    total = stats.total
    shown = [c for c in _COLUMNS if c.always or c.cell(total).value]
    ordered = sorted(stats.functions.items(), key=lambda item: (-item[1].saved, item[0]))
    rows = [
        [Cell(label(name), name), *(column.cell(part) for column in shown)]
        for name, part in ordered[: limit or None]
    ]
    last = [Cell("total"), *(column.cell(total) for column in shown)] if len(ordered) > 1 else ()
    return Table(
        ["function", *(column.title for column in shown)], rows, last, spare=_SPARE_COLUMNS
    )


def headline(stats: Stats) -> str:
    """Return the most important numbers in one line."""
    total = stats.total
    parts = [f"{quantity(total.hits, 'hit')}", f"{quantity(total.misses, 'miss', 'misses')}"]
    if total.stale:
        parts.insert(1, f"{number(total.stale)} stale")
    if total.coalesced:
        parts.append(f"{number(total.coalesced)} shared")
    if total.revalidated:
        parts.append(f"{number(total.revalidated)} revalidated")
    if total.calls:
        parts.append(f"{percent(total.hit_rate)} answered")
    if total.refreshes_running:
        parts.append(f"{quantity(total.refreshes_running, 'refresh', 'refreshes')} running")
    parts.append(f"saved {duration(total.saved)}")
    parts.append(_period(stats))
    return SEPARATOR.join(part for part in parts if part)


def _period(stats: Stats) -> str:
    if not stats.since:
        return ""
    same_day = time.localtime(stats.since)[:3] == time.localtime(stats.until)[:3]
    form = "%H:%M:%S" if same_day else "%Y-%m-%d %H:%M"
    since = f"since {time.strftime(form, time.localtime(stats.since))}"
    if stats.processes == 1:
        return since
    return f"{since} in {quantity(stats.processes, 'process', 'processes')}"


def tiers(stats: Stats) -> list[tuple[str, str, bool]]:
    """Return (name, text, True if all is well) for each tier with something to report."""
    lines = ((name, _tier_line(tier), _is_well(tier)) for name, tier in stats.tiers.items())
    return [line for line in lines if line[1]]


def _is_well(tier: TierStats) -> bool:
    """True if nothing needs to be done: waiting entries are sent to Redis automatically."""
    return tier.up is not False


def _tier_line(tier: TierStats) -> str:
    parts = [quantity(tier.hits, "hit")] if tier.hits else []
    parts += [f"{number(tier.stale)} stale"] if tier.stale else []
    parts += [quantity(tier.errors, "error")] if tier.errors else []
    if tier.up is not None:
        parts.append("up" if tier.up else "down")
    parts += [quantity(tier.downs, "outage")] if tier.downs else []
    return SEPARATOR.join([*parts, *_health(tier.health)])


_SIZES = ("size", "bytes", "used")
_BUDGETS = ("size_limit", "limit", "budget", "maxmemory")


def _health(facts: Mapping[str, Any]) -> list[str]:
    """Describe the facts that a tier reports, budgets and waiting invalidations first."""
    left = {name: fact for name, fact in facts.items() if name != "up" and fact not in (None, "")}
    used = next((left.pop(name) for name in _SIZES if name in left), None)
    budget = next((left.pop(name) for name in _BUDGETS if name in left), None)
    parts = []
    if used is not None:
        parts.append(size(used) + (f" of {size(budget)}" if budget else ""))
    if journal := left.pop("journal", 0):
        to = left.pop("to", "a shared tier")
        parts.append(f"{quantity(journal, 'invalidation')} on the way to {to}")
    if left.pop("breaker", "") == "open":
        parts.append("not asked until it answers again")
    if names := left.pop("names", 0):
        parts.append(f"{quantity(names, 'key')} in this database")
    if (entries := left.pop("entries", None)) is not None:
        parts.append(quantity(entries, "entry", "entries"))
    if left.get("state") == "writable":  # the normal state
        del left["state"]
    if "error" in left:  # of the disk: it names the directory and the cause
        for name in ("directory", "state", "why"):
            left.pop(name, None)
    if policy := left.pop("policy", ""):
        parts.append(f"eviction: {policy}")
    return parts + [_fact(name, fact) for name, fact in left.items()]


def _fact(name: str, fact: object) -> str:
    words = name.replace("_", " ")
    if isinstance(fact, bool):
        return words if fact else f"not {words}"
    if isinstance(fact, int) and name.endswith("bytes"):
        return f"{words} {size(fact)}"
    if isinstance(fact, int):
        return f"{words} {number(fact)}"
    return f"{words} {fact}"


def _left_out(stats: Stats, limit: int, more: str) -> str:
    """Say how many functions a table leaves out, and how to see them; `""` if none."""
    count = len(stats.functions)
    if not limit or count <= limit:
        return ""
    lead = "Those that saved most: "
    return lead + shown_part(limit, count, "function", "functions", more)


def _nothing_text(stats: Stats) -> str:
    return (
        f"No function named {' or '.join(stats.patterns)} was called."
        if stats.patterns
        else NO_CALLS
    )


SHOWS_ALL = "memo.stats().to_frame()"
"""The expression that shows every function, where no flag does."""


def text(
    stats: Stats,
    plot: bool = False,
    width: int = 80,
    limit: int = FUNCTIONS_SHOWN,
    more: str = SHOWS_ALL,
) -> str:
    """Return statistics as plain text, at most `width` columns wide."""
    lines = stats_lines(stats, plot=plot, width=width, limit=limit, more=more)
    return "\n".join(line.text for line in lines)


def stats_lines(
    stats: Stats,
    *,
    plot: bool = False,
    width: int = 80,
    limit: int = FUNCTIONS_SHOWN,
    more: str = SHOWS_ALL,
) -> list[Styled]:
    """Return statistics as lines of at most `width` columns.

    Args:
        stats: the statistics to show.
        plot: draw calls over time.
        width: columns.
        limit: maximum number of functions; 0: all.
        more: tells how to see those that are left out.
    """
    lines = [Styled(line, "bold") for line in wrap(f"memo: {headline(stats)}", width)]
    lines.append(Styled(""))
    shown = table(stats, limit)
    lines += table_lines(shown, width) if stats.functions else [Styled(_nothing_text(stats))]
    lines += [Styled(line, "dim") for line in wrap(_left_out(stats, limit, more), width)]
    facts = tiers(stats)
    lines += [Styled("")] if facts else []
    first = max((len(name) for name, _, _ in facts), default=0)
    for name, text, well in facts:
        head, *rest = wrap(text, width - first - 2)
        style = "" if well else "red"
        lines.append(Styled(f"{name.ljust(first)}  {head}", style))
        lines += [Styled(f"{' ' * first}  {line}", style) for line in rest]
    drawn = sparklines(stats) if plot else ""
    return [*lines, *map(Styled, ["", *drawn.splitlines()] if drawn else [])]


def html(
    stats: Stats, plot: bool = False, limit: int = FUNCTIONS_SHOWN, more: str = SHOWS_ALL
) -> str:
    """Return statistics as HTML; `limit` and `more` as for `stats_lines`."""
    if not stats.functions and not stats.total.invalidations:
        return with_style(f"<p>{_code(_nothing_text(stats))}</p>{_tiers_html(stats)}")
    parts = [f"<p><b>memo</b> {escape(headline(stats))}</p>"]
    parts += [svg(stats)] if plot else []
    found = bool(stats.functions)
    parts += [table_html(table(stats, limit)) if found else f"<p>{_code(_nothing_text(stats))}</p>"]
    left_out = _left_out(stats, limit, more)
    parts += [f'<p class="memo-dim">{escape(left_out)}</p>'] if left_out else []
    return with_style("".join(parts) + _tiers_html(stats))


def _code(sentence: str) -> str:
    return escape(sentence).replace("@cache", "<code>@cache</code>")


def _tiers_html(stats: Stats) -> str:
    parts = (
        f'<p class="memo-dim"><b{"" if well else " class=memo-bad"}>{escape(name)}</b> '
        f"{escape(text)}</p>"
        for name, text, well in tiers(stats)
    )
    return "".join(parts)


# --- Entries ------------------------------------------------------------------------------------


def arguments(header: Header) -> dict[str, str]:
    """Return argument -> short text, from the summary of an entry."""
    summary = _summary(header)
    hidden = (RESOLVED, RESULT_SHAPE, BUILT_ON)
    return {
        name.removeprefix(SPECIAL_PREFIX): s[0] for name, s in summary.items() if name not in hidden
    }


def call_text(header: Header) -> str:
    """Return an entry as a call, for display: `load(region='EU')`."""
    given = ", ".join(f"{name}={text}" for name, text in arguments(header).items())
    return f"{label(header.function)}({given})"


def _summary(header: Header) -> dict[str, tuple[str, str]]:
    try:
        summary = json.loads(header.summary)
        return {str(name): (str(text), str(digest)) for name, (text, digest) in summary.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def address(header: Header) -> str:
    """Return the address of an entry for display, without secret arguments."""
    refs = [stamp.ref for stamp in header.stamps if type(stamp) is Generation]
    prefixes = [ref.group[2:] for ref in refs if ref.group.startswith("p:")]
    begins = [prefix for prefix in prefixes if f"{header.address}:".startswith(f"{prefix}:")]
    own = next((ref for ref in refs if ref.group == f"f:{header.function}"), None)
    resolved = own is None or ADDRESS in dict(own.arguments or ())
    prefix = max(begins, key=len, default="")
    return summaries.mask_address(header.address, prefix, header.summary, resolved=resolved)


def entries(
    headers: Iterable[tuple[Header, int]],
    ages: Sequence[float | None],
    lifetimes: Sequence[float | None],
    places: Sequence[str] | None = None,
    states: Sequence[str] | None = None,
) -> Table:
    """Return a table of entries.

    Args:
        headers: the header and the size in bytes of each.
        ages: seconds since each was computed; None: unknown.
        lifetimes: seconds for which each stays fresh, infinity without expiry, 0 or less if it has
            expired; None: it is not valid, or that is unknown.
        places: the tiers that hold each; None: omit that column.
        states: the state of each, in a word; None: omit that column.
    """
    rows = [
        _entry_row(header, held, age, left)
        for (header, held), age, left in zip(headers, ages, lifetimes, strict=True)
    ]
    titles = ["function", "arguments", "age", "expires in", "size", "cost", "by"]
    spare = ("by", "tier", "cost", "age")
    if places is not None:
        titles.insert(2, "tier")
        for row, place in zip(rows, places, strict=True):
            row.insert(2, Cell(place, place))
    if states is not None:
        titles.insert(2, "state")
        for row, state in zip(rows, states, strict=True):
            row.insert(2, Cell(state, state))
    texts = 2 + (places is not None) + (states is not None)
    return Table(titles, rows, texts=texts, spare=spare)


def _entry_row(header: Header, held: int, age: float | None, left: float | None) -> list[Cell]:
    cost = header.times.cost / SECOND
    given = ", ".join(f"{name}={text}" for name, text in arguments(header).items())
    return [
        Cell(label(header.function), header.function),
        Cell(given, given),
        Cell(duration(age), age or 0.0),
        Cell(_left_text(left), left or 0.0),
        Cell(f"{size(held)}{' zstd' if header.flags & COMPRESSED else ''}", held),
        Cell(duration(cost), cost),
        Cell(header.writer, header.writer),
    ]


def _left_text(left: float | None) -> str:
    """Describe for how long an entry stays fresh; see `entries`."""
    if left is None:
        return duration(None)
    return "never" if left == math.inf else duration(left) if left > 0 else "expired"


# --- Plots --------------------------------------------------------------------------------------

_CHART_WIDTH, _CHART_HEIGHT, _CHART_FOOT = 640, 96, 34


def svg(stats: Stats) -> str:
    """Draw hits, stale hits and misses over time as stacked bars; `""` if nothing happened."""
    width, points = stats.total.bars(MAX_BARS)
    if not points:
        return ""
    top = max(sum(point[1:]) for point in points)
    step = _CHART_WIDTH / max(len(points), 12)
    drawn = "".join(_bar(i * step, step, point, top) for i, point in enumerate(points))
    first, last = (_clock(point) for point in (points[0], points[-1]))
    foot = _CHART_HEIGHT + 14
    return (
        f'<svg role="img" aria-label="hits, stale hits and misses over time" '
        f'viewBox="0 -14 {_CHART_WIDTH} {_CHART_HEIGHT + _CHART_FOOT + 14}" width="{_CHART_WIDTH}" '
        f'height="{_CHART_HEIGHT + _CHART_FOOT + 14}" xmlns="http://www.w3.org/2000/svg">'
        f'<text x="0" y="-4">{number(top)} calls in {escape(duration(width))}</text>{drawn}'
        f'<line x1="0" y1="{_CHART_HEIGHT}" x2="{_CHART_WIDTH}" y2="{_CHART_HEIGHT}" '
        f'stroke="currentColor" stroke-opacity=".4"/><text x="0" y="{foot}">{first}</text>'
        f'<text x="{min(_CHART_WIDTH, max(len(points) * step, 130)):.1f}" y="{foot}" '
        f'text-anchor="end">{last}</text>{_legend(foot + 16)}</svg>'
    )


def _bar(x: float, step: float, point: Point, top: int) -> str:
    parts, base = [], float(_CHART_HEIGHT)
    for (name, colour), count in zip(PLOT_COLOURS.items(), point[1:], strict=True):
        height = count / top * _CHART_HEIGHT
        base -= height
        if count:
            parts.append(
                f'<rect x="{x:.1f}" y="{base:.1f}" width="{max(step - 1, 0.8):.1f}" '
                f'height="{height:.1f}" fill="{colour}"><title>{number(count)} {name}, '
                f"{_clock(point)}</title></rect>"
            )
    return "".join(parts)


def _legend(y: int) -> str:
    parts, x = [], 0
    for name, colour in PLOT_COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{y}">{name}</text>')
        x += 70
    return "".join(parts)


def sparklines(stats: Stats) -> str:
    """Draw the same as three lines of block characters."""
    width, points = stats.total.bars(MAX_BARS)
    if not points:
        return ""
    top = max(max(point[1:]) for point in points)
    rows = zip(PLOT_COLOURS, zip(*(point[1:] for point in points), strict=True), strict=True)
    lines = [f"{name:>6}  {''.join(_block(n, top) for n in counts)}" for name, counts in rows]
    foot = f"{'':>6}  {duration(width)} each, the last at {_clock(points[-1])}"
    return "\n".join((*lines, foot))


def _clock(point: Point) -> str:
    return time.strftime("%H:%M:%S", time.localtime(point.start))


def _block(count: int, top: int) -> str:
    return "▁▂▃▄▅▆▇█"[max(0, -(-count * 8 // top) - 1)] if count else " "


# --- One line under a cell ----------------------------------------------------------------------


def report(span: Span) -> str:
    """Summarize a span of time in one line.

    `2 hits (disk) · 1 stale, refreshing · 1 miss: code of clean() changed · saved 41.8 s`
    """
    total = span.stats.total
    parts = [_answers(total.hits, total.hits_by_tier)] if total.hits else []
    if total.stale or span.refreshes:
        parts.append(_stale_part(total.stale, span.refreshes.values()))
    if total.misses:
        parts.append(f"{quantity(total.misses, 'miss', 'misses')}{_reasons(span, total)}")
    parts += [f"{number(total.coalesced)} shared"] if total.coalesced else []
    parts += [f"{number(total.revalidated)} revalidated"] if total.revalidated else []
    parts += [f"{number(total.failed)} raised"] if total.failed else []
    if total.errors:
        kinds = ", ".join(total.errors_by_reason)
        parts.append(f"{quantity(total.errors, 'cache error')} ({kinds})")
    parts += [f"saved {duration(total.saved)}"] if total.saved > 0 else []
    return SEPARATOR.join(parts)


def _answers(hits: int, by_tier: Counts) -> str:
    names = (
        " ".join(by_tier) if len(by_tier) == 1 else counts_text(by_tier).replace(SEPARATOR, ", ")
    )
    return f"{quantity(hits, 'hit')} ({names})"


def _stale_part(stale: int, states: Iterable[str]) -> str:
    kinds = list(states)
    words = [f"{number(stale)} stale"] if stale else []
    for state in (REFRESHING, REFRESHED, REFRESHED_ELSEWHERE, FAILED_REFRESH):
        count = kinds.count(state)
        if count:
            words.append(state if count == len(kinds) else f"{number(count)} {state}")
    return ", ".join(words)


def _reasons(span: Span, total: FunctionStats) -> str:
    counts: dict[str, int] = {}
    for miss in span.misses:
        short = label(miss.function).rpartition(":")[2].rpartition(".")[2]
        call = short if short.endswith(")") else f"{short}()"
        what = miss.detail or f"{call} {miss.reason}"
        counts[what] = counts.get(what, 0) + 1
    if not counts:
        return f": {counts_text(total.misses_by_reason)}"
    first = [what if n == 1 else f"{what} ({n}{TIMES})" for what, n in list(counts.items())[:3]]
    return ": " + ", ".join(first) + (", …" if len(counts) > 3 else "")


def report_html(line: str) -> str:
    """Return the lines of a report as HTML."""
    return with_style(
        "".join(f'<p class="memo-dim">{escape(one)}</p>' for one in line.splitlines())
    )


def progress_html(lines: Iterable[tuple[str, float | None, int]]) -> str:
    """Return running computations as HTML.

    Args:
        lines: the text of each, the fraction that is done (0 to 1, None: unknown), and the number
            of other lines that it is nested in.
    """
    parts = (
        f'<p class="memo-dim" style="margin-left:{depth * 1.5}em">{_bar_html(share)}'
        f"{escape(text)}</p>"
        for text, share, depth in lines
    )
    return with_style("".join(parts))


def _bar_html(share: float | None) -> str:
    if share is None:
        return ""
    done = f"{share * 100:.0f}"
    return (
        f'<span class="memo-bar" role="progressbar" aria-valuenow="{done}">'
        f'<span style="width:{done}%"></span></span> '
    )
