"""Tiny vision and audio encoders of DeepMind's package, run by it in float32: the same numbers.

Where it differs from transformers, fields of the config say so; each is shown to matter.
"""

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
    padding_keys="attended",
    max_soft_tokens=8,
    budgets=(8,),
    video_soft_tokens=8,
)
AUDIO = ConformerConfig(
    mel=MelConfig(padding=0, window_offset=0.5, validity="proportional"),
    width=20,
    layers=2,
    heads=2,
    output_width=14,
    window=13,
    subsampling_mask="first",
    projection_norm="after",
)


VISION_FILE, AUDIO_FILE = load("gemma4_vision"), load("gemma4_audio")


def bounds(file: dict, place: str, part) -> np.ndarray:
    names = ("clip_input_min", "clip_input_max", "clip_output_min", "clip_output_max")
    return np.stack([file[f"{place}/{name}"][part] for name in names])


def vision_leaves(file: dict) -> dict[str, np.ndarray]:
    block = "encoder/transformer/stacked_layers/block"
    leaves = {
        "tower.patches.weight": file["encoder/entry/input_projection/w"].T,
        "tower.positions": np.swapaxes(file["encoder/entry/pos_emb"], 0, 1),
        "standardize.bias": file["encoder/standardize/bias"],
        "standardize.scale": file["encoder/standardize/scale"],
        "projection.weight": file["embedder/mm_input_projection/w"].T,
    }
    for index in range(VISION.layers):
        ours = f"tower.layers.{index}"
        for name in ("pre_attention", "post_attention", "pre_ffw", "post_ffw"):
            leaves[f"{ours}.{name}_norm.scale"] = file[f"{block}/{name}_norm/scale"][index]
        for name in ("query", "key"):
            scale = file[f"{block}/attn/{name}_norm/scale"][index]
            leaves[f"{ours}.attention.{name}_norm.scale"] = scale
        weights = {
            "attention.query": ("attn/q_einsum", "NTH->NHT", ()),
            # One pair of bounds for both of what one equation computes.
            "attention.key": ("attn/kv_einsum", "NTH->NHT", (0,)),
            "attention.value": ("attn/kv_einsum", "NTH->NHT", (1,)),
            "attention.output": ("attn/attn_vec_einsum", "NHT->TNH", ()),
            "gate": ("mlp/gating_einsum", "FT->FT", (0,)),
            "up": ("mlp/gating_einsum", "FT->FT", (1,)),
            "down": ("mlp/linear", "FT->TF", ()),
        }
        for name, (theirs, axes, part) in weights.items():
            weight = file[f"{block}/{theirs}/w"][(index, *part)]
            leaves[f"{ours}.{name}.linear.weight"] = np.einsum(axes, weight)
            leaves[f"{ours}.{name}.bounds"] = bounds(file, f"{block}/{theirs}", index)
    return leaves


def audio_leaves(file: dict) -> dict[str, np.ndarray]:
    width, heads, head_dim = AUDIO.width, AUDIO.heads, AUDIO.head_dim
    projection = file["encoder/feature/input_proj/kernel"]
    leaves = {
        "subsampling.projection.weight": projection.reshape(-1, width).T,
        "output.linear.weight": file["encoder/output_projection/kernel"].T,
        "output.bias": file["encoder/output_projection/bias"],
        "projection.weight": file["embedder/audio_input_projection/w"].T,
    }
    for index in range(2):
        ours, theirs = f"subsampling.convolutions.{index}", "encoder/feature"
        kernel = file[f"{theirs}/subsampling_{index}/kernel"]
        leaves[f"{ours}.weight"] = np.einsum("tfio->oitf", kernel)
        leaves[f"{ours}.norm.scale"] = file[f"{theirs}/norm_{index}/scale"]
    for index in range(AUDIO.layers):
        ours, block = f"layers.{index}", f"encoder/conformer/stacked_layers_{index}"
        attention = f"{block}/trans_atten/self_atten"
        relative = file[f"{attention}/relative_position_embedding/pos_proj/kernel"]
        leaves |= {
            f"{ours}.attention.query_scale": file[f"{attention}/per_dim_scale"],
            f"{ours}.attention.relative.weight": np.einsum("TNH->NHT", relative),
            f"{ours}.convolution.weight": file[f"{block}/lconv/depthwise_conv1d/kernel"][:, 0].T,
        }
        for name, theirs in {
            "pre_attention_norm": "trans_atten/pre_norm",
            "post_attention_norm": "trans_atten/post_norm",
            "final_norm": "final_ln",
            "convolution.pre_norm": "lconv/ln",
            "convolution.convolution_norm": "lconv/conv_norm",
            "first_ffw.pre_norm": "fflayer_start/pre_layer_norm",
            "first_ffw.post_norm": "fflayer_start/post_layer_norm",
            "second_ffw.pre_norm": "fflayer_end/pre_layer_norm",
            "second_ffw.post_norm": "fflayer_end/post_layer_norm",
        }.items():
            leaves[f"{ours}.{name}.scale"] = file[f"{block}/{theirs}/scale"]
        for name, (theirs, shape) in {
            "attention.query": ("trans_atten/self_atten/query", (heads, head_dim, width)),
            "attention.key": ("trans_atten/self_atten/key", (heads, head_dim, width)),
            "attention.value": ("trans_atten/self_atten/value", (heads, head_dim, width)),
            "attention.output": ("trans_atten/post", (width, heads, head_dim)),
            "convolution.gate": ("lconv/linear_start", (2, width, width)),
            "convolution.output": ("lconv/linear_end", (width, width)),
            "first_ffw.up": ("fflayer_start/ffn_layer1", (4 * width, width)),
            "first_ffw.down": ("fflayer_start/ffn_layer2", (width, 4 * width)),
            "second_ffw.up": ("fflayer_end/ffn_layer1", (4 * width, width)),
            "second_ffw.down": ("fflayer_end/ffn_layer2", (width, 4 * width)),
        }.items():
            kernel = file[f"{block}/{theirs}/kernel"]
            outputs = kernel.reshape(-1, kernel.shape[-1]).T.reshape(shape)
            leaves[f"{ours}.{name}.linear.weight"] = outputs
            leaves[f"{ours}.{name}.bounds"] = bounds(file, f"{block}/{theirs}", ())
    return leaves


