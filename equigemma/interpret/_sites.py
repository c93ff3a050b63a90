"""Sites: the values of a forward pass that can be read and patched, under the field's names.

Of layer L, with TransformerLens' name (`blocks.L.` before it) and the place in this library. Axes
are those of the legend in `_typing.py`; with AltUp the stream has an axis `A` of streams in front.

| `layers.L.` | TransformerLens | axes | place |
|---|---|---|---|
| `resid_pre` | `hook_resid_pre` | `[A] *B L D` | input of `layers.L` |
| `attn_normed` | `ln1.hook_normalized` × weight | `*B L D` | output of `pre_attention_norm` |
| `q`, `k`, `v` | `attn.hook_q`, `hook_k`, `hook_v` | `*B L N H`, `*B L K H` | output of the \
projections: before norms and RoPE, and before keys enter the cache |
| `pattern` | `attn.hook_pattern` | `*B N L S` | `attention.attention_fn`: after the softmax |
| `z` | `attn.hook_z` | `*B L N H` | input of `attention.output` |
| `attn_out` | `hook_attn_out` | `*B L D` | output of `post_attention_norm`, or of `attention` |
| `resid_mid` | `hook_resid_mid` | `*B L D` | `resid_mid`; with AltUp the active stream |
| `mlp_normed` | `ln2.hook_normalized` × weight | `*B L D` | output of `pre_ffw_norm` |
| `mlp_post` | `mlp.hook_post` | `*B L F` | input of `ffw.down`: hidden units |
| `router` | – | `*B L E` | output of `ffw.router.logits` |
| `mlp_out` | `hook_mlp_out` | `*B L D` | output of `post_ffw_norm`, or of `ffw` |
| `per_layer_input` | – | `*B L P` | second input of `per_layer_gate` |
| `resid_post` | `hook_resid_post` | `[A] *B L D` | output of `layers.L` |

And of the model: `embed` (`hook_embed` plus images), what the first layer reads before AltUp makes
streams of it; `final_norm` (`ln_final.hook_normalized` × weight), what the logits are made from.

Any other module has two sites, named by its path: `layers.3.ffw.gate:output` is what it returns,
`:input` its first argument. `:output.1` and `:input.1` are the second of several.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import equinox as eqx

from equigemma._arguments import described
from equigemma.config import FeedForwardConfig, LayerConfig, SharedKVConfig
from equigemma.interpret._intercept import modules
from equigemma.nn import AbstractBlock, AltUpStream, Experts, Stacked, Transformer


Axis = Literal["position", "head", "feature", "key"]


@dataclass(frozen=True)
class Site:
    """Where a value is: which input or output of the module at `path`.

    `axes` are the last axes of the value, `sizes` how long they are, None where the text decides.
    `streams` is the number of AltUp streams, an axis in front of the batch.
    """

    name: str
    path: str
    slot: Literal["input", "output", "pattern"]
    index: int | None = None
    axes: tuple[Axis, ...] = ()
    sizes: tuple[int | None, ...] = ()
    streams: int | None = None

    def size(self, axis: Axis) -> int | None:
        """The length of one of `axes`."""
        return self.sizes[self.axes.index(axis)]


def sites(model: Transformer) -> dict[str, Site]:
    """The sites of `model` that have a name of the field, in the order in which they are reached.

    ```python
    >>> import equigemma as eg, jax
    >>> from dataclasses import replace
    >>> from equigemma import interpret
    >>> config = eg.variants.get("gemma3-270m")
    >>> small = replace(config, vocab=7, layers=config.layers[:1])
    >>> model = eg.Transformer(small, key=jax.random.key(0))
    >>> [name.removeprefix("layers.0.") for name in interpret.sites(model)]
    ['embed', 'resid_pre', 'attn_normed', 'q', 'k', 'v', 'pattern', 'z', 'attn_out', 'resid_mid', \
'mlp_normed', 'mlp_post', 'mlp_out', 'resid_post', 'final_norm']
    >>> interpret.sites(model)["layers.0.z"].sizes
    (None, 4, 256)

    ```

    **Arguments:** `model`: any `Transformer` that is not stacked.

    **Returns:** sites by name, each with where it is and the sizes of its axes.

    **Raises:** `ValueError` for a stacked model.
    """
    if isinstance(model.layers, Stacked):
        raise ValueError(_STACKED)
    width = model.config.width
    found = [_stream("embed", "embed", "output", width)]
    for index, config in enumerate(model.config.layers):
        path, block = _block(model.layers[index], f"layers.{index}")
        found += _of_layer(model, f"layers.{index}", path, block, config)
    found.append(_stream("final_norm", "final_norm", "output", width))
    return {site.name: site for site in found}


_STACKED = (
    "The layers of this model are stacked, in one loop, so none has a site of its own: use "
    "eg.unstack(model)."
)


def find(model: eqx.Module, name: str) -> list[Site]:
    """The sites that `name` means: one, or all those that a glob matches.

    In a glob, `*`, `?` and `[0-9]` stand for parts of what is between two dots.

    **Raises:** `TypeError` for what is no string; `ValueError` if there is no such site.
    """
    if not isinstance(name, str):
        raise TypeError(f"A site is named by a str such as 'layers.3.z', got {described(name)}.")
    if isinstance(getattr(model, "layers", None), Stacked):
        if name.startswith("layers."):
            raise ValueError(f"{name}: {_STACKED}")
        named = {}
    else:
        named = sites(model) if isinstance(model, Transformer) else {}
    found = [site for site in named.values() if _matches(site.name, name)]
    found = found or list(_raw(model, name))
    if not found:
        raise ValueError(_unknown(model, name, named))
    return found


def _matches(name: str, glob: str) -> bool:
    parts, globs = name.split("."), glob.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))


def _raw(model: eqx.Module, name: str) -> Iterator[Site]:
    """Inputs and outputs of modules, by their paths."""
    path, colon, place = name.partition(":")
    read = re.fullmatch(r"(input|output)(?:\.(\d+))?", place if colon else "output")
    if read is None:
        raise ValueError(
            f"{name}: after the colon comes input or output, such as {path}:output or {path}:input."
        )
    slot: Any = read[1]
    index = int(read[2]) if read[2] else 0 if slot == "input" else None
    looped = [path for path, node in modules(model) if isinstance(node, Experts)]
    for found, node in modules(model):
        if not found or not callable(node) or not _matches(found, path):
            continue
        experts = next((loop for loop in looped if found.startswith(f"{loop}.")), None)
        if experts is not None:
            raise ValueError(
                f"{found} runs in a loop over experts, which it has no single input or output in: "
                f"patch {experts}:input or {experts}:output."
            )
        yield Site(f"{found}:{place}" if colon else found, found, slot, index)


def _unknown(model: eqx.Module, name: str, named: dict[str, Site]) -> str:
    shared = re.fullmatch(r"layers\.(\d+)\.([kv])", name)
    if shared and isinstance(model, Transformer) and f"layers.{shared[1]}.q" in named:
        owner = model.config.owner(int(shared[1]))
        return (
            f"{name}: layer {shared[1]} has no keys and values of its own. It attends to those of "
            f"layer {owner}: use layers.{owner}.{shared[2]}."
        )
    near = difflib.get_close_matches(name, named, n=1)
    hint = f" Is it {near[0]}?" if near else ""
    return (
        f"The model has no site {name}.{hint} `interpret.sites(model)` lists those with names like "
        "layers.3.z; any other module is named by its path, like layers.3.ffw.gate:output."
    )


def _block(node: Any, path: str) -> tuple[str, AbstractBlock]:
    """The innermost block at a path, and its path: there may be others around it."""
    within = [(f"{path}.{inner}", block) for inner, block in modules(node) if inner]
    blocks = [(inner, block) for inner, block in within if isinstance(block, AbstractBlock)]
    return blocks[-1] if blocks else (path, node)


def _of_layer(
    model: Transformer, name: str, path: str, block: AbstractBlock, config: LayerConfig
) -> Iterator[Site]:
    """The sites of one layer, `name` being its name and `path` where the block is."""
    width = model.config.width
    parts = {inner for inner, _ in modules(block)}
    stream = model.stream
    streams = len(stream.spread) + 1 if isinstance(stream, AltUpStream) else None

    def plain(site: str, inner: str, slot: Any, size: int, index: int | None = None) -> Site:
        return _stream(f"{name}.{site}", f"{path}.{inner}", slot, size, index)

    def first(site: str, *choices: str) -> Iterator[Site]:
        """The output of the first module that there is."""
        for choice in choices:
            if choice in parts:
                yield plain(site, choice, "output", width, 0 if choice == "attention" else None)
                return

    pre = _stream(f"{name}.resid_pre", path, "input", width, 0)
    yield replace(pre, streams=streams)
    yield from first("attn_normed", "pre_attention_norm")
    if "attention.attention_fn" in parts:
        yield from _of_attention(name, path, config)
    yield from first("attn_out", "post_attention_norm", "attention")
    yield from first("resid_mid", "resid_mid")
    yield from first("mlp_normed", "pre_ffw_norm")
    ffw = config.ffw
    if isinstance(ffw, FeedForwardConfig):
        down, hidden, experts = "ffw.down", ffw.hidden_dim, 0
    else:
        down, hidden, experts = "ffw.dense.down", ffw.dense.hidden_dim, ffw.moe.num_experts
    if down in parts:
        yield plain("mlp_post", down, "input", hidden, 0)
    if "ffw.router.logits" in parts:
        yield plain("router", "ffw.router.logits", "output", experts)
    yield from first("mlp_out", "post_ffw_norm", "ffw")
    if "per_layer_gate" in parts and model.config.per_layer is not None:
        yield plain("per_layer_input", "per_layer_gate", "input", model.config.per_layer.dim, 1)
    yield replace(pre, name=f"{name}.resid_post", slot="output", streams=streams)


def _of_attention(name: str, path: str, config: LayerConfig) -> Iterator[Site]:
    attention = config.attention
    axes: tuple[Axis, ...] = ("position", "head", "feature")

    def heads(site: str, inner: str, slot: Any, number: int, index: int | None = None) -> Site:
        sizes = (None, number, attention.head_dim)
        return Site(f"{name}.{site}", f"{path}.attention.{inner}", slot, index, axes, sizes)

    if isinstance(attention.kv, SharedKVConfig):
        yield heads("q", "query", "output", attention.heads)
    else:
        numbers = {"q": attention.heads, "k": attention.kv.heads, "v": attention.kv.heads}
        for index, (site, number) in enumerate(numbers.items()):
            yield heads(site, "projection", "output", number, index)
    pattern: tuple[Axis, ...] = ("head", "position", "key")
    sizes = (attention.heads, None, None)
    yield Site(f"{name}.pattern", f"{path}.attention.attention_fn", "pattern", None, pattern, sizes)
    yield heads("z", "output", "input", attention.heads, 0)


def _stream(name: str, path: str, slot: Any, width: int, index: int | None = None) -> Site:
    return Site(name, path, slot, index, ("position", "feature"), (None, width))
