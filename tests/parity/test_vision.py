"""Tiny random Gemma 3 with images of `transformers`: saved there, loaded here, and the other way.

Configs and weights go through files. The same logits at every position, soft tokens included, of
rows with different numbers of images, whole and through our cache.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import nn
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.checkpoint.hf._config import read_config
from equigemma.checkpoint.hf._config_write import write_config


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


# Ids up to 108 are needed: that is two line ends, which no config of theirs names.
VOCAB, START, END, SOFT = 113, 109, 110, 112
PIXELS, TOKENS_PER_IMAGE, WINDOW = 12, 4, 7
# Both sum in float32 in orders of their own; logits reach 30, there are five layers and a tower.
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-4)


def their_config(**vision):
    return transformers.Gemma3Config(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=22,
            intermediate_size=29,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=10,
            query_pre_attn_scalar=10,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=dict(
            hidden_size=15,
            intermediate_size=17,
            num_hidden_layers=2,
            num_attention_heads=5,
            image_size=PIXELS,
            patch_size=2,
        )
        | vision,
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=SOFT,
    )


def randomise(model) -> None:
    """Weights that matter, also in norms and biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name or "layer_norm" in name or name.endswith("bias"):
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)


def from_folder(folder, dtype=torch.float32):
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=dtype
    )
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Their model and ours, through a folder that they wrote."""
    folder = tmp_path_factory.mktemp("vision")
    config = their_config()
    config._attn_implementation = "eager"
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, dtype="float32"), folder


@cache
def prompts() -> np.ndarray:
    """Three rows with two images, one and none, of different length; −1 is padding."""
    rng = np.random.default_rng(0)
    rows = np.full((3, 13), -1)
    for row, (length, images) in enumerate([(13, (2, 9)), (9, (4,)), (5, ())]):
        rows[row, :length] = rng.integers(3, 100, length)
        rows[row, list(images)] = START
    return rows


def pictures(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (3, 2, height, width, 3)).astype(np.uint8)


def their_logits(model, tokens: np.ndarray, images: np.ndarray) -> np.ndarray:
    """`tokens` as `insert_image_tokens` gives them; of each row, the images that it has."""
    is_image_token = tokens < -1
    used = is_image_token.sum(-1) // TOKENS_PER_IMAGE
    pixels = np.asarray(nn.preprocess_images(tiny.host(images, np.uint8), PIXELS))
    chosen = np.concatenate([row[:count] for row, count in zip(pixels, used, strict=True)])
    real = tokens != -1
    with torch.no_grad():
        output = model(
            input_ids=torch.as_tensor(
                np.where(is_image_token, model.config.image_token_id, np.where(real, tokens, 0))
            ),
            attention_mask=torch.as_tensor(real).long(),
            token_type_ids=torch.as_tensor(is_image_token).long(),
            pixel_values=torch.as_tensor(np.moveaxis(chosen, -1, 1).copy()),
            use_cache=False,
        )
    return output.logits.float().numpy()


def inserted(model: eg.Transformer, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(nn.insert_image_tokens(tiny.host(tokens, np.int32), model.config.vision, 2))


SIZES = [(PIXELS, PIXELS), (31, 7), (5, 23)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_position(pair, size):
    theirs, ours, _ = pair
    images = pictures(*size)
    tokens = inserted(ours, prompts())
    expected = their_logits(theirs, tokens, images)
    assert np.abs(expected).max() > 1
    soft = tiny.call(ours, "encode_images", tiny.host(images, np.uint8))
    hidden, _ = tiny.call(ours, "trunk", tiny.host(tokens, np.int32), soft_tokens=soft)
    logits = tiny.call(ours, "unembed", hidden)
    real = tokens != -1
    np.testing.assert_allclose(np.asarray(logits)[real], expected[real], **CLOSE)

    # Of what is in the prompt; an image counts as its first newline.
    output = tiny.run(ours, tiny.host(prompts(), np.int32), images=tiny.host(images, np.uint8))
    places = np.asarray(
        nn.indices_after_insertion(tiny.host(prompts(), np.int32), ours.config.vision, 2)
    )
    picked = np.take_along_axis(expected, places[..., None], axis=1)
    real = prompts() != -1
    np.testing.assert_allclose(np.asarray(output.logits)[real], picked[real], **CLOSE)


def test_images_change_what_follows_them_only(pair):
    _, ours, _ = pair
    images = pictures(PIXELS, PIXELS)
    other = images.copy()
    other[0, 1] = 255 - other[0, 1]
    tokens = tiny.host(prompts(), np.int32)
    before, after = (
        np.asarray(tiny.run(ours, tokens, images=tiny.host(each, np.uint8)).logits)
        for each in (images, other)
    )
    # The second image of the first row is at place 9.
    np.testing.assert_array_equal(before[0, :10], after[0, :10])
    assert np.abs(before[0, 10:] - after[0, 10:]).max() > 1e-2
    np.testing.assert_array_equal(before[1:], after[1:])


@pytest.mark.parametrize("chunks", [(10, 13, 4), (9, 1, 1, 7, 5, 4), (27,)], ids=str)
def test_through_our_cache(pair, chunks):
    theirs, ours, _ = pair
    tokens = inserted(ours, prompts())[:1]
    images = pictures(31, 7)[:1]
    expected = their_logits(theirs, tokens, images)
    soft = tiny.call(ours, "encode_images", tiny.host(images, np.uint8))
    cache = tiny.empty_cache(ours.config, (1,), capacity=tokens.shape[-1])
    pieces, start = [], 0
    for size in chunks:
        piece = tiny.host(tokens[:, start : start + size], np.int32)
        hidden, cache = tiny.call(ours, "trunk", piece, soft_tokens=soft, cache=cache)
        pieces.append(tiny.call(ours, "unembed", hidden))
        start += size
    assert start == tokens.shape[-1]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, **CLOSE)


def test_what_we_save_they_load(pair, tmp_path):
    theirs, ours, _ = pair
    eg.save(ours, tmp_path / "ours")
    again = from_folder(tmp_path / "ours")
    expected = theirs.state_dict()
    for name, weight in again.state_dict().items():
        if ".head." not in name:
            assert torch.equal(weight, expected[name]), name
    tokens, images = inserted(ours, prompts()), pictures(PIXELS, PIXELS)
    real = tokens != -1
    np.testing.assert_allclose(
        their_logits(again, tokens, images)[real], their_logits(theirs, tokens, images)[real]
    )


def test_text_only(pair):
    theirs, ours, folder = pair
    text = load_model(folder, dtype="float32", text_only=True)
    assert text.vision is None and text.config == ours.config.text_only()
    tokens = np.where(prompts() == START, 5, prompts())[:1]
    with torch.no_grad():
        expected = theirs(input_ids=torch.as_tensor(tokens), use_cache=False).logits.numpy()
    output = tiny.run(text, tiny.host(tokens, np.int32))
    np.testing.assert_allclose(output.logits, expected, **CLOSE)
    with pytest.raises(
        ValueError, match="Images were given, but this model reads text only: it has no"
    ):
        text(tiny.host(tokens, np.int32), images=tiny.host(pictures(3, 3)[:1], np.uint8))


@pytest.mark.parametrize("size", [(PIXELS, PIXELS), (53, 31), (7, 97)], ids=str)
def test_pixels_are_those_of_their_processor(size):
    images = pictures(*size)[0]
    processor = transformers.Gemma3ImageProcessor(
        size=dict(height=PIXELS, width=PIXELS), do_pan_and_scan=False
    )
    theirs = processor(images=list(images), return_tensors="np", input_data_format="channels_last")
    ours = np.moveaxis(np.asarray(nn.preprocess_images(tiny.host(images, np.uint8), PIXELS)), -1, 1)
    # They round colours to whole numbers after resizing, which are 2/255 apart here.
    np.testing.assert_allclose(ours, theirs["pixel_values"], rtol=0, atol=1.01 / 127.5)


def test_configs_both_ways():
    config = read_config(their_config().to_dict() | {"transformers_version": "5"})
    assert config.vision == replace(
        eg.config.SigLIPConfig(),
        pixels=PIXELS,
        patch=2,
        width=15,
        layers=2,
        heads=5,
        hidden=17,
        num_soft_tokens=TOKENS_PER_IMAGE,
        start=START,
        end=END,
    )
    assert read_config(write_config(config)) == config
    for change, message in [
        ({"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ({"num_channels": 4}, "vision_config.num_channels is 4"),
        ({"image_size": 13}, "SigLIPConfig.patch must divide pixels"),
        ({"novel": 1}, "not supported: vision_config.novel"),
    ]:
        data = their_config().to_dict()
        data["vision_config"] = data["vision_config"] | change
        with pytest.raises(CheckpointError, match=message):
            read_config(data)
