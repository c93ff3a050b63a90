"""Extensions of Jinja that chat templates use, as in `transformers`.

This file is imported on use only: Jinja is an optional extra.

**Source:** transformers `utils/chat_template_utils.py::_cached_compile_jinja_template`.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace


class Generation(Extension):
    """`{% generation %}`, which marks what the model is to learn from, and writes its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    def write(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateDict:
    """`dict` without what else a class has."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace`, of which no attribute begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any):  # pyright: ignore[reportSelfClsParameterName]
        # An attribute may be called self.
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # Written out, what it holds could be of any size.
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores an attribute called {name}")


def refuse(message: Any) -> NoReturn:
    """`raise_exception`, by which a template refuses a conversation."""
    raise TemplateError(str(message))
