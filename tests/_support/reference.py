"""The forward pass once more: numpy in float64, one position and one head at a time.

Written from the papers and DeepMind's code, to be read next to them; of the package it knows only
where a model keeps its weights. One row of tokens, no cache, no batch.
"""

import numpy as np

import equigemma as eg
from equigemma.config import (
    AltUpConfig,
    AttentionConfig,
    DensePlusMoEConfig,
    KeyIsValueConfig,
    LayerConfig,
    NormConfig,
    RopeConfig,
    SharedKVConfig,
)


def wide(array) -> np.ndarray:
    """Any array in float64."""
    return np.asarray(array).astype(np.float64)


def norm(x: np.ndarray, scale, config: NormConfig) -> np.ndarray:
    """One vector, divided by its root mean square."""
    normed = x / np.sqrt(np.mean(x * x) + config.epsilon)
    return normed if config.offset is None else normed * (config.offset + wide(scale))


def apply_rope(x: np.ndarray, position: int, config: RopeConfig) -> np.ndarray:
    """One head, turned pair by pair; pairs beyond the turning share keep still."""
    turned = x.copy()
    half = len(x) // 2
    for pair in range(int(config.proportion * half)):
        angle = position / config.scale * config.theta ** (-2 * pair / len(x))
        first, second = x[pair], x[pair + half]
        turned[pair] = first * np.cos(angle) - second * np.sin(angle)
        turned[pair + half] = first * np.sin(angle) + second * np.cos(angle)
    return turned


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, softcap: float | None = None
) -> np.ndarray:
    """`q [L N H]`, `k, v [S K H]`, `mask [L S]`: what every query head takes from the values."""
    length, heads, _ = q.shape
    mixed = np.zeros_like(q)
    for query in range(length):
        seen = np.flatnonzero(mask[query])
        for head in range(heads if len(seen) else 0):
            kv_head = head * k.shape[1] // heads
            logits = k[seen, kv_head] @ q[query, head]
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits - logits.max())
            mixed[query, head] = weights / weights.sum() @ v[seen, kv_head]
    return mixed


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def feed_forward(
    x: np.ndarray, gate, down, gate_axes: str, cutoff: float | None = None
) -> np.ndarray:
    """One vector through the gated feed-forward."""
    gate = wide(gate)
    if gate_axes == "CFD":
        gate = np.swapaxes(gate, 1, 2)
    gate, up = x @ gate[0], x @ gate[1]
    if cutoff is not None:
        gate = np.maximum(gate - (gate.mean() + cutoff * gate.std()), 0)
    return (gelu(gate) * up) @ wide(down)


def dense_and_experts(x: np.ndarray, layer, config: LayerConfig) -> np.ndarray:
    """One vector of the stream through the dense branch and through the experts it chooses."""
    assert isinstance(config.ffw, DensePlusMoEConfig)
    dense, experts, router = layer.dense, layer.experts, layer.router

    def maybe(vector, module):
        return vector if module is None else norm(vector, module.scale, config.post_norm)

    read = norm(x, layer.pre_dense_norm.scale, config.pre_norm)
    total = maybe(
        feed_forward(read, dense.gate.weight, dense.down.weight, "CFD"), layer.post_dense_norm
    )

    bare = NormConfig(epsilon=config.pre_norm.epsilon, offset=None)
    logits = (norm(x, None, bare) * wide(router.scale) / np.sqrt(len(x))) @ wide(
        router.logits.weight
    )
    shares = np.exp(logits - logits.max())
    chosen = np.argsort(-shares, kind="stable")[: config.ffw.moe.num_experts_per_token]
    read = norm(x, layer.pre_experts_norm.scale, config.pre_norm)
    mixed = np.zeros_like(x)
    for expert in chosen:
        weights = experts.gate.weight[expert], experts.down.weight[expert]
        share = shares[expert] / shares[chosen].sum() * wide(router.expert_scale)[expert]
        mixed += share * feed_forward(read, *weights, "CFD")
    return total + maybe(mixed, layer.post_experts_norm)


