"""Values of our modules' calls in the form in which DeepMind's modules return them.

Each function gets a call, and the last call of a module within, where the place names one.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp

from equigemma import nn
from equigemma.config import NormConfig
from equigemma.interpret import Call
from equigemma.linen._cache import layer_to_dict


Value = Callable[[Call, Call | None], Any]


def result(call: Call, inner: Call | None) -> Any:
    """The result as it is."""
    del inner
    return call.result


def of_input(call: Call, inner: Call | None) -> Any:
    """The first argument as it is: the result of what DeepMind's model does before."""
    del inner
    return call.args[0]


def as_input(call: Call, inner: Call | None) -> Any:
    """The result in the dtype of the first argument, where ours is float32."""
    del inner
    return call.result.astype(call.args[0].dtype)


def within(call: Call, inner: Call | None) -> Any:
    """The result of the module within, in the dtype of what the outer one was given."""
    assert inner is not None
    return inner.result.astype(call.args[0].dtype)


def parts_first(call: Call, inner: Call | None) -> Any:
    """Keys and values, or queries too, on the first axis."""
    del inner
    return jnp.moveaxis(call.result, -3, 0)


def as_list(call: Call, inner: Call | None) -> Any:
    """Parallel streams one by one."""
    del inner
    return list(call.result)


def with_cache(call: Call, inner: Call | None) -> Any:
    """The cache of a layer and its result; no cache without one."""
    del inner
    output, cache = call.result
    return layer_to_dict(cache), output


def with_keys(call: Call, inner: Call | None) -> Any:
    """The cache of a layer and its result; without a cache, the keys and values of this call."""
    output, cache = call.result
    # A layer that attends to the keys of another returns no cache, it was given that one's.
    held = layer_to_dict(call.args[3] if cache is None else cache)
    if held is None:
        assert inner is not None
        k, v = (jnp.swapaxes(array, -3, -2) for array in inner.args[1:3])
        held = {"k": k, "v": v}
    return held, output


def with_keys_and_streams(call: Call, inner: Call | None) -> Any:
    """As `with_keys`, with parallel streams one by one."""
    held, streams = with_keys(call, inner)
    return held, list(streams)


def attention_weights(call: Call, inner: Call | None) -> Any:
    """The weights that queries give to keys, `[*B L N S]`."""
    del inner
    # Recomputed from what went in, so that any way of computing attention can be watched.
    q, k, _, mask_spec = call.args
    weights = nn.attention_weights(q, k, mask_spec.mask(), softcap=call.module.softcap)
    heads = weights.reshape(*weights.shape[:-4], -1, *weights.shape[-2:])
    return jnp.swapaxes(heads, -3, -2).astype(q.dtype)


def scaled_projection(call: Call, inner: Call | None) -> Any:
    """The projection of an embedding to those of layers, divided by √D as its weight is there."""
    del inner
    return call.result * jnp.asarray(call.args[0].shape[-1] ** -0.5, call.result.dtype)


def expert_weights(part: str) -> Value:
    """The weight of one projection of all experts: there a module that returns nothing else."""

    def weight(call: Call, inner: Call | None) -> Any:
        del inner
        return jax.tree.leaves(getattr(call.module, part))[0]

    return weight


def unused_kv(call: Call, inner: Call | None) -> Any:
    """Keys and values that DeepMind's model computes for a layer which attends to another's."""
    del inner
    k, v = _unused(call)
    return k if call.module.unused.kv is None else jnp.stack([k, v])


def unused_key_norm(call: Call, inner: Call | None) -> Any:
    """The keys of `unused_kv`, normalised."""
    del inner
    return _norm(call.module.config.qk_norm, call.module.unused.key_norm, _unused(call)[0])


def unused_value_norm(call: Call, inner: Call | None) -> Any:
    """The values of `unused_kv`, normalised."""
    del inner
    return _norm(call.module.config.v_norm, None, _unused(call)[1])


def _unused(call: Call) -> tuple[jax.Array, jax.Array]:
    x, unused = call.args[0], call.module.unused
    if unused.kv is None:
        k = jnp.einsum("...D,KDH->...KH", x, unused.k.astype(x.dtype))
        return k, k
    kv = jnp.einsum("...D,CKDH->...CKH", x, unused.kv.astype(x.dtype))
    return kv[..., 0, :, :], kv[..., 1, :, :]


def _norm(config: NormConfig, scale: jax.Array | None, x: jax.Array) -> jax.Array:
    norm = nn.RMSNorm(x.shape[-1], config, dtype=x.dtype)
    if scale is not None:
        norm = jax.tree.map(lambda _: scale, norm)
    return norm(x)


def one_batch_axis(value: Value, rank: int) -> Value:
    """`value` with all axes but the last `rank` as one, as in DeepMind's vision encoder."""

    def flattened(call: Call, inner: Call | None) -> Any:
        array = value(call, inner)
        return array.reshape(-1, *array.shape[array.ndim - rank :])

    return flattened


def grid(call: Call, inner: Call | None) -> Any:
    """Vectors of patches in rows and columns."""
    del inner
    side = isqrt(call.result.shape[-2])
    return call.result.reshape(-1, side, side, call.result.shape[-1])
