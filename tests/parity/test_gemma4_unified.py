"""Images and sound of Gemma 4 12B Unified, which has no encoders, here and with `transformers`."""

import ast
import math
from importlib.util import find_spec
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equigemma import nn
from equigemma.config import PatchConfig, RawAudioConfig
from equigemma.preprocessing import preprocess_audio, preprocess_images


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PIL = pytest.importorskip("PIL.Image", reason="images are resized by Pillow, an extra")

from parity import encoders  # noqa: E402
from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs_images  # noqa: E402
from transformers.models.gemma4_unified import (  # noqa: E402
    configuration_gemma4_unified as theirs_config,
)
from transformers.models.gemma4_unified import (  # noqa: E402
    feature_extraction_gemma4_unified as theirs_audio,
)
from transformers.models.gemma4_unified import modeling_gemma4_unified as theirs  # noqa: E402


TEXT = 22
CONFIG = PatchConfig(
    width=20, patch=12, positions=20, max_soft_tokens=8, budgets=(5, 8, 13), video_soft_tokens=5
)
PUBLISHED = PatchConfig()
# Float32, sums in other orders, soft tokens of size 3.
CLOSE = dict(rtol=0, atol=1e-5)


def patches_merge():
    """Their function, whose module cannot be imported without torchvision."""
    spec = find_spec("transformers.models.gemma4_unified.image_processing_gemma4_unified")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = [node for node in tree.body if getattr(node, "name", "") == "patches_merge"]
    space = {"torch": torch, "math": math}
    exec(compile(ast.Module(found, []), spec.origin, "exec"), space)
    return space["patches_merge"]


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def their_embedder(config: PatchConfig):
    vision = theirs_config.Gemma4UnifiedVisionConfig(
        patch_size=config.patch // 3,
        mm_embed_dim=config.width,
        mm_posemb_size=config.positions,
        output_proj_dims=config.width,
    )
    text = theirs_config.Gemma4UnifiedTextConfig(hidden_size=TEXT)
    embedder = theirs.Gemma4UnifiedVisionEmbedder(vision, text).eval()
    encoders.randomise(embedder)
    fresh = nn.PatchEmbedder(TEXT, config, key=jax.random.key(0))
    return embedder, encoders.put(fresh, encoders.patch_leaves(embedder))


@pytest.mark.parametrize("budget", [5, 8, 13])
def test_soft_tokens_of_images(budget):
    embedder, ours = their_embedder(CONFIG)
    sizes = [(50, 70), (31, 9), (24, 24), (5, 600)]
    patches = preprocess_images(pictures(*sizes), CONFIG, max_soft_tokens=budget)
    with torch.no_grad():
        expected = embedder(
            torch.as_tensor(np.array(patches.pixel_values)),
            torch.as_tensor(np.array(patches.positions)).long(),
        ).pooler_output.numpy()
    soft, real = np.asarray(eqx.filter_jit(ours)(patches)), np.asarray(patches.is_patch)
    assert np.abs(expected[real]).max() > 1 and len(set(real.sum(-1).tolist())) > 1
    np.testing.assert_allclose(soft[real], expected[real], **CLOSE)
    assert not soft[~real].any()


def test_the_published_size():
    embedder, ours = their_embedder(PUBLISHED)
    patches = preprocess_images(pictures((90, 200)), PUBLISHED, max_soft_tokens=70)
    with torch.no_grad():
        expected = embedder(
            torch.as_tensor(np.array(patches.pixel_values)),
            torch.as_tensor(np.array(patches.positions)).long(),
        ).pooler_output.numpy()
    soft, real = np.asarray(eqx.filter_jit(ours)(patches)), np.asarray(patches.is_patch)
    # Sums of several thousand products.
    np.testing.assert_allclose(soft[real], expected[real], rtol=0, atol=1e-4)


# Their processor resizes by torchvision alone; the 16-pixel patches of their other one, which
# resizes by Pillow, are merged by their function.
PROCESSOR = theirs_images.Gemma4ImageProcessorPil()
MERGE = patches_merge()
LENGTHS = st.floats(0, np.log(700)).map(lambda x: int(np.exp(x)))


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(height=LENGTHS, width=LENGTHS, budget=st.sampled_from([70, 140]), seed=st.integers(0, 99))
@example(height=1, width=10_000, budget=70, seed=0)
@example(height=480, width=640, budget=1120, seed=0)
def test_patches_are_theirs_merged(height, width, budget, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    small = PROCESSOR(
        [PIL.fromarray(image)], max_soft_tokens=budget, input_data_format="channels_last"
    )
    (count,) = small["num_soft_tokens_per_image"]
    values, positions = MERGE(
        torch.as_tensor(small["pixel_values"][:, : 9 * count]),
        torch.as_tensor(small["image_position_ids"][:, : 9 * count]),
        count,
    )
    ours = preprocess_images([image], PUBLISHED, max_soft_tokens=budget)
    assert ours.num_soft_tokens(1).tolist() == [count]
    np.testing.assert_array_equal(ours.pixel_values[:, :count], values.numpy())
    np.testing.assert_array_equal(ours.positions[:, :count], positions.numpy())
    assert not np.asarray(ours.pixel_values)[:, count:].any()
    assert (np.asarray(ours.positions)[:, count:] == -1).all()


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 30_000), min_size=1, max_size=4), seed=st.integers(0, 99))
@example(lengths=[640, 1, 641, 639], seed=0)
def test_frames_of_samples_equal_theirs(lengths, seed):
    rng = np.random.default_rng(seed)
    clips = [rng.normal(size=length).astype(np.float32) for length in lengths]
    expected = theirs_audio.Gemma4UnifiedAudioFeatureExtractor()(clips, return_tensors="np")
    features = FEATURES(preprocess_audio(clips, RawAudioConfig()))
    count = expected["input_features"].shape[1]
    np.testing.assert_array_equal(features.values[:, :count], expected["input_features"])
    np.testing.assert_array_equal(features.is_frame[:, :count], expected["input_features_mask"])
    assert not np.asarray(features.is_frame)[:, count:].any()


FEATURES = jax.jit(lambda clips: nn.audio_frames(clips, 640))


def test_soft_tokens_of_sound():
    config = RawAudioConfig()
    text = theirs_config.Gemma4UnifiedTextConfig(hidden_size=TEXT)
    embedder = theirs.Gemma4UnifiedMultimodalEmbedder(
        theirs_config.Gemma4UnifiedAudioConfig(), text
    ).eval()
    encoders.randomise(embedder)
    fresh = nn.FrameEmbedder(TEXT, config, key=jax.random.key(0))
    weight = encoders.array(embedder.embedding_projection.weight)
    ours = encoders.put(fresh, {"projection.weight": weight})
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=length).astype(np.float32) for length in (6_400, 100, 6_401)]
    inputs = theirs_audio.Gemma4UnifiedAudioFeatureExtractor()(clips, return_tensors="pt")
    with torch.no_grad():
        expected = embedder(inputs["input_features"]).numpy()
    mask = inputs["input_features_mask"].numpy()
    soft, exists = eqx.filter_jit(lambda model, x: model(model.features(x)))(
        ours, preprocess_audio(clips, config)
    )
    assert np.asarray(exists).sum(-1).tolist() == mask.sum(-1).tolist() == [10, 1, 11]
    np.testing.assert_allclose(np.asarray(soft)[np.asarray(exists)], expected[mask], **CLOSE)
