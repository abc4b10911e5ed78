"""The command line: `memo demo`, `stats`, `ls`, `clear`, `doctor` and others.

Each command calls a module of `inspection` and prints the result.  A user's mistake ends with one
line on standard error and status 2; a finding that needs work, or a name that matches nothing, with
status 1.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import memo
from memo.decorators import names
from memo.decorators.assembly import default_chain
from memo.engine.invalidating import invalidate
from memo.errors import MemoError, MissingExtraError, OptionError, SettingError
from memo.inspection import call_graph, doctor, gathered_stats, inventory
from memo.metrics import formatting, rendering
from memo.records import seal
from memo.runtime.blocking import BLOCKING, drive
from memo.runtime.clock import SECOND
from memo.settings import configuration
from memo.stores.bundle_file import given_key
from memo.stores.protocols import MEMORY
from memo.validity.stamps import Turn

if TYPE_CHECKING:
    from rich.text import Text

MARKS = {doctor.GOOD: "green", doctor.NOTE: "cyan", doctor.WARN: "yellow", doctor.FAIL: "red"}
_KEY_FILE = click.Path(exists=True, dir_okay=False)


class _Commands(click.Group):
    """Turns memo's own errors into messages with the mistake and the fix."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OptionError as error:  # a name that matches nothing, or several
            raise click.ClickException(str(error)) from error
        except MemoError as error:
            raise click.UsageError(str(error), None) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(memo.__version__, prog_name="memo")
def main() -> None:
    """Inspect and manage cached results of functions."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where it is not UTF-8, a rule becomes `?`
            stream.reconfigure(errors="replace")


@main.command()
@click.option("--redis", metavar="URL", help="Put this Redis before the disk.")
@click.option("--quick", is_flag=True, help="Use less data: 1 to 2 seconds of work.")
def demo(redis: str | None, quick: bool) -> None:
    """Cache a pipeline over real data, and print what that saved.

    Reads and parses the source of the packages installed here: first run, again, in a fresh
    process, and after a change of the data. Needs no network, and leaves nothing behind.
    """
    from memo.cli.demo import main as run_demo

    try:
        passed = run_demo(redis, quick=quick)
    except SettingError as error:
        raise click.BadParameter(error.fix, param_hint="--redis") from None
    if not passed:
        raise SystemExit(1)


@main.command()
@click.argument("pattern", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--html", "as_html", is_flag=True, help="As a page of HTML.")
@click.option("--plot", is_flag=True, help="With hits and misses over time.")
@click.option(
    *("-n", "--limit"),
    type=click.IntRange(min=0),
    default=rendering.FUNCTIONS_SHOWN,
    show_default=True,
    help="Maximum number of functions; 0: all of them.",
)
def stats(pattern: tuple[str, ...], as_json: bool, as_html: bool, plot: bool, limit: int) -> None:
    """Show what the cache did, in every process that shares the directory.

    Functions that saved most come first.

    PATTERN selects functions by name: load, app.* or sales:load.
    """
    found = gathered_stats.stats(*pattern, shared=True)
    if pattern and not found.functions:
        click.echo("No function of this name has been called.", err=as_json)
        _suggest_names(pattern)
        raise SystemExit(1)
    if as_json:
        click.echo(found.to_json())
        return
    found = found.with_health(_health())
    if as_html:
        shown = rendering.html(found, plot, limit, "--limit 0")
        click.echo(formatting.page("memo stats", shown))
        return
    _show(rendering.stats_lines(found, plot=plot, width=_width(), limit=limit, more="--limit 0"))


def _width() -> int:
    """Return the columns of the terminal; 80 if there is none."""
    return shutil.get_terminal_size().columns


def _show(lines: Iterable[formatting.Styled]) -> None:
    """Print lines; with styles if a terminal shows them."""
    from rich.text import Text

    _print(Text(line.text, style=line.style) for line in lines)


def _print(texts: Iterable[Text]) -> None:
    """Print texts; with styles if a terminal shows them, without colors if NO_COLOR is set."""
    from rich.console import Console

    console = Console(width=_width(), highlight=False)
    for text in texts:
        console.print(text, soft_wrap=True)


def _health() -> dict[str, dict[str, Any]]:
    """Return facts about the tiers that processes share; this one's memory is empty."""
    facts = drive(default_chain().health(BLOCKING))
    host = facts.pop("host", {})
    facts.pop(MEMORY, None)
    return {**facts, "host": host} if host.get("journal") else facts


