"""Writes `gemma4_vision.npz` and `gemma4_audio.npz` beside this file: tiny encoders of DeepMind's.

Run by hand, in an environment with gemma 4.0.1, Python 3.12 and no equigemma:
`python tests/golden/make_gemma4_encoders.py`. Each file has the random parameters of a tiny encoder
and its projection, inputs, and what the package computes from them in float32.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gemma.gm.nn.gemma4 import _modules as text
from gemma.gm.nn.gemma4.audio import _model as audio
from gemma.gm.nn.gemma4.audio import _modules as conformer
from gemma.gm.nn.gemma4.vision import _encoder as vision


FOLDER = Path(__file__).parent
TEXT = 22


def drawn(shapes, seed: int = 0):
    """Random parameters; bounds that cut off a part of every tensor."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "clip_" in name:
            bound = rng.uniform(1.2, 1.5, leaf.shape)
            return jnp.asarray(bound if name.endswith("max") else -bound, jnp.float32)
        # The inputs of a map are most of its axes; parameters of few are scales.
        scale = 0.5 if leaf.ndim < 2 else max(leaf.shape) ** -0.5
        return jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def flat(tree, prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def projected(embeddings: jax.Array, method: str, **widths) -> tuple[dict, jax.Array]:
    """Parameters of a random projection to the width of a text, and what it makes of embeddings."""
    module = text.Embedder(vocab_size=3, embed_dim=TEXT, **widths)
    init = partial(module.init, method=method)
    variables = drawn(jax.eval_shape(init, jax.random.key(0), embeddings), seed=1)
    return variables["params"], module.apply(variables, embeddings, method=method)


def make_vision() -> dict[str, np.ndarray]:
    """Three images of one budget: whole, with little padding, and with much."""
    module = vision.VisionEncoder(
        d_model=24,
        num_layers=2,
        num_heads=2,
        ffw_hidden=28,
        patch_size=4,
        output_length=8,
        pos_emb_shape_yx=(100, 2),
        use_clipped_linears=True,
        standardize_embeddings=True,
    )
    patches = np.zeros((3, 72, 48), np.float32)
    positions = np.full((3, 72, 2), -1, np.int32)
    rng = np.random.default_rng(2)
    for index, (rows, columns) in enumerate([(6, 12), (9, 6), (3, 6)]):
        count = rows * columns
        patches[index, :count] = rng.uniform(size=(count, 48))
        grid = np.meshgrid(np.arange(columns), np.arange(rows))
        positions[index, :count] = np.stack(grid, axis=-1).reshape(count, 2)
    arguments = jnp.asarray(patches), jnp.asarray(positions)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), *arguments))
    ((embeddings, mask),) = module.apply(variables, *arguments)
    projection, soft = projected(embeddings, "encode_vision", vision_proj_dim=24)
    return {
        **flat(variables["params"], "encoder"),
        **flat(projection, "embedder"),
        "pixel_values": patches,
        "positions": positions,
        "mask": np.asarray(mask),
        "soft_tokens": np.asarray(soft),
    }


def make_audio() -> dict[str, np.ndarray]:
    """Three clips, padded to the longest of them."""
    config = conformer.ConformerConfig(
        num_layers=2, model_dims=20, lm_model_dims=14, atten_num_heads=2
    )
    module = audio.AudioTokenizer(config)
    lengths = np.asarray([12_000, 9_000, 5_010], np.int32)
    rng = np.random.default_rng(2)
    # Few different numbers, so that the file is small.
    samples = np.round(rng.normal(0, 16, (3, 12_000))).astype(np.float32) / 128
    samples[np.arange(12_000) >= lengths[:, None]] = 0
    arguments = jnp.asarray(samples), jnp.asarray(lengths)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), *arguments))
    embeddings, padding = module.apply(variables, *arguments)
    projection, soft = projected(embeddings, "encode_audio", audio_proj_dim=14)
    mel = conformer.GemaxMelFilterbank(sample_rate=16_000, n_mels=128)
    return {
        **flat(variables["params"], "encoder"),
        **flat(projection, "embedder"),
        "samples": samples,
        "lengths": lengths,
        "mel": np.asarray(mel.apply({}, arguments[0])),
        "mask": ~np.asarray(padding),
        "soft_tokens": np.asarray(soft),
    }


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "gemma4_vision.npz", **make_vision())
    np.savez_compressed(FOLDER / "gemma4_audio.npz", **make_audio())
