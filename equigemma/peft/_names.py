"""Module names of `transformers`, as PEFT files use them, to paths in a model.

Releases and classes differ in what stands in front of a name; here it is left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from equigemma.checkpoint.core import Assignment, leaf_shapes, plan, skeleton
from equigemma.checkpoint.hf._rules import HEADS, Names, rules
from equigemma.config import ModelConfig
from equigemma.lora import einsums


ROOT = "base_model.model."
TOWER = "vision_tower."
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# In front of the layers of a text model: with a tower for images since transformers 4.52 and
# before it, with a head, and alone.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file is in a model: a part of a leaf."""

    entry: Assignment
    index: int


def bare(name: str) -> str:
    """A name without what only some releases and classes put in front."""
    name = name.removeprefix(ROOT)
    for head in HEADS:
        module = head.removesuffix(".weight")
        if name == module or name.startswith(f"{module}."):
            return HEAD + name.removeprefix(module)
    outer = name.removeprefix("model.")
    if outer.startswith(TOWER):
        return TOWER + outer.removeprefix(TOWER).removeprefix("vision_model.")
    if outer.startswith("multi_modal_projector."):
        return outer
    prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
    return name.removeprefix(prefix)


def full(name: str, config: ModelConfig) -> str:
    """The name as `transformers` has it now, in the class with a head."""
    if name == HEAD or name.startswith(f"{HEAD}."):
        return name
    if name.startswith((TOWER, "multi_modal_projector.")) or config.vision is None:
        return f"model.{name}"
    return f"model.language_model.{name}"


def places(config: ModelConfig) -> dict[str, Place]:
    """Where every tensor is, by its name: `layers.0.self_attn.k_proj.weight`."""
    names = Names("", tower=TOWER, head=f"{HEAD}.weight")
    return {
        key: Place(entry, index)
        for entry in plan(leaf_shapes(skeleton(config)), rules(config, names))
        for index, key in enumerate(entry.keys)
    }


def modules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For each einsum that `transformers` has linear maps for, the names of these."""
    paths = {f"{path}.weight": path for path, _ in einsums(skeleton(config))}
    found: dict[str, tuple[str, ...]] = {}
    for place in places(config).values():
        entry = place.entry
        is_linear = len(entry.key_shape) == 2 and all(k.endswith(".weight") for k in entry.keys)
        if entry.path in paths and is_linear:
            found[paths[entry.path]] = tuple(key.removesuffix(".weight") for key in entry.keys)
    return found


def experts(config: ModelConfig) -> dict[str, str]:
    """For each einsum of a mixture of experts, the parameter that `transformers` has for it."""
    paths = {f"{path}.weight": path for path, _ in einsums(skeleton(config))}
    return {
        paths[place.entry.path]: key
        for key, place in places(config).items()
        if place.entry.path in paths and ".experts." in key
    }


def every_linear(config: ModelConfig) -> Iterator[str]:
    """The linear maps that `transformers` has of a model, those that are not used here too."""
    for names in modules(config).values():
        yield from names
    if config.vision is not None:
        for name in ("attention.out_proj", "mlp.fc1", "mlp.fc2"):
            yield f"{TOWER}head.{name}"
    yield HEAD
