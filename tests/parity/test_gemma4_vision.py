"""The vision encoder of Gemma 4: preprocessing and soft tokens, here and with `transformers`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equigemma import nn
from equigemma.config import VisionTransformerConfig
from equigemma.preprocessing import preprocess_images, preprocess_video
from equigemma.video import Video, timestamp


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
PIL = pytest.importorskip("PIL.Image", reason="images are resized by Pillow, an extra")

from parity import encoders  # noqa: E402
from transformers import video_utils  # noqa: E402
from transformers.models.gemma4 import configuration_gemma4 as theirs_config  # noqa: E402
from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs_images  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4 as theirs  # noqa: E402


WIDTH, HEADS, HEAD_DIM, TEXT = 20, 2, 12, 22
# 9 patches of 4 pixels make a soft token.
CONFIG = VisionTransformerConfig(
    width=WIDTH,
    layers=3,
    heads=HEADS,
    head_dim=HEAD_DIM,
    hidden=28,
    patch=4,
    positions=100,
    max_soft_tokens=8,
    budgets=(5, 8, 13),
    video_soft_tokens=5,
)
CONFIGS = {
    "clipped": CONFIG,
    "standardised": VisionTransformerConfig(
        **{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__}
        | {"clipping": None, "standardize": "stored"}
    ),
}
# Float32, sums in other orders, three layers, soft tokens of size 3.
CLOSE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Their tower with its embedder, and ours with the same weights."""
    ours = CONFIGS[request.param]
    config = theirs_config.Gemma4VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=ours.hidden,
        num_hidden_layers=ours.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        patch_size=ours.patch,
        pooling_kernel_size=ours.pooling,
        position_embedding_size=ours.positions,
        use_clipped_linears=ours.clipping is not None,
        standardize=ours.standardize is not None,
    )
    config._attn_implementation = "eager"
    tower = theirs.Gemma4VisionModel(config).eval()
    embedder = theirs.Gemma4MultimodalEmbedder(
        config, theirs_config.Gemma4TextConfig(hidden_size=TEXT)
    )
    encoders.randomise(tower)
    encoders.randomise(embedder, 1)
    fresh = nn.VisionEncoder(TEXT, ours, key=jax.random.key(0), dtype=jnp.float32)
    leaves = encoders.vision_leaves(tower, embedder, HEADS, HEAD_DIM)
    return tower, embedder, encoders.put(fresh, leaves)


def their_soft_tokens(tower, embedder, patches: nn.ImagePatches) -> np.ndarray:
    """The soft tokens of all images, one after the other."""
    with torch.no_grad():
        output = tower(
            torch.as_tensor(np.array(patches.pixel_values)),
            torch.as_tensor(np.array(patches.positions)).long(),
        )
        return embedder(output.last_hidden_state).numpy()


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


def encode(model, patches):
    return eqx.filter_jit(model)(patches)


SIZES = [(50, 70), (31, 9), (24, 24), (5, 600)]


@pytest.mark.parametrize("budget", [5, 8, 13])
def test_soft_tokens_of_a_batch(pair, budget):
    tower, embedder, ours = pair
    patches = preprocess_images(pictures(*SIZES), ours.config, max_soft_tokens=budget)
    counts = np.asarray(patches.num_soft_tokens(3))
    assert len(set(counts.tolist())) > 1 and counts.max() <= budget
    expected = their_soft_tokens(tower, embedder, patches)
    assert np.abs(expected).max() > 1
    soft = np.asarray(encode(ours, patches))
    assert soft.shape == (len(SIZES), budget, TEXT)
    real = np.arange(budget) < counts[:, None]
    np.testing.assert_allclose(soft[real], expected, **CLOSE)
    assert not soft[~real].any()


def test_the_bounds_cut_something_off(pair):
    """Else the comparison would say nothing about them."""
    tower, _, ours = pair
    patches = preprocess_images(pictures((50, 70)), ours.config)
    soft = encode(ours, patches)
    wide = eqx.tree_at(
        lambda model: [
            part.bounds
            for part in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nn.ClippedLinear))
            if isinstance(part, nn.ClippedLinear) and part.bounds is not None
        ],
        ours,
        replace_fn=lambda bounds: jnp.asarray([-jnp.inf, jnp.inf] * 2, bounds.dtype),
    )
    changed = np.abs(np.asarray(encode(wide, patches) - soft)).max()
    assert changed > 0.1 if ours.config.clipping else changed == 0


