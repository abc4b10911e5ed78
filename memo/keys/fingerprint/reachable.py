"""Survey a function: find the user's code and state that it reaches.

Rules of this module:

1.  Functions and classes are nodes of a graph (`name_graph`), with their text from
    `normalized_code`; the names through which they reach each other are its edges (`names_used`).
2.  Plain values (globals, defaults, captured variables, class attributes) are facts of a node, by
    their fingerprint (`held_values`); Python and installed distributions by their version
    (`origin`).  memo's own code is no fact: the functions that it wraps are followed.
3.  Everything that is read on the way is kept with its location (`unchanged`).
4.  A counter or container that a function only fills (`calls.append(x)`) is not an input of it.
    State that the reached code both changes and reads counts as it was before (`own_changes`).
5.  Everything that is left out is listed.
"""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from memo.keys import origin
from memo.keys.fingerprint import (
    class_body,
    library_patches,
    name_graph,
    normalized_code,
    own_changes,
)
from memo.keys.fingerprint.held_values import (
    DESCRIPTORS,
    NO_VALUE,
    STABLE,
    CodeRef,
    SelfState,
    ValueFingerprint,
    fingerprint_of,
    fingerprint_with,
    innermost,
    qualified_name,
    slots_of,
)
from memo.keys.fingerprint.name_graph import Key, Node
from memo.keys.fingerprint.names_used import (
    ANY_HOLDER,
    FREE,
    GLOBAL_NAME,
    IMPORT,
    SELF,
    SUPER,
    Path,
    TakenAttributes,
    Use,
    below,
)
from memo.keys.fingerprint.normalized_code import Code
from memo.keys.fingerprint.own_changes import CurrentValue, ValuePlace
from memo.keys.fingerprint.unchanged import (
    ClassAttributes,
    KnownVersion,
    Location,
    Place,
    WatchedValue,
    location_in_cell,
    location_in_class,
    location_of,
)
from memo.keys.origin import Origin
from memo.runtime.named_tuple import NamedTuple

_BUILTINS = vars(builtins)
_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
_DYNAMIC = frozenset({"eval", "exec", "__import__", "globals"})
_DYNAMIC_IN = {
    "importlib": {"import_module"},
    "runpy": {"run_path", "run_module"},
    "sys": {"modules"},
}
"""Module -> functions that import modules by a name known only when the code runs."""
_ENVIRONMENT = tuple(
    vars(os)[name] for name in ("environ", "environb", "getenv", "getenvb") if name in vars(os)
)
_FILLED_TYPES = (
    *(int, float, list, dict, set, bytearray),
    *(collections.deque, collections.Counter, collections.defaultdict, collections.OrderedDict),
)
"""Types of counters and containers that do not affect code that only fills them."""
_ITSELF = TakenAttributes()
_ROOT: Key = (0, 0)
_INITIALIZERS = frozenset({"__init__", "__new__", "__post_init__", "__setstate__"})
"""Methods that fill a new object: what they set is not changed by a computation."""


def survey(
    function: Callable[..., Any],
    owner: type | None,
    *,
    shipped: bool = False,
    ignored: frozenset[str] = frozenset(),
    find_originals: Callable[[], Mapping[str, str]] = dict,
) -> KnownVersion:
    """Survey a function and everything that it reaches.

    The survey is repeated while classes turn out to have more counters and containers that are only
    filled.

    Args:
        function: the root.
        owner: for a method the class of `self`.
        shipped: use the bytecode of functions, which cloudpickle brings to other processes.
        ignored: labels of state that does not count, such as `global:api`.
        find_originals: returns the originals that other processes have found (`own_changes`);
            called if something in reach may change, and applied to what the code in reach changes.
    """
    filled: frozenset[Place] = frozenset()
    applied: dict[str, str] = {}
    originals: Mapping[str, str] | None = None
    while True:
        found = GraphBuilder(filled, shipped, ignored, applied)
        found.start(function, owner)
        only_filled = found.only_filled()
        if originals is None and found.version().may_change():
            originals = find_originals()
        applicable = own_changes.applicable(originals or {}, frozenset(found.changed))
        if only_filled <= filled and applicable == applied:
            return found.version()
        filled, applied = filled | only_filled, applicable


