"""Numbers as people read them, and tables in general, as text and as HTML.

All text of the HTML is escaped.  It takes text and line colours from the page (`--jp-*` variables
of JupyterLab, `--vscode-*` of VS Code), so it is readable in light and dark themes.  A click sorts
a column where scripts run; elsewhere it is a plain table.
"""

from __future__ import annotations

import functools
import math
import os
import re
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from memo.errors import MissingExtraError
from memo.runtime.named_tuple import NamedTuple

if TYPE_CHECKING:
    import pandas as pd

SEPARATOR = " · "
DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"  # en dash, minus sign, multiplication sign


# --- Numbers for people -------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """Return a time as text: `14 µs`, `3.2 ms`, `41.8 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds is None:
        return DASH
    if seconds < 0:
        return f"{MINUS}{duration(-seconds)}"
    if seconds == 0:
        return "0 s"
    for unit, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3), ("s", 1.0)):
        amount = seconds * factor
        if amount < (59.95 if unit == "s" else 999.5):
            return f"{amount:.1f} {unit}" if _wants_tenth(unit, amount) else f"{amount:.0f} {unit}"
    return _long_duration(round(seconds))


def _wants_tenth(unit: str, amount: float) -> bool:
    return unit == "s" or (unit == "ms" and amount < 99.95) or amount < 9.95


def _long_duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02} h"


def size(count: float | None) -> str:
    """Return a number of bytes as text, in powers of 1024: `512 B`, `3.2 KiB`, `1.2 GiB`."""
    if count is None:
        return DASH
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 999.95 or unit == "TiB":
            break
    return f"{count:.1f} {unit}"


def date_and_time(seconds: float) -> str:
    """Return a Unix time as text, in the local time zone: `2025-03-01 14:05:09`."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def number(count: int) -> str:
    """Return a count as text: `1 234 567`, with narrow spaces that do not break."""
    return f"{count:,}".replace(",", "\u202f")


def quantity(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 hit`, `2 hits`, `3 misses`."""
    return f"{number(count)} {noun if count == 1 else plural or noun + 's'}"


def percent(share: float | None) -> str:
    """Return a fraction as text; 100 % only if nothing is missing."""
    if share is None:
        return DASH
    return f"{min(share * 100, 100 if share == 1 else 99.9):.3g} %"


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts with their names, the largest first: `memory 5 · disk 3`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return SEPARATOR.join(f"{name or 'unknown'} {number(count)}" for name, count in ordered)


def shown_part(shown: int, count: int, noun: str, plural: str, more: str) -> str:
    """Return `2 entries`, or `50 of 300 entries` and how to see the others."""
    if shown >= count:
        return quantity(count, noun, plural)
    return f"{number(shown)} of {number(count)} {plural}; {more} shows all."


# --- Tables in general --------------------------------------------------------------------------


class Cell(NamedTuple):
    """One cell: its text, the value that it sorts by, and a note in small print."""

    text: str
    value: float | str = ""
    note: str = ""


