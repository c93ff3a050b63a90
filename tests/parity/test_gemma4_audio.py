"""The audio encoder of Gemma 4: spectrogram and soft tokens, here and with `transformers`."""

from dataclasses import replace
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equigemma import nn
from equigemma.config import ConformerConfig, MelConfig
from equigemma.preprocessing import preprocess_audio


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from parity import encoders  # noqa: E402
from transformers.models.gemma4 import configuration_gemma4 as theirs_config  # noqa: E402
from transformers.models.gemma4 import feature_extraction_gemma4 as theirs_mel  # noqa: E402
from transformers.models.gemma4 import modeling_gemma4 as theirs  # noqa: E402
from transformers.models.gemma4 import processing_gemma4 as theirs_processor  # noqa: E402


TEXT = 22
# They expect as many frequencies as the first convolution has channels.
CONFIG = ConformerConfig(
    mel=MelConfig(mels=32),
    width=20,
    layers=3,
    heads=2,
    channels=(32, 6),
    chunk=5,
    context=6,
    window=5,
    output_width=14,
)
CONFIGS = {
    "clipped": CONFIG,
    "not clipped": replace(CONFIG, clipping=None),
    # A chunk that is as long as its context.
    "longer chunks": replace(CONFIG, chunk=7, context=7, window=6),
}
# Float32, sums in other orders, three layers, soft tokens of size 3.
CLOSE = dict(rtol=0, atol=1e-5)


