"""The secret: find it, check it, or generate it.

A secret is given (`configure(secret=...)`, `MEMO_SECRET`), read from a file (`secret_file=`,
`MEMO_SECRET_FILE`), or generated once: 32 random bytes, in hexadecimal, in a file of the user's
configuration directory that only the user can read.

Text is used as its UTF-8 bytes, so the content of a secret file may be given as `MEMO_SECRET` on
another host.  More than one secret means rotation: the first seals, all of them open.  In text they
are separated by commas or line breaks.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from memo.errors import SecretError
from memo.runtime.checksums import blake2b
from memo.runtime.events import ERROR, Event, emit

if TYPE_CHECKING:
    from pathlib import Path

SECRET_BYTES = 32
"""The minimum length of a secret."""
APPLICATION = "jupyter-memo"
"""Name of memo's directories; `memo` alone belongs to other programs on some systems."""
MAX_SECRET_FILE_BYTES = 65_536
"""Bytes; a longer file is not a secret."""

_SECRETS_SEPARATOR = r"[,\r\n]+"
_HOW_TO_MAKE = 'make one with: python -c "import secrets; print(secrets.token_hex(32))"'


class SecretWarning(RuntimeWarning):
    """The secret could not be saved, so no other process can read the entries of this one."""


class Secret:
    """A key that seals and opens entries.  Its repr shows its id, never its bytes."""

    __slots__ = ("_mac", "id")

    def __init__(self, secret: bytes) -> None:
        self.id = blake2b(secret, digest_size=8, person=b"memo key id").digest()
        key = blake2b(secret, digest_size=32, person=b"memo seal key").digest()
        self._mac = blake2b(key=key, digest_size=32, person=b"memo entry v1")

    def seal(self, *parts: bytes | memoryview) -> bytes:
        """Return the MAC of these bytes under this secret: 32 bytes."""
        mac = self._mac.copy()
        for part in parts:
            mac.update(part)
        return mac.digest()

    def __repr__(self) -> str:
        return f"<Secret {self.id.hex()}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Secret is never pickled")


def from_value(value: Any, source: str) -> tuple[Secret, ...]:
    """Return the secrets in a setting: text, bytes, or a list of these, newest first.

    Args:
        value: text is split at commas and line breaks; bytes are one secret as they are.
        source: the source of the setting, for the error.

    Raises:
        SecretError: too short, empty, or of another type.  The message has no part of the value.
    """
    parts = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(
        _secret(one, number, source)
        for number, one in enumerate((one for part in parts for one in _split(part, source)), 1)
    )
    if not found:
        raise SecretError("secret", source, f"is empty; {_HOW_TO_MAKE}")
    return found


def _split(part: Any, source: str) -> Iterable[bytes]:
    if isinstance(part, Secret):
        raise SecretError("secret", source, "is a loaded Secret; give its text or bytes.")
    if isinstance(part, (bytes, bytearray)):
        return [bytes(part)]
    if isinstance(part, str):
        return [one.strip().encode() for one in re.split(_SECRETS_SEPARATOR, part) if one.strip()]
    kind = type(part).__name__
    raise SecretError("secret", source, f"has the type {kind}; give text, bytes or a list of them.")


def _secret(value: bytes, number: int, source: str) -> Secret:
    if len(value) < SECRET_BYTES:
        fix = (
            f"no. {number} has {len(value)} bytes; it needs {SECRET_BYTES} or more; {_HOW_TO_MAKE}"
        )
        raise SecretError("secret", source, fix)
    return Secret(value)


def from_file(path: Path, source: str, *, mounted: bool = False) -> tuple[Secret, ...]:
    """Return the secrets in a file that belongs to this user, and that no other user can read.

    A text file may contain several, separated by commas or line breaks; any other file is one
    secret.

    Args:
        path: the file.
        source: the source of the setting, for the error.
        mounted: named by the user as the secret file: links are followed, root may own the file,
            and its group may read it, as container platforms mount secrets.

    Raises:
        SecretError: missing, a symlink, not a plain file, another user's, readable by others, too
            long, or its content is too short.
    """
    where = f"{source}, file {path}"
    content = read_private(path, source, mounted=mounted)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return from_value(content, where)
    plain = all(sign.isprintable() or sign in "\r\n\t" for sign in text)
    return from_value(text if plain else content, where)


