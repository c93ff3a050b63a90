"""Chat templates compiled: Jinja programs in which work is counted, and origins are marked.

This file is imported on use only: Jinja is an optional extra.
"""

from collections.abc import Mapping
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from equigemma.chat._sandbox import BUDGET, Sandbox


LONGEST = 1 << 17
"""Characters that a template may have."""


def compile_template(source: str, *, marked: bool) -> CodeType:
    """The program of a template, with the work that it does counted.

    **Arguments:** `marked`: the program marks what is the template's own (see `_provenance`).

    **Raises:** `TemplateError` if it is no template, or one that may not run.
    """
    if len(source) > LONGEST:
        raise SecurityError(f"it has {len(source)} characters, more than {LONGEST}")
    sandbox = Sandbox()
    try:
        tree = _Transformed(marked).visit(sandbox.parse(source))
        tree.set_environment(sandbox)
        return sandbox.compile(tree)
    except TemplateError:
        raise
    except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
        raise SecurityError("it is nested too deeply, or has a number too long to read") from error


def run(
    code: CodeType, variables: Mapping[str, Any], *, size: tuple[int, int], now: datetime
) -> str:
    """What a template makes of `variables`.

    **Arguments:** `size`: characters and messages of the conversation, by which it is measured how
    much work is too much. `now`: the time that a template may ask for.

    **Raises:** `TemplateError`, also for what the template itself refuses.
    """
    characters, messages = size
    # Honest templates read each text a few times, and for each message look at all others.
    budget = BUDGET + (1 << 8) * characters + (1 << 10) * messages**2
    sandbox = Sandbox(budget, now)
    template = sandbox.template_class.from_code(sandbox, code, sandbox.globals)
    try:
        return template.render(variables)
    except TemplateError:
        raise
    except Exception as error:
        # The program is the file's: whatever goes wrong in it is the file's mistake.
        raise SecurityError(f"it fails with {type(error).__name__}: {error}") from error


class _Transformed(NodeTransformer):
    """Puts calls of the environment into a template: what counts, and what marks."""

    def __init__(self, marked: bool):
        self._marked = marked

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = _filtered("_tick", nodes.Const(0), node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        # Constants are as long as the source.
        is_constant = next(node.find_all((nodes.Name, nodes.Call)), None) is None
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_constant or is_target else _filtered("_built", node, node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered("_joined", nodes.List(node.nodes, lineno=node.lineno), node)

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> NoReturn:
        raise SecurityError("it uses autoescape, which would change what is said")

    visit_EvalContextModifier = visit_ScopedEvalContextModifier

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = self.visit(node.arg)
        return _filtered("_sliced", node, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        # A comparison makes no text.
        if not isinstance(node.expr, nodes.Const):
            node.expr = self.visit(node.expr)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        is_text = self._marked and isinstance(node.value, str)
        return _filtered("_literal", node, node) if is_text else node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        if self._marked:
            node.nodes = [
                nodes.Const(part.data, lineno=part.lineno)
                if isinstance(part, nodes.TemplateData)
                else part
                for part in node.nodes
            ]
        return self.generic_visit(node)


def _filtered(name: str, value: nodes.Expr, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)
