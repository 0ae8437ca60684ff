"""What a user writes: `@recurrence` on a function of the state and one token's inputs.

The body runs once, on symbols, and what it does is recorded; nothing is parsed from source text. This module turns a
function into a `Recurrence` (a record, its arguments and their roles); what it means as algebra is derived in
kdagen.derive.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from kdagen.errors import RecurrenceError
from kdagen.language.annotations import Role, role_of
from kdagen.language.node import Node, equations
from kdagen.language.vocabulary import functions


@dataclass(frozen=True, eq=False)
class Recurrence:
    """A recorded recurrence: new state and output as nodes over the state and the arguments."""

    name: str
    doc: str
    state: Node  # the symbol S_{t-1}
    inputs: tuple[Node, ...]
    roles: dict[str, Role]  # by argument; those annotated
    new_state: Node
    output: Node
    constants: dict[str, object]  # parameters with a default: fixed at compile time
    body: object = field(repr=False)
    scope: dict = field(repr=False)

    def __deepcopy__(self, memo) -> Recurrence:
        """A model that is copied shares its recurrences: they do not change."""
        return self

    @property
    def arguments(self):
        """Names, axes and bounds of the inputs (kdagen.ir.canonical.Argument), inferred where not annotated."""
        from kdagen.derive.roles import infer

        return infer(self).arguments

    @property
    def equations(self) -> list[tuple[str, str]]:
        """What the body computes, one (name, text) a line; the last two are S' and o."""
        from kdagen.derive.roles import infer

        return equations(self.new_state, self.output, infer(self).axes)

    def bind(self, **constants) -> Recurrence:
        """The same recurrence with other compile-time constants: `kda_bounded.bind(lower_bound=-8.0)`."""
        if unknown := sorted(set(constants) - set(self.constants)):
            raise RecurrenceError(
                f"recurrence '{self.name}' has no constant {', '.join(unknown)}: "
                f"expected some of {', '.join(self.constants) or 'none'} (the parameters with a default)"
            )
        return _record(self.body, self.name, self.constants | constants, self.scope)

    def __str__(self):
        names = ", ".join([str(self.state), *map(str, self.inputs)])
        return f"{self.name}({names}):" + "".join(f"\n    {name} = {text}" for name, text in self.equations)


def recurrence(body=None, *, name: str | None = None):
    """Records `body(S, q, k, v, ...) -> (new state, output)`; parameters with a default are compile-time constants."""
    caller = sys._getframe(1)  # annotations that are text may use names of an enclosing function
    scope = {} if caller.f_locals is caller.f_globals else dict(caller.f_locals)
    if body is None:
        return lambda b: _record(b, name or b.__name__, {}, scope)
    if not inspect.isfunction(body):
        raise RecurrenceError(
            f"a {type(body).__name__} was given where a function of the state and inputs was expected"
        )
    return _record(body, name or body.__name__, {}, scope)


def _record(body, name: str, constants: dict, scope: dict) -> Recurrence:
    if not name.isidentifier():
        raise RecurrenceError(f"recurrence '{name}': the name must be an identifier: use def, or recurrence(name=...)")
    try:
        recorded = _run(body, name, constants, scope)
        from kdagen.derive.roles import infer

        infer(recorded)
    except RecurrenceError as e:
        text = str(e)
        cause = e.__cause__  # what the body raised of itself
        raise RecurrenceError(text if text.startswith("recurrence '") else f"recurrence '{name}': {text}") from cause
    return recorded


def _run(body, name: str, constants: dict, scope: dict) -> Recurrence:
    state_parameter, *parameters = _parameters(body)
    state = Node("state", value=state_parameter.name, holds_state=True)
    fixed = {p.name: constants.get(p.name, p.default) for p in parameters if p.default is not p.empty}
    roles, inputs, given = {}, [], {}
    for p in parameters:
        if p.name in fixed:
            continue
        role = role_of(p, body, scope)
        names = [f"{p.name}_{i + 1}" for i in range(role.count)] if role and role.count else [p.name]
        nodes = tuple(Node("argument", value=n) for n in names)
        given[p.name] = nodes if role and role.count else nodes[0]
        inputs += nodes
        roles |= {n: role for n in names if role}
    if repeated := {n.value for n in inputs if [m.value for m in inputs].count(n.value) > 1}:
        raise RecurrenceError(f"two arguments are called {', '.join(sorted(repeated))}: rename one")
    new_state, output = _pair(_call(body, state, given | fixed), state)
    doc = inspect.getdoc(body) or ""
    return Recurrence(name, doc, state, tuple(inputs), roles, new_state, output, fixed, body, scope)


