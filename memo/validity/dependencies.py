"""Dependencies: files, data sets and callables that a result depends on, as stamps.

`@cache(depends_on=...)` and arguments annotated with `File` produce stamps (`stamps`): the state of
the source before the computation began.  An entry is valid as long as the source is unchanged.

A file is identified by size, modification time and inode, which costs one `stat`, or by its content
with `File(by_content=True)`.  A file that was modified less than `RACY_SECONDS` before the stamp
was taken could change again without its time changing, so its content is compared as well. URLs are
handled in `remote`.
"""

from __future__ import annotations

import inspect
import os
import re
import stat
import time
import weakref
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from memo.errors import DependencyError, EntryError, OptionError, public, shown
from memo.records import codec
from memo.records.stamp_types import MISSING, CallStamp, FileStamp, Stamp, is_pattern
from memo.runtime.checksums import blake2b, digest_of_file
from memo.runtime.memory_budget import remember
from memo.runtime.port import Port
from memo.runtime.reasons import DEPENDENCY_CHANGED, FILE_CHANGED, SOURCE_UNREACHABLE
from memo.settings import options
from memo.settings.durations import seconds

if TYPE_CHECKING:
    from memo.validity import remote  # imported elsewhere only when there is a URL

RACY_SECONDS = 0.1
"""Seconds: the coarsest resolution of modification times on file systems in common use."""
_URL_PATTERN = "[a-z][a-z0-9+.-]+(://|::)"
MAX_ARGUMENT_BYTES = 64 * 1024
"""Maximum size in bytes of pickled arguments that an entry keeps, to repeat a call with them."""
_EVERY_HINT = "0 asks at each call"
MAX_FILE_DIGESTS = 4096
"""Maximum number of files whose digest is remembered."""
MAX_FILES_ON_LOOP = 64
"""Maximum number of files that one check may `stat` on an event loop; for more it uses a thread."""


class File:
    """A path whose content matters, not only its name.

    As the annotation of an argument, the path becomes part of the key and its content part of the
    stamp, so that a new version of the file replaces the old entry::

        @cache
        def load(path: Annotated[str, memo.File]) -> DataFrame: ...

    As a dependency: `depends_on=memo.File("rates.csv", check="content")`.

    Args:
        path: a file, a directory (with everything in it), a pattern such as `"data/*.csv"`, or a
            URL of one of these; only for `depends_on`.
        check: `"time"`: compare size, modification time and inode, or the ETag of a URL if it has
            one; `"content"`: compare the content, so that merely touching a file changes nothing.
        by_content: True is the same as `check="content"`.

    Raises:
        OptionError: `path` is not a path, or `check` is something else.
    """

    @public
    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        *,
        check: Literal["time", "content"] = "time",
        by_content: bool = False,
    ) -> None:
        if check not in ("time", "content"):
            raise OptionError("check", check, 'must be "time" or "content".')
        try:
            self.path = os.fspath(path)
        except TypeError:
            raise OptionError("File", path, "must be a path.") from None
        self.by_content = by_content or check == "content"

    def __repr__(self) -> str:
        return f"File({self.path!r}, check={'content' if self.by_content else 'time'!r})"

    @staticmethod
    def __memo_argument__(value: Any) -> Any:
        """Return the absolute paths that represent the argument in the key."""
        if isinstance(value, (list, tuple)):
            return [_absolute(one) for one in value]
        return value if value is None else _absolute(value)


def _absolute(value: Any) -> str:
    try:
        path = os.fsdecode(os.fspath(value))
    except TypeError:
        raise OptionError("File", value, "must be a path, or a list of paths.") from None
    return _absolute_path(path)


def _absolute_path(path: str) -> str:
    """Return an absolute path, or a URL unchanged."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return path if is_url(path) else os.path.abspath(path)


def is_url(path: str) -> bool:
    """True if a path names something outside this host's file system."""
    if "://" not in path and "::" not in path:
        return False
    return re.match(_URL_PATTERN, path, re.IGNORECASE) is not None and not path.startswith(
        "file://"
    )


# --- files ----------------------------------------------------------------------------------------


