"""Attention masks computed from positions. True: the query attends to the key.

Each rule is a function `[*B L], [*B S] -> [*B L S]` of absolute positions, where −1 marks an empty
slot; `attention_mask` joins them into the mask of one layer.
"""

from typing import Literal

import jax.numpy as jnp

from equigemma._typing import Array, Bool, Int, typed


@typed
def valid(k_pos: Int[Array, "*B S"]) -> Bool[Array, "*B 1 S"]:
    """True where a key exists.

    **Arguments:** `k_pos`: positions of keys, −1 where there is none.

    **Returns:** a mask with one row for all queries.
    """
    return (k_pos >= 0)[..., None, :]


@typed
def causal(q_pos: Int[Array, "*B L"], k_pos: Int[Array, "*B S"]) -> Bool[Array, "*B L S"]:
    """True where a key is not ahead of the query.

    **Arguments:**

    - `q_pos`: positions of queries.
    - `k_pos`: positions of keys.

    **Returns:** a mask; one for keys that do not exist is still to be applied, see `valid`.
    """
    return k_pos[..., None, :] <= q_pos[..., :, None]


@typed
def sliding(
    q_pos: Int[Array, "*B L"], k_pos: Int[Array, "*B S"], window: int
) -> Bool[Array, "*B L S"]:
    """True where query and key are less than `window` apart.

    A query at p sees the keys p − window + 1 … p + window − 1; with `causal` that is `window` keys,
    itself included.

    **Arguments:**

    - `q_pos`: positions of queries.
    - `k_pos`: positions of keys.
    - `window`: how many keys a causal query attends to, its own included.

    **Returns:** a mask, which does not care whether keys exist or lie ahead.

    **Raises:** `ValueError` if `window < 1`.

    **Source:** gemma `gm/nn/_modules.py::create_sliding_mask`, the same inequality.
    """
    if window < 1:
        raise ValueError(f"A sliding window needs at least one key, got window={window}.")
    return abs(q_pos[..., :, None] - k_pos[..., None, :]) < window


@typed
def attention_mask(
    q_pos: Int[Array, "*B L"],
    k_pos: Int[Array, "*B S"],
    window: int | None,
    mask_kind: Literal["causal", "causal_bidirectional_images", "bidirectional"] = "causal",
    block_end: Int[Array, "*B L"] | None = None,
) -> Bool[Array, "*B L S"]:
    """The mask of a layer: valid, inside the window if there is one, and as far ahead as it may.

    **Arguments:**

    - `q_pos`: positions of queries.
    - `k_pos`: positions of keys, −1 where there is none.
    - `window`: of a local layer; None for a global one.
    - `mask_kind`: whether a query attends to what comes after it: not at all, within its image, or
      everywhere.
    - `block_end`: for each query the last position of the image that it is part of, or its own
      position; None where there are no images. What lies between the two is all one image.

    **Returns:** True where a query attends to a key.

    **Source:** gemma `gm/utils/_attention_mask.py`, there by numbers of blocks.
    """
    if mask_kind == "bidirectional":
        mask = jnp.broadcast_to(valid(k_pos), (*q_pos.shape, k_pos.shape[-1]))
    else:
        sees_block = mask_kind == "causal_bidirectional_images"
        end = block_end if sees_block and block_end is not None else q_pos
        mask = valid(k_pos) & causal(end, k_pos)
    return mask if window is None else mask & sliding(q_pos, k_pos, window)
