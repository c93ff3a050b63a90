"""LoRA and DoRA adapters of an einsum, and the axes of their two factors."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._kernels import (
    activation_axes,
    contract,
    contract_experts,
    result_axes,
    weight_axes,
)
from equigemma._typing import Array, Float, Int
from equigemma.nn import AbstractEinsum, AbstractExpertEinsum, Einsum, by_expert, one_expert


class LoRAEinsum(AbstractExpertEinsum):
    """`base(x) + scale · up(down(x))`, the two small maps of one rank.

    The rank is the axis r of the equations. Parts that are stored in one weight (axis C: keys and
    values, gate and up) have an adapter each, so that files of other libraries, which store them
    apart, hold the same thing; so have experts.

    **Source:** Hu et al. 2021, arXiv:2106.09685.
    """

    base: AbstractEinsum
    down: Float[Array, "..."]
    up: Float[Array, "..."]
    scale: float = eqx.field(static=True)
    eqn: str = eqx.field(static=True)  # that of the base

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.base(x) + self.scale * _low_rank(self.eqn, x, self.down, self.up)

    def by_expert(
        self, x: Float[Array, "rows ..."], expert: Int[Array, " rows"]
    ) -> Float[Array, "rows ..."]:
        of_base = by_expert(self.base, x, expert)
        return of_base + self.scale * _low_rank_of(self.eqn, x, self.down, self.up, expert)


class DoRAEinsum(AbstractEinsum):
    """Like `LoRAEinsum`, with length and direction of each output's weights learned apart.

    The length of the adapted weights is taken as a constant by gradients, as the paper proposes.

    **Source:** Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.
    """

    base: AbstractEinsum
    down: Float[Array, "..."]
    up: Float[Array, "..."]
    magnitude: Float[Array, "..."]
    scale: float = eqx.field(static=True)
    eqn: str = eqx.field(static=True)  # that of the base

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        adapted = self.base(x) + self.scale * _low_rank(self.eqn, x, self.down, self.up)
        weight = dense(self.base, sizes(self)) + self.scale * product(self.eqn, self.down, self.up)
        length = jax.lax.stop_gradient(lengths(self.eqn, weight))
        longer = (self.magnitude / length).astype(adapted.dtype)
        return adapted * jnp.broadcast_to(longer, adapted.shape)


Adapter = LoRAEinsum | DoRAEinsum


def sizes(einsum: AbstractEinsum) -> dict[str, int]:
    """How long each axis of a weight is.

    **Raises:** `ValueError` if the einsum does not tell, as one of a prepared model.
    """
    match einsum:
        case Einsum():
            return dict(zip(weight_axes(einsum.eqn), einsum.weight.shape, strict=True))
        case LoRAEinsum() | DoRAEinsum():
            down, up = factor_axes(einsum.eqn)
            both = (*zip(down, einsum.down.shape, strict=True),)
            both += (*zip(up, einsum.up.shape, strict=True),)
            return {axis: size for axis, size in both if axis != "r"}
    raise ValueError(
        f"`{type(einsum).__name__}` does not tell the axes of its weight. Add adapters to the "
        f"plain model; `prepare` and `quantize.int8` leave them alone afterwards."
    )


def dense(einsum: AbstractEinsum, sizes: dict[str, int]) -> Float[Array, "..."]:
    """The weight that an einsum applies, along the axes of its equation, in float32."""
    if isinstance(einsum, Einsum):
        return einsum.weight.astype(jnp.float32)
    # However it is stored, this is what it makes of the identity.
    inputs, outputs = activation_axes(einsum.eqn), result_axes(einsum.eqn)
    shape = [sizes[axis] for axis in inputs]
    rows = einsum(jnp.eye(math.prod(shape), dtype=jnp.float32).reshape(-1, *shape))
    rows = rows.reshape(*shape, *(sizes[axis] for axis in outputs))
    return jnp.einsum(f"{inputs}{outputs}->{weight_axes(einsum.eqn)}", rows)


def product(eqn: str, down: Float[Array, "..."], up: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weight that two factors make together, in float32.

    **Arguments:**

    - `eqn`: the equation of the einsum, such as `"...D,NDH->...NH"`.
    - `down`: the factor that reads, `A` in the paper.
    - `up`: the factor that writes, `B` in the paper.

    **Returns:** an array with the axes of the weight in `eqn`, without the scale of the adapter.
    """
    down_axes, up_axes = factor_axes(eqn)
    return jnp.einsum(
        f"{down_axes},{up_axes}->{weight_axes(eqn)}",
        down.astype(jnp.float32),
        up.astype(jnp.float32),
        precision="highest",
    )


def factor_axes(eqn: str) -> tuple[str, str]:
    """`"...D,CKDH->...CKH"` gives `"CDr"` and `"CrKH"`: a part's factors are its own.

    So are an expert's: `"...ED,ECFD->...ECF"` gives `"ECDr"` and `"ECrF"`.
    """
    inputs, outputs = activation_axes(eqn), result_axes(eqn)
    experts = "".join(axis for axis in inputs if axis in outputs)
    parts = experts + "C" * ("C" in outputs)
    rest_in, rest_out = (
        "".join(axis for axis in axes if axis not in parts) for axes in (inputs, outputs)
    )
    return f"{parts}{rest_in}r", f"{parts}r{rest_out}"


def lengths(eqn: str, weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """The Euclidean length of the weights of each output."""
    squares = jnp.einsum(f"{weight_axes(eqn)}->{result_axes(eqn)}", jnp.square(weight))
    return jnp.sqrt(squares)


def _low_rank(eqn: str, x: Array, down: Array, up: Array) -> Array:
    inputs, outputs = activation_axes(eqn), result_axes(eqn)
    down_axes, up_axes = factor_axes(eqn)
    inner = down_axes.translate({ord(axis): None for axis in inputs if axis not in outputs})
    low = contract(f"...{inputs},{down_axes}->...{inner}", x, down)
    if "C" not in inner:
        return contract(f"...{inner},{up_axes}->...{outputs}", low, up)
    # One product for each part: on CPU there is none for all parts of bfloat16 at once.
    part, part_up, part_out = (axes.replace("C", "") for axes in (inner, up_axes, outputs))
    lows = jnp.moveaxis(low, inner.index("C") - len(inner), 0)
    ups = jnp.moveaxis(up, up_axes.index("C"), 0)
    products = [
        contract(f"...{part},{part_up}->...{part_out}", *both)
        for both in zip(lows, ups, strict=True)
    ]
    return jnp.stack(products, axis=outputs.index("C") - len(outputs))


def _low_rank_of(eqn: str, x: Array, down: Array, up: Array, expert: Array) -> Array:
    """`_low_rank` of each row with the factors of its expert, which are in front."""
    eqn = one_expert(eqn)
    inputs, (down_axes, up_axes) = activation_axes(eqn), factor_axes(eqn)
    inner = down_axes.translate({ord(axis): None for axis in inputs})
    low = contract_experts(f"...{inputs},{down_axes}->...{inner}", x, down, expert)
    outputs = up_axes.replace("C", "").replace("r", "")
    of_part = f"...r,r{outputs}->...{outputs}"
    if "C" not in inner:
        return contract_experts(of_part, low, up, expert)
    parts = range(low.shape[1])
    products = [contract_experts(of_part, low[:, part], up[:, part], expert) for part in parts]
    return jnp.stack(products, axis=1)
