"""The forward pass once more: numpy in float64, one position and one head at a time.

Written from the papers and DeepMind's code, to be read next to them; of the package it knows only
where a model keeps its weights. One row of tokens, no cache, no batch.
"""

import numpy as np

import equigemma as eg
from equigemma.config import AttentionConfig, NormConfig, RopeConfig


def wide(array) -> np.ndarray:
    """Any array in float64."""
    return np.asarray(array).astype(np.float64)


def norm(x: np.ndarray, scale, config: NormConfig) -> np.ndarray:
    """One vector, divided by its root mean square."""
    normed = x / np.sqrt(np.mean(x * x) + config.epsilon)
    return normed if config.offset is None else normed * (config.offset + wide(scale))


def rotate(x: np.ndarray, position: int, config: RopeConfig) -> np.ndarray:
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


def feed_forward(x: np.ndarray, gate, down, gate_axes: str) -> np.ndarray:
    """One vector through the gated feed-forward."""
    gate = wide(gate)
    if gate_axes == "CFD":
        gate = np.swapaxes(gate, 1, 2)
    return (gelu(x @ gate[0]) * (x @ gate[1])) @ wide(down)


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


def attention(x: np.ndarray, layer, config: AttentionConfig, positions: np.ndarray) -> np.ndarray:
    """`x [L D]` through one attention layer."""
    projection = layer.projection
    if config.qkv_axes == "CNDH":
        q, k, v = (np.einsum("LD,NDH->LNH", x, wide(weight)) for weight in projection.qkv.weight)
    else:
        q = np.einsum("LD,NDH->LNH", x, wide(projection.q.weight))
        k, v = (np.einsum("LD,KDH->LKH", x, wide(weight)) for weight in projection.kv.weight)
    for row, position in enumerate(positions):
        for heads, scale in ((q, layer.query_norm), (k, layer.key_norm)):
            for head in range(heads.shape[1]):
                if config.qk_norm is not None:
                    heads[row, head] = norm(heads[row, head], scale.scale, config.qk_norm)
                heads[row, head] = rotate(heads[row, head], position, config.rope)
    mixed = attend(q * config.query_scale, k, v, may_see(positions, config), config.softcap)
    return np.einsum("LNH,NHD->LD", mixed, wide(layer.output.weight))


def forward(model: eg.Transformer, tokens, positions=None) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[L V]` and hidden states `[L D]` of one row of tokens."""
    tokens = np.asarray(tokens)
    positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
    config = model.config
    x = wide(model.embedding.weight[tokens]) * np.sqrt(config.width)

    def normed(vectors, module, norm_config):
        return np.stack([norm(vector, module.scale, norm_config) for vector in vectors])

    for layer, layer_config in zip(model.layers, config.layers, strict=True):
        pre, post = layer_config.pre_norm, layer_config.post_norm
        update = normed(x, layer.pre_attention_norm, pre)
        update = attention(update, layer.attention, layer_config.attention, positions)
        if post is not None:
            update = normed(update, layer.post_attention_norm, post)
        x = x + update

        update = normed(x, layer.pre_ffw_norm, pre)
        update = feed_forward(
            update, layer.ffw.gate.weight, layer.ffw.down.weight, layer_config.ffw.gate_axes
        )
        if post is not None:
            update = normed(update, layer.post_ffw_norm, post)
        x = x + update

    x = normed(x, model.final_norm, config.final_norm)
    logits = x @ wide(model.embedding.weight).T
    if config.final_softcap is not None:
        logits = config.final_softcap * np.tanh(logits / config.final_softcap)
    return logits, x