def see(config: VisionTransformerConfig) -> np.ndarray:
    fresh = nn.VisionEncoder(TEXT, config, key=jax.random.key(0))
    patches = nn.ImagePatches(
        jnp.asarray(VISION_FILE["pixel_values"]), jnp.asarray(VISION_FILE["positions"])
    )
    model = put(fresh, vision_leaves(VISION_FILE))
    return np.asarray(eqx.filter_jit(model)(patches))


def hear(config: ConformerConfig) -> tuple[np.ndarray, np.ndarray]:
    fresh = nn.AudioEncoder(TEXT, config, key=jax.random.key(0))
    clips = nn.AudioClips(jnp.asarray(AUDIO_FILE["samples"]), jnp.asarray(AUDIO_FILE["lengths"]))
    model = put(fresh, audio_leaves(AUDIO_FILE))
    soft, exists = eqx.filter_jit(lambda model, clips: model(model.features(clips)))(model, clips)
    return np.asarray(soft), np.asarray(exists)


def test_images():
    expected, real = VISION_FILE["soft_tokens"], VISION_FILE["mask"]
    assert real.sum(-1).tolist() == [8, 6, 2] and np.abs(expected[real]).max() > 1
    soft = see(VISION)
    np.testing.assert_allclose(soft[real], expected[real], **CLOSE)
    assert not soft[~real].any()


def test_padding_takes_part_there_but_not_here():
    """Row a of the table of disagreements; an image that fills its budget has no padding."""
    expected, real = VISION_FILE["soft_tokens"], VISION_FILE["mask"]
    masked = see(replace(VISION, padding_keys="masked"))
    np.testing.assert_allclose(masked[0][real[0]], expected[0][real[0]], **CLOSE)
    for index in (1, 2):
        assert np.abs(masked[index][real[index]] - expected[index][real[index]]).max() > 0.05


@pytest.mark.slow
def test_sound():
    expected, real = AUDIO_FILE["soft_tokens"], AUDIO_FILE["mask"]
    assert len(set(real.sum(-1).tolist())) == 3 and np.abs(expected[real]).max() > 1
    soft, exists = hear(AUDIO)
    np.testing.assert_array_equal(exists, real)
    np.testing.assert_allclose(soft[real], expected[real], **CLOSE)
    assert not soft[~real].any()


def test_spectrogram():
    clips = nn.AudioClips(
        jnp.asarray(AUDIO_FILE["samples"]), jnp.full(3, AUDIO_FILE["samples"].shape[1], jnp.int32)
    )
    features = nn.log_mel_spectrogram(clips, replace(AUDIO.mel, validity="complete"))
    # Float32 all through, and near silence the logarithm is steep.
    np.testing.assert_allclose(features.values, AUDIO_FILE["mel"], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        dict(window=12),
        dict(subsampling_mask="every"),
        dict(projection_norm="before"),
        dict(mel=replace(AUDIO.mel, window_offset=0.0)),
        dict(mel=replace(AUDIO.mel, padding=160)),
        dict(mel=replace(AUDIO.mel, validity="complete")),
    ],
    ids=lambda change: str(change)[:60],
)
def test_every_field_matters(change):
    """Rows c to f of the table of disagreements, one at a time."""
    expected, real = AUDIO_FILE["soft_tokens"], AUDIO_FILE["mask"]
    soft, exists = hear(replace(AUDIO, **change))
    same = exists.shape == real.shape and (exists == real).all()
    assert not same or np.abs(soft[real] - expected[real]).max() > 1e-3