class _ValueAt(NamedTuple):
    """A value with its location, its fingerprint, and the fingerprint that counts as an input."""

    where: Location
    at: ValuePlace
    value: Any
    fingerprint: ValueFingerprint
    base: ValueFingerprint

    def watch(self) -> WatchedValue:
        return WatchedValue(self.where, self.at, self.value, self.fingerprint, self.base)


class GraphBuilder:
    """The graph of one function, while it is built.

    Attributes:
        nodes, todo: the graph, and the functions and classes in it that are still to be read.
        functions, classes: the functions and the user's classes that were read, by address.
        class_functions: addresses of functions under `@classmethod`: they get the class as `self`.
        library: classes of libraries to which the user may have attached something.
        named: node -> names in its code; one that such a class has is followed.
        places, values: where the digest depends on an object's identity, and that object.
        watched: where it depends on a value that may change in place.
        values_at: every value read so far, by its place.
        assigned, set_anywhere: places that code in reach rebinds; names of attributes that it sets
            on objects that cannot be determined.
        changed: names that it assigns, sets or fills; see `own_changes`.
        filled: places in classes that are only filled, as the survey before this one found.
        filled_names, read_names: names of attributes that code fills; that it reads.
        originals: see `own_changes`.
        self_attributes, self_escapes: attributes of `self` that count; True if all of them do.
        ignored, unmatched: labels that do not count; those of them that nothing had so far.
        left_out: descriptions of everything that does not count, for `explain`.
        context_variables: label -> context variable that the code reads.
        set_variables: context variables that it sets itself.
        shipped: use the bytecode of functions as their text.
        home: the module of the root; labels of its globals leave it out.
        owner: the class of `self`.
    """

    def __init__(
        self,
        filled: frozenset[Place],
        shipped: bool,
        ignored: frozenset[str],
        originals: Mapping[str, str],
    ) -> None:
        self.filled = filled
        self.filled_names: set[str] = set()
        self.read_names: set[str] = set()
        self.shipped = shipped
        self.ignored = ignored
        self.unmatched = set(ignored)
        self.originals = originals
        self.assigned: set[Place] = set()
        self.set_anywhere: set[str] = set()
        self.nodes: dict[Key, Node] = {}
        self.todo: list[tuple[Key, CodeRef, type | None]] = []
        self.places: dict[Place, Location] = {}
        self.values: dict[Place, Any] = {}
        self.watched: dict[Place, WatchedValue] = {}
        self.values_at: dict[Place, _ValueAt] = {}
        self.functions: dict[int, types.FunctionType] = {}
        self.classes: dict[int, ClassAttributes] = {}
        self.class_functions: set[int] = set()
        self.named: dict[Key, frozenset[str]] = {}
        self.library: dict[type, None] = dict.fromkeys(library_patches.extensible_classes())
        self.left_out: set[str] = set()
        self.context_variables: dict[str, ContextVar[Any]] = {}
        self.set_variables: set[ContextVar[Any]] = set()
        self.home = "__main__"
        self.self_attributes: set[str] = set()
        self.self_escapes = False
        self.changed: set[str] = set()
        self.owner: type | None = None

    def start(self, function: Callable[..., Any], owner: type | None) -> None:
        """Build the graph from its root."""
        self.home = qualified_name(innermost(function)).partition(":")[0]
        self.owner = owner
        root = self.nodes[_ROOT] = Node("", "")
        root.facts.add(("python", _PYTHON_VERSION))
        marked = isinstance(function, types.FunctionType) and STABLE in vars(function)
        fingerprint = ValueFingerprint("@0", (function,)) if marked else fingerprint_of(function)  # type: ignore[arg-type]
        if fingerprint.mutable:  # a bound method, a partial or an object with `__call__`
            fingerprint = self._watch_root(function, fingerprint)
        self.add_fingerprint(root, "function", fingerprint, owner)
        while self.todo:
            key, found, of = self.todo.pop()
            if isinstance(found, type):
                self._class(self.nodes[key], found)
            else:
                self._function(key, found, of)
            if not self.todo:
                self._follow_patches()

    def _watch_root(
        self, function: Callable[..., Any], fingerprint: ValueFingerprint
    ) -> ValueFingerprint:
        """Let the state of the function itself count; return the fingerprint that counts."""
        where = location_of({"function": function}, "function")
        at = ValuePlace(function, "", "function")
        base = self._base(at, function, fingerprint)
        self.watched[where.place] = WatchedValue(where, at, function, fingerprint, base)
        return base

    def version(self) -> KnownVersion:
        """Return the digest, with everything that it depends on."""
        self._watch_assigned()
        return KnownVersion(
            name_graph.digest(self.nodes, _ROOT),
            name_graph.parts(self.nodes),
            frozenset(self.left_out),
            [(at.get, at.name, self.values[place]) for place, at in self.places.items()],
            [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in self.functions.values()],
            [*self.classes.values(), *map(library_patches.AttributeCount, self.library)],
            list(self.watched.values()),
            self.state(),
            frozenset(self.changed),
            frozenset(self.unmatched),
            self._known_changes_in_reach(),
            frozenset(
                label
                for label, variable in self.context_variables.items()
                if variable not in self.set_variables
            ),
        )

    def only_filled(self) -> set[Place]:
        """Return the counters and containers of classes in reach that are only filled."""
        names = self.filled_names - self.read_names
        return {
            (id(shape.cls), name)
            for shape in self.classes.values()
            for name in names & shape.members.keys()
            if type(shape.members[name]) in _FILLED_TYPES
        }

    def _watch_assigned(self) -> None:
        """Compare by value what the code assigns, since it assigns another object each time."""
        for cls in self.classes:
            self.assigned.update((cls, name) for name in self.set_anywhere)
        for place in self.assigned & self.values_at.keys() - self.watched.keys():
            known, shape = self.values_at[place], self.classes.get(place[0])
            if issubclass(type(known.value), (types.FunctionType, type, types.ModuleType)):
                continue
            self.places.pop(place, None)
            if shape is not None and place[1] in shape.names:
                self.classes[place[0]] = shape.without(place[1])
            self.watched[place] = known.watch()

    def state(self) -> SelfState:
        """Return the state of `self` that the followed methods read."""
        if self.owner is None:
            return SelfState()
        slots = {slot.__name__: slot for slot in slots_of(self.owner)}
        names, changed = tuple(sorted(self.self_attributes)), frozenset(self.changed)
        originals = {k: t for k, t in self.originals.items() if k.startswith("self.")}
        return SelfState(names, self.self_escapes, slots, changed, originals)

    def _known_changes_in_reach(self) -> tuple[str, ...]:
        """Return the keys of the originals that apply to values in reach."""
        met = {known.at.label for known in self.values_at.values()}
        own = {f"self.{name}" for name in self.self_attributes}
        return tuple(
            key
            for key in self.originals
            if own_changes.label_of(key) in met | own
            or (self.self_escapes and key.startswith("self."))
        )

    # nodes

    def add_fingerprint(
        self, node: Node, label: str, fingerprint: ValueFingerprint, owner: type | None = None
    ) -> None:
        """Add the fingerprint of a value to a node."""
        if fingerprint.text != "@0":
            node.facts.add((label, fingerprint.text))
        node.facts.update((f"package:{name}", version) for name, version in fingerprint.packages)
        self.left_out.update(f"{label}{path}: {why}" for path, why in fingerprint.left_out)
        for at, ref in enumerate(fingerprint.refs):
            node.edges.add((f"{label}@{at}", self._node_key(ref, owner)))
        for note, ref in fingerprint.noted:
            node.edges.add((f"{label}@{note}", self._node_key(ref, None)))

    def _node_key(self, ref: CodeRef, owner: type | None) -> Key:
        of = None if isinstance(ref, type) else owner
        key = (id(ref), 0 if of is None else id(of))
        if key not in self.nodes:
            self.nodes[key] = Node(qualified_name(ref), "")
            self.todo.append((key, ref, of))
        return key

    def _package(self, node: Node, whose: Origin) -> None:
        if whose.kind == origin.INSTALLED:
            node.facts.add((f"package:{whose.name}", whose.version))

    def _label(self, module: str, name: str) -> str:
        module = "__main__" if module == "__mp_main__" else module
        return f"global:{name}" if module == self.home else f"global:{module}.{name}"

    # places

    def _watch_identity(self, where: Location, value: Any) -> None:
        """Record that the digest is valid only while this very object is at that location."""
        self.places[where.place] = where
        self.values[where.place] = value

    def _follow_name(
        self, node: Node, label: str, namespace: dict[str, Any], name: str, taken: TakenAttributes
    ) -> None:
        """Follow a name of a module or a function; if they lack it, it may be a builtin."""
        where = location_of(namespace, name)
        if where.value() is not NO_VALUE or name not in _BUILTINS:
            self._follow(node, label, where, taken)
            return
        self._watch_identity(where, NO_VALUE)
        if name in _DYNAMIC:
            self._note_dynamic(node, f"{name}()")
        if isinstance(_BUILTINS[name], (types.FunctionType, types.MethodType)):
            self._follow(node, label, location_of(_BUILTINS, name), taken)

    def _note_dynamic(self, node: Node, name: str) -> None:
        self.left_out.add(f"{node.name}: {name} reaches code that cannot be determined")

    def _note_dynamic_in(self, node: Node, module: str, chains: Iterable[Path]) -> None:
        names = {chain[0] for chain in chains if chain} & _DYNAMIC_IN.get(module, set())
        for name in sorted(names):
            self._note_dynamic(node, f"{module}.{name}")

    def _follow(
        self,
        node: Node,
        label: str,
        where: Location,
        taken: TakenAttributes = _ITSELF,
        owner: type | None = None,
    ) -> None:
        """Follow the value at a location, and the attributes taken from it."""
        value = where.value()
        if label in self.ignored:
            self.unmatched.discard(label)
            self.left_out.add(f"{label}: is ignored")
        elif where.place in self.filled or (taken.is_only_filled and type(value) in _FILLED_TYPES):
            self.left_out.add(f"{label}: is filled by the code and never read")
        elif value is NO_VALUE:
            self.add_fingerprint(node, label, self._fingerprint_at(where, label, value))
        elif issubclass(type(value), types.ModuleType):
            self._watch_identity(where, value)
            self._module(node, label, value, taken)
        else:
            if value is importlib.import_module:
                self._note_dynamic(node, "import_module()")
            if value is os.environ:  # its items are listed by name
                self._watch_identity(where, value)
                return
            self._note_context_variable(label, value, taken)
            if issubclass(type(value), type) and origin.of_type(value).kind != origin.USER:
                self.library[value] = None
            self.add_fingerprint(node, label, self._fingerprint_at(where, label, value), owner)
            self._follow_attributes(node, label, value, taken)

    def _note_context_variable(self, label: str, value: Any, taken: TakenAttributes) -> None:
        """Note how the code uses a value, if it is a context variable."""
        if type(value) is not ContextVar:  # of any other object, `__class__` may raise
            return
        if ("set",) in taken.chains:
            self.set_variables.add(value)
        if not {("get",), ()}.isdisjoint(taken.chains):
            self.context_variables[label] = value

    def _fingerprint_at(self, where: Location, label: str, value: Any) -> ValueFingerprint:
        """Return the fingerprint that counts for the value at a location; it is made only once."""
        known = self.values_at.get(where.place)
        if known is None or known.value is not value:
            fingerprint, at = fingerprint_of(value), ValuePlace(where.of, where.name, label)
            known = _ValueAt(where, at, value, fingerprint, self._base(at, value, fingerprint))
            self.values_at[where.place] = known
        if known.fingerprint.mutable:
            self.watched[where.place] = known.watch()
        else:
            self._watch_identity(where, value)
        return known.base

    def _base(self, at: ValuePlace, value: Any, fingerprint: ValueFingerprint) -> ValueFingerprint:
        if issubclass(type(value), (types.FunctionType, type)):
            return fingerprint
        originals = own_changes.originals_of(at, self.originals)
        current = CurrentValue(at, value, fingerprint, fingerprint_with)
        found = own_changes.REGISTRY.base(current, (lambda: originals) if originals else dict)
        assert isinstance(found, ValueFingerprint)
        return found

    def _follow_attributes(
        self, node: Node, label: str, value: Any, taken: TakenAttributes
    ) -> None:
        """Follow attributes set on a function (`helper.table`); a class is followed as a whole."""
        if type(value) is types.FunctionType or origin.is_of_memo(type(value)):
            own = getattr(value, "__dict__", {})
            for name, inner in taken.by_attribute().items():
                if name in own:
                    self._follow_name(node, f"{label}.{name}", own, name, inner)

    def _module(
        self, node: Node, label: str, module: types.ModuleType, taken: TakenAttributes
    ) -> None:
        whose = origin.of_module(module)
        self._package(node, whose)
        node.facts.add((label, f"module {module.__name__}"))
        if whose.kind != origin.USER:
            self._note_dynamic_in(node, module.__name__, taken.chains)
            self._follow_taken(node, label, module, taken)
            return
        if () in taken.chains:
            self.left_out.add(f"{label}: module {module.__name__} is used as a value")
        for name, inner in taken.by_attribute().items():
            if name not in vars(module) and hasattr(module, "__path__"):
                origin.import_module(f"{module.__name__}.{name}")
            self._follow_name(node, self._label(module.__name__, name), vars(module), name, inner)
            if name not in vars(module) and "__getattr__" in vars(module):
                self._note_computed(node, module, name)

    def _note_computed(self, node: Node, module: types.ModuleType, name: str) -> None:
        """Note a name that a user's module provides by its `__getattr__`."""
        where = f"{module.__name__}.{name}"
        self.left_out.add(f"{where}: is computed by {module.__name__}.__getattr__ when it is read")
        self._follow_name(
            node, self._label(module.__name__, "__getattr__"), vars(module), "__getattr__", _ITSELF
        )

    def _follow_taken(
        self, node: Node, label: str, module: types.ModuleType, taken: TakenAttributes
    ) -> None:
        """Follow what is taken from a library's module, if the user may have put it there."""
        for name, inner in taken.by_attribute().items():
            where = location_of(vars(module), name)
            value = where.value()
            if library_patches.is_user_defined(value):
                self._follow(node, f"{label}.{name}", where, inner)
            elif library_patches.is_fixed(value):
                self._watch_identity(where, value)
                if issubclass(type(value), type):
                    self.library[value] = None
                elif issubclass(type(value), types.ModuleType):
                    self._follow_taken(node, f"{label}.{name}", value, inner)

    def _follow_patches(self) -> None:
        """Follow what the user has attached to library classes, if the code uses its name."""
        classes = {base: None for cls in self.library for base in cls.__mro__ if base is not object}
        for cls, (key, names) in itertools.product(classes, list(self.named.items())):
            for name in names & vars(cls).keys():
                where = location_in_class(cls, name)
                if library_patches.is_user_defined(where.value()):
                    self._follow(self.nodes[key], f"attribute:{qualified_name(cls)}.{name}", where)
                else:
                    self._watch_identity(where, where.value())

    # functions

    def _function(self, key: Key, function: types.FunctionType, owner: type | None) -> None:
        node = self.nodes[key]
        whose = origin.of_namespace(function.__globals__, function.__code__.co_filename)
        self.functions[id(function)] = function
        self._package(node, whose)
        if whose.kind == origin.USER:
            read = normalized_code.read(function.__code__, function.__globals__)
            node.text = normalized_code.bytecode(function.__code__) if self.shipped else read.text
            self.named[key] = read.names
            if function.__name__ not in _INITIALIZERS:
                self.changed |= read.changed
            self.read_names |= read.read
            self.filled_names.update(path[-1] for path in read.filled if len(path) == 2)
            self._note_assigned(function, read, owner)
            self._follow_uses(node, function, read, owner)
        else:  # named by its code, since `wraps` gives it the name of a user's function
            home = function.__globals__.get("__name__", "")
            node.name, node.text = f"{home}:{function.__code__.co_qualname}", "installed"
            self._follow_installed_closure(node, function)
            if home == "functools" and "registry" in vars(function):  # of a `singledispatch`
                self._follow(node, f"registry:{node.name}", location_of(vars(function), "registry"))
        self._defaults(node, function)
        if "__wrapped__" in vars(function):
            where = location_of(vars(function), "__wrapped__")
            self._follow(node, f"wrapped:{node.name}", where, owner=owner)

    def _follow_installed_closure(self, node: Node, function: types.FunctionType) -> None:
        """Follow the closure of an installed decorator: the user's function, and options."""
        for name, cell in _cells(function).items():
            value = location_in_cell(cell).value()
            if value is not NO_VALUE:
                self.add_fingerprint(
                    node, f"closure:{node.name}.{name}", fingerprint_of(value, quiet=True)
                )

    def _defaults(self, node: Node, function: types.FunctionType) -> None:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        values = function.__defaults__ or ()
        for name, value in zip(names[len(names) - len(values) :], values, strict=False):
            label, where = f"default:{node.name}.{name}", location_of({name: value}, name)
            fingerprint, at = fingerprint_of(value), ValuePlace(function, name, label)
            base = self._base(at, value, fingerprint)
            self.add_fingerprint(node, label, base)
            if fingerprint.mutable:
                self.watched[id(function), name] = WatchedValue(where, at, value, fingerprint, base)
        keywords = function.__kwdefaults__ or {}
        for name in list(keywords):
            self._follow(node, f"default:{node.name}.{name}", location_of(keywords, name))

    def _follow_uses(
        self, node: Node, function: types.FunctionType, code: Code, owner: type | None
    ) -> None:
        home = function.__globals__
        module = str(home.get("__name__", "__main__"))
        used = _chains_by_name(code.uses)
        for (root, name), chains in used.items():
            variable = _first_parameter(function) if root == SELF else name
            taken = TakenAttributes(chains, below(code.filled, variable))
            self._note_environment(node, function, code, (root, name))
            if root == GLOBAL_NAME:
                self._follow_name(node, self._label(module, name), home, name, taken)
            elif root == IMPORT:
                self._follow_import(node, home, name, chains)
            elif root == SELF:
                self._follow_self(node, function, owner, taken)
            elif root == SUPER:
                self._follow_super(node, function, owner, taken)
        self._note_variadic_self(function, owner)
        for name, cell in _cells(function).items():  # `super()` uses `__class__` implicitly
            taken = TakenAttributes(used.get((FREE, name), ((),)), below(code.filled, name))
            self._follow(node, f"closure:{node.name}.{name}", location_in_cell(cell), taken)

    def _note_environment(
        self, node: Node, function: types.FunctionType, code: Code, name: tuple[str, str]
    ) -> None:
        """List the environment variables that a function reads through a name."""
        for use in code.uses:
            if (use.root, use.name) == name and _reads_environment(function, use):
                items = sorted(item for held, item in code.items if held == use)
                for item in [f"[{one!r}]" for one in items] or [""]:
                    self.left_out.add(f"os.environ{item}: is read by {node.name} when it runs")

    def _follow_import(
        self, node: Node, home: dict[str, Any], name: str, chains: tuple[Path, ...]
    ) -> None:
        """Follow a module that the function imports itself."""
        full = origin.absolute_name(name, home)
        whose = None if full is None else origin.find(full)
        if full is None or whose is None:
            node.facts.add((f"import:{name}", "absent"))
            return
        self._package(node, whose)
        self._note_dynamic_in(node, full, chains)
        module = sys.modules.get(full)
        if whose.kind != origin.USER:
            if module is not None:
                self._follow_taken(node, f"import:{full}", module, TakenAttributes(chains))
        else:
            origin.import_module(full)
            taken = TakenAttributes(tuple(chain for chain in chains if chain))
            self._follow(node, f"import:{full}", location_of(sys.modules, full), taken)

    def _note_assigned(self, function: types.FunctionType, code: Code, owner: type | None) -> None:
        """Note the names that a function rebinds."""
        cells = _cells(function)
        for use in code.assigned:
            if use.root == GLOBAL_NAME:
                self._note_rebound(location_of(function.__globals__, use.name), use.chain)
            elif use.root == FREE and use.name in cells:
                self._note_rebound(location_in_cell(cells[use.name]), use.chain)
            elif use.root == SELF and len(use.chain) == 1:
                bases = owner.__mro__ if owner is not None else ()
                self.assigned.update((id(base), use.chain[0]) for base in bases)
            elif use.root == ANY_HOLDER or use.chain[:-1] == ("__class__",):
                self.set_anywhere.add(use.chain[-1])

    def _note_rebound(self, where: Location, chain: Path) -> None:
        """Note that code rebinds a name, or an attribute of the object under it."""
        for step in chain:
            value = where.value()
            if issubclass(type(value), type):
                where = location_in_class(value, step)
            elif issubclass(type(value), (types.ModuleType, types.FunctionType)) or (
                origin.is_of_memo(type(value)) and hasattr(value, "__dict__")
            ):
                where = location_of(vars(value), step)
            else:
                return
        self.assigned.add(where.place)

    # classes

    def _follow_self(
        self, node: Node, function: types.FunctionType, owner: type | None, taken: TakenAttributes
    ) -> None:
        """Follow what a method takes from `self` and `cls`, in the class if that is known."""
        if owner is None:
            return
        if () in taken.chains:
            self.add_fingerprint(node, f"self:{node.name}", fingerprint_of(owner))
        self.self_escapes |= () in taken.chains and id(function) not in self.class_functions
        for name, inner in taken.by_attribute().items():
            if id(function) not in self.class_functions:
                self._note_attribute(node, owner, name)
            self._follow_member(node, owner, owner.__mro__, name, inner)

    def _note_attribute(self, node: Node, owner: type, name: str) -> None:
        """Note an attribute of `self`, unless the class has a property of that name."""
        found = next((vars(base)[name] for base in owner.__mro__ if name in vars(base)), NO_VALUE)
        if name == "__class__":
            self.add_fingerprint(node, f"self:{node.name}", fingerprint_of(owner))
        elif name.startswith("__") and name.endswith("__") and found is not NO_VALUE:
            self.self_escapes = True
        elif found is NO_VALUE:
            self.self_attributes.add(name)
            for hook in ("__getattr__", "__getattribute__"):
                if any(hook in vars(base) for base in owner.__mro__[:-1]):
                    self._follow_member(node, owner, owner.__mro__[:-1], hook, _ITSELF)
        elif type(found) in (property, functools.cached_property):
            pass  # what its function reads counts
        elif _is_known(found) or not hasattr(type(found), "__get__"):
            self.self_attributes.add(name)
        else:  # a descriptor of another kind gets `self`
            self.self_escapes = True

    def _follow_super(
        self, node: Node, function: types.FunctionType, owner: type | None, taken: TakenAttributes
    ) -> None:
        """Follow what a method takes from `super()`: from the next class that has it."""
        cell = _cells(function).get("__class__")
        here = None if cell is None else location_in_cell(cell).value()
        if owner is None:
            return
        if here not in owner.__mro__ or () in taken.chains:
            self.self_escapes = True
            return
        after = owner.__mro__[owner.__mro__.index(here) + 1 :]
        for name, inner in taken.by_attribute().items():
            self._follow_member(node, owner, after, name, inner)

    def _note_variadic_self(self, function: types.FunctionType, owner: type | None) -> None:
        """Let all of `self` count if a method takes it among `*args`."""
        variadic = function.__code__.co_flags & inspect.CO_VARARGS
        hides = not function.__code__.co_argcount and variadic
        if owner is not None and hides and "__wrapped__" not in vars(function):
            self.self_escapes = True

    def _follow_member(
        self, node: Node, owner: type, bases: Iterable[type], name: str, taken: TakenAttributes
    ) -> None:
        """Follow an attribute of `self` in the first class that has it.

        An object may also have an attribute of its own.
        """
        for base in bases:
            where = location_in_class(base, name)
            value = where.value()
            if origin.of_type(base).kind == origin.USER:
                if isinstance(value, class_body.SLOT_TYPES):
                    return
                if value is not NO_VALUE:
                    of = None if isinstance(value, staticmethod) else owner
                    if isinstance(value, classmethod) or getattr(value, "of_class", False) is True:
                        self.class_functions.add(id(innermost(value)))
                    self.self_escapes |= _is_opaque_property(value)
                    label = f"attribute:{qualified_name(base)}.{name}"
                    self._follow(node, label, where, taken, of)
                    return
                self._watch_identity(where, value)
            elif value is not NO_VALUE:
                self.add_fingerprint(node, f"base:{qualified_name(base)}", fingerprint_of(base))
                reads = base is not object or name in _READING_METHODS
                self.self_escapes |= reads and hasattr(type(value), "__get__")
                return

    def _class(self, node: Node, cls: type) -> None:
        body = vars(cls)
        node.text = class_body.head(cls)
        for at, base in enumerate((*cls.__bases__, type(cls))):
            if base not in (object, type):
                self.add_fingerprint(node, f"base:{node.name}.{at}", fingerprint_of(base))
        kept: dict[str, Any] = {}
        for name, value in class_body.attributes(cls):
            if isinstance(value, classmethod) or getattr(value, "of_class", False) is True:
                self.class_functions.add(id(innermost(value)))
            where = location_in_class(cls, name)
            self._follow(node, f"attribute:{node.name}.{name}", where)
            if self.places.pop(where.place, None) is not None:
                kept[name] = self.values[where.place]
        for name, value in class_body.fields(cls):
            self.add_fingerprint(
                node, f"field:{node.name}.{name}", fingerprint_of(value, quiet=True)
            )
        for name, value in class_body.field_types(cls):
            self.add_fingerprint(node, f"type:{node.name}.{name}", fingerprint_of(value, True))
        self.classes[id(cls)] = ClassAttributes(
            cls, cls.__bases__, body, tuple(kept), tuple(kept.values()), len(body)
        )


