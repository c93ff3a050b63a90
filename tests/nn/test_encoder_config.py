"""Configs of the encoders: what they refuse, and the numbers of the published models."""

from dataclasses import replace

import pytest

from equigemma.config import (
    ConformerConfig,
    MelConfig,
    PatchConfig,
    RawAudioConfig,
    VisionTransformerConfig,
)


@pytest.mark.parametrize(
    "config, change, message",
    [
        (VisionTransformerConfig(), dict(width=0), "VisionTransformerConfig.width must be pos"),
        (VisionTransformerConfig(), dict(head_dim=6), "divisible by 4, .* got 6"),
        (
            VisionTransformerConfig(),
            dict(max_soft_tokens=300),
            r"one of the token budgets \(70, 140, 280, 560, 1120\), got 300",
        ),
        (VisionTransformerConfig(), dict(video_soft_tokens=71), "video_soft_tokens must be one"),
        (VisionTransformerConfig(), dict(positions=3359), "3360 patches .* got 3359"),
        (PatchConfig(), dict(positions=1119), "1120 patches .* got 1119"),
        (PatchConfig(), dict(layer_norm_epsilon=0.0), "layer_norm_epsilon must be positive"),
        (MelConfig(), dict(fft=319), "at least as long as a frame, got 319 for 320"),
        (MelConfig(), dict(padding=-1), "must not be negative, got -1"),
        (ConformerConfig(), dict(heads=3), "heads must divide its width; got 3 and 1024"),
        (ConformerConfig(), dict(channels=(0, 3)), r"channels must be positive, got \(0, 3\)"),
        (ConformerConfig(), dict(window=14), "at most its context, .* got 14 and 13"),
        (ConformerConfig(), dict(width=9, heads=3), "width must be even, .* got 9"),
        (RawAudioConfig(), dict(frame=0), "RawAudioConfig.frame must be positive, got 0"),
    ],
)
def test_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_they_can_be_static_under_jit():
    configs = (VisionTransformerConfig(), PatchConfig(), ConformerConfig(), RawAudioConfig())
    assert len({hash(config) for config in configs}) == 4
    assert all(config == replace(config) for config in configs)


def test_pixels_of_a_soft_token():
    assert VisionTransformerConfig().side == PatchConfig().side == 48
    assert (VisionTransformerConfig().pooling, PatchConfig().pooling) == (3, 1)
    assert (ConformerConfig().head_dim, ConformerConfig().hidden) == (128, 4096)
