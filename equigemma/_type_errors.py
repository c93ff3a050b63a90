"""The errors of arguments of a wrong type or shape, in one sentence.

jaxtyping prints all arguments and all annotations, a model leaf by leaf. Here it is the argument
that is wrong, what it must be, and the sizes that others have set.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import Parameter, signature
from os import PathLike
from types import NoneType
from typing import Any, Literal, SupportsIndex, TypeVar, get_args, get_origin

from equinox import Module
from jaxtyping import AbstractArray

from equigemma._arguments import described, with_article


_PARAMETER = re.compile(r"The problem arose whilst typechecking parameter '(\w+)'")
_RESULT = re.compile(r"Actual value: (.*)\nExpected type: (.*)\.\n-{5}", re.DOTALL)
_SIZE = re.compile(r"^(\w+)=(\(.*\)|\d+)$", re.MULTILINE)


def message_of(error: TypeError, function: Callable, args: tuple, kwargs: Mapping) -> str | None:
    """The error of a call of `function` in one sentence; None if it comes from within it."""
    try:
        given = signature(function).bind(*args, **kwargs).arguments
    except TypeError as wrong_call:
        return f"{_caller(function)}: {wrong_call}{_by_name(function, args)}."
    message = str(error)
    if message.startswith("Type-check error whilst checking the parameters of"):
        found = _PARAMETER.search(message)
        if found is not None:
            sizes = dict(_SIZE.findall(message))
            return f"{_caller(function)}: {_wrong(found[1], given, function, sizes)}"
        arrays = (f"`{name}` {described(value)}" for name, value in given.items() if name != "self")
        return f"{_caller(function)}: these do not fit each other: {', '.join(arrays)}."
    result = _RESULT.search(message)
    if result is None or not message.startswith("Type-check error whilst checking the return"):
        return None
    actual, expected = (" ".join(part.split())[:200] for part in result.groups())
    return f"{_caller(function)} gave {actual}, and {expected} is expected: a part of it is wrong."


def _by_name(function: Callable, args: tuple) -> str:
    """What goes by name, where too much was given by place."""
    kinds = signature(function).parameters.values()
    named = [p.name for p in kinds if p.kind is Parameter.KEYWORD_ONLY]
    places = sum(p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in kinds)
    return f"; by name only: {', '.join(named)}" if named and len(args) > places else ""


def _wrong(name: str, given: Mapping[str, Any], function: Callable, sizes: Mapping) -> str:
    parameters = signature(function).parameters
    annotation = parameters[name].annotation
    known = {
        axis: sizes[axis]
        for axis in dict.fromkeys(_axes(annotation))
        if axis in sizes and any(axis in _axes(p.annotation) for p in _before(parameters, name))
    }
    where = ", ".join(f"{axis} = {size}" for axis, size in known.items())
    return (
        f"`{name}` must be {_expected(annotation)}{f', where {where}' if where else ''}; got "
        f"{described(given[name])}."
    )


def _caller(function: Callable) -> str:
    """The function as it is called: by its public name, `__call__` by that of its class."""
    owner, _, name = function.__qualname__.rpartition(".")
    if owner:
        dunder = {"__call__": f"A call of {owner}", "__init__": owner}
        return dunder.get(name, f"{owner}.{name}")
    public = [part for part in function.__module__.split(".")[1:] if not part.startswith("_")]
    return ".".join(public if public[-1:] == [name] else [*public, name])


def _before(parameters: Mapping[str, Parameter], name: str) -> Iterator[Parameter]:
    for parameter in parameters.values():
        if parameter.name == name:
            return
        yield parameter


def _options(annotation: Any) -> Iterator[Any]:
    """The members of a union, unions within it taken apart; otherwise the annotation itself."""
    if isinstance(annotation, TypeVar):
        yield from _options(annotation.__bound__)
    elif type(annotation).__name__ in ("UnionType", "_UnionGenericAlias", "Union"):
        for option in get_args(annotation):
            yield from _options(option)
    else:
        yield annotation


def _is_array(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, AbstractArray)


def _axes(annotation: Any) -> list[str]:
    arrays = [option for option in _options(annotation) if _is_array(option)]
    return [axis.lstrip("*") for array in arrays for axis in array.dim_str.split()]


def _expected(annotation: Any) -> str:
    words = [word for option in _options(annotation) for word in _words(option)]
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


_WORDS: dict[Any, str] = {
    NoneType: "None",
    SupportsIndex: "a whole number",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    PathLike: "a path",
    Iterable: "a list",
    Sequence: "a list",
    Callable: "a function",
    Module: "an equinox.Module",
}


def _words(option: Any) -> list[str]:
    """One kind of argument as an error calls it."""
    if _is_array(option):
        # As `described` writes what came: the dtype, then the axes.
        kind = option.__name__.partition("[")[0]
        shown = f"{kind}[{option.dim_str}]"
        return ["a key such as jax.random.key(0)" if kind == "Key" else shown]
    origin = get_origin(option)
    if origin is Literal:
        return list(map(repr, get_args(option)))
    kind = option if origin is None else origin
    name = getattr(kind, "__name__", str(kind))
    return [_WORDS.get(kind) or with_article(name)]
