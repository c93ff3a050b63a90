"""Traversal of a model's einsums, embeddings and adapters."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax

from equigemma._arguments import described
from equigemma.lora._adapters import Adapter, DoRAEinsum, LoRAEinsum, product
from equigemma.lora._embedding import LoRAEmbedding
from equigemma.nn import AbstractEinsum, AbstractEmbedding, Einsum, Embedding, Transformer


Part = AbstractEinsum | AbstractEmbedding
"""What can have an adapter."""

EMBEDDING, HEAD = "embedding", "lm_head"


def einsums(model: Any) -> list[tuple[str, AbstractEinsum]]:
    """Path and value of every einsum of a model, outermost where they are nested.

    **Arguments:** `model`: a model, or any tree with einsums.

    **Returns:** pairs of a path, such as `layers.0.attention.output`, and the einsum there.
    """
    return [(path, part) for path, part in parts(model) if isinstance(part, AbstractEinsum)]


def parts(model: Any) -> list[tuple[str, Part]]:
    """The same of every einsum and every embedding.

    An output projection that is tied is the embedding once more, under its own name: an adapter
    there changes logits alone.
    """
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_part)
    whole = [(_name(path), part) for path, part in found if _is_part(part)]
    models = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_model)
    tied = [
        (_beside(_name(path), HEAD), part.embedding)
        for path, part in models
        if _is_model(part) and part.lm_head is None and _is_part(part.embedding)
    ]
    return whole + tied


def adapters(model: Any) -> dict[str, Adapter | LoRAEmbedding]:
    """Path and value of every adapter, the outermost where they are nested.

    One of logits alone is under the name of the output projection, also where that is tied.

    **Arguments:** `model`: a model, or any tree with adapters.

    **Returns:** adapters by path, such as `layers.0.attention.output`.
    """
    found: dict[str, Adapter | LoRAEmbedding] = {}
    for path, part in parts(model):
        if isinstance(part, Adapter):
            found[path] = part
        for layer in layers(part):
            if _is_at(layer, path):
                found.setdefault(path, layer)
    return found


def layers(part: Part) -> Iterator[LoRAEmbedding]:
    """The adapters of an embedding, the outermost first."""
    while isinstance(part, LoRAEmbedding):
        yield part
        part = part.base


def _is_at(layer: LoRAEmbedding, path: str) -> bool:
    """Whether an adapter is what the name of an embedding, or of an output projection, means."""
    return (layer.use == "decode") == (path.rpartition(".")[2] == HEAD)


def replace(model: Any, new: Callable[[str, AbstractEinsum], AbstractEinsum]) -> Any:
    """The model with every einsum replaced by `new(path, einsum)`.

    **Arguments:**

    - `model`: a model, or any tree with einsums.
    - `new`: told the path, such as `layers.0.attention.output`, and the einsum there.

    **Returns:** a tree of the same class, all else shared.
    """

    def at(path: Any, part: Any) -> Any:
        return new(_name(path), part) if isinstance(part, AbstractEinsum) else part

    return jax.tree_util.tree_map_with_path(
        at, model, is_leaf=lambda part: isinstance(part, AbstractEinsum)
    )


def replace_embeddings(
    model: Any, new: Callable[[str, AbstractEmbedding], AbstractEmbedding]
) -> Any:
    """The model with every embedding replaced by `new(path, embedding)`."""

    def at(path: Any, part: Any) -> Any:
        return new(_name(path), part) if isinstance(part, AbstractEmbedding) else part

    return jax.tree_util.tree_map_with_path(
        at, model, is_leaf=lambda part: isinstance(part, AbstractEmbedding)
    )


def trainable(model: Any) -> Any:
    """A tree of booleans, true at the arrays of adapters: for `eqx.partition` and `train.init`.

    **Arguments:** `model`: one with adapters.

    **Returns:** a tree of the structure of `model`, with True or False for each leaf.
    """

    def mark(part: Any) -> Any:
        if not _is_adapter(part):
            return False
        inner = jax.tree.map(lambda _: True, part)
        return eqx.tree_at(lambda adapter: adapter.base, inner, trainable(part.base))

    return jax.tree.map(mark, model, is_leaf=_is_adapter)


def split(model: Any) -> tuple[Any, Any]:
    """Adapters, and everything else: two halves for `eqx.combine`.

    **Arguments:** `model`: one with adapters.

    **Returns:** two trees of the structure of `model`: the arrays of adapters, and all other
    leaves; None stands for what is in the other one.
    """
    return eqx.partition(model, trainable(model))


def remove(model: Any) -> Any:
    """The model without its adapters, as it was before `add`.

    **Arguments:** `model`: one with adapters, which are not merged.

    **Returns:** the model without them; weights are shared.
    """

    def bare(path: str, part: Any) -> Any:
        return bare(path, part.base) if _is_adapter(part) else part

    return replace_embeddings(replace(model, bare), bare)


def transfer(adapted: Any, model: Any) -> Any:
    """`model` with the adapters of `adapted` around its own einsums and embeddings.

    So adapters that were learned over 8-bit weights get back to the full ones.

    **Arguments:**

    - `adapted`: a model with adapters.
    - `model`: one with parts of the same shapes at the same paths, so not a prepared one for
      adapters of a plain one.

    **Returns:** `model`, with the adapters of `adapted`.

    **Raises:** `ValueError` naming places of adapters that `model` does not have, or where its
    weights have other shapes; also if `adapted` has none.
    """
    found = adapters(adapted)
    if not found:
        raise ValueError(f"`adapted` has no adapters, got {described(adapted)}.")
    return put(found, model)


def put(found: Mapping[str, Adapter | LoRAEmbedding], model: Any) -> Any:
    """`model` with these adapters around what is at their paths."""
    if missing := sorted(found.keys() - dict(parts(model)).keys()):
        raise ValueError(
            f"There are adapters for {', '.join(missing[:3])}, which the model does not have; it "
            f"is of another kind, or `prepare` has joined its projections."
        )
    for path, part in parts(model):
        ours, theirs = (_shape(one) for one in (part, found.get(path)))
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"{path}: the adapter is of a weight of shape {list(theirs or ())}, and the model "
                f"has one of {list(ours or ())}."
            )
    # Adapters over adapters come along whole, the innermost first.
    for depth in range(max((len(_nested(part, path)) for path, part in found.items()), default=0)):
        layer = {path: _nested(part, path)[depth:] for path, part in found.items()}
        model = around({path: some[0] for path, some in layer.items() if some}, model)
    return model


def _shape(part: Any) -> tuple[int, ...] | None:
    """The shape of a dense weight, or of that which an adapter changes; None for others."""
    if isinstance(part, LoRAEmbedding):
        return part.up.shape[0], part.down.shape[-1]
    if isinstance(part, Adapter):
        return jax.eval_shape(partial(product, part.eqn), part.down, part.up).shape
    return part.weight.shape if isinstance(part, Einsum | Embedding) else None


def around(layer: Mapping[str, Adapter | LoRAEmbedding], model: Any) -> Any:
    """`model` with one more adapter around what is at each path; what these are around is let go.

    Of a tied embedding, the one for logits goes inside.
    """

    def wrapped(path: str, part: Any) -> Any:
        return dataclasses.replace(layer[path], base=part) if path in layer else part

    tied = {path for path in layer if _is_tied(path, model)}

    def wrapped_embedding(path: str, part: AbstractEmbedding) -> AbstractEmbedding:
        head = _beside(path.rpartition(".")[0], HEAD)
        return wrapped(path, wrapped(head, part) if head in tied else part)

    return replace_embeddings(replace(model, wrapped), wrapped_embedding)


def _nested(part: Any, path: str) -> list[Any]:
    """The adapters at a path, the innermost first."""
    if isinstance(part, LoRAEmbedding):
        return [layer for layer in layers(part) if _is_at(layer, path)][::-1]
    return [*_nested(part.base, path), part] if isinstance(part, Adapter) else []


def _is_tied(path: str, model: Any) -> bool:
    """Whether there is no array at the path of an output projection: the embedding stands in."""
    above, _, name = path.rpartition(".")
    models = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_model)
    return name == HEAD and any(
        _is_model(part) and part.lm_head is None and _name(where) == above for where, part in models
    )


def _beside(above: str, name: str) -> str:
    return f"{above}.{name}" if above else name


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_part(part: Any) -> bool:
    return isinstance(part, AbstractEinsum | AbstractEmbedding)


def _is_model(part: Any) -> bool:
    return isinstance(part, Transformer)


def _is_adapter(part: Any) -> bool:
    return isinstance(part, LoRAEinsum | DoRAEinsum | LoRAEmbedding)