def test_every_layer_of_the_published_size():
    """One layer of the widths of both published encoders, a small image: the same numbers."""
    for sizes in (
        dict(width=768, heads=12, head_dim=64, hidden=3072),
        dict(width=1152, heads=16, head_dim=72, hidden=4304),
    ):
        ours = VisionTransformerConfig(**sizes, layers=1)
        config = theirs_config.Gemma4VisionConfig(
            hidden_size=ours.width,
            intermediate_size=ours.hidden,
            num_hidden_layers=1,
            num_attention_heads=ours.heads,
            num_key_value_heads=ours.heads,
            head_dim=ours.head_dim,
            use_clipped_linears=True,
        )
        config._attn_implementation = "eager"
        tower = theirs.Gemma4VisionModel(config).eval()
        embedder = theirs.Gemma4MultimodalEmbedder(
            config, theirs_config.Gemma4TextConfig(hidden_size=TEXT)
        )
        encoders.randomise(tower)
        encoders.randomise(embedder)
        fresh = nn.VisionEncoder(TEXT, ours, key=jax.random.key(0), dtype=jnp.float32)
        leaves = encoders.vision_leaves(tower, embedder, ours.heads, ours.head_dim)
        model = encoders.put(fresh, leaves)
        patches = preprocess_images(pictures((40, 60)), ours, max_soft_tokens=70)
        expected = their_soft_tokens(tower, embedder, patches)
        soft = np.asarray(encode(model, patches))[0, : len(expected)]
        # Sums of a thousand products.
        np.testing.assert_allclose(soft, expected, rtol=0, atol=1e-4)


# Spread evenly over orders of magnitude: extreme ratios are as frequent as others.
LENGTHS = st.floats(0, np.log(700)).map(lambda x: int(np.exp(x)))
PUBLISHED = VisionTransformerConfig()


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(height=LENGTHS, width=LENGTHS, budget=st.sampled_from([70, 140]), seed=st.integers(0, 99))
@example(height=1, width=10_000, budget=70, seed=0)
@example(height=3, width=3, budget=70, seed=0)
@example(height=672, width=960, budget=280, seed=0)  # stays as it is
@example(height=480, width=640, budget=1120, seed=0)
def test_patches_equal_those_of_the_pil_processor(height, width, budget, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    expected = PROCESSOR([PIL.fromarray(image)], max_soft_tokens=budget, **LAST)
    patches = preprocess_images([image], PUBLISHED, max_soft_tokens=budget)
    np.testing.assert_array_equal(patches.pixel_values, expected["pixel_values"])
    np.testing.assert_array_equal(patches.positions, expected["image_position_ids"])
    assert patches.num_soft_tokens(3).tolist() == expected["num_soft_tokens_per_image"]


PROCESSOR = theirs_images.Gemma4ImageProcessorPil()
# They guess which axis are the channels, which of 3 x 3 pixels cannot be guessed.
LAST = dict(input_data_format="channels_last")


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 10**5),
    width=st.integers(1, 10**5),
    budget=st.sampled_from(PUBLISHED.budgets),
)
@example(height=1, width=10**5, budget=1120)
def test_grids_are_those_of_their_processor(height, width, budget):
    expected = theirs_images.get_aspect_ratio_preserving_size(height, width, 16, 9 * budget, 3)
    rows, columns = nn.soft_token_grid(height, width, 48, budget)
    assert (48 * rows, 48 * columns) == expected
    assert 1 <= rows * columns <= budget


@pytest.mark.parametrize("size", [(31, 7), (9, 97), (48, 48), (201, 133), (1, 50)], ids=str)
def test_patches_that_are_made_on_the_device(size):
    (image,) = pictures(size)
    expected = preprocess_images([image], PUBLISHED, max_soft_tokens=70)
    make = jax.jit(lambda image: nn.image_patches(image, PUBLISHED, 70))
    patches = make(tiny.host(image, np.uint8))
    np.testing.assert_array_equal(patches.pixel_values, expected.pixel_values[0])
    np.testing.assert_array_equal(patches.positions, expected.positions[0])
    # Integers are rounded by up to half a grey level after each of two passes, and the weights of
    # the second stretch that of the first by at most 1.25. Of faint colours none is cut off.
    faint = (96 + image // 4).astype(np.uint8)
    rounded = preprocess_images([faint], PUBLISHED, max_soft_tokens=70).pixel_values[0]
    smooth = make(tiny.host(faint / 255, np.float32)).pixel_values
    np.testing.assert_allclose(smooth, rounded, rtol=0, atol=1.126 / 255)


@pytest.mark.parametrize("total", [1, 31, 32, 33, 100, 1000, 997])
def test_frames_and_time_stamps_are_those_of_their_processor(total):
    frames = np.zeros((total, 4, 5, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(total) % 256
    video = preprocess_video(Video(frames, fps=29.97), PUBLISHED)
    metadata = video_utils.VideoMetadata(total_num_frames=total, fps=29.97)
    metadata.frames_indices = list(range(total))
    if total >= 32:
        metadata.frames_indices = video_utils.default_sample_indices_fn(metadata, num_frames=32)
    expected = [f"{int(s // 60):02d}:{int(s % 60):02d}" for s in metadata.timestamps]
    assert list(video.timestamps) == expected
    chosen = preprocess_images(
        [frames[index] for index in metadata.frames_indices], PUBLISHED, max_soft_tokens=70
    )
    np.testing.assert_array_equal(video.patches.pixel_values, chosen.pixel_values)
    assert timestamp(59.999) == "00:59" and timestamp(3600) == "60:00"