@main.command("ls")
@click.argument("pattern", nargs=-1)
@click.option(
    *("-n", "--limit"),
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Maximum number of entries; 0: all of them.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option("--html", "as_html", is_flag=True, help="As a page of HTML.")
def list_entries(pattern: tuple[str, ...], limit: int, as_json: bool, as_html: bool) -> None:
    """List entries of the disk, newest first, with their state.

    PATTERN selects functions by name: load, app.* or sales:load. An entry that was invalidated
    stays here until it is computed again or evicted; it is never used.
    """
    shown, count = inventory.items(inventory.Selection(pattern), limit or None)
    if as_json:
        for item in shown:
            click.echo(json.dumps(_as_data(item)))
        if count or not pattern:
            return
    if not count:
        click.echo("No entries on this host.", err=as_json)
        if pattern:
            _suggest_names(pattern)
            raise SystemExit(1)
        return
    table = inventory.table(shown)
    if as_html:
        click.echo(formatting.page("memo ls", formatting.with_style(formatting.table_html(table))))
        return
    _show(formatting.table_lines(table, _width()))
    click.echo(formatting.shown_part(len(shown), count, "entry", "entries", "--limit 0"))


@main.command("graph")
@click.option("--svg", metavar="FILE", type=click.File("w"), help="Write a drawing; - for stdout.")
@click.option("--json", "as_json", is_flag=True, help="Nodes and edges as JSON.")
@click.option("--calls", is_flag=True, help="Each call, however many there are.")
def draw_graph(svg: Any, as_json: bool, calls: bool) -> None:
    """Show what the stored results of this host were built on."""
    made = call_graph.graph_of(everything=True, group=False if calls else None)
    if svg:
        svg.write(made.to_svg())
    elif as_json:
        click.echo(json.dumps(made.to_dict(), indent=1))
    else:
        _show(made.lines(_width()))
    if not made.nodes:
        raise SystemExit(1)


@main.command()
@click.option("--prefix", metavar="PREFIX", help="Entries of an address prefix.")
@click.option("--tag", metavar="TAG", help="Entries with a tag.")
@click.option("--function", metavar="NAME", help="Entries of a function: load, etl:load.")
@click.option("--key", metavar="KEY", help="Entries of one address or key: products:42.")
@click.option("--all", "everything", is_flag=True, help="All entries of the namespace.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before --all.")
def clear(everything: bool, yes: bool, **target: str | None) -> None:
    """Invalidate entries, in every process and on every host that shares the cache.

    Give exactly one of the options. --all also frees the space.
    The exit status is 1 if nothing matched.
    """
    named: dict[str, Any] = {name: value for name, value in target.items() if value is not None}
    if len(named) + everything != 1:
        raise click.UsageError("give exactly one of --prefix, --tag, --function, --key, --all.")
    if everything:
        namespace = configuration.current().namespace
        if not yes:
            click.confirm(f"Drop all entries of the namespace {namespace!r}?", abort=True)
        _clear_all(namespace)
        return
    try:
        done = memo.invalidate(**named, reason="memo clear", strict=True)
    except memo.NothingMatchedError as missed:
        click.echo(repr(missed.outcome))
        raise SystemExit(1) from None
    click.echo(repr(done))


@main.command("export")
@click.argument("file", type=click.Path(dir_okay=False))
@click.argument("pattern", nargs=-1)
@click.option("--tag", metavar="TAG", help="Only entries with this tag.")
@click.option("--note", default="", help="Shown where it is imported.")
@click.option("--key-file", type=_KEY_FILE, help="The key, in a file.")
def export(
    file: str, pattern: tuple[str, ...], tag: str | None, note: str, key_file: str | None
) -> None:
    """Write valid entries to one sealed FILE, to be imported elsewhere.

    PATTERN names functions: load, etl:load. The key is the one in --key-file or in
    MEMO_BUNDLE_KEY; without either a fresh one is made and printed, once.
    """
    key = _key_in(key_file)
    try:
        made = memo.export_bundle(file, list(pattern) or None, tag=tag, key=key, note=note)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be written: {error.strerror}.") from error
    click.echo(repr(made).partition(";")[0])
    if made.generated:
        click.echo(f"key: {made.key}")
        click.echo("Importing the bundle needs this key; it is shown only now.", err=True)


@main.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--key-file", type=_KEY_FILE, help="The key, in a file.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask after showing where it comes from.")
def import_(file: str, key_file: str | None, yes: bool) -> None:
    """Show where a bundle comes from, and store its entries here.

    The key is the one in --key-file or in MEMO_BUNDLE_KEY; without either it is asked for.
    The exit status is 1 if nothing was imported.
    """
    from memo.inspection import bundles

    key = _key_in(key_file)
    if given_key(key) is None:
        click.echo("\n".join(bundles.describe_bundle(memo.Bundle(file))))
        key = click.prompt("Key of the bundle", hide_input=sys.stdin.isatty())
    bundle = memo.Bundle(file, key)
    click.echo("\n".join(bundles.describe_bundle(bundle)))
    if not yes:
        click.confirm("Import it? Calls here will then unpickle its results.", abort=True)
    done = bundles.import_bundle(bundle)
    click.echo(repr(done))
    if not done.stored:
        raise SystemExit(1)


def _key_in(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        key = Path(file).read_text("utf-8").strip()
    except OSError as error:
        raise click.UsageError(f"--key-file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        key = ""
    if not key:
        raise click.UsageError(f"--key-file {file} has no key in it.")
    return key


@main.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Port to listen on; 0: any free one.",
)
@click.option("--no-browser", is_flag=True, help="Print the URL, and open no browser.")
def ui(port: int, no_browser: bool) -> None:
    """Serve the live view as a local page, over every process that shares the directory.

    It listens on this machine only. The token in its URL permits listing entries and invalidating
    them. No value is loaded.
    """
    try:
        from memo.cli.web_page import Server
    except ImportError:
        raise MissingExtraError("memo ui needs pip install 'jupyter-memo[ui]'") from None
    try:
        server = Server(port)
    except OSError as error:
        fix = f"{error.strerror}; choose another port, or 0 for any free one."
        raise click.UsageError(f"--port {port}: {fix}") from None
    click.echo(f"memo ui: {server.url}\nPress Ctrl-C to stop it.")
    if not no_browser:
        click.launch(server.url)
    with suppress(KeyboardInterrupt):
        server.run()


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def examine(as_json: bool) -> None:
    """Check this set-up, and name the fix for each finding.

    The exit status is 1 if something does not work or must not be trusted.
    """
    found = doctor.health()
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found], indent=1))
    else:
        _print(map(_finding_text, found))
    if not found.ok:
        raise SystemExit(1)


