"""GGUF files in several parts, as `llama-gguf-split` cuts them.

The first has all values, and each has some of the tensors. Their names end in `-00001-of-00003` and
so on; the others are found by the name of the first.

**Source:** llama.cpp `src/llama-model-loader.cpp`, `llama_split_path`.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError, about
from equigemma.checkpoint.gguf._container import GGUFFile


_PART = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.IGNORECASE)


def open_file(path: Path) -> GGUFFile:
    """The header of a file and, if it is the first of several parts, those of all.

    **Raises:** `CheckpointError` if it is another part, or if one is missing or another file's.
    """
    file = GGUFFile.open(path)
    with about(path):
        count, number = (_whole(file, key, 1) for key in ("split.count", "split.no"))
        if count == 1:
            return file
        names = part_names(path.name)
        if len(names) != count:
            raise CheckpointError(
                f"it is one part of several; join them with llama-gguf-split --merge, or give them "
                f"names that end in -00001-of-{count:05}.gguf."
            )
        if number != 0:
            raise CheckpointError(f"it is one part of several; load the first, {names[0]}.")
        tensors = dict(file.tensors)
        for index, name in enumerate(names[1:], 1):
            for key, tensor in _part(path.with_name(name), index, count).tensors.items():
                if key in tensors:
                    raise CheckpointError(f"the tensor {key} is in two of its parts.")
                tensors[key] = tensor
        total = _whole(file, "split.tensors.count", len(tensors))
        if total != len(tensors):
            raise CheckpointError(
                f"its parts should have {total} tensors, they have {len(tensors)}."
            )
    return replace(file, tensors=tensors)


def part_names(name: str) -> list[str]:
    """The names of all parts of a file of this name; that name alone if it is no part."""
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['name']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def is_later_part(name: str) -> bool:
    """Whether a name is that of a part which is not the first."""
    match = _PART.fullmatch(name)
    return match is not None and int(match["number"]) > 1


def whole_name(name: str) -> str:
    """The name of a file without what parts have at the end."""
    match = _PART.fullmatch(name)
    return name if match is None else f"{match['name']}.gguf"


def _part(path: Path, number: int, count: int) -> GGUFFile:
    if not path.is_file():
        raise CheckpointError(f"it is the first of {count} parts, and {path.name} is missing.")
    part = GGUFFile.open(path)
    told = _whole(part, "split.no", None), _whole(part, "split.count", None)
    if told != (number, count):
        raise CheckpointError(
            f"{path.name} says that it is part {told[0]} of {told[1]}, not {number} of {count} as "
            "its name does, counted from 0."
        )
    return part


def _whole(file: GGUFFile, key: str, otherwise: Any) -> Any:
    value = file.metadata.get(key, otherwise if key != "split.no" else 0)
    if type(value) is not int or not 0 <= value < 100_000:
        raise CheckpointError(f"{file.path.name} has the value {value!r:.40} for {key}.")
    return value
