"""Tiny vision and audio encoders of keras-hub, run by it in float32: a second vote.

Where transformers and DeepMind's package differ, keras-hub sides with transformers, whose numbers
are the default here.
"""

from collections.abc import Iterator
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_encoders import CLOSE, TEXT, load, put

from equigemma import nn
from equigemma.config import ConformerConfig, MelConfig, VisionTransformerConfig


VISION = VisionTransformerConfig(
    width=24,
    layers=2,
    heads=2,
    head_dim=12,
    hidden=28,
    patch=4,
    positions=100,
    standardize="stored",
    max_soft_tokens=8,
    budgets=(8,),
    video_soft_tokens=8,
)
AUDIO = ConformerConfig(
    mel=MelConfig(mels=32), width=20, layers=2, heads=2, channels=(32, 6), output_width=14
)
VISION_FILE, AUDIO_FILE = load("keras_vision"), load("keras_audio")
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


class Weights:
    """Those of a file, taken one after the other."""

    def __init__(self, file: dict[str, np.ndarray]):
        numbered = [(name, value) for name, value in file.items() if name[:4].isdigit()]
        self._next: Iterator[tuple[str, np.ndarray]] = iter(numbered)

    def take(self, name: str) -> np.ndarray:
        path, value = next(self._next)
        assert path.endswith(name), (path, name)
        return value

    def clipped(self, ours: str, axes: str = "TF->FT", shape=None) -> dict[str, np.ndarray]:
        bounds = np.stack([self.take(name) for name in BOUNDS])
        weight = np.einsum(axes, self.take("kernel"))
        weight = weight if shape is None else weight.reshape(shape)
        return {f"{ours}.linear.weight": weight, f"{ours}.bounds": bounds}

    def end(self) -> None:
        assert next(self._next, None) is None


def vision_leaves() -> dict[str, np.ndarray]:
    weights = Weights(VISION_FILE)
    leaves = {
        "tower.positions": weights.take("position_embedding_table"),
        "tower.patches.weight": weights.take("input_proj/kernel").T,
    }
    for index in range(VISION.layers):
        ours = f"tower.layers.{index}"
        for name in ("pre_attention_norm", "post_attention_norm"):
            leaves[f"{ours}.{name}.scale"] = weights.take(f"{name}/scale")
        for name in ("query", "key", "value"):
            leaves |= weights.clipped(f"{ours}.attention.{name}", "NTH->NHT")
        for name in ("query_norm", "key_norm"):
            leaves[f"{ours}.attention.{name}.scale"] = weights.take(f"{name}/scale")
        leaves |= weights.clipped(f"{ours}.attention.output", "NHT->TNH")
        for name in ("pre_ffw_norm", "post_ffw_norm"):
            leaves[f"{ours}.{name}.scale"] = weights.take(f"{name}/scale")
        for name in ("gate", "up", "down"):
            leaves |= weights.clipped(f"{ours}.{name}")
    leaves["standardize.bias"] = weights.take("std_bias")
    leaves["standardize.scale"] = weights.take("std_scale")
    leaves["projection.weight"] = weights.take("kernel").T
    weights.end()
    return leaves


def audio_leaves() -> dict[str, np.ndarray]:
    weights, leaves = Weights(AUDIO_FILE), {}
    width, heads, head_dim = AUDIO.width, AUDIO.heads, AUDIO.head_dim

    def norm(ours: str) -> None:
        leaves[f"{ours}.scale"] = weights.take("scale")

    def feed_forward(ours: str) -> None:
        norm(f"{ours}.pre_norm")
        leaves.update(weights.clipped(f"{ours}.up") | weights.clipped(f"{ours}.down"))
        norm(f"{ours}.post_norm")

    for index in range(2):
        ours = f"subsampling.convolutions.{index}"
        leaves[f"{ours}.weight"] = np.einsum("tfio->oitf", weights.take("kernel"))
        leaves[f"{ours}.norm.scale"] = weights.take("gamma")
    leaves["subsampling.projection.weight"] = weights.take("kernel").T
    for index in range(AUDIO.layers):
        ours = f"layers.{index}"
        feed_forward(f"{ours}.first_ffw")
        norm(f"{ours}.pre_attention_norm")
        leaves[f"{ours}.attention.query_scale"] = weights.take("per_dim_scale")
        for name in ("query", "key", "value"):
            shape = (heads, head_dim, width)
            leaves |= weights.clipped(f"{ours}.attention.{name}", shape=shape)
        relative = weights.take("pos_proj").T.reshape(heads, head_dim, width)
        leaves[f"{ours}.attention.relative.weight"] = relative
        shape = (width, heads, head_dim)
        leaves |= weights.clipped(f"{ours}.attention.output", shape=shape)
        norm(f"{ours}.post_attention_norm")
        norm(f"{ours}.convolution.pre_norm")
        leaves |= weights.clipped(f"{ours}.convolution.gate", shape=(2, width, width))
        leaves[f"{ours}.convolution.weight"] = weights.take("kernel")[..., 0].T
        norm(f"{ours}.convolution.convolution_norm")
        leaves |= weights.clipped(f"{ours}.convolution.output")
        feed_forward(f"{ours}.second_ffw")
        norm(f"{ours}.final_norm")
    leaves["output.linear.weight"] = weights.take("kernel").T
    leaves["output.bias"] = weights.take("bias")
    leaves["projection.weight"] = weights.take("kernel").T
    weights.end()
    return leaves


def see(config: VisionTransformerConfig) -> np.ndarray:
    model = put(nn.VisionEncoder(TEXT, config, key=jax.random.key(0)), vision_leaves())
    patches = nn.ImagePatches(
        jnp.asarray(VISION_FILE["pixel_values"]), jnp.asarray(VISION_FILE["positions"])
    )
    return np.asarray(eqx.filter_jit(model)(patches))


def hear(config: ConformerConfig) -> tuple[np.ndarray, np.ndarray]:
    model = put(nn.AudioEncoder(TEXT, config, key=jax.random.key(0)), audio_leaves())
    features = nn.AudioFeatures(jnp.asarray(AUDIO_FILE["mel"]), jnp.asarray(AUDIO_FILE["mask"]))
    soft, exists = eqx.filter_jit(model)(features)
    return np.asarray(soft), np.asarray(exists)


@pytest.mark.slow
def test_images():
    expected, soft = VISION_FILE["soft_tokens"], see(VISION)
    for index, count in enumerate((6, 8)):
        assert np.abs(expected[index, :count]).max() > 1
        np.testing.assert_allclose(soft[index, :count], expected[index, :count], **CLOSE)
    # The first image has padding, which takes no part.
    attended = see(replace(VISION, padding_keys="attended"))
    assert np.abs(attended[0, :6] - expected[0, :6]).max() > 0.05


@pytest.mark.slow
def test_sound():
    expected, (soft, exists) = AUDIO_FILE["soft_tokens"], hear(AUDIO)
    assert exists.sum(-1).tolist() == [23, 15] and np.abs(expected[exists]).max() > 1
    np.testing.assert_allclose(soft[exists], expected[exists], **CLOSE)


@pytest.mark.parametrize("change", [dict(window=13), dict(subsampling_mask="first")], ids=str)
def test_what_it_does_not_do(change):
    soft, exists = hear(replace(AUDIO, **change))
    assert np.abs(soft[exists] - AUDIO_FILE["soft_tokens"][exists]).max() > 1e-3