def _suggest_names(patterns: tuple[str, ...]) -> None:
    """Name the functions that were probably intended by patterns that matched none."""
    known = drive(names.known_functions(BLOCKING, []))
    near = names.did_you_mean_functions(names.without_match(patterns, known), known)
    if near:
        click.echo(near, err=True)


def _clear_all(namespace: str) -> None:
    chain, turns = default_chain(), [Turn("n")]
    work = invalidate(BLOCKING, [chain], turns, f"namespace {namespace}", "memo clear")
    done = drive(work)
    click.echo(repr(done))
    freed = drive(chain.clear(BLOCKING))
    for tier, how in freed.items():
        outcome = (
            f"{formatting.quantity(how, 'entry', 'entries')} dropped"
            if isinstance(how, int)
            else how
        )
        click.echo(f"{tier}: {outcome}")
    if done.missed and not any(freed.values()):
        raise SystemExit(1)


def _finding_text(finding: doctor.Finding) -> Text:
    from rich.text import Text

    text = Text(repr(doctor.Health([finding])))
    text.stylize(MARKS[finding.level], 0, len(finding.level))
    return text


# --- memo ls -------------------------------------------------------------------------------------


def _as_data(item: inventory.Item) -> dict[str, Any]:
    """Return an entry as `--json` shows it.

    Durations in seconds, times since the epoch, size in bytes.
    """
    header, size, tiers, state, *_ = item
    times = header.times
    return {
        "function": header.function,
        "key": header.key,
        "address": rendering.address(header),
        "arguments": rendering.arguments(header),
        "finished": times.finished / SECOND,
        "ttl": None if times.ttl < 0 else times.ttl / SECOND,
        "cost": times.cost / SECOND,
        "size": size,
        "compressed": bool(header.flags & seal.COMPRESSED),
        "raised": bool(header.flags & seal.RAISED),
        "tiers": tiers,
        "state": state,
        "writer": header.writer,
    }