async def file_stamps(
    port: Port, paths: Sequence[tuple[str, bool]], every: float
) -> list[FileStamp]:
    """Take the stamps of files, directories, patterns and URLs; a missing file has a stamp too.

    Args:
        port: the port of the caller.
        paths: pairs of an absolute path or a URL, and True if its content is compared.
        every: seconds for which the state of a URL is reused without asking again.
    """
    urls = [one for one in paths if is_url(one[0])]
    far = await _remote_facts(port, urls) if urls else {}
    near: dict[tuple[str, bool], str] = {}
    if len(urls) < len(paths):
        near = await port.offload(lambda: {one: _facts(*one) for one in paths if one not in far})
    return [
        FileStamp(path, far[path, by_content], by_content, every)
        if (path, by_content) in far
        else FileStamp(path, near[path, by_content], by_content)
        for path, by_content in paths
    ]


async def _remote_facts(port: Port, urls: list[remote.UrlQuery]) -> dict[remote.UrlQuery, str]:
    """Return the facts of URLs, queried concurrently."""
    from memo.validity import remote

    answers = await remote.query_all(port, urls)
    return {one: facts or remote.unknown_version() for one, facts in answers.items()}


def _facts(path: str, by_content: bool) -> str:
    if is_pattern(path) and not os.path.lexists(path):
        from glob import glob

        found = sorted(glob(path, recursive=True))
        return _digest_of_files(found, by_content) if found else MISSING
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return MISSING
    if stat.S_ISDIR(status.st_mode):
        return _digest_of_files(sorted(_walk(path)), by_content)
    return _file_facts(path, status, by_content)


def _digest_of_files(paths: Iterable[str], by_content: bool) -> str:
    digest = blake2b(digest_size=20)
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:  # a dangling link, or a file that has just gone: its name counts
            digest.update(f"{path}\0?\n".encode("utf-8", "surrogateescape"))
            continue
        if stat.S_ISREG(status.st_mode):
            line = f"{path}\0{_file_facts(path, status, by_content)}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _walk(path: str) -> Iterator[str]:
    for folder, _, names in os.walk(path):
        for name in names:
            yield os.path.join(folder, name)


def _file_facts(path: str, status: os.stat_result, by_content: bool) -> str:
    if by_content:
        return _content(path, status)
    facts = f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
    if not _is_settled(status):
        facts += f":{_content(path, status)}"
    return facts


_digests: dict[str, tuple[tuple[int, ...], str]] = {}


def _content(path: str, status: os.stat_result) -> str:
    """Return the digest of the content, read again only if size, time or inode have changed."""
    is_settled = _is_settled(status)
    known = _known_digest(path, status) if is_settled else None
    if known is not None:
        return known
    try:
        with open(path, "rb") as file:
            digest = digest_of_file(file)
    except OSError as error:
        return f"unreadable:{error.errno}"
    if is_settled:
        remember(_digests, path, (_identity(status), digest), MAX_FILE_DIGESTS)
    return digest


def _is_settled(status: os.stat_result) -> bool:
    """True if a file that changes again will get another modification time."""
    return abs(time.time() - status.st_mtime) >= RACY_SECONDS


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def _known_digest(path: str, status: os.stat_result) -> str | None:
    """Return the digest of the content if it was read in this state."""
    known = _digests.get(path)
    return known[1] if known is not None and known[0] == _identity(status) else None


def _facts_by_stat(stamp: FileStamp) -> str | None:
    """Return the current facts of a file by one `stat`; None if more has to be listed or read."""
    if is_pattern(stamp.path):
        return None
    try:
        status = os.stat(stamp.path)
    except (OSError, ValueError):
        return MISSING
    if not (stat.S_ISREG(status.st_mode) and _is_settled(status)):
        return None
    has_digest = stamp.by_content or stamp.facts.count(":") > 2
    if has_digest and _known_digest(stamp.path, status) is None:
        return None
    return _file_facts(stamp.path, status, stamp.by_content)


def _file_holds(stamp: FileStamp) -> bool:
    return _holds_by(stamp, _facts(stamp.path, stamp.by_content))


