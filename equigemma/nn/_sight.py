"""A mask that is not there yet: what it is computed from, whole or part by part.

Who may look at whom is decided in `_mask.py`, where keys are in `_cache.py`.
"""

from typing import Literal

import equinox as eqx

from equigemma._kernels import Part, cut
from equigemma._typing import Array, Bool, Int
from equigemma.nn._cache import Order
from equigemma.nn._mask import sliding, visible


class Sight(eqx.Module):
    """Which keys each query of one layer may look at: what a mask is computed from.

    `given` replaces the causal rule; `block_end` is as in `visible`. Queries and keys of different
    texts, if they are told apart, do not see each other.
    """

    q_pos: Int[Array, "*B L"]
    k_pos: Int[Array, "*B S"]
    window: int | None = eqx.field(static=True)
    visibility: Literal["causal", "causal_or_same_block", "all"] = eqx.field(
        static=True, default="causal"
    )
    given: Bool[Array, "*B L S"] | None = None
    block_end: Int[Array, "*B L"] | None = None
    texts: tuple[Int[Array, "*B L"], Int[Array, "*B S"]] | None = None
    order: Order | None = eqx.field(static=True, default=None)

    def mask(self) -> Bool[Array, "*B L S"]:
        """All of it."""
        if self.given is None:
            mask = visible(self.q_pos, self.k_pos, self.window, self.visibility, self.block_end)
        elif self.window is None:
            mask = self.given
        else:
            mask = self.given & sliding(self.q_pos, self.k_pos, self.window)
        if self.texts is not None:
            ours, theirs = self.texts
            mask = mask & (ours[..., :, None] == theirs[..., None, :])
        return mask

    def part(self, queries: Part | None = None, keys: Part | None = None) -> "Sight":
        """That of a run of queries and one of keys. None: all of them."""
        given, texts = self.given, self.texts
        if given is not None:
            given = cut(cut(given, queries, -2), keys, -1)
        if texts is not None:
            texts = cut(texts[0], queries, -1), cut(texts[1], keys, -1)
        block_end = self.block_end
        return Sight(
            q_pos=cut(self.q_pos, queries, -1),
            k_pos=cut(self.k_pos, keys, -1),
            window=self.window,
            visibility=self.visibility,
            given=given,
            block_end=None if block_end is None else cut(block_end, queries, -1),
            texts=texts,
        )
