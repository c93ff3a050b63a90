"""Formulations of hot operations: arrays in, arrays out.

Each has the mathematics of the one-line `jnp` reference in its docstring, and could be replaced by
it without changing a result beyond rounding. No other module knows which formulation runs.
"""

from equigemma._kernels._argmax import argmax as argmax
from equigemma._kernels._attention import MASK_VALUE as MASK_VALUE
from equigemma._kernels._attention import attention as attention
from equigemma._kernels._auto_axes import explicit_mesh as explicit_mesh
from equigemma._kernels._auto_axes import on_auto_axes as on_auto_axes
from equigemma._kernels._auto_axes import spec_of as spec_of
from equigemma._kernels._auto_axes import split_batch as split_batch
from equigemma._kernels._barrier import barrier_on_cpu as barrier_on_cpu
from equigemma._kernels._barrier import computed_apart as computed_apart
from equigemma._kernels._barrier import not_hoisted as not_hoisted
from equigemma._kernels._blockwise import Part as Part
from equigemma._kernels._blockwise import blockwise_attention as blockwise_attention
from equigemma._kernels._blockwise import cut as cut
from equigemma._kernels._contract import contract as contract
from equigemma._kernels._contract import summed_products as summed_products
from equigemma._kernels._dense_experts import contract_experts as contract_experts
from equigemma._kernels._each_head import each_head as each_head
from equigemma._kernels._equation import activation_axes as activation_axes
from equigemma._kernels._equation import result_axes as result_axes
from equigemma._kernels._equation import weight_axes as weight_axes
from equigemma._kernels._expert_blocks import each_block as each_block
from equigemma._kernels._experts import few_rows as few_rows
from equigemma._kernels._experts import read_in_place as read_in_place
from equigemma._kernels._forms import LONGEST_ROW as LONGEST_ROW
from equigemma._kernels._geglu import geglu as geglu
from equigemma._kernels._grouped import GroupedProduct as GroupedProduct
from equigemma._kernels._grouped import widened_groups as widened_groups
from equigemma._kernels._grouped_experts import GroupedExperts as GroupedExperts
from equigemma._kernels._is_finite import is_finite as is_finite
from equigemma._kernels._linear_map import linear_map as linear_map
from equigemma._kernels._linear_map import tangent_or_none as tangent_or_none
from equigemma._kernels._precision import wide_dtype as wide_dtype
from equigemma._kernels._precision import widened as widened
from equigemma._kernels._remat import rematerialized as rematerialized
from equigemma._kernels._sin_cos import sin_cos as sin_cos
from equigemma._kernels._slot_update import update_slot as update_slot
from equigemma._kernels._squares import sum_of_squares as sum_of_squares
from equigemma._kernels._threshold import smallest_of_best as smallest_of_best
from equigemma._kernels._threshold import threshold_of as threshold_of
from equigemma._kernels._update_in_place import Update as Update
from equigemma._kernels._update_in_place import in_place as in_place
from equigemma._kernels._while_loop import while_loop as while_loop