_READING_METHODS = frozenset(
    {"__getattribute__", "__getstate__", "__reduce__", "__reduce_ex__", "__dir__", "__str__"}
)
"""Methods of `object` that read attributes, or call methods that do."""


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))


def _reads_environment(function: types.FunctionType, use: Use) -> bool:
    """True if a use is `os.environ`, `os.getenv` or similar."""
    found: Any = None
    if use.root == GLOBAL_NAME:
        found = function.__globals__.get(use.name)
    elif use.root == IMPORT:
        found = sys.modules.get(origin.absolute_name(use.name, function.__globals__) or "")
    for step in ("", *use.chain):
        found = vars(found).get(step) if step and type(found) is types.ModuleType else found
        if any(found is one for one in _ENVIRONMENT):
            return True
    return False


def _is_known(value: Any) -> bool:
    """True if an attribute of a class passes `self` only to code that is followed."""
    if type(value) in (*DESCRIPTORS, types.FunctionType, *class_body.SLOT_TYPES):
        return True
    return origin.is_of_memo(type(value))


def _is_opaque_property(value: Any) -> bool:
    """True for a property whose function does not tell what it reads: `property(itemgetter(0))`."""
    if type(value) not in (property, functools.cached_property):
        return False
    function = getattr(value, DESCRIPTORS[type(value)])
    return not (isinstance(function, types.FunctionType) or origin.is_of_memo(type(function)))


def _first_parameter(function: types.FunctionType) -> str:
    names = function.__code__.co_varnames
    return names[0] if names else ""


def _chains_by_name(uses: Iterable[Use]) -> dict[tuple[str, str], tuple[Path, ...]]:
    """Group the chains of attributes by the name that they are taken from."""
    found: dict[tuple[str, str], tuple[Path, ...]] = {}
    for use in uses:
        key = (use.root, use.name)
        found[key] = (*found.get(key, ()), use.chain)
    return found
