"""Writes `keras_vision.npz` and `keras_audio.npz` beside this file: tiny encoders of keras-hub.

Run by hand, in an environment with keras-hub 0.32.0 and JAX, Python 3.12:
`KERAS_BACKEND=jax python tests/golden/make_keras_encoders.py`. Weights are in the order in which
the models have them, `0000 path`, because paths are not unique.
"""

from pathlib import Path

import numpy as np
from keras_hub.src.models.gemma4.gemma4_audio_encoder import Gemma4AudioEncoder
from keras_hub.src.models.gemma4.gemma4_vision_encoder import Gemma4VisionEncoder


FOLDER = Path(__file__).parent


def draw(model) -> dict[str, np.ndarray]:
    """Random weights; bounds that cut off a part of every tensor."""
    rng, weights = np.random.default_rng(0), {}
    for index, weight in enumerate(model.weights):
        name = weight.path.split("/")[-1]
        if name in ("input_min", "output_min", "input_max", "output_max"):
            bound = rng.uniform(1.2, 1.5, weight.shape)
            value = -bound if name.endswith("min") else bound
        else:
            scale = 0.5 if len(weight.shape) < 2 else max(weight.shape) ** -0.5
            value = rng.normal(0, scale, weight.shape)
        weight.assign(value.astype(np.float32))
        weights[f"{index:04} {weight.path}"] = value.astype(np.float32)
    return weights


def make_vision() -> dict[str, np.ndarray]:
    """Images one at a time: of several, keras-hub counts the columns of the widest for all."""
    model = Gemma4VisionEncoder(
        image_size=24,
        patch_size=4,
        num_heads=2,
        hidden_dim=24,
        num_layers=2,
        intermediate_dim=28,
        head_dim=12,
        output_dim=22,
        position_embedding_size=100,
        standardize=True,
    )
    weights = draw(model)
    patches = np.zeros((2, 72, 48), np.float32)
    positions = np.full((2, 72, 2), -1, np.int32)
    rng, soft = np.random.default_rng(2), []
    for index, (rows, columns) in enumerate([(6, 9), (6, 12)]):
        count = rows * columns
        patches[index, :count] = rng.uniform(size=(count, 48))
        grid = np.meshgrid(np.arange(columns), np.arange(rows))
        positions[index, :count] = np.stack(grid, axis=-1).reshape(count, 2)
        inputs = {
            "pixel_values": patches[None, index : index + 1],
            "pixel_position_ids": positions[None, index : index + 1],
        }
        soft.append(np.asarray(model(inputs)).reshape(-1, 22))
    return {
        **weights,
        "pixel_values": patches,
        "positions": positions,
        "soft_tokens": np.stack(soft),
    }


def make_audio() -> dict[str, np.ndarray]:
    """Two spectrograms, the second of them padded."""
    model = Gemma4AudioEncoder(
        input_feat_size=32,
        hidden_size=20,
        num_heads=2,
        num_layers=2,
        sscp_conv_channels=(32, 6),
        output_proj_dims=14,
        output_dim=22,
    )
    rng = np.random.default_rng(2)
    mask = np.arange(90) < np.array([[90], [58]])
    mel = np.where(mask[..., None], rng.normal(size=(2, 90, 32)), 0).astype(np.float32)
    model(mel, mask)
    weights = draw(model)
    return {**weights, "mel": mel, "mask": mask, "soft_tokens": np.asarray(model(mel, mask))}


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "keras_vision.npz", **make_vision())
    np.savez_compressed(FOLDER / "keras_audio.npz", **make_audio())
