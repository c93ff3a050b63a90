"""Weights that are still in their files: shapes are known, numbers are read when asked for.

Every reader gives a model of such leaves. `load` puts them on a device one by one; `save` takes
them as they are, so that converting a file never needs the whole model in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._trim_malloc import trim_malloc
from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._keymap import Assignment, leaves
from equigemma.nn import Transformer
from equigemma.tokenizers import Tokenizer


Progress = Callable[[int, int, str], None]
"""Called after each weight with the bytes done, those of the whole model, and the weight's path."""

Transform = Callable[[Any], Any]
"""A part of a model to what takes its place, such as `prepare`."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A leaf in its file. `read` gives it in the dtype asked for; `dtype` is the stored one.

    Where `exact`, only that one may be asked for. `blocks`, if the file has such, reads the same
    numbers as rows of integers, one row for each output, and the float16 scales of 32 each. A leaf
    that is in memory as such blocks has the dtype int8; as an array it is float32.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[np.dtype], np.ndarray]
    exact: bool = False
    blocks: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        own = np.dtype(np.float32) if self.dtype == np.int8 and not self.exact else self.dtype
        return self.read(own if dtype is None else np.dtype(dtype))


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers have been read and compared with each other."""

    model: Transformer
    """Its leaves are `Stored`."""
    tokenizer: Callable[[], Tokenizer | None]
    """Reads it, if there is one."""


def stored(
    entry: Assignment,
    dtypes: Iterable[np.dtype],
    read_key: Callable[[str, np.dtype], np.ndarray],
) -> Stored:
    """The leaf of `entry`.

    **Arguments:** `dtypes`: those of the entry's keys in the file. `read_key`: reads one key, in
    the dtype given or in one that it can be rounded to from.
    """

    def read(dtype: np.dtype) -> np.ndarray:
        if entry.is_rename:
            array = read_key(entry.keys[0], dtype)
            if array.dtype == dtype:
                return array
        out = aligned(entry.shape, dtype)
        # An offset is taken off before rounding: a norm close to its offset keeps all its digits.
        wide = np.dtype(np.float32) if entry.rule.offset else dtype
        for key, part in zip(entry.keys, entry.parts(out), strict=True):
            # Numbers too large for the new dtype become infinite, as everywhere in JAX.
            with np.errstate(over="ignore", invalid="ignore"):
                part[...] = entry.part_to_ours(read_key(key, wide))
        return out

    dtype = np.dtype(np.float32) if entry.rule.offset else _common(dtypes)
    return Stored(entry.shape, dtype, read)


def put_on_device(
    model: Transformer,
    dtype: np.dtype,
    sharding: Any,
    progress: Progress | None,
    transform: Transform | None = None,
) -> Transformer:
    """The model with every leaf read in `dtype`, one at a time.

    **Arguments:** `sharding`: where leaves go: a device, a `jax.sharding.Sharding`, or a tree of
    these with the structure of the model or of the top of it; None leaves it to JAX. `transform`:
    applied to each part of the model, such as a layer, before the next is read.
    """
    entries, places = leaves(model), _places(model, sharding)
    dtypes = [leaf.dtype if leaf.exact else dtype for _, leaf in entries]
    total = sum(
        math.prod(leaf.shape) * kind.itemsize
        for (_, leaf), kind in zip(entries, dtypes, strict=True)
    )

    def read_all() -> Iterator[jax.Array]:
        done = 0
        for (path, leaf), kind, place in zip(entries, dtypes, places, strict=True):
            # Waiting here keeps one leaf at a time on its way to the device.
            array = jax.block_until_ready(jax.device_put(leaf.read(kind), place))
            done += array.nbytes
            if progress is not None:
                progress(done, total, path)
            yield array

    # What the tokenizer and the headers left in the heap would lie beside the weights, and what
    # the weights leave, beside the compiler's memory.
    trim_malloc([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in entries])
    arrays = read_all()
    parts, structure = jax.tree.flatten(model, is_leaf=_is_part)
    filled = [_transformed(_filled(part, arrays), transform) for part in parts]
    trim_malloc(filled)
    return jax.tree.unflatten(structure, filled)


def shapes_on_device(
    model: Transformer, dtype: np.dtype, transform: Transform | None = None
) -> Transformer:
    """What `put_on_device` will give, with a `jax.ShapeDtypeStruct` for every array."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if leaf.exact else dtype), model
    )
    if transform is None:
        return shapes
    # Most layers are alike, and tracing takes its time.
    transformed = cache(
        lambda structure, leaves: eqx.filter_eval_shape(
            transform, jax.tree.unflatten(structure, leaves)
        )
    )

    def of_part(part: Any) -> Any:
        leaves, structure = jax.tree.flatten(part)
        return transformed(structure, tuple(leaves))

    return jax.tree.map(of_part, shapes, is_leaf=_is_part)


def _places(model: Transformer, sharding: Any) -> list[Any]:
    if sharding is None:
        return [None] * len(leaves(model))
    try:
        return jax.tree.leaves(jax.tree.broadcast(sharding, model))
    except ValueError as error:
        raise ValueError(
            "sharding must be a device, a jax.sharding.Sharding, or a tree of them with the "
            f"structure of the model. {error}"
        ) from error


def _is_part(node: Any) -> bool:
    return isinstance(node, eqx.Module) and not isinstance(node, Transformer)


def _filled(part: Any, arrays: Iterator[jax.Array]) -> Any:
    return jax.tree.map(lambda _: next(arrays), part)


def _transformed(part: Any, transform: Transform | None) -> Any:
    return part if transform is None else jax.block_until_ready(transform(part))


FLOATS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    jnp.dtype(jnp.bfloat16): "BF16",
}
"""The dtypes that weights are saved in, and what safetensors calls them."""


def float_dtype(path: str, dtype: Any) -> np.dtype:
    """The dtype that the leaf at `path` is saved in.

    **Raises:** `CheckpointError` if no format for others has it.
    """
    if np.dtype(dtype) in FLOATS:
        return np.dtype(dtype)
    raise CheckpointError(
        f"{path} has dtype {np.dtype(dtype).name}; weights are saved as "
        f"{', '.join(kind.name for kind in FLOATS)}. Choose one with dtype=."
    )


def as_numpy(weights: Mapping[str, Any], path: str, dtype: np.dtype) -> np.ndarray:
    """A leaf, in a file or on a device, as an array of `dtype`.

    **Raises:** `CheckpointError` if it holds numbers that the dtype does not reach.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.asarray(weights[path], dtype)
    # Of the dtypes of weights, only float16 has a shorter range than others.
    if dtype == np.float16 and not np.isfinite(array).all():
        raise CheckpointError(f"{path} holds numbers that float16 cannot hold; take bfloat16.")
    return array


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX on CPU takes over without a copy: it starts at a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
