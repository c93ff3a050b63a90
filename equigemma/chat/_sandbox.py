"""Jinja templates from files that nobody should trust: what they may do, and how much of it.

Jinja's own sandbox keeps a template away from Python. But a template can still loop for ever or
fill the memory, and once it does nothing stops it from outside. So only those parts of the language
are let in that chat templates are made of, and each run has a budget, from which every round of a
loop, every call and every character of every text goes off. Nothing here knows what a conversation
is. This file is imported on use only: Jinja is an optional extra.
"""

import json
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sized, ValuesView
from functools import wraps
from types import CodeType, GeneratorType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer


LONGEST = 1 << 17
"""Characters that a template may have."""

STEP = 16
"""What one round of a loop, or a look at one value, costs; a character of a text costs 1."""

# Whatever a later Jinja adds to the language stays out until it is added here.
_NODES = frozenset(
    "Add And Assign AssignBlock Break Call Compare Concat CondExpr Const Continue Dict Filter For "
    "Getattr Getitem If Keyword List Macro Mod Name NSRef Neg Not Operand Or Output Pair Slice Sub "
    "Template TemplateData Test Tuple".split()
)
_TEXT_METHODS = frozenset(
    "capitalize endswith find isdigit join lower lstrip removeprefix removesuffix replace rstrip "
    "split splitlines startswith strip title upper".split()
)
_MAPPING_METHODS = frozenset("get items keys values".split())
_FILTERS = (
    "capitalize count d default dictsort first int items last length list lower map reject "
    "rejectattr reverse select selectattr string title trim unique upper"
)
_TESTS = (
    "!= == boolean defined eq equalto even false float ge gt in integer iterable le lower lt "
    "mapping ne none number odd sequence string true undefined upper"
)
# These look at no more than the head of an object; all others may look at the whole of it.
_CHEAP = frozenset(
    "boolean count d default defined even false first float integer items iterable last length "
    "mapping none number odd sequence string true undefined".split()
)


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one run of one template."""

    intercepted_binops = frozenset(["+", "-", "%"])

    def __init__(self, budget: int = 0):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.left = budget
        self.globals = {"namespace": Namespace, "range": self._range, "raise_exception": _refuse}
        filters = {name: self._weighing(name, self.filters[name]) for name in _FILTERS.split()}
        own = {"join": self._join, "replace": self._replace, "tojson": self._tojson}
        self.tests = {name: self._weighing(name, self.tests[name]) for name in _TESTS.split()}
        self.filters = filters | own

    def spend(self, amount: int) -> str:
        """Takes an amount off the budget; gives an empty text, so that it can stand in an output.

        **Raises:** `SecurityError` if nothing is left.
        """
        self.left -= amount
        if self.left < 0:
            raise SecurityError("it does more work than any conversation needs")
        return ""

    def weigh(self, value: Any) -> Any:
        """`value`, after its whole size was taken off the budget."""
        match value:
            case str():
                self.spend(STEP + len(value))
            case Mapping():
                self.spend(STEP)
                for key, item in value.items():
                    self.weigh(key)
                    self.weigh(item)
            case list() | tuple() | range() | KeysView() | ItemsView() | ValuesView():
                self.spend(STEP)
                for item in value:
                    self.weigh(item)
            case int():
                self.spend(STEP + value.bit_length())
            case float() | None | Undefined() | GeneratorType():
                self.spend(STEP)
            case _:
                raise SecurityError("it writes or compares what is neither text nor data")
        return value

    def rounds(self, value: Any) -> Any:
        """What a loop goes over, after the number of rounds was taken off the budget."""
        if not isinstance(value, Iterable):
            # Jinja says what is wrong with it.
            return value
        items = value if isinstance(value, Sized) else list(value)
        self.spend(STEP * (1 + len(items)))
        return items

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Every call in a template comes through here, and those of the meter itself."""
        if obj in (self.spend, self.weigh, self.rounds):
            return obj(*args)
        self.spend(STEP)
        # Jinja's own, for functions that ask for it; none here does.
        kwargs = {key: value for key, value in kwargs.items() if not key.startswith("_")}
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, dict) and name in _MAPPING_METHODS:
            return obj(*args, **kwargs)
        if isinstance(owner, str) and name in _TEXT_METHODS:
            if name == "replace":
                return self._replace(owner, *args)
            if name == "join":
                return self._join(*args, owner)  # pyright: ignore[reportCallIssue]
            self.weigh([owner, *args])
            return self.weigh(obj(*args, **kwargs))
        if isinstance(obj, Macro) or obj in self.globals.values():
            return super().call(context, obj, *args, **kwargs)
        raise SecurityError(f"it calls {name or type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Sums of texts and lists cost what they weigh."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator != "+" and not numbers:
            raise SecurityError(f"it uses {operator} on what is no number")
        self.spend(STEP + sum(len(side) for side in (left, right) if isinstance(side, Sized)))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A part of a text or list costs what there is of it."""
        if isinstance(argument, slice) and isinstance(obj, Sized):
            self.spend(len(obj))
        return super().getitem(obj, argument)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(STEP * (1 + len(numbers)))
        return numbers

    def _join(self, value: Any, d: str = "") -> str:
        items = [str(self.weigh(item)) for item in self.rounds(value)]
        self.spend(sum(map(len, items)) + len(self.weigh(d)) * len(items))
        return d.join(items)

    def _replace(self, text: Any, old: str, new: str) -> str:
        text = str(self.weigh(text))
        self.spend(len(text) + text.count(self.weigh(old)) * len(self.weigh(new)))
        return text.replace(old, new)

    def _tojson(self, value: Any, indent: int | None = None) -> str:
        if indent is not None and not 0 <= indent <= 8:
            raise SecurityError(f"it indents by {indent}")
        return self.weigh(json.dumps(self.weigh(value), ensure_ascii=False, indent=indent))

    def _weighing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Some get the environment or the context before what the template gives them.
        given = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def weighing(*args: Any, **kwargs: Any) -> Any:
            self.spend(STEP)
            if name in _CHEAP:
                return function(*args, **kwargs)
            self.weigh([*args[given:], *kwargs.values()])
            return self.weigh(function(*args, **kwargs))

        return weighing


def compile_template(source: str) -> CodeType:
    """The program of a template, in which the meter is called wherever work is done.

    **Raises:** `TemplateError` if it is no template, or one that may not run.
    """
    if len(source) > LONGEST:
        raise SecurityError(f"it has {len(source)} characters, more than {LONGEST}")
    sandbox = Sandbox()
    try:
        tree = _Metered().visit(sandbox.parse(source))
        tree.set_environment(sandbox)
        return sandbox.compile(tree)
    except TemplateError:
        raise
    except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
        raise SecurityError("it is nested too deeply, or has a number too long to read") from error


def run(code: CodeType, variables: Mapping[str, Any], *, budget: int) -> str:
    """What a template makes of `variables`.

    **Raises:** `TemplateError`, also for what the template itself refuses.
    """
    sandbox = Sandbox(budget)
    template = sandbox.template_class.from_code(sandbox, code, sandbox.globals)
    try:
        return template.render(variables)
    except TemplateError:
        raise
    except Exception as error:
        # The program is the file's: whatever goes wrong in it is the file's mistake.
        raise SecurityError(f"it fails with {type(error).__name__}: {error}") from error


class _Metered(NodeTransformer):
    """Refuses what templates may not have, and puts calls of the meter into what is left."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        name = type(node).__name__
        if name not in _NODES:
            raise SecurityError(f"it uses {name}")
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise SecurityError("it uses a recursive loop")
        cost = _cost(node.body)
        self.generic_visit(node)
        node.iter = _metered("rounds", node.iter)  # pyright: ignore[reportArgumentType]
        node.body.insert(0, cost)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, cost)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _metered("weigh", part)
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_metered("weigh", part) for part in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _metered("weigh", node.expr)
        for operand in node.ops:
            operand.expr = _metered("weigh", operand.expr)
        return node


def _metered(name: str, *args: nodes.Expr) -> nodes.Call:
    meter = nodes.EnvironmentAttribute(name)
    return nodes.Call(meter, list(args), [], None, None, lineno=args[0].lineno)


def _cost(body: list[nodes.Node]) -> nodes.Output:
    """Of one round: what there is to do and to write, however much of it is done."""
    parts = [part for entry in body for part in (entry, *entry.find_all(nodes.Node))]
    text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
    line = body[0].lineno if body else 1
    amount = nodes.Const(2 * len(parts) + text, lineno=line)
    return nodes.Output([_metered("spend", amount)], lineno=line)


def _refuse(message: Any) -> NoReturn:
    raise TemplateError(str(message))