def read_private(path: Path, source: str, *, mounted: bool = False) -> bytes:
    """Return the bytes of a file that only this user can read; see `from_file`."""
    where = f"{source}, file {path}"
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    if not mounted:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise SecretError("secret", where, _why_not_opened(path, error)) from None
    try:
        _check_private(os.fstat(descriptor), path, where, mounted=mounted)
        content = os.read(descriptor, MAX_SECRET_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > MAX_SECRET_FILE_BYTES:
        raise SecretError(
            "secret", where, f"is longer than {MAX_SECRET_FILE_BYTES} bytes; {_HOW_TO_MAKE}"
        )
    return content


def _why_not_opened(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"does not exist; {_HOW_TO_MAKE} > {path} and: chmod 600 {path}"
    with suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            return "is a symlink; give the path of the file itself."
        if _foreign(found):
            return "belongs to another user; give a file of your own."
    return f"cannot be read: {error.strerror}."


def _check_private(found: os.stat_result, path: Path, where: str, *, mounted: bool) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SecretError("secret", where, "is not a plain file.")
    if os.name != "posix":
        return
    if _foreign(found) and not (mounted and found.st_uid == 0):
        raise SecretError("secret", where, "belongs to another user; give a file of your own.")
    if found.st_mode & (0o037 if mounted else 0o077):
        fix = "can be read or written by others, so it is no longer secret; "
        fix += f"replace it, and run: chmod 600 {path}"
        fix += " (in Kubernetes: defaultMode: 0440)" if mounted else ""
        raise SecretError("secret", where, fix)


def _foreign(found: os.stat_result) -> bool:
    return os.name == "posix" and found.st_uid != os.geteuid()


def default_file() -> Path | None:
    """Return the path of the generated secret; None if this user has no configuration directory."""
    import platformdirs

    try:
        directory = platformdirs.user_config_path(APPLICATION, appauthor=False)
    except (KeyError, RuntimeError, OSError):
        return None
    return directory / "secret" if directory.is_absolute() else None


def generated() -> tuple[Secret, ...]:
    """Return the secret in `default_file`, which is generated if the file is missing.

    If it cannot be kept (a read-only home, or none), this process gets a secret of its own, with a
    `SecretWarning` and an event: caching works, but no other process can read the entries.

    Raises:
        SecretError: there is a file, and it must not be trusted.
    """
    path = default_file()
    if path is None:
        return (_unkept_secret("there is no configuration directory"),)
    if not os.path.lexists(path):
        try:
            _create(path)
        except OSError as error:
            return (_unkept_secret(f"{path} cannot be made: {error.strerror or error}"),)
    return from_file(path, "the generated secret")


def _create(path: Path) -> None:
    """Create the file without a race: written under another name, then linked if none exists.

    Of two processes, one links first and the other reads the file of the first.  No process sees a
    file that is empty, half written or, with any umask, readable by others.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".secret.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            _fill(descriptor)
        finally:
            os.close(descriptor)
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _fill(descriptor: int) -> None:
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, 0o600)
    os.write(descriptor, os.urandom(SECRET_BYTES).hex().encode() + b"\n")
    os.fsync(descriptor)


_lock = threading.Lock()
_UNKEPT_SECRETS: list[Secret] = []


def _unkept_secret(why: str) -> Secret:
    with _lock:
        first = not _UNKEPT_SECRETS
        if first:
            _UNKEPT_SECRETS.append(Secret(os.urandom(SECRET_BYTES)))
    if first:
        text = (
            f"the secret could not be saved ({why}): cached entries will not outlive this process."
        )
        _unkept_reasons.append(text)
        emit(Event(ERROR, reason="secret", detail=text))
    return _UNKEPT_SECRETS[0]


def forget() -> None:
    """Forget the secret that was generated for this process alone, if there is one."""
    _UNKEPT_SECRETS.clear()
    _unkept_reasons.clear()


def is_kept(secret: Secret) -> bool:
    """False for a secret of this process alone, used when none could be kept."""
    return all(secret is not one for one in _UNKEPT_SECRETS)


_unkept_reasons: list[str] = []


def warn_if_not_kept() -> None:
    """Warn, once, that the secret could not be saved.

    Called where entries could outlive the process.

    Otherwise the warning about the directory is enough.
    """
    while _unkept_reasons:
        text = _unkept_reasons.pop()
        fix = "Set MEMO_SECRET_FILE, or MEMO_SECRET, to keep and share them."
        with suppress(Warning):  # a filter made it an error; the caller still gets its result
            warnings.warn(f"memo: {text} {fix}", SecretWarning, stacklevel=2)
