"""A config in words and numbers: the layer table, parameters by part, the size of the cache.

Everything here is computed from shapes; no weight is made or read.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._typing import typed
from equigemma.config import (
    DensePlusMoEConfig,
    FeedForwardConfig,
    KeyIsValueConfig,
    LayerConfig,
    ModelConfig,
    SharedKVConfig,
)
from equigemma.nn import RMSNorm, Transformer, init_cache


NOTHING = "-"


@typed
def describe(config: ModelConfig) -> str:
    """The layers of a model as a table: one row for each kind, and the order they come in.

    ```python
    >>> import equigemma as eg
    >>> print(eg.describe(eg.variants.get("gemma3-270m")))
    vocabulary 262,144, width 640, 268,098,176 parameters
    18 layers: 3 x (5 a, b)
    <BLANKLINE>
    kind  count  heads  head size  window  rope       feed-forward  norms
    a        15    4/1        256     512     10,000         2,048  pre post query key
    b         3    4/1        256     all  1,000,000         2,048  pre post query key

    ```

    Heads are query heads and key/value heads; a window counts the keys that a query sees. Where a
    token sees what comes after it, a column says how much: the rest of its image, or all.

    **Arguments:** `config`: of any model, as in `variants` or `model.config`.

    **Returns:** a text of several lines, without one at the end.
    """
    kinds = list(dict.fromkeys(config.layers))
    letters = {kind: _letter(number) for number, kind in enumerate(kinds)}
    heading = (
        f"vocabulary {config.vocab:,}, width {config.width:,}, "
        f"{parameter_counts(config)['total']:,} parameters"
    )
    if config.lm_head == "untied":
        heading += ", an output projection of its own"
    if config.final_softcap is not None:
        heading += f", logits capped at {config.final_softcap:g}"
    order = _repeated(_runs([letters[layer] for layer in config.layers]))

    def row(kind: LayerConfig) -> list[str]:
        count = config.layers.count(kind)
        kv_heads = config.kv_heads(config.layers.index(kind))
        return [letters[kind], str(count), f"{kind.attention.heads}/{kv_heads}"] + [
            words(kind) for words in _COLUMNS.values()
        ]

    titles = ["kind", "count", "heads", *_COLUMNS]
    table = _aligned([titles, *map(row, kinds)])
    return f"{heading}\n{len(config.layers)} layers: {order}\n\n{table}"


@typed
def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model, and their `"total"`.

    Norms count as such wherever they are, except in a vision tower; projections of per-layer
    embeddings, parallel streams and the like are `"other"`. Parts that the model lacks are left
    out.

    **Arguments:** `config`: of any model, as in `variants` or `model.config`; no weights are made.

    **Returns:** numbers of parameters by the name of the part; `"total"` is their sum.
    """
    model = eqx.filter_eval_shape(Transformer, config, key=jax.random.key(0))
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, RMSNorm)
    )
    counts: dict[str, int] = dict.fromkeys(("embedding", "per-layer embedding", "attention"), 0)
    counts |= dict.fromkeys(("feed-forward", "norms", "output projection", "vision", "other"), 0)
    for path, node in nodes:
        size = sum(leaf.size for leaf in jax.tree.leaves(node))
        part = _part(path)
        counts["norms" if isinstance(node, RMSNorm) and part != "vision" else part] += size
    return {part: size for part, size in counts.items() if size} | {"total": sum(counts.values())}