def _holds_by(stamp: FileStamp, now: str) -> bool:
    """True if the stamp of a file holds whose facts are `now`."""
    if now == stamp.facts:
        return True
    if stamp.by_content:
        return False
    size, _, content = stamp.facts.rpartition(":")
    if size.count(":") != 2:
        return False
    # the stamp was taken right after the file was written, so it has the content's digest as well
    return now == size and _digest_now(stamp.path) == content


def _digest_now(path: str) -> str | None:
    try:
        return _content(path, os.stat(path))
    except OSError:
        return None


# --- callables ------------------------------------------------------------------------------------

CALLABLES: weakref.WeakValueDictionary[str, Dependencies] = weakref.WeakValueDictionary()


def checked_interval(check_every: Any) -> float:
    """Return the option `check_every` in seconds.

    Raises:
        OptionError: it is not a length of time.
    """
    every = seconds("check_every", check_every, zero=True, fix=_EVERY_HINT)
    if every is None:
        raise OptionError("check_every", None, f"must be seconds; {_EVERY_HINT}.")
    return every


class Dependencies:
    """The dependencies of a function besides its arguments and its code.

    Args:
        identity: the id of the cached function.
        depends_on: a path, a pattern, a `File`, a callable, or several of them.  A path may contain
            the names of arguments in braces: `"data/{region}.csv"`.
        signature: the signature of the cached function.
        annotations: its parameters with their annotations.
        digest: returns the digest of a callable's answer.
        encode: encodes the arguments of a callable, for an entry to hold.
        check_every: seconds for which the state of a URL is reused without asking again.

    Raises:
        OptionError: something else, or a callable with a parameter that is not an argument.
    """

    def __init__(
        self,
        identity: str,
        depends_on: Any,
        signature: inspect.Signature,
        annotations: Iterable[tuple[str, Any]],
        digest: Callable[[Any], bytes],
        encode: Callable[[Any], codec.Encoded] = codec.encode,
        check_every: Any = 0,
    ) -> None:
        self.identity = identity
        self.signature = signature
        self._digest = digest
        self._encode = encode
        self.every = checked_interval(check_every)
        extra = (p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD)
        self._extra = next(extra, "")
        self.files: list[File] = []
        self.calls: list[Callable[..., Any]] = []
        self._takes: list[tuple[str, ...] | None] = []
        for one in _as_list(depends_on):
            self._add(one)
        self.arguments = {
            name: isinstance(part, File) and part.by_content
            for name, part in annotations
            if part is File or isinstance(part, File)
        }

    def register(self) -> None:
        """Let these callables answer for the function's id when an entry is checked."""
        if self.calls:
            CALLABLES[self.identity] = self

    def __bool__(self) -> bool:
        return bool(self.files or self.calls or self.arguments)

    def _add(self, one: Any) -> None:
        if isinstance(one, File) and one.path:
            self._add_file(one)
        elif isinstance(one, (str, os.PathLike)) and os.fspath(one):
            self._add_file(File(one))
        elif callable(one) and not isinstance(one, type):
            self._takes.append(self._declared_arguments(one))
            self.calls.append(one)
        else:
            raise OptionError(
                "depends_on", one, "must be a path, a URL, a memo.File with one, or a callable."
            )

    def _add_file(self, file: File) -> None:
        if is_url(file.path):
            from memo.validity import remote

            remote.check_url(file.path)
        parameters = self.signature.parameters
        for name in _placeholders(file.path):
            options.refuse_whole_keywords("depends_on", file.path, name, self._extra)
            if name not in parameters and not (self._extra and name.isidentifier()):
                raise OptionError(
                    "depends_on",
                    file.path,
                    f"has {{{name}}}, which is not an argument; there are {', '.join(parameters)}.",
                )
        self.files.append(file)

    def _declared_arguments(self, one: Callable[..., Any]) -> tuple[str, ...] | None:
        """Return the names of the arguments that a callable declares; None: it takes all."""
        try:
            parameters = inspect.signature(one).parameters
        except ValueError:  # written in C: errors show when it is called
            return ()
        own = self.signature.parameters
        names: list[str] = []
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                return None
            if parameter.default is parameter.empty:
                options.refuse_whole_keywords("depends_on", one, name, self._extra)
            if name in own and parameter.kind is not parameter.POSITIONAL_ONLY:
                names.append(name)
            elif parameter.default is parameter.empty and parameter.kind is not (
                parameter.VAR_POSITIONAL
            ):
                fix = f"takes {name!r}, which is not an argument; there are {', '.join(own)}."
                raise OptionError("depends_on", one, fix)
        return tuple(names)

    async def take(
        self, port: Port, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Stamp, ...]:
        """Take the stamps of one call, in the current state.

        Raises:
            DependencyError: a callable raised, or takes an argument that cannot be stored; or a
                URL is malformed.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        paths = list(self._paths(bound.arguments))
        taken: list[Stamp] = []
        for index, function in enumerate(self.calls):
            needed = self._arguments_of(index, bound.arguments)
            try:
                digest, named = await self.answer(port, function, needed)
            except Exception as error:
                raise DependencyError(
                    f"{self.identity}: depends_on {shown(function)} raised {error!r}"
                ) from error
            packed = self._pack(function, needed) if needed else ""
            taken.append(CallStamp(f"{self.identity}#{index}", digest, packed))
            paths += named
        self._refuse_malformed([path for path, _ in paths if is_url(path)])
        return (*await file_stamps(port, paths, self.every), *taken)

    def _refuse_malformed(self, urls: Sequence[str]) -> None:
        if not urls:
            return
        from memo.validity import remote

        for url in urls:
            if fault := remote.why_malformed(url):
                raise DependencyError(f"{self.identity}: {remote.display_url(url)} {fault}")

    def _arguments_of(self, index: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that a callable takes."""
        names, flat = self._takes[index], _flat_arguments(self.signature, arguments)
        return {name: flat[name] for name in (flat if names is None else names) if name in flat}

    def _pack(self, function: Callable[..., Any], needed: Mapping[str, Any]) -> str:
        encoded, why = None, f"take more than {MAX_ARGUMENT_BYTES // 1024} KiB"
        try:
            encoded = self._encode(needed)
        except Exception as error:
            why = f"cannot be pickled ({type(error).__name__})"
        if (
            encoded is None
            or encoded.payload is not None
            or len(encoded.stream) > MAX_ARGUMENT_BYTES
        ):
            raise DependencyError(
                f"{self.identity}: the arguments of depends_on {shown(function)} {why}; an entry "
                "has to hold them, to ask again: declare smaller ones, such as an id."
            )
        return b2a_base64(encoded.stream, newline=False).decode()

    async def answer(
        self, port: Port, function: Callable[..., Any], needed: Mapping[str, Any]
    ) -> tuple[str, list[tuple[str, bool]]]:
        """Call a callable; return the digest of its answer, and the files named in that."""
        value = function(**needed)
        if inspect.isawaitable(value):
            value = await port.settle(value)
        return self._digest(_keyable(value)).hex(), list(_files_in(value))

    def _paths(self, arguments: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        for file in self.files:
            path = file.path
            if "{" in path or "}" in path:
                path = path.format(**_flat_arguments(self.signature, arguments))
            yield _absolute_path(path), file.by_content
        for name, by_content in self.arguments.items():
            value = File.__memo_argument__(arguments.get(name))
            for path in [value] if isinstance(value, str) else value or ():
                yield path, by_content


def _files_in(answer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the files in the answer of a callable, whose digest covers only their names."""
    for one in answer if isinstance(answer, (list, tuple)) else (answer,):
        if isinstance(one, File):
            yield _absolute_path(one.path), one.by_content
        elif isinstance(one, os.PathLike):
            yield _absolute_path(os.fsdecode(one)), False


def _keyable(answer: Any) -> Any:
    """Return the answer of a callable with plain values in place of `File`s."""
    if isinstance(answer, (list, tuple)):
        return [_keyable(one) for one in answer]
    return (answer.path, answer.by_content) if isinstance(answer, File) else answer


def is_remote(stamp: Stamp) -> bool:
    """True if a server has to be asked about a stamp."""
    return isinstance(stamp, FileStamp) and is_url(stamp.path)


async def check(port: Port, stamps: Sequence[Stamp]) -> list[str]:
    """Return for each file or call stamp why it does not hold any more, or "".

    URLs are queried concurrently.
    """
    files = [stamp for stamp in stamps if isinstance(stamp, FileStamp)]
    now = await _present(port, files)
    valid = await _valid_files(port, [stamp for stamp in files if not is_remote(stamp)])
    return [await _why_changed(port, stamp, now, valid) for stamp in stamps]


async def _valid_files(port: Port, stamps: Sequence[FileStamp]) -> set[FileStamp]:
    """Return the stamps of local files that hold; an event loop is not blocked meanwhile."""
    known: dict[FileStamp, str | None] = {}
    if port.native and len(stamps) <= MAX_FILES_ON_LOOP:
        known = {stamp: _facts_by_stat(stamp) for stamp in stamps}
    valid = {one for one, now in known.items() if now is not None and _holds_by(one, now)}
    costly = [stamp for stamp in stamps if known.get(stamp) is None]
    if costly:
        valid |= await port.offload(lambda: set(filter(_file_holds, costly)))
    return valid


async def _present(port: Port, stamps: Iterable[FileStamp]) -> dict[remote.UrlQuery, str | None]:
    """Return the current facts of the URLs among some stamps; None if they are unknown."""
    far = list(filter(is_remote, stamps))
    if not far:
        return {}
    from memo.validity import remote

    now: dict[remote.UrlQuery, str | None] = {}
    todo: list[remote.UrlQuery] = []
    for stamp in far:
        one = stamp.path, stamp.by_content
        known = remote.recent_facts(stamp)
        if known is None:
            todo.append(one)
        else:
            now[one] = known
    return {**now, **await remote.query_all(port, todo)} if todo else now


async def _why_changed(
    port: Port,
    stamp: Stamp,
    now: Mapping[remote.UrlQuery, str | None],
    valid: Container[FileStamp],
) -> str:
    if isinstance(stamp, FileStamp):
        if not is_remote(stamp):
            return "" if stamp in valid else FILE_CHANGED
        facts = now[stamp.path, stamp.by_content]
        if facts is None:
            return SOURCE_UNREACHABLE
        return "" if facts == stamp.facts else DEPENDENCY_CHANGED
    if isinstance(stamp, CallStamp):
        return "" if await _call_holds(port, stamp) else DEPENDENCY_CHANGED
    return f"unknown stamp {type(stamp).__name__}"


async def _call_holds(port: Port, stamp: CallStamp) -> bool:
    identity, _, index = stamp.name.rpartition("#")
    dependencies = CALLABLES.get(identity)
    if dependencies is None or int(index) >= len(dependencies.calls):
        return False  # the module with the callable is not imported
    try:
        needed = _unpack(stamp.arguments)
        function = dependencies.calls[int(index)]
        digest, _ = await dependencies.answer(port, function, needed)
        return digest == stamp.digest
    except Exception:
        return False  # taking the stamp again reports the error


def _unpack(arguments: str) -> dict[str, Any]:
    if not arguments:
        return {}
    needed = codec.unpickled(memoryview(a2b_base64(arguments)))
    if not isinstance(needed, dict):
        raise EntryError(DEPENDENCY_CHANGED, "the arguments of a callable are not a mapping")
    return needed


def _placeholders(path: str) -> list[str]:
    """Return the names in braces in a path, up to a dot or a bracket."""
    from string import Formatter

    try:
        fields = [field for _, field, _, _ in Formatter().parse(path) if field is not None]
    except ValueError:
        raise OptionError("depends_on", path, "has an unmatched brace.") from None
    return [re.split(r"[.\[]", field, maxsplit=1)[0] for field in fields]


def _flat_arguments(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return bound arguments by name, with those of `**kwargs` under their own names."""
    flat = dict(arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            flat |= flat.pop(parameter.name, {})
    return flat


def _as_list(depends_on: Any) -> list[Any]:
    if depends_on is None:
        return []
    if isinstance(depends_on, (str, os.PathLike, File)) or callable(depends_on):
        return [depends_on]
    return list(depends_on) if isinstance(depends_on, Iterable) else [depends_on]
