"""Find the function, prefix or tag that a displayed name stands for.

Names are known from the functions of this process, from the generations of this host and, for a
function that neither has, from the entries in Redis.  A function can be named by its id, by the
label that tables show, by its qualified name or by its bare name, as long as only one function
fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from memo.decorators import assembly
from memo.errors import OptionError, TierError, label
from memo.records.stamp_types import Ref
from memo.runtime.port import Port
from memo.stores.chain import Chain
from memo.stores.protocols import ServerTier

MAX_NAMES_READ = 20_000
"""Maximum number of names of one kind that are read from this host."""
MAX_NEAREST = 3
"""Maximum number of names that an error lists."""
MAX_COMPARED_CHARACTERS = 1000
"""Longest name, in characters, for which similar names are searched."""
FUNCTION, PREFIX, TAG = "f", "p", "t"


async def names_on_host(port: Port, chain: Chain, kind: str) -> list[str]:
    """Return the names of one kind in this host's generations; none if those cannot be read."""
    if chain.host is None:
        return []
    try:
        return await port.offload(chain.host.generations.names, f"{kind}:", MAX_NAMES_READ)
    except TierError:
        return []


async def known_functions(port: Port, here: Iterable[str]) -> list[str]:
    """Return the ids of the functions of this process and of this host."""
    stored = await names_on_host(port, assembly.default_chain(), FUNCTION)
    return list(dict.fromkeys((*here, *stored)))


def best_fits(name: str, identities: Iterable[str]) -> list[str]:
    """Return the functions that a name fits by id, else by label, qualified name or bare name."""
    known = list(dict.fromkeys(identities))
    for shown in (str, label, _qualified, _bare):
        found = [identity for identity in known if shown(identity) == name]
        if found:
            return found
    return []


def _qualified(identity: str) -> str:
    return label(identity).rpartition(":")[2]


def _bare(identity: str) -> str:
    qualified = _qualified(identity)
    return qualified if "(" in qualified else qualified.rpartition(".")[2]


async def function_named(port: Port, option: str, given: Any, here: Sequence[str]) -> str:
    """Return the id of a function, given as a cached function or by any of its displayed names.

    Args:
        here: the ids of the functions of this process.

    Raises:
        OptionError: no function has the name, or several have.
    """
    identity = getattr(given, "function_id", None)
    if identity is not None:
        return str(identity)
    if not isinstance(given, str) or not given:
        raise OptionError(option, given, "must be a cached function, or its name.")
    if given in here:
        return given
    known = await known_functions(port, here)
    if not best_fits(given, known):
        if await _is_known_elsewhere(port, given):
            return given
        known += await _functions_in_redis(port)
    return only_fit(option, given, known)


def only_fit(option: str, name: str, known: Sequence[str]) -> str:
    """Return the only id that a name fits.

    Raises:
        OptionError: it fits none, or several.
    """
    found = best_fits(name, known)
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(sorted(map(_distinguishing(found), found)))
        raise OptionError(option, name, f"fits several functions: {several}. Name one of them.")
    raise unknown_function(option, name, known)


def _distinguishing(identities: Sequence[str]) -> Any:
    """Return the function that shortens some ids: to labels if those differ, else not at all."""
    return label if len(set(map(label, identities))) == len(identities) else str


async def is_known(port: Port, kind: str, name: str, known: Iterable[str]) -> bool:
    """True if a prefix or tag is known here or in a shared tier, or that tier cannot be reached."""
    if name in known:
        return True
    return await _is_in_shared_tier(port, Ref(f"{kind}:{name}"), otherwise=True)


async def _is_known_elsewhere(port: Port, identity: str) -> bool:
    """True if a shared tier knows a function; if it cannot be reached, for any full id."""
    return await _is_in_shared_tier(port, Ref(f"f:{identity}"), otherwise=":" in identity)


async def _functions_in_redis(port: Port) -> list[str]:
    """Return the functions of the entries that Redis has, so that tables can show their names."""
    from memo.engine.explaining import list_shared_headers  # needed only for an unknown name

    chain = assembly.default_chain()
    shared = chain.authorities.shared
    if not isinstance(shared, ServerTier):
        return []
    try:
        listed, _ = await list_shared_headers(port, chain, shared, f"{chain.namespace}:")
    except TierError:
        return []
    return list(dict.fromkeys(header.function for header, _ in listed))


async def _is_in_shared_tier(port: Port, ref: Ref, *, otherwise: bool) -> bool:
    chain = assembly.default_chain()
    shared = chain.authorities.shared
    if shared is None or shared.generations is None:
        return False
    try:
        [state] = await shared.generations.states(port, [ref])
    except TierError:
        return otherwise
    return bool(state.text)


def unknown_function(option: str, name: str, known: Iterable[str]) -> OptionError:
    """Make the error for a name that no function has; it lists the nearest names, or a few."""
    labels = list(map(label, known))
    near = did_you_mean_functions([name], labels)
    if near:
        return OptionError(option, name, f"no cached function has this name; {near}")
    there = ", ".join(sorted(labels)[:MAX_NEAREST]) or "none"
    more = ", …" if len(labels) > MAX_NEAREST else "."
    return OptionError(option, name, f"no cached function has this name; there are: {there}{more}")


def did_you_mean_functions(names: Iterable[str], known: Iterable[str]) -> str:
    """Ask for the functions that misspelled names probably mean; `""` if there are none."""
    labels = dict.fromkeys(map(label, known))
    shown = [*labels, *map(_qualified, labels), *map(_bare, labels)]
    near = [one for name in names for one in nearest(name, shown)]
    return did_you_mean(
        next((one for one in labels if one == n or one.endswith((f":{n}", f".{n}"))), n)
        for n in near
    )


def without_match(patterns: Iterable[str], identities: Sequence[str]) -> list[str]:
    """Return the names or patterns that fit none of some functions."""
    from memo.metrics.snapshots import matches

    return [one for one in patterns if not any(matches(identity, one) for identity in identities)]


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that are nearest to a misspelled one, best first."""
    if len(name) > MAX_COMPARED_CHARACTERS:
        return []
    import difflib  # needed only for an error

    return difflib.get_close_matches(name, list(dict.fromkeys(known)), MAX_NEAREST, 0.6)


def did_you_mean(names: Iterable[str]) -> str:
    """Return the question `did you mean 'a' or 'b'?`; `""` without names."""
    listed = " or ".join(map(repr, dict.fromkeys(names)))
    return f"did you mean {listed}?" if listed else ""


async def functions_matching(
    port: Port, option: str, pattern: str, here: Sequence[str]
) -> list[str]:
    """Return the functions that a name, a module or a pattern such as `lo*` stands for.

    Raises:
        OptionError: there is none, or a name fits several.
    """
    known = await known_functions(port, here)
    exact = best_fits(pattern, known)
    if not exact and not set(pattern).isdisjoint("*?["):
        from memo.metrics.snapshots import matches

        found = [identity for identity in known if matches(identity, pattern)]
        if found:
            return found
        raise unknown_function(option, pattern, known)
    if not exact:
        found = [one for one in known if label(one).rpartition(":")[0] == pattern]
        if found:
            return found
    return [await function_named(port, option, pattern, here)]