class Table(NamedTuple):
    """Rows of cells under titles; the first `texts` columns are texts, the others numbers.

    `spare` names the columns to leave out in a narrow table, in that order.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    total: Sequence[Cell] = ()
    texts: int = 1
    spare: Sequence[str] = ()

    def without(self, title: str) -> Table:
        """Return the table without one column."""
        at = list(self.titles).index(title)
        rows = [(*row[:at], *row[at + 1 :]) for row in self.rows]
        total = (*self.total[:at], *self.total[at + 1 :]) if self.total else ()
        titles = (*self.titles[:at], *self.titles[at + 1 :])
        return Table(titles, rows, total, self.texts - (at < self.texts), self.spare)


class Styled(NamedTuple):
    """A line of text and its style in the words of Rich; `""` for plain."""

    text: str
    style: str = ""


_TIE = "\0"
"""A space at which no line is broken."""
MIN_TEXT_COLUMNS = 8
"""Minimum width, in columns, to which a text is cut."""


def table_text(table: Table, width: int = 80) -> str:
    """Return a table as aligned plain text, at most `width` characters wide."""
    return "\n".join(line.text for line in table_lines(table, width))


def table_lines(table: Table, width: int = 80) -> list[Styled]:
    """Return a table as lines of at most `width` columns; notes are lines of their own.

    If not all columns fit, some are left out and named in a last line; then texts are cut.
    """
    gone = []
    for title in table.spare:
        if _needed_width(table) <= width:
            break
        if title in table.titles:
            gone.append(title)
            table = table.without(title)
    widths = _widths(table)
    for index in sorted(range(table.texts), key=lambda at: -widths[at]):
        over = sum(widths) + 2 * (len(widths) - 1) - width
        widths[index] = max(min(widths[index], MIN_TEXT_COLUMNS), widths[index] - max(0, over))
    rule = Styled("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim")
    lines = [Styled(_line(table.titles, widths, table.texts), "bold"), rule]
    for row in table.rows:
        lines += _row_lines(row, table, widths, width)
    if table.total:
        lines += [rule, *_row_lines(table.total, table, widths, width)]
    if gone:
        lines += [Styled(line, "dim") for line in wrap(f"Not shown: {', '.join(gone)}.", width)]
    return lines


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Wrap a text into lines of at most `width` columns, but not narrower than a cut text."""
    width = max(width, MIN_TEXT_COLUMNS)
    room = width - len(indent)
    parts = [
        part.replace(" ", _TIE) if len(part) < room else part
        for part in re.split(r"(?<=;) | (?=·)|(?<=·) ", text)
    ]
    lines = textwrap.wrap(
        " ".join(parts),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
    return [line.replace(_TIE, " ") for line in lines]


def cell_len(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    from rich import cells

    return cells.cell_len(text)


def cut_to_width(text: str, width: int) -> str:
    """Cut a text to `width` columns, with `…` in place of the rest."""
    if cell_len(text) <= width:
        return text
    from rich import cells

    return f"{cells.set_cell_size(text, width - 1).rstrip()}…"


def _widths(table: Table) -> list[int]:
    rows = [[cell.text for cell in row] for row in (*table.rows, table.total) if row]
    return [max(map(cell_len, column)) for column in zip(table.titles, *rows, strict=True)]


def _needed_width(table: Table) -> int:
    """Return the columns that a table needs if its texts are cut to a third of a line."""
    widths = [min(w, 26) if at < table.texts else w for at, w in enumerate(_widths(table))]
    return sum(widths) + 2 * (len(widths) - 1)


def _row_lines(
    row: Sequence[Cell], table: Table, widths: Sequence[int], width: int
) -> list[Styled]:
    pairs = zip(table.titles, row, strict=True)
    notes = [f"{title}: {cell.note}" for title, cell in pairs if cell.note]
    line = Styled(_line([cell.text for cell in row], widths, table.texts))
    return [line, *(Styled(one, "dim") for one in wrap("; ".join(notes), width, "  "))]


def _line(parts: Sequence[str], widths: Sequence[int], texts: int) -> str:
    padded = []
    for index, (part, width) in enumerate(zip(parts, widths, strict=True)):
        text = cut_to_width(part, width)
        space = " " * (width - cell_len(text))
        padded.append(f"{text}{space}" if index < texts else f"{space}{text}")
    return "  ".join(padded).rstrip()


def table_data(table: Table) -> dict[str, Any]:
    """Return a table as plain data, for the page of the live view."""
    rows = [
        {"cells": [{"text": c.text, "value": _plain(c.value), "note": c.note} for c in row]}
        for row in table.rows
    ]
    return {"titles": list(table.titles), "texts": table.texts, "rows": rows}


def _plain(value: float | str) -> float | str:
    return "Infinity" if value == math.inf else value


def table_html(table: Table) -> str:
    """Return a table as HTML, sortable where scripts run."""
    name = f"memo-{os.urandom(6).hex()}"
    heads = "".join(
        f'<th scope="col"{_side(index < table.texts)}>{escape(title)}</th>'
        for index, title in enumerate(table.titles)
    )
    body = "".join(_row_html(row, table.texts) for row in table.rows)
    foot = f"<tfoot>{_row_html(table.total, table.texts)}</tfoot>" if table.total else ""
    script = (
        f"<script>({static_file(__package__, 'sort.js').strip()})({name!r})</script>"
        if len(table.rows) > 1
        else ""
    )
    parts = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody>{foot}"
    return f'<div class="memo-wide"><table id="{name}">{parts}</table></div>{script}'


def _side(is_text: bool) -> str:
    return ' class="memo-text"' if is_text else ""


def _row_html(row: Sequence[Cell], texts: int) -> str:
    head, *rest = row
    cells = (
        f'<td data-v="{_sort_key(cell)}"{_side(index < texts)}>{_cell_html(cell)}</td>'
        for index, cell in enumerate(rest, 1)
    )
    first = f'<th scope="row" data-v="{_sort_key(head)}"{_side(True)}>{_cell_html(head)}</th>'
    return f"<tr>{first}{''.join(cells)}</tr>"


def _sort_key(cell: Cell) -> str:
    return "Infinity" if cell.value == math.inf else escape(str(cell.value))


def _cell_html(cell: Cell) -> str:
    notes = cell.note.split(SEPARATOR) if cell.note else ()
    return escape(cell.text) + "".join(f"<small>{escape(note)}</small>" for note in notes)


@functools.cache
def static_file(package: str, name: str) -> str:
    """Return the text of a file in the `static` folder of a package."""
    from importlib import resources

    return resources.files(package).joinpath("static", name).read_text("utf-8")


def with_style(content: str) -> str:
    """Wrap HTML in a block with memo's own style."""
    return (
        f'<style>{static_file(__package__, "tables.css")}</style><div class="memo">{content}</div>'
    )


def page(title: str, content: str) -> str:
    """Return a whole page of HTML, light or dark like the reader's system."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f'<meta name="color-scheme" content="light dark">{content}</html>'
    )


def lines_html(text: str) -> str:
    """Return plain lines as HTML."""
    return with_style("".join(f"<p>{escape(line)}</p>" for line in text.splitlines()))


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """Return a title and a few named facts as HTML."""
    rows = "".join(
        f'<tr><th scope="row" class="memo-text">{escape(name)}</th>'
        f'<td class="memo-text">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return with_style(f"<p><b>{escape(title)}</b></p><table><tbody>{rows}</tbody></table>")


def frame_of(records: Iterable[tuple[Any, ...]], columns: Sequence[str]) -> pd.DataFrame:
    """Return a pandas DataFrame, one row for each record.

    Raises:
        MissingExtraError: pandas is not installed.
    """
    frame: pd.DataFrame = import_pandas().DataFrame(list(records), columns=list(columns))
    return frame


def import_pandas() -> Any:
    """Import pandas, for the `to_frame()` of objects that are shown as a table.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise MissingExtraError("to_frame() needs pandas: pip install pandas") from None
    return pd
