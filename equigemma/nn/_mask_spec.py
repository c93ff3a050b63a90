"""A lazily evaluated attention mask, which can be sliced before it is materialised.

The masks are computed in `_mask.py`.
"""

from typing import Literal

import equinox as eqx

from equigemma._kernels import Part, cut
from equigemma._typing import Array, Bool, Int
from equigemma.nn._cache import KeyLayout
from equigemma.nn._mask import attention_mask, sliding


class MaskSpec(eqx.Module):
    """The attention mask of one layer, before it is materialised.

    `explicit_mask` replaces the causal rule; `block_end` is as in `attention_mask`. Queries and
    keys of different texts, if they are told apart, do not attend to each other.
    """

    q_pos: Int[Array, "*B L"]
    k_pos: Int[Array, "*B S"]
    window: int | None = eqx.field(static=True)
    mask_kind: Literal["causal", "causal_bidirectional_images", "bidirectional"] = eqx.field(
        static=True, default="causal"
    )
    explicit_mask: Bool[Array, "*B L S"] | None = None
    block_end: Int[Array, "*B L"] | None = None
    segment_ids: tuple[Int[Array, "*B L"], Int[Array, "*B S"]] | None = None
    key_layout: KeyLayout | None = eqx.field(static=True, default=None)

    def mask(self) -> Bool[Array, "*B L S"]:
        """The materialised mask."""
        if self.explicit_mask is None:
            mask = attention_mask(
                self.q_pos, self.k_pos, self.window, self.mask_kind, self.block_end
            )
        elif self.window is None:
            mask = self.explicit_mask
        else:
            mask = self.explicit_mask & sliding(self.q_pos, self.k_pos, self.window)
        if self.segment_ids is not None:
            ours, theirs = self.segment_ids
            mask = mask & (ours[..., :, None] == theirs[..., None, :])
        return mask

    def part(self, queries: Part | None = None, keys: Part | None = None) -> "MaskSpec":
        """The mask of a run of queries and a run of keys. None: all of them."""
        explicit_mask, segment_ids = self.explicit_mask, self.segment_ids
        if explicit_mask is not None:
            explicit_mask = cut(cut(explicit_mask, queries, -2), keys, -1)
        if segment_ids is not None:
            segment_ids = cut(segment_ids[0], queries, -1), cut(segment_ids[1], keys, -1)
        block_end = self.block_end
        return MaskSpec(
            q_pos=cut(self.q_pos, queries, -1),
            k_pos=cut(self.k_pos, keys, -1),
            window=self.window,
            mask_kind=self.mask_kind,
            explicit_mask=explicit_mask,
            block_end=None if block_end is None else cut(block_end, queries, -1),
            segment_ids=segment_ids,
        )
