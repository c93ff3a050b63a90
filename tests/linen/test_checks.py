"""Wrong calls: each error names the argument, the axis, and both sizes."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from stored import causal

from equigemma import linen
from equigemma.checkpoint import CheckpointError


CONFIG = tiny.GEMMA3
SHIM = linen.Transformer(config=CONFIG, dtype=jnp.float32)
VARIABLES = linen.to_variables(tiny.model(CONFIG))
TOKENS = tiny.tokens(2, 7)
HEADS, HEAD = CONFIG.layers[0].attention.kv.heads, CONFIG.layers[0].attention.head_dim


def cache(slots: int = 11, rows: int = 2, config=CONFIG) -> dict[str, Any]:
    return linen.Transformer(config=config).init_cache(
        batch_size=rows, dtype=jnp.float32, cache_length=slots
    )


def changed(tree: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """The tree with one entry changed, or taken out if it becomes None."""
    name, _, rest = path.partition("/")
    value = changed(tree[name], rest, change) if rest else change(tree.get(name))
    others = {key: entry for key, entry in tree.items() if key != name}
    return others if value is None else others | {name: value}


@dataclass
class Wrong:
    """A call, and all that its error must say."""

    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tokens: Any = field(default_factory=lambda: TOKENS)
    variables: Any = field(default_factory=lambda: VARIABLES)
    error: type[Exception] = ValueError


def masked(mask, slots: int = 11) -> dict[str, Any]:
    return {"cache": cache(slots), "attention_mask": mask}


def params(path: str, change: Callable[[Any], Any]) -> Any:
    return changed(VARIABLES, f"params/{path}", change)


def broken_cache(path: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {"cache": changed(cache(), path, change), "attention_mask": causal(7, 11)}


WRONG = {
    "float tokens": Wrong(
        ("`tokens`", "int[*B L]", "float32[2, 7]"), tokens=TOKENS.astype(float), error=TypeError
    ),
    "tokens without an axis": Wrong(("`tokens`", "at least 1 axes", "0 axes"), tokens=TOKENS[0, 0]),
    "tokens as a list": Wrong(("`tokens`", "array", "list"), tokens=[2, 5, 7], error=TypeError),
    "tokens as text": Wrong(("`tokens`", "array", "str"), tokens="Hello", error=TypeError),
    "images for a model of text": Wrong(
        ("`images`", "text only"), {"images": jnp.zeros((2, 1, 8, 8, 3), jnp.uint8)}
    ),
    "images of the wrong rank": Wrong(
        ("`images`", "at least 4 axes", "2 axes"), {"images": jnp.zeros((2, 8), jnp.uint8)}
    ),
    "images of floats": Wrong(
        ("`images`", "uint8", "float32[2, 8, 8, 3]"),
        {"images": jnp.zeros((2, 8, 8, 3))},
        error=TypeError,
    ),
    "images of another batch": Wrong(
        ("`images`", "axis *B is 3", "`tokens` has *B = 2"),
        {"images": jnp.zeros((3, 8, 8, 3), jnp.uint8)},
    ),
    "positions of another length": Wrong(
        ("`positions`", "axis L is 5", "`tokens` has L = 7"),
        {"positions": jnp.zeros((2, 5), int)},
    ),
    "positions of another batch": Wrong(
        ("`positions`", "axis *B is 3", "`tokens` has *B = 2"),
        {"positions": jnp.zeros((3, 7), int)},
    ),
    "positions that are not whole": Wrong(
        ("`positions`", "int[*B L]", "float32[2, 7]"),
        {"positions": jnp.zeros((2, 7))},
        error=TypeError,
    ),
    "a mask of numbers": Wrong(
        ("`attention_mask`", "bool[*B L S]", "float32[2, 7, 11]"),
        masked(jnp.zeros((2, 7, 11))),
        error=TypeError,
    ),
    "a mask of another cache": Wrong(
        ("`attention_mask`", "axis S is 13", "has S = 11"), masked(causal(7, 13))
    ),
    "a mask of other tokens": Wrong(
        ("`attention_mask`", "axis L is 5", "`tokens` has L = 7"), masked(causal(5, 11))
    ),
    "a mask of another batch": Wrong(
        ("`attention_mask`", "axis *B is 3", "`tokens` has *B = 2"),
        masked(causal(7, 11, rows=3)),
    ),
    "a mask without its batch": Wrong(
        ("`attention_mask`", "axis *B is []", "`tokens` has *B = 2"), masked(causal(7, 11)[0])
    ),
    "a mask of too few keys": Wrong(
        ("`attention_mask`", "axis L is 5", "`tokens` has L = 7"),
        {"attention_mask": causal(5, 7)},
    ),
    "a mask of too many keys": Wrong(
        ("`attention_mask`", "axis L is 11", "`tokens` has L = 7"),
        {"attention_mask": causal(7, 11)},
    ),
    "no mask for a longer cache": Wrong(
        ("`attention_mask`", "S = 11", "L = 7"), {"cache": cache()}
    ),
    "a cache that is too short": Wrong(
        ("`tokens` has L = 7", "`cache`", "S = 5"),
        {"cache": cache(5), "attention_mask": causal(7, 5)},
    ),
    "a cache of another batch": Wrong(
        ("`cache['layer_0']['positions']`", "axis *B is 3", "`tokens` has *B = 2"),
        {"cache": cache(rows=3), "attention_mask": causal(7, 11)},
    ),
    "a cache of a model with other layers": Wrong(
        ("`cache`", "has 3 layers", "this model has 2"),
        {
            "cache": cache(config=tiny.model_config(*(tiny.layer(),) * 3)),
            "attention_mask": causal(7, 11),
        },
    ),
    "a cache of a model with other heads": Wrong(
        ("`cache['layer_0']['k']`", f"axis H is {HEAD + 2}", f"this model has H = {HEAD}"),
        {
            "cache": cache(config=tiny.model_config(*(tiny.layer(head_dim=HEAD + 2),) * 2)),
            "attention_mask": causal(7, 11),
        },
    ),
    "a cache with too many heads": Wrong(
        ("`cache['layer_1']['v']`", f"axis K is {HEADS + 1}", f"this model has K = {HEADS}"),
        broken_cache("layer_1/v", lambda v: jnp.concatenate([v, v[:, :, :1]], axis=2)),
    ),
    "a cache of one layer shorter": Wrong(
        ("`cache['layer_1']['positions']`", "axis S is 9", "has S = 11"),
        broken_cache("layer_1/positions", lambda positions: positions[:, :9]),
    ),
    "a cache without a part": Wrong(
        ("`cache['layer_1']`", "end_index, k, positions and v", "['end_index', 'k', 'positions']"),
        broken_cache("layer_1/v", lambda v: None),
    ),
    "a cache that is not a dict": Wrong(
        ("`cache`", "dict of layers", "an array"), {"cache": TOKENS}, error=TypeError
    ),
    "parameters alone": Wrong(("`variables`", '"params"'), variables=VARIABLES["params"]),
    "parameters in parameters": Wrong(
        ("`variables`", '"params" within "params"'), variables={"params": VARIABLES}
    ),
    "no variables": Wrong(("`variables`", "nothing"), variables={}),
    "an Equinox model": Wrong(
        ("`variables`", "Transformer"), variables=tiny.model(CONFIG), error=TypeError
    ),
    "a missing parameter": Wrong(
        ("layer_1/mlp/linear: missing",),
        variables=params("layer_1/mlp/linear", lambda w: None),
        error=CheckpointError,
    ),
    "an extra parameter": Wrong(
        ("layer_0/attn/bias: not a part of this model",),
        variables=params("layer_0/attn/bias", lambda w: jnp.zeros(3)),
        error=CheckpointError,
    ),
    "a parameter of another shape": Wrong(
        (
            "embedder/input_embedding",
            f"expected shape [{tiny.VOCAB}, {tiny.WIDTH}]",
            f"got [{tiny.VOCAB - 1}, {tiny.WIDTH}]",
        ),
        variables=params("embedder/input_embedding", lambda w: w[1:]),
        error=CheckpointError,
    ),
    "a model of other layers": Wrong(
        ("layer_1/attn/q_einsum/w: missing",),
        variables={
            "params": {
                name: value for name, value in VARIABLES["params"].items() if name != "layer_1"
            }
        },
        error=CheckpointError,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name):
    wrong = WRONG[name]
    with pytest.raises(wrong.error) as caught:
        SHIM.apply(wrong.variables, wrong.tokens, **wrong.options)
    assert isinstance(caught.value, TypeError | ValueError)
    for words in wrong.says:
        assert words in str(caught.value)
    lines = str(caught.value).splitlines()
    assert all(len(line) < 300 for line in lines), "sentences, not a dump"
    assert len(lines) == 1 or wrong.error is CheckpointError, "which lists all that is wrong"


@pytest.mark.parametrize("name", ["positions of another length", "a parameter of another shape"])
def test_wrong_calls_are_found_while_tracing(name):
    wrong = WRONG[name]
    with pytest.raises(wrong.error) as caught:
        jax.eval_shape(lambda v, t: SHIM.apply(v, t, **wrong.options), wrong.variables, TOKENS)
    assert wrong.says[0] in str(caught.value)


def test_right_calls_pass():
    # The table above would pass if everything were refused.
    output = SHIM.apply(
        VARIABLES,
        TOKENS,
        cache=cache(),
        positions=jnp.broadcast_to(jnp.arange(7), (2, 7)),
        attention_mask=causal(7, 11),
    )
    assert output.logits.shape == (2, 7, tiny.VOCAB)


def test_the_tower_of_a_checkpoint_is_left_aside():
    # DeepMind's checkpoints of 4B and more hold a vision tower; their model of text ignores it.
    vision = {"siglip_encoder": {"embedding": {"kernel": jnp.ones((3, 5))}}}
    with_tower = params("vision_encoder", lambda _: vision)
    with_tower = changed(with_tower, "params/embedder/mm_input_projection", lambda _: {"w": TOKENS})
    output = SHIM.apply(with_tower, TOKENS)
    assert (output.logits == SHIM.apply(VARIABLES, TOKENS).logits).all()


def test_jaxtyping_turns_the_checks_off():
    script = """
import jax.numpy as jnp
from equigemma.linen._shapes import Sizes
sizes = Sizes()
sizes.expect("tokens", jnp.zeros(()), "int", "*B L")
print("unchecked")
"""
    environment = os.environ | {"JAXTYPING_DISABLE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "unchecked\n"


def test_configs_of_another_width_share_nothing():
    other = linen.Transformer(config=replace(CONFIG, width=tiny.WIDTH + 2))
    with pytest.raises(CheckpointError, match="final_norm/scale: expected shape") as caught:
        other.apply(VARIABLES, TOKENS)
    assert "layer_1/mlp/linear" in str(caught.value), "all of them are listed"