def _call(body, state: Node, given: dict):
    """What the body returns; an error of its own with the line it stands in."""
    try:
        return body(state, **given)
    except RecurrenceError:
        raise
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        at = next((f for f in reversed(frames) if f.filename == body.__code__.co_filename), frames[-1])
        raise RecurrenceError(
            f"the body raised {type(e).__name__} at {at.filename}:{at.lineno}: {e}. It runs once, on symbols "
            f"that take + - * / ** @, .T and the functions of kdagen ({', '.join(functions())})"
        ) from e


def _parameters(body) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(body).parameters.values())
    if not parameters:
        raise RecurrenceError("the function takes nothing: expected the state first, then the inputs of one token")
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise RecurrenceError(f"'*{p.name}': arguments must be named one by one, since their names are the op's")
        if p.kind is p.POSITIONAL_ONLY:
            raise RecurrenceError(f"'{p.name}' is positional only ('/'): remove it, since arguments go by name")
    return parameters


ONE_STATE = (
    "A recurrence has one matrix state and one output: a second state, such as a momentum, is outside the family, and "
    "a normaliser is read by one more value channel of ones, to divide by after the op"
)


def _pair(returned, state: Node) -> tuple[Node, Node]:
    how = f"expected 'return {state}, output': the new state and a value vector"
    if not isinstance(returned, tuple) or len(returned) != 2:
        got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        raise RecurrenceError(f"the function returned {got}: {how}. {ONE_STATE}")
    for what, node in zip(("the new state", "the output"), returned, strict=True):
        if isinstance(node, tuple):
            raise RecurrenceError(f"{what} is a tuple of {len(node)}: {how}. {ONE_STATE}")
        if not isinstance(node, Node):
            raise RecurrenceError(f"{what} is a {type(node).__name__}: {how}")
    if not returned[0].holds_state:
        raise RecurrenceError(
            f"the first value returned, '{returned[0]}', does not hold the state, which is "
            f"the function's first parameter, '{state}': {how}"
        )
    return returned


def load(spec: str | Recurrence) -> Recurrence:
    """The recurrence that `spec` names: one of the zoo ('kda'), or 'file.py:name'."""
    if isinstance(spec, Recurrence):
        return spec
    if not isinstance(spec, str):
        raise RecurrenceError(
            f"a {type(spec).__name__} was given where a recurrence was expected: a function decorated with "
            f"@kdagen.recurrence, a name of the zoo, or 'file.py:name'"
        )
    if ":" not in spec and not spec.endswith(".py"):
        from kdagen import zoo

        return zoo.get(spec)
    path, _, attribute = spec.rpartition(":") if ":" in spec else (spec, "", "")
    module = _module(Path(path), spec)
    found = {n: r for n, r in vars(module).items() if isinstance(r, Recurrence)}
    if not attribute and len(found) == 1:
        return next(iter(found.values()))
    if attribute in found:
        return found[attribute]
    listed = ", ".join(found) or "none: decorate a function with @kdagen.recurrence"
    if attribute and hasattr(module, attribute):
        kind = type(getattr(module, attribute)).__name__
        raise RecurrenceError(
            f"'{attribute}' in {path} is of type {kind}, not a recurrence. Recurrences there: {listed}"
        )
    what = f"no '{attribute}'" if attribute else "more than one recurrence: name one as file.py:name"
    what = what if found else "no recurrence"
    raise RecurrenceError(f"{path} has {what}. Recurrences there: {listed}")


def _module(path: Path, spec: str):
    if not path.is_file():
        raise RecurrenceError(f"'{spec}': there is no file {path}. Expected a name of the zoo, or file.py:name")
    module_spec = importlib.util.spec_from_file_location(f"kdagen_user_{path.stem}", path)
    if module_spec is None:
        raise RecurrenceError(f"'{spec}': {path} is not a python file. Expected file.py:name")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except RecurrenceError:
        raise
    except Exception as e:
        raise RecurrenceError(f"{path} could not be imported: {type(e).__name__}: {e}") from e
    return module
