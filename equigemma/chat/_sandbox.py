"""Chat templates as Jinja programs: what they are given, and bounds on what they do.

A template comes with the weights, and whoever wrote those wrote it. It runs in Jinja's own
`ImmutableSandboxedEnvironment`, as in `transformers`, which keeps it away from Python: that is the
boundary, and a hole in it is a hole here. Against a template that loops for ever or fills the
memory, the sandbox does nothing, so that each run has a budget here: rounds of loops, calls and
filters, and every character that they write, go off it. What one operation of Python's own does is
estimated before it is done. A template may still say whatever it likes in a conversation.

Nothing here knows what a conversation is. This file is imported on use only: Jinja is an optional
extra.

**Source:** transformers `utils/chat_template_utils.py::_cached_compile_jinja_template`.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import pass_context
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from equigemma.chat._language import Generation, TemplateDict, TemplateNamespace, refuse
from equigemma.chat._provenance import OWN, SAID, UNKNOWN, Text, origin


BUDGET = 1 << 24
"""Cost of what a template may do whatever the conversation."""

SECONDS = 10.0
"""Processor time for a run of that cost, and so much more for one of more; honest ones take
milliseconds."""

STEP = 64
"""Cost of one round of a loop, one call or one filter; that of a character is 1."""

ITEM = 16
"""Cost of one entry of a list or an object."""

WIDEST = 256
"""The largest width, indentation or batch that a template may ask for."""

_WIDTHS = frozenset(
    "batch center expandtabs indent ljust rjust slice tojson wordwrap zfill".split()
)
# Widths of four digits, and those that are computed.
_WIDE = {
    "%": re.compile(r"%[-+ #0]*(\d{4}|\*|\d*\.(\d{4}|\*))"),
    "format": re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)"),
}
_WIDE["format_map"] = _WIDE["format"]
_BRACKETS = re.compile(r"[<>\[\]]")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one run of one template."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, budget: int = BUDGET, now: datetime | None = None):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._shown,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        self._left = budget
        self._deadline = time.thread_time() + SECONDS * max(1.0, budget / BUDGET)
        self._steps = 0
        self._literals: dict[str, Text] = {}
        self._now = datetime.now() if now is None else now
        # Random words are of no use, and cost what a template asks for.
        del self.globals["lipsum"]
        self.globals |= {
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
            "raise_exception": refuse,
            "strftime_now": self._strftime_now,
        }
        filters = self.filters | {"join": self._join, "tojson": self._tojson, "safe": _safe}
        self.filters = {name: self._metered(name, filter) for name, filter in filters.items()}
        self.filters |= {"_tick": self._tick, "_built": self._built, "_sliced": self._sliced}
        self.filters |= {"_literal": self._literal, "_joined": self._joined}

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What a template, a macro or a block has written."""
        parts = list(parts)
        self._spend(sum(map(len, parts)))
        return _concatenated(parts)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Every call in a template comes through here."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        name = getattr(obj, "__name__", "")
        self._spend(STEP)
        if isinstance(owner, str):
            self._spend(len(owner))
            if name == "join" and args:
                args = list(args[0]), *args[1:]
            self._estimate(name, owner, *args)
        return self._charged(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Sums of texts and lists cost what they weigh."""
        self._spend(STEP)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    self._spend(self._weight(one) * max(other, 0))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = abs(left).bit_length()
            if (bits + abs(right).bit_length() if operator == "*" else bits * abs(right)) > 1 << 12:
                raise SecurityError("it computes with numbers that are too large")
        if operator == "%" and isinstance(left, str):
            self._estimate("%", left)
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, str | list | tuple):
            self._spend(len(value))
        return value

    def _spend(self, amount: int) -> None:
        self._left -= amount
        self._steps += 1
        # Asking the clock takes as long as many steps do.
        is_late = self._steps % 64 == 0 and time.thread_time() > self._deadline
        if self._left < 0 or is_late:
            raise SecurityError("it does more work than any conversation needs")

    def _weight(self, value: Any) -> int:
        """Characters and entries of a value, those counted twice that are there twice."""
        match value:
            case str():
                return ITEM + len(value)
            case Mapping():
                items: Iterable[Any] = [*value.keys(), *value.values()]
            case list() | tuple() | set():
                items = value
            case _:
                return ITEM
        weight = ITEM
        for item in items:
            weight += self._weight(item)
            if weight > self._left:
                break
        return weight

    def _charged(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict | set):
            self._spend(self._weight(value))
        return value

    def _estimate(self, name: str, *args: Any) -> None:
        """Takes off the budget what an operation is about to write, if that may be far more than
        what it is given."""
        match name, args:
            case "replace", (str(text), str(old), str(new), *_):
                self._spend((text.count(old) if old else len(text) + 1) * len(new))
            case "join", (str(text), list(items)):
                self._spend(self._weight(items) + len(text) * len(items))
            case "translate", (str(text), Mapping() as table):
                longest = max((len(str(item)) for item in table.values()), default=0)
                self._spend(len(text) * longest)
            case (("%" | "format" | "format_map"), (str(text), *_)) if _WIDE[name].search(text):
                raise SecurityError("it formats with widths that no conversation needs")
        if name in _WIDTHS and any(isinstance(arg, int) and arg > WIDEST for arg in args):
            raise SecurityError(f"it uses {name} with a number above {WIDEST}")

    def _metered(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        # Some get the environment or the context before what the template gives them.
        given = 1 if hasattr(filter, "jinja_pass_arg") else 0

        @wraps(filter)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._spend(STEP)
            self._estimate(name, *args[given:], *kwargs.values())
            return self._charged(filter(*args, **kwargs))

        return metered

    def _shown(self, value: Any) -> str:
        """A value as text, of which more is known only if it is text already."""
        if isinstance(value, Text):
            return value
        if value is None or type(value) in (bool, int, float):
            return Text(str(value), OWN)
        return Text(str(value))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            value = (self.getitem(item, attribute) for item in value)
        parts = [self._shown(item) for item in value]
        self._spend(sum(map(len, parts)) + len(parts) * len(d))
        return (d if isinstance(d, Text) else Text(d, OWN if not d else UNKNOWN)).join(parts)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        self._spend(self._weight(value))
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return Text(text, SAID if _is_said(value) else UNKNOWN)

    def _strftime_now(self, format: str) -> str:
        self._estimate("%", format)
        return Text(self._now.strftime(format), OWN)

    @pass_context
    def _tick(self, context: Any, value: Any) -> Any:
        self._spend(STEP)
        return value

    @pass_context
    def _built(self, context: Any, value: Any) -> Any:
        return self._charged(value)

    @pass_context
    def _sliced(self, context: Any, value: Any) -> Any:
        self._spend(STEP + (len(value) if isinstance(value, str | list | tuple) else 0))
        return value

    @pass_context
    def _literal(self, context: Any, value: str) -> str:
        made = self._literals.get(value)
        if made is None:
            made = self._literals[value] = Text(value, OWN)
        return made

    @pass_context
    def _joined(self, context: Any, items: list[Any]) -> str:
        return self.concat([self._shown(item) for item in items])


def _safe(value: Any) -> Any:
    """Nothing is escaped in a chat template, so that all of it is safe."""
    return value if isinstance(value, Text) else Markup(value)


def _concatenated(parts: list[str]) -> str:
    return Text("".join(parts), "".join(map(origin, parts)))


def _is_said(value: Any) -> bool:
    """Whether a special token in what JSON has would be of the conversation."""
    match value:
        case str():
            return set(origin(value)) <= {SAID} or not _BRACKETS.search(value)
        case Mapping():
            return all(_is_said(part) for pair in value.items() for part in pair)
        case list() | tuple():
            return all(map(_is_said, value))
    return True