def may_see(positions: np.ndarray, config: AttentionConfig) -> np.ndarray:
    """Who sees whom among tokens at `positions`, −1 being padding."""
    length = len(positions)
    mask = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(length):
            distance = positions[query] - positions[key]
            in_window = config.window is None or distance < config.window
            mask[query, key] = positions[key] >= 0 and distance >= 0 and in_window
    return mask


def attention(
    x: np.ndarray, layer, config: AttentionConfig, positions: np.ndarray, lent=None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """`x [L D]` through one attention layer, and the keys and values `[L K H]` it looked at."""

    def heads(weight):
        return np.einsum("LD,NDH->LNH", x, wide(weight))

    def per_head(function, array):
        return np.stack([[function(head, row) for head in row_] for row, row_ in enumerate(array)])

    def turned(array, module):
        def one(head, row):
            if config.qk_norm is not None:
                head = norm(head, module.scale, config.qk_norm)
            return apply_rope(head, positions[row], config.rope)

        return per_head(one, array)

    if isinstance(config.kv, SharedKVConfig):
        assert lent is not None
        q, (k, v) = heads(layer.query.weight), lent
    else:
        projection = layer.projection
        if config.qkv_axes == "CNDH":
            q, k, v = map(heads, projection.qkv.weight)
        elif isinstance(config.kv, KeyIsValueConfig):
            q, k, v = map(heads, (projection.q.weight, projection.k.weight, projection.k.weight))
        else:
            q, k, v = map(heads, (projection.q.weight, *projection.kv.weight))
        k = turned(k, layer.key_norm)
        if config.v_norm is not None:
            v = per_head(lambda head, row: norm(head, None, config.v_norm), v)
    q = turned(q, layer.query_norm)
    mixed = attend(q * config.query_scale, k, v, may_see(positions, config), config.softcap)
    return np.einsum("LNH,NHD->LD", mixed, wide(layer.output.weight)), (k, v)


class Row:
    """One row of tokens on its way through a model; `lent` has the keys of every layer so far."""

    def __init__(self, model: eg.Transformer, positions: np.ndarray):
        self.model, self.config, self.positions = model, model.config, positions
        self.lent: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def attend(self, x: np.ndarray, index: int) -> np.ndarray:
        config = self.config.layers[index].attention
        keys = self.lent.get(config.kv.layer) if isinstance(config.kv, SharedKVConfig) else None
        layer = self.model.layers[index].attention
        update, self.lent[index] = attention(x, layer, config, self.positions, keys)
        return update

    def feed_forward(self, x: np.ndarray, index: int) -> np.ndarray:
        """The whole second half of a layer, up to what it adds."""
        layer, config = self.model.layers[index], self.config.layers[index]
        if isinstance(config.ffw, DensePlusMoEConfig):
            update = np.stack([dense_and_experts(vector, layer.ffw, config) for vector in x])
        else:
            weights = layer.ffw.gate.weight, layer.ffw.down.weight, config.ffw.gate_axes
            read = normed(x, layer.pre_ffw_norm, config.pre_norm)
            update = np.stack([feed_forward(row, *weights, config.ffw.cutoff) for row in read])
        return normed(update, layer.post_ffw_norm, config.post_norm)

    def layer(self, x: np.ndarray, index: int, vectors: np.ndarray | None) -> np.ndarray:
        """`x [L D]` through a layer of a plain stream."""
        layer, config = self.model.layers[index], self.config.layers[index]
        update = self.attend(normed(x, layer.pre_attention_norm, config.pre_norm), index)
        x = x + normed(update, layer.post_attention_norm, config.post_norm)
        x = x + self.feed_forward(x, index)
        if vectors is not None:
            x = x + self.gated(x, index, vectors)
        return x if config.skip_scale is None else x * wide(layer.skip_scale)

    def altup_layer(self, x: np.ndarray, index: int, vectors: np.ndarray | None) -> np.ndarray:
        """`x [A L D]` through a layer of parallel streams."""
        layer, config = self.model.layers[index], self.config.layers[index]
        altup, clip, width = layer.alternation, self.config.stream.clip, x.shape[-1]

        def modes(vectors):
            routed = normed(vectors, altup.router_norm, config.pre_norm) / width
            return np.tanh(routed @ wide(altup.router.weight))

        mixing = np.tensordot(modes(x[0]), np.clip(wide(altup.prediction), -clip, clip), 1)
        predicted = np.stack(
            [x[:, token] + mixing[token] @ x[:, token] for token in range(x.shape[1])], axis=1
        )
        first = predicted[0]
        read = normed(first, layer.pre_attention_norm, config.pre_norm)
        low = read @ wide(layer.laurel.left.weight) @ wide(layer.laurel.right.weight)
        low = read + normed(low, layer.laurel.norm, config.pre_norm)
        update = normed(self.attend(read, index), layer.post_attention_norm, config.post_norm)
        first = (first + update + low) / np.sqrt(2)
        first = first + self.feed_forward(first, index)

        share = 1 + modes(first) @ np.clip(wide(altup.correction), -clip, clip)
        x = predicted + share.T[..., None] * (first - predicted[0])
        if vectors is not None:
            x[1:] += self.gated(x[0] * wide(altup.output_scale), index, vectors)
        return x

    def gated(self, x: np.ndarray, index: int, vectors: np.ndarray) -> np.ndarray:
        gate = self.model.layers[index].per_layer_gate
        update = (gelu(x @ wide(gate.gate.weight)) * vectors[:, index]) @ wide(gate.output.weight)
        return normed(update, gate.norm, self.config.per_layer.norm)


def normed(vectors: np.ndarray, module, config: NormConfig | None) -> np.ndarray:
    """Each row through a norm, if there is one."""
    if config is None:
        return vectors
    return np.stack([norm(vector, module.scale, config) for vector in vectors])


def stretched(x: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Each row of `x` at the root mean square of that of `target`."""
    size = [np.sqrt(np.mean(array**2, axis=-1, keepdims=True)) for array in (x, target)]
    return x * size[1] / size[0]


def forward(model: eg.Transformer, tokens, positions=None) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[L V]` and hidden states `[L D]` of one row of tokens."""
    tokens = np.asarray(tokens)
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    config = model.config
    row = Row(model, positions)
    embedding = np.asarray(model.embedding.weight)
    # The factor is part of the model as it was trained: rounded to the dtype of the table.
    x = wide(embedding[tokens]) * wide(np.sqrt(config.width).astype(embedding.dtype))

    vectors = None
    if config.per_layer is not None:
        table, vocab = model.per_layer, config.per_layer.vocab
        looked_up = wide(table.weight)[np.where(tokens < vocab, tokens, 0)]
        projected = np.einsum("LD,DJP->LJP", x, wide(table.projection.weight))
        projected = np.stack(
            [
                normed(rows, table.norm, config.per_layer.norm)
                for rows in projected / config.width**0.5
            ]
        )
        vectors = (projected + looked_up * np.sqrt(config.per_layer.dim)) / np.sqrt(2)

    if isinstance(config.stream, AltUpConfig):
        spread = [stretched(x @ wide(project.weight), x) for project in model.stream.spread]
        streams = np.stack([x, *spread])
        for index in range(len(config.layers)):
            streams = row.altup_layer(streams, index, vectors)
        first, *others = streams
        gathered = [
            stretched(other @ wide(project.weight), first)
            for project, other in zip(model.stream.gather, others, strict=True)
        ]
        x = np.mean([first, *gathered], axis=0)
    else:
        for index in range(len(config.layers)):
            x = row.layer(x, index, vectors)

    x = normed(x, model.final_norm, config.final_norm)
    logits = x @ wide(embedding).T
    if config.final_softcap is not None:
        logits = config.final_softcap * np.tanh(logits / config.final_softcap)
    return logits, x
