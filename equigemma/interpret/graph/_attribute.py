"""The attribution graph of one text, row by row."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from equigemma._arguments import as_integer
from equigemma._typing import Array, Float, Int
from equigemma.interpret._activations import activations
from equigemma.interpret._streams import check_is_sum
from equigemma.interpret.graph._graph import Graph
from equigemma.interpret.graph._replacement import Transcoders, no_shifts, read_linear
from equigemma.interpret.sae import inputs
from equigemma.nn import Transformer


def attribute(
    model: Transformer,
    transcoders: Transcoders,
    tokens: Int[Array, " L"],
    *,
    max_logits: int = 10,
    probability: float = 0.95,
    max_features: int | None = None,
    batch: int = 64,
    skip: int = 1,
) -> Graph:
    """The attribution graph of a text: direct effects between features, errors, tokens and logits.

    Feed-forwards are replaced by what their transcoders make of the features, plus an error that
    is constant, and the affine skip connection where there is one. Attention patterns and the
    statistics of all norms are frozen, so that the rest is linear: an effect is the gradient of
    what a feature reads, before its activation function, with respect to what another one writes,
    times what that writes. Logits are those of the last position before the soft cap, minus the
    mean of all.

    ```python
    transcoders = [sae.load(folder) for folder in folders]  # one of each layer
    graph = interpret.graph.attribute(model, transcoders, tokens)
    pruned = interpret.graph.prune(graph)
    ```

    **Arguments:**

    - `model`: a model of one residual stream, with one feed-forward in each layer.
    - `transcoders`: for each layer a transcoder and its place, as `sae.load` gives them.
    - `tokens`: one text.
    - `max_logits`: the most logits that become nodes.
    - `probability`: as many of the likeliest tokens become nodes as have this much together.
    - `max_features`: the most features that become nodes, those of most influence; None: all.
    - `batch`: how many rows are computed at once.
    - `skip`: features and errors at that many first positions, at which attention rests, are left
      out; 4 for the instruction-tuned Gemma 3, whose texts begin with a header.

    **Returns:** the graph, not pruned.

    **Raises:** `ValueError` for AltUp, for a stacked model, for per-layer inputs, and for other
    than one transcoder of each layer.

    **Source:** Ameisen et al. 2025, "Circuit Tracing"; Dunefsky et al. 2024, arXiv:2406.11944.
    """
    check_is_sum(model, "attribution")
    _check(model, transcoders)
    batch = as_integer("batch", batch, least=1)
    parts = _parts(model, transcoders, tokens, as_integer("skip", skip, least=0))
    chosen, probabilities = _targets(parts.logits, max_logits, probability)
    table = model.output_embedding.table.astype(jnp.float32)
    directions = np.asarray(table[chosen] - table.mean(axis=0, keepdims=True))
    rows_of = _row_function(model, transcoders, tokens, parts, batch)

    count = len(parts.features)
    wanted = count if max_features is None else min(as_integer("max_features", max_features), count)
    last = np.array([len(transcoders), len(tokens) - 1])
    rows = list(rows_of(np.tile(last, (len(chosen), 1)), directions))
    done: list[int] = []
    while len(done) < wanted:
        if wanted == count:
            pending = np.arange(count)
        else:
            influence = _influence(rows, done, probabilities)[:count]
            ranked = np.argsort(-influence, kind="stable")
            pending = ranked[~np.isin(ranked, done)][: min(4 * batch, wanted - len(done))]
        rows += list(rows_of(parts.features[pending, :2], parts.encoders[pending]))
        done += pending.tolist()

    order = np.argsort(done)
    selected = np.asarray(done, int)[order]
    columns = np.concatenate([selected, np.arange(count, count + parts.others)])
    size = len(columns) + len(chosen)
    adjacency = np.zeros((size, size), np.float32)
    matrix = np.stack(rows)[:, columns]
    adjacency[: len(selected), : len(columns)] = matrix[len(chosen) :][order]
    adjacency[-len(chosen) :, : len(columns)] = matrix[: len(chosen)]
    return Graph(
        tokens=np.asarray(tokens),
        features=parts.features[selected],
        activations=parts.active[selected],
        logits=chosen,
        probabilities=probabilities,
        layers=len(transcoders),
        adjacency=adjacency,
    )


class _Parts(NamedTuple):
    """What is active in a text. `others` is the number of errors and tokens."""

    features: np.ndarray  # [n 3]: layer, position, number
    active: np.ndarray  # [n]
    encoders: np.ndarray  # [n d]
    decoders: np.ndarray  # [n D], times the activation
    errors: np.ndarray  # [J L D]
    embed: np.ndarray  # [L D]
    logits: np.ndarray  # [V], of the last position
    others: int


def _check(model: Transformer, transcoders: Transcoders) -> None:
    if model.per_layer is not None:
        raise ValueError(
            "This model has gates of per-layer inputs, which are not linear and no transcoder "
            "replaces: there are no attribution graphs of it. Use edge_attribution."
        )
    if len(transcoders) != len(model.layers):
        raise ValueError(
            f"There must be a transcoder of each of the {len(model.layers)} layers, in order; got "
            f"{len(transcoders)}."
        )
    for layer, (_, place) in enumerate(transcoders):
        if place.writes != f"layers.{layer}.mlp_out":
            raise ValueError(
                f"Transcoder {layer} should write layers.{layer}.mlp_out, got {place.writes}."
            )


def _parts(model: Transformer, transcoders: Transcoders, tokens: Array, skip: int) -> _Parts:
    names = ["embed", *(site for _, place in transcoders for site in (place.reads, place.writes))]
    output, values = activations(lambda m: m(tokens), model, names)
    features, active, encoders, decoders, errors = [], [], [], [], []
    for layer, (sae, place) in enumerate(transcoders):
        read = inputs(sae, place, model, values[place.reads])
        found = np.array(sae.encode(read))
        found[:skip] = 0
        whole = sae.decode(jnp.asarray(found))
        whole = whole if sae.skip is None else whole + read.astype(sae.skip.dtype) @ sae.skip
        error = np.asarray(values[place.writes].astype(whole.dtype) - whole)
        errors.append(np.where(np.arange(len(error))[:, None] < skip, 0, error))
        positions, numbers = np.nonzero(found)
        features.append(np.stack([np.full_like(positions, layer), positions, numbers], axis=1))
        active.append(found[positions, numbers])
        encoders.append(np.asarray(sae.w_enc)[:, numbers].T)
        decoders.append(np.asarray(sae.w_dec)[numbers] * active[-1][:, None])
    return _Parts(
        np.concatenate(features),
        np.concatenate(active),
        np.concatenate(encoders),
        np.concatenate(decoders),
        np.stack(errors),
        np.asarray(values["embed"]),
        np.asarray(output.logits[-1]),
        (len(transcoders) + 1) * len(tokens),
    )


def _targets(logits: np.ndarray, most: int, probability: float) -> tuple[np.ndarray, np.ndarray]:
    likely = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    order = np.argsort(-likely, kind="stable")[:most]
    count = int(np.searchsorted(np.cumsum(likely[order]), probability)) + 1
    return order[:count], likely[order[:count]]


def _row_function(
    model: Transformer, transcoders: Transcoders, tokens: Array, parts: _Parts, batch: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function from layers and positions `[m 2]`, and vectors `[m D]` there, to rows."""
    layers, positions = parts.features[:, 0], parts.features[:, 1]

    @eqx.filter_jit
    def run(
        model: Transformer,
        transcoders: Transcoders,
        arrays: tuple[Array, ...],
        places: Array,
        vectors: Float[Array, "m D"],
    ) -> Float[Array, "m row"]:
        decoders, errors, embed = arrays
        (read, final), pullback = jax.vjp(
            lambda shifts: read_linear(model, transcoders, tokens, shifts),
            no_shifts(model, len(tokens)),
        )

        def row(place: Array, vector: Array) -> Array:
            def there(layer: int, like: Array) -> Array:
                at_place = (jnp.arange(len(like)) == place[1]) & (place[0] == layer)
                row = vector[: like.shape[-1]].astype(like.dtype)
                return jnp.where(at_place[:, None], row[None], jnp.zeros_like(like))

            cotangents = [there(layer, like) for layer, like in enumerate(read)]
            (gradient,) = pullback((cotangents, there(len(read), final)))
            written = gradient.written.astype(decoders.dtype)
            of_features = (written[layers, positions] * decoders).sum(axis=-1)
            of_errors = (written * errors).sum(axis=-1).reshape(-1)
            return jnp.concatenate([of_features, of_errors, (gradient.embed * embed).sum(axis=-1)])

        return jax.vmap(row)(places, vectors)

    arrays = tuple(map(jnp.asarray, (parts.decoders, parts.errors, parts.embed)))

    def rows_of(places: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(places), batch):
            here = slice(start, start + batch)
            missing = batch - len(places[here])
            # The last batch is filled up, so that one program serves all.
            filled = np.pad(places[here], ((0, missing), (0, 0)))
            padded = np.pad(vectors[here], ((0, missing), (0, 0)))
            rows = run(model, transcoders, arrays, jnp.asarray(filled), jnp.asarray(padded))
            found.append(np.asarray(rows)[: batch - missing])
        return np.concatenate(found) if found else np.zeros((0, len(layers) + parts.others))

    return rows_of


def _influence(rows: list[np.ndarray], done: list[int], probabilities: np.ndarray) -> np.ndarray:
    """Of every column on the logits, through the rows that are there."""
    matrix = np.abs(np.stack(rows)).astype(np.float64)
    matrix /= np.maximum(matrix.sum(axis=1, keepdims=True), 1e-8)
    of_logits, of_features = matrix[: len(probabilities)], matrix[len(probabilities) :]
    step = probabilities @ of_logits
    total = step.copy()
    while done and step.any():
        step = step[done] @ of_features
        total += step
    return total
