"""What holds of the encoders as functions: batches, padding, reach, derivatives, dtypes."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from equigemma import lora, nn
from equigemma.config import (
    ConformerConfig,
    MelConfig,
    PatchConfig,
    RawAudioConfig,
    VisionTransformerConfig,
)


TEXT = 11
BUDGETS = dict(max_soft_tokens=5, budgets=(5, 7), video_soft_tokens=5)
VISION = VisionTransformerConfig(
    width=14,
    layers=2,
    heads=3,
    head_dim=8,
    hidden=13,
    patch=2,
    positions=21,
    standardize="stored",
    **BUDGETS,
)
PATCHES = PatchConfig(width=14, patch=6, positions=7, **BUDGETS)
# A second of ten thousandths: frames of 6 samples, every 3.
MEL = MelConfig(sample_rate=1000, frame=6, hop=3, fft=8, mels=5, padding=3)
AUDIO = ConformerConfig(
    mel=MEL,
    width=14,
    layers=2,
    heads=2,
    channels=(7, 3),
    kernel=3,
    chunk=4,
    context=4,
    window=3,
    output_width=9,
    max_samples=240,
)
RAW = RawAudioConfig(frame=6, sample_rate=1000, max_samples=240)


def drawn(model, seed: int = 0):
    """Random weights, norms too; bounds that cut off a part of every tensor."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if jax.tree_util.keystr(path).endswith(".bounds"):
            return jnp.asarray([-1.3, 1.2, -1.1, 1.4], leaf.dtype)
        scale = 0.6 if leaf.ndim < 2 else leaf[0].size ** -0.5
        return jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, model)


VISION_MODELS = {
    "transformer": drawn(nn.VisionEncoder(TEXT, VISION, key=jax.random.key(0))),
    "attended padding": drawn(
        nn.VisionEncoder(TEXT, replace(VISION, padding_keys="attended"), key=jax.random.key(0))
    ),
    "raw": drawn(nn.PatchEmbedder(TEXT, PATCHES, key=jax.random.key(0))),
}
AUDIO_MODELS = {
    "conformer": drawn(nn.AudioEncoder(TEXT, AUDIO, key=jax.random.key(0))),
    "raw": drawn(nn.FrameEmbedder(TEXT, RAW, key=jax.random.key(0))),
}


def images(*shape: int, seed: int = 0) -> jax.Array:
    return tiny.host(np.random.default_rng(seed).integers(0, 256, shape), np.uint8)


def clips(samples: int, *lengths: int, dtype=np.float32) -> nn.AudioClips:
    rng = np.random.default_rng(0)
    sound = rng.normal(size=(len(lengths), samples))
    return nn.AudioClips(tiny.host(sound, dtype), tiny.host(lengths, np.int32))


run = eqx.filter_jit(lambda function, *arguments: function(*arguments), donate="none")


def see(model, patches):
    return run(lambda model, patches: model(patches), model, patches)


def hear(model, clips):
    return run(lambda model, clips: model(model.features(clips)), model, clips)


