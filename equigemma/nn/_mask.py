"""Who may look at whom, from positions alone. True means: may look.

Each rule is a function `[*B L], [*B S] -> [*B L S]` of absolute positions, where −1 marks an empty
slot; `visible` joins them into the mask of one layer.
"""

from equigemma._typing import Array, Bool, Int, typed


@typed
def valid(k_pos: Int[Array, "*B S"]) -> Bool[Array, "*B 1 S"]:
    """True where a key exists."""
    return (k_pos >= 0)[..., None, :]


@typed
def causal(q_pos: Int[Array, "*B L"], k_pos: Int[Array, "*B S"]) -> Bool[Array, "*B L S"]:
    """True where a key is not ahead of the query."""
    return k_pos[..., None, :] <= q_pos[..., :, None]


@typed
def sliding(
    q_pos: Int[Array, "*B L"], k_pos: Int[Array, "*B S"], window: int
) -> Bool[Array, "*B L S"]:
    """True where query and key are less than `window` apart.

    A query at p sees the keys p − window + 1 … p + window − 1; with `causal` that is `window` keys,
    itself included.

    **Raises:** `ValueError` if `window < 1`.

    **Source:** gemma `gm/nn/_modules.py::create_sliding_mask`, the same inequality.
    """
    if window < 1:
        raise ValueError(f"A sliding window needs at least one key, got window={window}.")
    return abs(q_pos[..., :, None] - k_pos[..., None, :]) < window


@typed
def visible(
    q_pos: Int[Array, "*B L"], k_pos: Int[Array, "*B S"], window: int | None
) -> Bool[Array, "*B L S"]:
    """The mask of a causal layer: valid, not ahead, and inside the window if there is one."""
    mask = valid(k_pos) & causal(q_pos, k_pos)
    return mask if window is None else mask & sliding(q_pos, k_pos, window)