def their_pair(ours: ConformerConfig):
    config = theirs_config.Gemma4AudioConfig(
        hidden_size=ours.width,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        subsampling_conv_channels=ours.channels,
        conv_kernel_size=ours.kernel,
        attention_chunk_size=ours.chunk,
        attention_context_left=ours.context,
        output_proj_dims=ours.output_width,
        use_clipped_linears=ours.clipping is not None,
    )
    config._attn_implementation = "eager"
    tower = theirs.Gemma4AudioModel(config).eval()
    embedder = theirs.Gemma4MultimodalEmbedder(
        config, theirs_config.Gemma4TextConfig(hidden_size=TEXT)
    )
    encoders.randomise(tower)
    encoders.randomise(embedder, 1)
    fresh = nn.AudioEncoder(TEXT, ours, key=jax.random.key(0))
    return tower, embedder, encoders.put(fresh, encoders.audio_leaves(tower, embedder))


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Their tower with its embedder, and ours with the same weights."""
    return their_pair(CONFIGS[request.param])


def their_soft_tokens(tower, embedder, features: np.ndarray, mask: np.ndarray):
    with torch.no_grad():
        output = tower(torch.as_tensor(features), torch.as_tensor(mask))
        soft = embedder(output.last_hidden_state).numpy()
        return soft, output.attention_mask.numpy()


def sounds(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(0.1 * rng.normal(size=length)).astype(np.float32) for length in lengths]


def encode(model, clips):
    return eqx.filter_jit(lambda model, clips: model(model.features(clips)))(model, clips)


def test_soft_tokens_of_a_batch(pair):
    tower, embedder, ours = pair
    clips = sounds(16_000, 5_000, 321, 12_345)
    extractor = theirs_mel.Gemma4AudioFeatureExtractor(feature_size=32)
    inputs = extractor(clips, return_tensors="np")
    expected, mask = their_soft_tokens(
        tower, embedder, inputs["input_features"], inputs["input_features_mask"]
    )
    assert np.abs(expected[mask]).max() > 1
    # Ours are padded further; what is behind the end of a clip must not matter.
    soft, exists = encode(ours, preprocess_audio(clips, ours.config))
    assert np.asarray(exists).sum(-1).tolist() == mask.sum(-1).tolist() == [25, 8, 1, 20]
    np.testing.assert_allclose(np.asarray(soft)[np.asarray(exists)], expected[mask], **CLOSE)
    assert not np.asarray(soft)[~np.asarray(exists)].any()


def test_the_published_width():
    """One layer of the published encoder, half a second: the same numbers."""
    tower, embedder, ours = their_pair(ConformerConfig(layers=1))
    (clip,) = sounds(8_000)
    inputs = theirs_mel.Gemma4AudioFeatureExtractor()([clip], return_tensors="np")
    expected, mask = their_soft_tokens(
        tower, embedder, inputs["input_features"], inputs["input_features_mask"]
    )
    soft, exists = encode(ours, preprocess_audio([clip], ours.config))
    # Sums of a thousand products.
    np.testing.assert_allclose(
        np.asarray(soft)[np.asarray(exists)], expected[mask], rtol=0, atol=1e-4
    )


def signal(kind: str, length: int, seed: int) -> np.ndarray:
    """Float64 samples from −1 to 1."""
    rng, time = np.random.default_rng(seed), np.arange(length) / 16_000
    match kind:
        case "noise":
            return rng.uniform(-1, 1, length)
        case "tone":
            return np.sin(2 * np.pi * rng.uniform(0, 8_000) * time)
        case "click":
            return np.where(np.arange(length) == rng.integers(length), 1.0, 0.0)
    return np.zeros(length)


EXTRACTOR = theirs_mel.Gemma4AudioFeatureExtractor()
SIGNALS = dict(
    kind=st.sampled_from(["noise", "tone", "click", "silence"]), seed=st.integers(0, 999)
)


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(length=st.integers(321, 30_000), **SIGNALS)
@example(length=321, kind="noise", seed=0)
@example(length=60_000, kind="tone", seed=0)
def test_spectrograms_equal_those_of_their_extractor(length, kind, seed):
    """In float64, so that only the definition can differ, and the order of sums."""
    samples = signal(kind, length, seed)
    # As their `__call__` pads it. That goes on in float32.
    whole = np.pad(samples, (0, -length % 128))
    values, mask = EXTRACTOR._extract_spectrogram(whole, np.arange(len(whole)) < length)
    assert values.dtype == np.float64
    size = 30_000 if length <= 30_000 else 480_000
    with jax.enable_x64(True):
        padded = jnp.asarray(np.pad(samples, (0, size - length)))
        features = MEL(nn.AudioClips(padded, jnp.asarray(length, jnp.int32)))
        ours, exists = np.asarray(features.values), np.asarray(features.is_frame)
    assert ours.dtype == np.float64
    assert exists.sum() == mask.sum() and exists[: mask.sum()].all() and mask[: mask.sum()].all()
    # Rounding is 1e-16 of magnitudes up to 100, and the logarithm of the floor makes it 1e3 times
    # as much.
    np.testing.assert_allclose(ours[exists], values[mask], rtol=0, atol=1e-10)
    assert not ours[~exists].any()


MEL = jax.jit(lambda clips: nn.log_mel_spectrogram(clips, MelConfig()))


@pytest.mark.parametrize("kind", ["noise", "tone", "click", "silence"])
@pytest.mark.parametrize("length", [321, 4_001, 16_000, 29_999])
def test_float32(kind, length):
    """Both transform float32, which rounds every frequency by a few units of the last place of the
    loudest one; where that is near silence, the logarithm shows it."""
    expected = EXTRACTOR([signal(kind, length, seed=1)], return_tensors="np")
    features = MEL(preprocess_audio([signal(kind, length, seed=1)], ConformerConfig()))
    ours = np.asarray(features.values)[np.asarray(features.is_frame)]
    theirs = expected["input_features"][expected["input_features_mask"]]
    assert ours.shape == theirs.shape
    loudness = np.exp(theirs.max(axis=-1, keepdims=True) - theirs)
    assert (np.abs(ours - theirs) < 1e-5 + 4 * np.finfo(np.float32).eps * loudness).all()


@settings(max_examples=encoders.FUZZ, deadline=None, derandomize=True)
@given(length=st.integers(161, 480_000))
@example(length=161)
@example(length=480_000)
def test_numbers_of_soft_tokens_are_those_of_their_processor(length):
    mel = ConformerConfig().mel
    frames = nn.num_mel_frames(length, mel)
    halved = -(-frames // 2)
    extractor = SimpleNamespace(frame_length=mel.frame, hop_length=mel.hop)
    processor = SimpleNamespace(feature_extractor=extractor, audio_seq_length=750)
    expected = theirs_processor.Gemma4Processor._compute_audio_num_tokens(
        processor, np.zeros(length), mel.sample_rate
    )
    assert expected == -(-halved // 2)


def test_gradients_with_respect_to_samples(pair):
    """Through the spectrogram and the encoder, as torch has them; theirs is not differentiable
    before the spectrogram, so features are what both start from."""
    tower, embedder, ours = pair
    (clip,) = sounds(5_000)
    features = ours.features(preprocess_audio([clip], ours.config))
    count = int(np.asarray(features.is_frame).sum())
    values = np.asarray(features.values)[:, :count]
    mask = np.ones((1, count), bool)
    weights = np.random.default_rng(3).normal(size=(1, -(-(-(-count // 2)) // 2), TEXT))

    theirs_in = torch.as_tensor(values.copy()).requires_grad_()
    soft = embedder(tower(theirs_in, torch.as_tensor(mask)).last_hidden_state)
    (soft * torch.as_tensor(weights).float()).sum().backward()

    def value(values):
        soft, _ = ours(nn.AudioFeatures(values, tiny.host(mask, bool)))
        return jnp.sum(soft * tiny.host(weights, np.float32))

    gradient = jax.jit(jax.grad(value))(tiny.host(values, np.float32))
    expected = theirs_in.grad.numpy()
    assert np.abs(expected).max() > 0.1
    # Clipping is a corner: at a bound to the last bit, gradients may differ; there is none here.
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
