"""Options that the configs of several kinds of models share: which values, read how."""

from collections.abc import Mapping
from typing import Any

from equigemma.checkpoint.core._errors import CheckpointError
from equigemma.checkpoint.core._fields import Fields, short
from equigemma.checkpoint.hf._without_effect import FIXED
from equigemma.config import RopeConfig


# More layers than any model has, and few enough to describe one by one.
MAX_LAYERS = 10_000
ACTIVATION = "gelu_pytorch_tanh"
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def expect_fixed(read: Fields) -> None:
    for key, allowed in FIXED.items():
        read.expect(key, *allowed)


def read_count(read: Fields) -> int:
    """How many layers there are."""
    count = read.size("num_hidden_layers")
    if count > MAX_LAYERS:
        raise CheckpointError(f"its num_hidden_layers is {count}; no model has so many.")
    return count


def read_layer_types(read: Fields, count: int, period: int) -> list[str]:
    """Which layers are local: those listed, or all but the last of every period."""
    periods = [read.take(key) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    types = read.take("layer_types")
    if types is None:
        period = next((given for given in periods if given is not None), period)
        if type(period) is not int or period < 1:
            raise CheckpointError(
                f"its sliding_window_pattern must be a whole number from 1 up, got {short(period)}."
            )
        return [LOCAL if (index + 1) % period else GLOBAL for index in range(count)]
    if not isinstance(types, list) or len(types) != count:
        raise CheckpointError(f"its layer_types must be a list with an entry for each of {count}.")
    if unknown := [name for name in types if name not in (LOCAL, GLOBAL)]:
        raise CheckpointError(
            f"its layer_types name {short(unknown[0])}; {LOCAL!r} and {GLOBAL!r} are supported."
        )
    return types


def read_ropes(read: Fields) -> dict[str, RopeConfig]:
    """The rotary options of local and global layers, from the older keys, the newer, or both."""
    scaling = read.table("rope_scaling")
    theta = read.number_or_none("rope_theta")
    kinds = Fields(read.table("rope_parameters"), name="rope_parameters.")
    far, near = kinds.table(GLOBAL), kinds.table(LOCAL)
    local_theta = read.number_or_none("rope_local_base_freq")
    ropes = {
        GLOBAL: read_rope(far, f"rope_parameters.{GLOBAL}.", theta, scaling, 1_000_000.0),
        LOCAL: read_rope(near, f"rope_parameters.{LOCAL}.", local_theta, {}, 10_000.0),
    }
    _check_flat(kinds, ropes[GLOBAL])
    return ropes


def _check_flat(kinds: Fields, global_: RopeConfig) -> None:
    """Refuses options for all layers at once, which transformers leaves unread in such a model,
    unless they say what holds for the global layers anyway.
    """
    told = {key: kinds.take(key) for key in ("rope_type", "rope_theta", "factor") if key in kinds}
    kinds.refuse_rest()
    if not told:
        return
    rope = read_rope(told, "rope_parameters.", None, {}, global_.theta)
    if rope != global_:
        raise CheckpointError(
            f"its rope_parameters hold {' and '.join(told)} for all layers at once, which "
            f"transformers does not read; name them under {GLOBAL!r} and {LOCAL!r}."
        )


def read_rope(
    parameters: Mapping[str, Any],
    name: str,
    theta: float | None,
    scaling: Mapping[str, Any],
    default_theta: float,
) -> RopeConfig:
    """One set of rotary options; what the older and the newer keys both say must be the same."""
    old = dict(scaling) | ({} if theta is None else {"rope_theta": theta})
    both = {key for key in old.keys() & parameters.keys() if old[key] != parameters[key]}
    if both:
        key = min(both)
        raise CheckpointError(
            f"its {name}{key} is {short(parameters[key])}, and an older key says {short(old[key])}."
        )
    read = Fields(old | dict(parameters), name=name)
    named = [read.take(key) for key in ("rope_type", "type")]
    kinds = {kind if isinstance(kind, str) else short(kind) for kind in named if kind is not None}
    kinds = kinds or {"default"}
    proportion = 1.0
    if kinds == {"proportional"}:
        proportion = read.number("partial_rotary_factor", 1.0)
    read.expect("partial_rotary_factor", 1.0)
    read.take("original_max_position_embeddings")
    theta = read.number("rope_theta", default_theta)
    factor = read.number("factor", 1.0)
    read.refuse_rest()
    unknown = kinds - {"default", "linear", "proportional"}
    if kinds == {"default"} and factor != 1.0 or unknown or len(kinds) > 1:
        raise CheckpointError(
            f"its {name}rope_type is {' and '.join(map(repr, sorted(kinds)))}, with a "
            f"factor of {factor}; only 'default' with 1.0, 'linear' and 'proportional' are "
            "supported."
        )
    return RopeConfig(theta=float(theta), scale=float(factor), proportion=float(proportion))


def scaling_of(rope: RopeConfig) -> dict[str, Any] | None:
    """The rotary options but for the base; None where all have the values of a plain rotation."""
    if rope.proportion != 1.0:
        factor = {} if rope.scale == 1.0 else {"factor": rope.scale}
        return {"rope_type": "proportional", "partial_rotary_factor": rope.proportion} | factor
    return None if rope.scale == 1.0 else {"rope_type": "linear", "factor": rope.scale}


def rope_parameters_of(rope: RopeConfig) -> dict[str, Any]:
    """The rotary options as transformers 5 writes them."""
    return (scaling_of(rope) or {"rope_type": "default"}) | {"rope_theta": rope.theta}
