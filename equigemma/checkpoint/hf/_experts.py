"""Experts that a folder stores one by one, as the tensors of all of them that releases now have.

`experts.3.down_proj.weight` is `[D, F]`, and `experts.down_proj` `[E, D, F]`; gate and up
projection, apart or as one, are `experts.gate_up_proj` `[E, 2F, D]`.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._safetensors import Tensor


_ONE = re.compile(
    r"(?P<front>.*\.experts)\.(?P<index>[0-9]{1,6})\."
    r"(?P<part>gate_proj|up_proj|gate_up_proj|down_proj)(?:\.weight)?"
)
_WHOLE = {
    "gate_up_proj": (("gate_up_proj",), ("gate_proj", "up_proj")),
    "down_proj": (("down_proj",),),
}
"""What a tensor of all experts is made of, in one way or another."""


def join_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those of single experts joined.

    **Raises:** `CheckpointError` if one is missing, or unlike the others.
    """
    rest: dict[str, Tensor] = {}
    found: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if match := _ONE.fullmatch(name):
            found[match["front"]][match["part"]][int(match["index"])] = tensor
        else:
            rest[name] = tensor
    for front, parts in found.items():
        for name, ways in _WHOLE.items():
            way = next((way for way in ways if any(part in parts for part in way)), None)
            if way is not None:
                rest[f"{front}.{name}"] = _joined(f"{front}.{name}", way, parts)
    return rest


def _joined(name: str, way: tuple[str, ...], parts: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
    front = name.rpartition(".")[0]
    count = 1 + max(max(some) for some in parts.values())
    tensors = []
    for index in range(count):
        for part in way:
            tensor = parts.get(part, {}).get(index)
            if tensor is None:
                raise CheckpointError(f"it has no {front}.{index}.{part}, and others like it.")
            tensors.append(tensor)
    first = tensors[0]
    for tensor in tensors:
        if len(tensor.shape) != 2 or (tensor.shape, tensor.kind) != (first.shape, first.kind):
            raise CheckpointError(
                f"{tensor.name} is {tensor.kind} of shape {list(tensor.shape)}, and {first.name} "
                f"{first.kind} of shape {list(first.shape)}; experts are all alike."
            )
    rows, columns = first.shape
    shape = (count, len(way) * rows, columns)
    return Tensor(first.file, name, shape, first.kind, tuple(tensors))
