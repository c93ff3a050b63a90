"""Descriptions of tools, which may be functions of Python: then their types and docstring say it.

**Source:** transformers `utils/chat_template_utils.py::get_json_schema`, whose rules these are.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


_TYPES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    NoneType: "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_SECTIONS = ("Args:", "Returns:", "Raises:")
_ARGUMENT = re.compile(r"\s*(\w+)(?:\s*\([^()]*\))?:\s*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(tool: Mapping[str, Any] | Callable[..., Any]) -> Mapping[str, Any]:
    """The description of a tool as OpenAI's interface has it: `{"type": "function", ...}`.

    ```python
    >>> from equigemma.chat import tool_schema
    >>> def look(place: str, closely: bool = False) -> str:
    ...     '''Says what is to be seen.
    ...
    ...     Args:
    ...         place: Where to look.
    ...         closely: Whether to take the time.
    ...     '''
    >>> tool_schema(look)["function"]["parameters"]["required"]
    ['place']

    ```

    **Arguments:** `tool`: such a description, which is given back, or a function with a type for
    each argument and a docstring in Google's style that describes each of them.

    **Returns:** such a description, with the types of arguments as JSON Schema.

    **Raises:** `ValueError` for anything else.
    """
    if isinstance(tool, Mapping):
        return tool
    if not inspect.isfunction(tool) and not inspect.ismethod(tool):
        raise ValueError(
            "A tool is a function with types and a docstring, or a description such as "
            f'{{"type": "function", "function": {{"name": ...}}}}, got {tool!r:.60}.'
        )
    name = tool.__name__
    docstring = inspect.getdoc(tool)
    if not docstring:
        raise ValueError(f"The function {name} has no docstring, which would say what it does.")
    description, described, returned = _sections(docstring)
    types, defaults = _arguments(tool, name)
    properties: dict[str, Any] = {}
    for argument, hint in types.items():
        if argument not in described:
            raise ValueError(
                f"The docstring of {name} does not describe the argument {argument}: add it to the "
                "section Args."
            )
        properties[argument] = _with_choices(
            _type(hint, f"{name}({argument})"), described[argument]
        )
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [argument for argument in types if argument not in defaults]:
        parameters["required"] = required
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function | _return(tool, returned)}


def _arguments(tool: Callable[..., Any], name: str) -> tuple[dict[str, Any], set[str]]:
    """The types of a function's arguments, and which of them have a default."""
    hints = get_type_hints(tool)
    types, defaults = {}, set()
    for place, (argument, entry) in enumerate(inspect.signature(tool).parameters.items()):
        if entry.annotation is entry.empty:
            if place == 0 and argument in ("self", "cls"):
                continue
            raise ValueError(f"The argument {argument} of {name} has no type.")
        types[argument] = hints[argument]
        if entry.default is not entry.empty:
            defaults.add(argument)
    return types, defaults


def _return(tool: Callable[..., Any], returned: str | None) -> dict[str, Any]:
    """What the function returns. The model never writes that: a type may be beyond JSON."""
    hints = get_type_hints(tool)
    if "return" not in hints:
        return {}
    try:
        schema = _type(hints["return"], "")
    except ValueError:
        return {}
    return {"return": schema | ({} if returned is None else {"description": returned})}


def _type(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type."""
    kind, args = get_origin(hint), get_args(hint)
    if kind is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _enumeration([member.value for member in hint], where)
    if hint is Any:
        return {}
    if kind is None and isinstance(hint, type) and hint in _TYPES:
        return {"type": _TYPES[hint]}
    if kind is Literal:
        return _enumeration(list(args), where)
    if kind in (Union, UnionType):
        return _union(args, where)
    if kind is list:
        return {"type": "array", "items": _type(args[0], where)}
    if kind is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_type(arg, where) for arg in args]}
    if kind is dict and len(args) == 2:
        return {"type": "object", "additionalProperties": _type(args[1], where)}
    raise ValueError(
        f"The type {hint!r} of {where} has no form in JSON that is known: take int, float, str, "
        "bool, list, dict, Literal, an Enum or a union of these, or describe the tool yourself."
    )


def _union(args: Sequence[Any], where: str) -> dict[str, Any]:
    kinds = [_type(arg, where) for arg in args if arg is not NoneType]
    if len(kinds) == 1:
        schema = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": kinds}
    return schema | ({"nullable": True} if NoneType in args else {})


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    scalars = (int, float, str, bool, NoneType)
    if not values or any(type(value) not in scalars for value in values):
        raise ValueError(f"The choices of {where} must be numbers, texts, booleans or None.")
    names = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _with_choices(schema: dict[str, Any], description: str) -> dict[str, Any]:
    """With the description, which may end in `(choices: ["a", "b"])`."""
    if found := _CHOICES.search(description):
        schema = schema | {"enum": [_stripped(choice) for choice in json.loads(found[1])]}
        description = description[: found.start()].strip()
    return schema | {"description": description}


def _stripped(choice: Any) -> Any:
    return choice.strip() if isinstance(choice, str) else choice


def _sections(docstring: str) -> tuple[str, dict[str, str], str | None]:
    """What a docstring says in general, of each argument, and of what is returned."""
    parts: dict[str, list[str]] = {"": []}
    section = ""
    for line in docstring.strip().splitlines():
        if line.strip() in _SECTIONS and line.strip() not in parts:
            section = line.strip()
            parts[section] = []
        else:
            parts[section].append(line)
    returned = "\n".join(parts["Returns:"]).strip() if "Returns:" in parts else None
    return "\n".join(parts[""]).strip(), _described(parts.get("Args:", [])), returned


def _described(lines: Sequence[str]) -> dict[str, str]:
    """The descriptions of arguments: what is indented deeper than its name goes on with it."""
    described: dict[str, list[str]] = {}
    name, depth = "", 0
    for line in filter(str.strip, lines):
        found, indent = _ARGUMENT.match(line), len(line) - len(line.lstrip())
        if found and (not name or indent <= depth):
            name, depth = found[1], indent
            described[name] = [found[2].strip()]
        elif name:
            described[name].append(line.strip())
    return {name: " ".join(parts).strip() for name, parts in described.items()}