# Float32 is up to 2e-5 from float64 in these models, on values of up to 3: two orders of the same
# sums are up to twice that apart, and which is met depends on the processor.
CLOSE = dict(rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_batches_of_images(kind):
    model = VISION_MODELS[kind]
    patches = run(lambda pixels: nn.image_patches(pixels, model.config), images(2, 3, 9, 20, 3))
    together = see(model, patches)
    assert together.shape == (2, 3, 5, TEXT) and np.abs(together).max() > 0.5
    single = see(model, jax.tree.map(lambda leaf: leaf[1, 2], patches))
    mapped = run(lambda model, x: jax.vmap(jax.vmap(model))(x), model, patches)
    np.testing.assert_allclose(together[1, 2], single, **CLOSE)
    np.testing.assert_allclose(mapped, together, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_padding_of_images(kind):
    """An image has the same soft tokens in an array for larger ones."""
    model = VISION_MODELS[kind]
    patches = nn.image_patches(images(9, 20, 3), model.config)
    assert patches.num_soft_tokens(model.config.pooling) == 3
    more = 2 * model.config.pooling**2
    rng = np.random.default_rng(1)
    # Neither does it matter what padding consists of.
    noise = tiny.host(rng.normal(size=(more, patches.pixel_values.shape[-1])), np.float32)
    padded = nn.ImagePatches(
        jnp.concatenate([patches.pixel_values, noise]),
        jnp.concatenate([patches.positions, jnp.full((more, 2), -1, jnp.int32)]),
    )
    before, after = np.asarray(see(model, patches)), np.asarray(see(model, padded))
    assert after.shape[0] == before.shape[0] + 2
    assert not before[3:].any() and not after[3:].any()
    if kind == "attended padding":
        assert np.abs(after[:3] - before[:3]).max() > 0.01
    else:
        np.testing.assert_allclose(after[:3], before[:3], **CLOSE)


def test_positions_of_patches_matter():
    """Patches in another order, with their positions, are the same image."""
    model = VISION_MODELS["transformer"]
    patches = nn.image_patches(images(9, 20, 3), VISION)
    order = np.random.default_rng(0).permutation(patches.positions.shape[0])
    shuffled = jax.tree.map(lambda leaf: leaf[order], patches)
    before, after = see(model, patches), see(model, shuffled)
    np.testing.assert_allclose(before, after, **CLOSE)
    moved = nn.ImagePatches(patches.pixel_values[order], patches.positions)
    assert np.abs(see(model, moved)[:3] - before[:3]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUDIO_MODELS)
def test_batches_of_clips(kind):
    model = AUDIO_MODELS[kind]
    batch = clips(120, 120, 77, 31)
    soft, exists = hear(model, batch)
    assert np.abs(soft).max() > 0.5 and len(set(np.asarray(exists).sum(-1).tolist())) == 3
    np.testing.assert_array_equal(np.asarray(soft)[~np.asarray(exists)], 0)
    for index in range(3):
        one, there = hear(model, jax.tree.map(lambda leaf: leaf[index], batch))
        np.testing.assert_allclose(one, soft[index], **CLOSE)
        np.testing.assert_array_equal(there, exists[index])
    mapped, there = run(
        lambda model, x: jax.vmap(lambda x: model(model.features(x)))(x), model, batch
    )
    np.testing.assert_allclose(mapped, soft, **CLOSE)
    np.testing.assert_array_equal(there, exists)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUDIO_MODELS)
@pytest.mark.parametrize("length", [8, 60, 61, 77])
def test_padding_of_clips(kind, length):
    """A clip has the same soft tokens in an array for longer ones, and as noise behind its end."""
    model = AUDIO_MODELS[kind]
    short, long = clips(77, length), clips(240, length)
    long = nn.AudioClips(long.samples.at[:, :77].set(short.samples), long.lengths)
    (before, there), (after, still_there) = hear(model, short), hear(model, long)
    count = int(np.asarray(there).sum())
    assert count == np.asarray(still_there).sum() >= 1
    np.testing.assert_allclose(after[0, :count], before[0, :count], **CLOSE)


def reach(config: ConformerConfig, taps: int) -> np.ndarray:
    """How much each frame of a conformer's layer depends on each: the size of the Jacobian."""
    from equigemma.nn._conformer import ConformerBlock

    config = replace(config, kernel=taps)
    block = drawn(ConformerBlock(config, key=jax.random.key(0), dtype=jnp.dtype("float32")))
    x, exists = tiny.normal(1, 1, 15, config.width), jnp.ones((1, 15), bool)
    jacobian = run(lambda block, x: jax.jacrev(lambda x: block(x, exists))(x), block, x)
    return np.abs(np.asarray(jacobian)).max(axis=(0, 2, 3, 5))


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("taps", [1, 2])
def test_how_far_a_layer_of_the_conformer_reaches(window, taps):
    """A window of W keys and a convolution of K taps reach W + K − 2 frames back, none ahead."""
    sizes = reach(replace(AUDIO, window=window), taps)
    query, key = np.indices(sizes.shape)
    distance = query - key
    inside = (distance >= 0) & (distance <= window + taps - 2)
    assert (sizes[~inside] == 0).all()
    assert (sizes[inside] > 1e-6).all()


def test_every_patch_attends_to_every_patch():
    model = VISION_MODELS["transformer"]
    patches = nn.image_patches(images(9, 20, 3), VISION)

    def one_layer(values):
        tower = eqx.tree_at(lambda tower: tower.layers, model.tower, model.tower.layers[:1])
        return tower(nn.ImagePatches(values, patches.positions))

    jacobian = jax.jit(jax.jacrev(one_layer))(patches.pixel_values)
    sizes = np.abs(np.asarray(jacobian)).max(axis=(1, 3))
    real = np.asarray(patches.is_patch)
    assert (sizes[real][:, real] > 1e-6).all()
    assert (sizes[real][:, ~real] == 0).all()


STEP = 1e-6


def check_differences(value, x) -> None:
    """Reverse and forward mode against a central difference, in float64.

    The difference is off by the third derivative times the step squared, and by the rounding of
    the value over the step: 1e-10 of a value.
    """
    rng = np.random.default_rng(5)
    change = jnp.asarray(rng.normal(size=x.shape))
    gradient = jax.jit(jax.grad(value))(x)
    assert gradient.dtype == jnp.float64
    reverse = float(jnp.sum(gradient * change))
    forward = float(jax.jit(lambda x: jax.jvp(value, (x,), (change,))[1])(x))
    function = jax.jit(value)
    difference = float((function(x + STEP * change) - function(x - STEP * change)) / (2 * STEP))
    assert abs(reverse) > 1e-2
    np.testing.assert_allclose([forward, difference], reverse, rtol=1e-6)


def widened(model):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION_MODELS)
def test_gradients_with_respect_to_pixels(kind):
    """From the pixels of an image that is yet to be resized."""
    with jax.enable_x64(True):
        model = widened(VISION_MODELS[kind])
        rng = np.random.default_rng(4)
        pixels = jnp.asarray(rng.uniform(size=(9, 20, 3)))
        cotangent = jnp.asarray(rng.normal(size=(5, TEXT)))

        def value(pixels):
            return jnp.sum(model(nn.image_patches(pixels, model.config)) * cotangent)

        check_differences(value, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AUDIO_MODELS)
