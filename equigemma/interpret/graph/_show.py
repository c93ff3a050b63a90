"""Attribution graphs for people: JSON for the public viewer, and a picture."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from equigemma.interpret.graph._graph import Graph, Pruned


def to_json(
    graph: Graph,
    pruned: Pruned,
    words: Sequence[str],
    logit_words: Sequence[str],
    *,
    slug: str,
    scan: str,
    node_threshold: float = 0.8,
) -> str:
    """The graph as the viewer of Neuronpedia and `circuit-tracer` reads it.

    **Arguments:**

    - `graph`: what `attribute` returns.
    - `pruned`: what `prune` made of it.
    - `words`: the text of each token.
    - `logit_words`: the text of each logit's token.
    - `slug`: a name for the graph.
    - `scan`: the name under which the viewer knows the transcoders.
    - `node_threshold`: what `prune` was called with.

    **Returns:** a JSON object with `metadata`, `qParams`, `nodes` and `links`.

    **Raises:** `ValueError` for other than one word for each token and logit.
    """
    for name, given, count in (
        ("words", words, len(graph.tokens)),
        ("logit_words", logit_words, len(graph.logits)),
    ):
        if len(given) != count:
            raise ValueError(f"`{name}` must be {count} strings, got {len(given)}.")
    nodes = _nodes(graph, pruned, logit_words)
    targets, sources = np.nonzero(pruned.edges)
    links = [
        {
            "source": nodes[source]["node_id"],
            "target": nodes[target]["node_id"],
            "weight": float(graph.adjacency[target, source]),
        }
        for target, source in zip(targets.tolist(), sources.tolist(), strict=True)
        if source in nodes and target in nodes
    ]
    linked = {link[end] for link in links for end in ("source", "target")}
    used = [
        node
        for node in nodes.values()
        if node["node_id"] in linked or node["feature_type"] in ("embedding", "logit")
    ]
    metadata = dict(
        slug=slug,
        scan=scan,
        transcoder_list=[],
        prompt_tokens=list(words),
        prompt="".join(words),
        node_threshold=node_threshold,
        schema_version=1,
    )
    view = dict(pinnedIds=[], supernodes=[], linkType="both", clickedId="", sg_pos="")
    return json.dumps(dict(metadata=metadata, qParams=view, nodes=used, links=links), indent=2)


def _nodes(graph: Graph, pruned: Pruned, logit_words: Sequence[str]) -> dict[int, dict[str, Any]]:
    features, length = len(graph.features), len(graph.tokens)
    tokens = features + graph.layers * length
    logits = tokens + length
    found = {}
    for number in np.flatnonzero(pruned.nodes).tolist():
        extra: dict[str, Any] = {}
        if number < features:
            layer, position, feature = graph.features[number].tolist()
            kind, name = "cross layer transcoder", str(layer)
            node, view = f"{layer}_{feature}_{position}", f"{layer}_{feature}-0"
            extra["activation"] = float(graph.activations[number])
            feature = (layer + feature) * (layer + feature + 1) // 2 + feature  # Cantor's pairing
        elif number < tokens:
            layer, position = divmod(number - features, length)
            kind, name, feature = "mlp reconstruction error", str(layer), -1
            node, view = f"0_{layer}_{position}", f"{layer}_{position}-0"
        elif number < logits:
            feature = position = number - tokens
            kind, name, token = "embedding", "E", int(graph.tokens[position])
            node, view = f"E_{token}_{position}", f"E_{token}-{position}"
        else:
            rank, position = number - logits, length - 1
            kind, name, feature = "logit", str(graph.layers + 1), int(graph.logits[rank])
            node, view = f"{name}_{feature}_{position}", f"L_{feature}-{position}"
            likely = float(graph.probabilities[rank])
            extra = dict(token_prob=likely, is_target_logit=rank == 0)
            extra["clerp"] = f'Output "{logit_words[rank]}" (p={likely:.3f})'
        found[number] = (
            dict(
                node_id=node,
                feature=feature,
                layer=name,
                ctx_idx=position,
                feature_type=kind,
                token_prob=0.0,
                is_target_logit=False,
                run_idx=0,
                reverse_ctx_idx=0,
                jsNodeId=view,
                clerp="",
                influence=float(pruned.cumulative[number]),
                activation=None,
            )
            | extra
        )
    return found


def draw(graph: Graph, pruned: Pruned, words: Sequence[str] | None = None) -> Any:
    """A picture: positions from left to right, layers from bottom to top.

    **Arguments:**

    - `graph`: what `attribute` returns.
    - `pruned`: what `prune` made of it.
    - `words`: what is written below the columns.

    **Returns:** the axes of matplotlib, which it needs.

    **Raises:** `ImportError` without matplotlib.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("draw needs matplotlib: pip install matplotlib") from error
    axes = pyplot.subplots()[1]
    places = _places(graph)
    targets, sources = np.nonzero(pruned.edges)
    largest = np.abs(graph.adjacency[pruned.edges]).max(initial=1e-10)
    for target, source in zip(targets, sources, strict=True):
        weight = float(graph.adjacency[target, source] / largest)
        color = "tab:blue" if weight > 0 else "tab:red"
        ends = places[[source, target]].T
        axes.plot(*ends, color=color, alpha=max(abs(weight), 0.05), linewidth=1, zorder=1)
    features, errors = len(graph.features), graph.layers * len(graph.tokens)
    kinds = np.repeat(
        ["tab:green", "tab:gray", "black", "tab:orange"],
        [features, errors, len(graph.tokens), len(graph.logits)],
    )
    kept = pruned.nodes
    axes.scatter(*places[kept].T, c=kinds[kept], s=18, zorder=2)
    axes.set_xlabel("position")
    axes.set_ylabel("layer")
    if words is not None:
        axes.set_xticks(range(len(graph.tokens)), words, rotation=90)
    return axes


def _places(graph: Graph) -> np.ndarray:
    """Of every node on the page; those of one layer and position side by side."""
    length, layers = len(graph.tokens), graph.layers
    layer, position = np.divmod(np.arange(layers * length), length)
    rows = [*graph.features[:, 0], *layer, *[-1] * length, *[layers] * len(graph.logits)]
    columns = [*graph.features[:, 1], *position, *range(length), *[length - 1] * len(graph.logits)]
    seen: dict[tuple[int, int], int] = {}
    places = []
    for row, column in zip(rows, columns, strict=True):
        number = seen[row, column] = seen.get((row, column), -1) + 1
        places.append((column + 0.7 * (number % 12) / 12, row + 0.1 * (number // 12 % 5)))
    return np.asarray(places)