@typed
def cache_bytes(
    config: ModelConfig,
    length: int,
    dtype: jnp.dtype | type | str = jnp.bfloat16,
    *,
    ring: bool = True,
) -> int:
    """Bytes of the cache of one row of `length` tokens; 0 for a model that has none.

    **Arguments:**

    - `config`: of any model.
    - `length`: tokens of the row, prompt and answer together.
    - `dtype`: of keys and values, as in `init_cache`.
    - `ring`: local layers keep their window, as `init_cache` has it; False: what it would take if
      every layer kept all tokens.

    **Returns:** a number of bytes.

    **Raises:** `ValueError` if `length < 1`.
    """
    if is_bidirectional(config) and length > 0:
        return 0
    if not ring:
        config = replace(config, layers=tuple(map(_without_window, config.layers)))
    cache = jax.eval_shape(lambda: init_cache(config, capacity=length, dtype=jnp.dtype(dtype)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


@typed
def is_bidirectional(config: ModelConfig) -> bool:
    """Whether attention is bidirectional, so that nothing can be generated or cached."""
    return any(layer.attention.mask_kind == "bidirectional" for layer in config.layers)


def _without_window(layer: LayerConfig) -> LayerConfig:
    return replace(layer, attention=replace(layer.attention, window=None))


def _part(path: Sequence) -> str:
    names = {
        "embedding": "embedding",
        "lm_head": "output projection",
        "per_layer": "per-layer embedding",
        "attention": "attention",
        "ffw": "feed-forward",
    }
    fields = jax.tree_util.keystr(tuple(path), simple=True, separator=".").split(".")
    if fields[0] == "vision":
        return "vision"
    return next((names[field] for field in fields if field in names), "other")


def _window(layer: LayerConfig) -> str:
    window = layer.attention.window
    return "all" if window is None else f"{window:,}"


def _ahead(layer: LayerConfig) -> str:
    """What a token sees that comes after it."""
    names = {"causal": NOTHING, "causal_bidirectional_images": "its image", "bidirectional": "all"}
    return names[layer.attention.mask_kind]


def _rope(layer: LayerConfig) -> str:
    rope = layer.attention.rope
    stretched = "" if rope.scale == 1 else f" / {rope.scale:g}"
    part = "" if rope.proportion == 1 else f" on {rope.proportion:.0%}"
    return f"{rope.theta:,.0f}{stretched}{part}"


def _keys(layer: LayerConfig) -> str:
    match layer.attention.kv:
        case SharedKVConfig(layer=owner):
            return f"of layer {owner}"
        case KeyIsValueConfig():
            return "also values"
        case _:
            return NOTHING


def _ffw(layer: LayerConfig) -> str:
    match layer.ffw:
        case DensePlusMoEConfig(dense=dense, moe=moe):
            chosen = f"{moe.num_experts_per_token} of {moe.num_experts}"
            return f"{dense.hidden_dim:,} + {chosen} x {moe.hidden_dim:,}"
        case FeedForwardConfig(hidden_dim=hidden, cutoff=None):
            return f"{hidden:,}"
        case FeedForwardConfig(hidden_dim=hidden):
            return f"{hidden:,} sparse"


def _norms(layer: LayerConfig) -> str:
    attention = layer.attention
    present = {"pre": layer.pre_norm, "post": layer.post_norm, "query": attention.qk_norm}
    if not isinstance(attention.kv, SharedKVConfig):
        present |= {"key": attention.qk_norm, "value": attention.v_norm}
    return " ".join(name for name, norm in present.items() if norm is not None)


def _softcap(layer: LayerConfig) -> str:
    cap = layer.attention.softcap
    return NOTHING if cap is None else f"{cap:g}"


_COLUMNS: dict[str, Callable[[LayerConfig], str]] = {
    "head size": lambda layer: str(layer.attention.head_dim),
    "window": _window,
    "ahead": _ahead,
    "rope": _rope,
    "keys": _keys,
    "soft-cap": _softcap,
    "feed-forward": _ffw,
    "norms": _norms,
}


def _letter(number: int) -> str:
    """a to z, then aa and so on."""
    rest, last = divmod(number, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("a") + last)


def _runs(letters: Sequence[str]) -> list[str]:
    """`aaab` is `["3 a", "b"]`."""
    runs: list[str] = []
    start = 0
    for end in range(1, len(letters) + 1):
        if end == len(letters) or letters[end] != letters[start]:
            runs.append(letters[start] if end - start == 1 else f"{end - start} {letters[start]}")
            start = end
    return runs


def _repeated(runs: list[str]) -> str:
    """Runs in words, with what comes several times over said once."""
    words, start = [], 0
    while start < len(runs):
        times, period = 1, 1
        for candidate in range(1, (len(runs) - start) // 2 + 1):
            block = runs[start : start + candidate]
            count = 1
            while runs[start + count * candidate : start + (count + 1) * candidate] == block:
                count += 1
            if count > 1 and count * candidate > times * period:
                times, period = count, candidate
        block = ", ".join(runs[start : start + period])
        words.append(block if times == 1 else f"{times} x ({block})")
        start += times * period
    return ", ".join(words)


def _aligned(rows: list[list[str]]) -> str:
    """Columns of equal width, numbers to the right; columns that say nothing are left out."""
    columns = [
        column for column in zip(*rows, strict=True) if any(cell != NOTHING for cell in column[1:])
    ]
    wide = [max(map(len, column)) for column in columns]
    lines = []
    for number, line in enumerate(zip(*columns, strict=True)):
        cells = [
            cell.rjust(width) if number and _is_number(column) else cell.ljust(width)
            for cell, width, column in zip(line, wide, columns, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(column: Sequence[str]) -> bool:
    cells = column[1:]
    return any(cell[0].isdigit() for cell in cells) and not any(" " in cell for cell in cells)