def test_gradients_with_respect_to_samples(kind):
    """Through the spectrogram, of raw samples; those behind the end of a clip have none."""
    with jax.enable_x64(True):
        model = widened(AUDIO_MODELS[kind])
        batch = clips(77, 60, dtype=np.float64)
        rng = np.random.default_rng(4)
        soft, _ = jax.eval_shape(model, jax.eval_shape(model.features, batch))
        cotangent = jnp.asarray(rng.normal(size=soft.shape))

        def value(samples):
            soft, _ = model(model.features(nn.AudioClips(samples, batch.lengths)))
            return jnp.sum(soft * cotangent)

        check_differences(value, batch.samples)
        gradient = np.asarray(jax.jit(jax.grad(value))(batch.samples))
        # The last frame that is real ends at the last sample but one, at most.
        assert not gradient[0, 60:].any() and np.abs(gradient[0, :57]).max() > 0


def test_silence_has_a_derivative():
    features = AUDIO_MODELS["conformer"].features
    quiet = nn.AudioClips(jnp.zeros((1, 77)), jnp.asarray([77], jnp.int32))

    def value(samples):
        return jnp.sum(features(nn.AudioClips(samples, quiet.lengths)).values)

    gradient = jax.jit(jax.grad(value))(quiet.samples)
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.slow
def test_bounds_and_statistics_are_not_trained():
    """No gradient reaches them, whatever is differentiated."""
    model = VISION_MODELS["transformer"]
    patches = nn.image_patches(images(9, 20, 3), VISION)
    grad = eqx.filter_jit(eqx.filter_grad(lambda model: jnp.sum(model(patches) ** 2)))
    gradient = grad(model)
    clipped = [
        part
        for part in jax.tree.leaves(gradient, is_leaf=lambda x: isinstance(x, nn.ClippedLinear))
        if isinstance(part, nn.ClippedLinear)
    ]
    assert len(clipped) == 7 * VISION.layers
    for part in clipped:
        assert not np.asarray(part.bounds).any()
        assert np.abs(np.asarray(part.linear.weight)).max() > 0
    assert not np.asarray(gradient.standardize.bias).any()
    assert not np.asarray(gradient.standardize.scale).any()
    # Infinite bounds of a fresh model neither: no 0 · ∞ on the way.
    fresh = nn.VisionEncoder(TEXT, VISION, key=jax.random.key(0))
    optimizer = optax.sgd(0.1)
    updates, _ = optimizer.update(grad(fresh), optimizer.init(fresh))
    stepped = eqx.apply_updates(fresh, updates)
    bounds = stepped.tower.layers[0].gate.bounds
    np.testing.assert_array_equal(bounds, [-np.inf, np.inf, -np.inf, np.inf])


