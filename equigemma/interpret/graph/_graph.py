"""Attribution graphs as arrays: influence of nodes on the logits, and pruning."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from equigemma._typing import Bool, Float32, Int


@dataclass(frozen=True)
class Graph:
    """Direct effects of nodes on each other.

    Nodes are in this order: features, errors by layer and position, tokens by position, logits.

    Attributes:
        tokens: `[L]`: the text.
        features: `[n 3]`: layer, position and number of each feature that is a node.
        activations: `[n]`: how active they are.
        logits: `[k]`: the tokens whose logits are nodes, the likeliest first.
        probabilities: `[k]`: how likely they are.
        layers: How many layers the model has.
        adjacency: `[nodes nodes]`: the effect of each column's node on each row's.
    """

    tokens: Int[np.ndarray, " L"]
    features: Int[np.ndarray, "n 3"]
    activations: Float32[np.ndarray, " n"]
    logits: Int[np.ndarray, " k"]
    probabilities: Float32[np.ndarray, " k"]
    layers: int
    adjacency: Float32[np.ndarray, "nodes nodes"]


class Pruned(NamedTuple):
    """Which nodes and edges of a graph stay, and the share of influence down to each node."""

    nodes: Bool[np.ndarray, " nodes"]
    edges: Bool[np.ndarray, "nodes nodes"]
    cumulative: Float32[np.ndarray, " nodes"]


def prune(graph: Graph, *, nodes: float = 0.8, edges: float = 0.98) -> Pruned:
    """The nodes, then the edges between them, that have most of the influence on the logits.

    Influence goes along all paths, edges into a node being weighted by their share of its inputs'
    absolute sum. Tokens and logits stay; features and errors that then lead nowhere, and features
    that nothing leads to, go.

    **Arguments:**

    - `graph`: what `attribute` returns.
    - `nodes`: the share of the influence of all nodes that those which stay have.
    - `edges`: the same of edges.

    **Returns:** masks of nodes and edges, and cumulative influence, all in the order of the graph.

    **Raises:** `ValueError` for a share outside of [0, 1].

    **Source:** Ameisen et al. 2025, "Circuit Tracing", Transformer Circuits Thread.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must be a share of the influence, in [0, 1]; got {share}.")
    weights = np.zeros(len(graph.adjacency), np.float64)
    weights[-len(graph.logits) :] = graph.probabilities
    influence = influences(_shares(graph.adjacency), weights)
    kept = influence >= _least(influence, nodes)
    always = len(graph.tokens) + len(graph.logits)
    kept[-always:] = True

    shares = _shares(np.where(kept[:, None] & kept[None], graph.adjacency, 0))
    scores = shares * (influences(shares, weights) + weights)[:, None]
    kept_edges = scores >= _least(scores.ravel(), edges)
    features = len(graph.features)
    while True:
        before = kept.copy()
        kept[:-always] &= kept_edges[:, :-always].any(axis=0)
        kept[:features] &= kept_edges[:features].any(axis=1)
        if (kept == before).all():
            break
        kept_edges &= kept[:, None] & kept[None]
    order = np.argsort(-influence, kind="stable")
    cumulative = np.empty(len(influence), np.float32)
    cumulative[order] = np.cumsum(influence[order]) / influence.sum()
    return Pruned(kept, kept_edges, cumulative)


def _shares(adjacency: np.ndarray) -> np.ndarray:
    size = np.abs(adjacency).astype(np.float64)
    return size / np.maximum(size.sum(axis=1, keepdims=True), 1e-10)


def influences(shares: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`weights` through all paths of a graph without cycles: w·A + w·A² + …"""
    step = weights @ shares
    total = step.copy()
    while step.any():
        step = step @ shares
        total += step
    return total


def _least(scores: np.ndarray, share: float) -> float:
    """The smallest of the scores that together have a share of their sum."""
    ordered = np.sort(scores)[::-1]
    cumulative = np.cumsum(ordered) / ordered.sum()
    return float(ordered[min(int(np.searchsorted(cumulative, share)), len(ordered) - 1)])