def test_fresh_encoders():
    """Random weights, soft tokens of unit size, no clipping yet."""
    models = (
        nn.VisionEncoder(TEXT, VISION, key=jax.random.key(1)),
        nn.PatchEmbedder(TEXT, PATCHES, key=jax.random.key(1)),
    )
    for model in models:
        soft = np.asarray(see(model, nn.image_patches(images(9, 20, 3), model.config)))
        assert 0.3 < soft[:3].std() < 3
    models = (
        nn.AudioEncoder(TEXT, AUDIO, key=jax.random.key(1)),
        nn.FrameEmbedder(TEXT, RAW, key=jax.random.key(1)),
    )
    for model in models:
        soft, _ = hear(model, clips(120, 120))
        assert 0.3 < np.asarray(soft).std() < 3


@pytest.mark.slow
def test_half_precision():
    """In bfloat16 throughout, and close to float32: the norms keep rounding from growing."""
    batch = clips(120, 120)
    patches = nn.image_patches(images(9, 20, 3), VISION)
    for model, give in (
        (VISION_MODELS["transformer"], lambda model, dtype: see(model, cast(patches, dtype))),
        (VISION_MODELS["raw"], lambda model, dtype: see(model, cast(RAW_PATCHES, dtype))),
        (
            AUDIO_MODELS["conformer"],
            lambda model, dtype: run(
                lambda m, f: m(f)[0], model, cast(model.features(batch), dtype)
            ),
        ),
    ):
        wide = np.asarray(give(model, jnp.float32))
        narrow = give(cast(model, jnp.bfloat16), jnp.bfloat16)
        assert narrow.dtype == jnp.bfloat16
        error = np.abs(np.asarray(narrow.astype(jnp.float32)) - wide)
        # A few dozen roundings to 8 bits on the way.
        assert error.mean() < 0.05 * np.abs(wide).max()


def cast(tree, dtype):
    def one(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


RAW_PATCHES = nn.image_patches(images(9, 20, 3), PATCHES)


def test_adapters_go_around_every_linear_map():
    model = VISION_MODELS["transformer"]
    adapted = lora.add(model, rank=2, key=jax.random.key(0), where=lambda path, _: True)
    # Seven in each layer, the patches, and the projection.
    assert len(lora.adapters(adapted)) == 7 * VISION.layers + 2
    patches = nn.image_patches(images(9, 20, 3), VISION)
    np.testing.assert_allclose(see(adapted, patches), see(model, patches), **CLOSE)


def test_clips_that_are_too_short_for_a_frame():
    with pytest.raises(ValueError, match="at least 4 samples for a frame .* got 3"):
        AUDIO_MODELS["conformer"].features(clips(3, 3))
