"""From images to answers: kinds of images, prompts, generation, files, the shim."""

import base64
import io
from pathlib import Path

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import equigemma as eg
from equigemma import linen, nn, sampling
from equigemma.checkpoint import CheckpointError, load_model
from equigemma.images import Picture, as_rgb
from equigemma.quantize import int8
from equigemma.text import encode_prompts


PIL = pytest.importorskip("PIL.Image", reason="reading files is the extra `images`")

# Ids of the tiny vocabulary that nothing else in these tests uses.
VISION = tiny.replace(tiny.VISION, start=273, end=274, newline=108)
CONFIG = tiny.seeing(formats.CONFIGS["gemma3"], VISION)
MODEL = formats.model(CONFIG)
TOKENIZER = formats.tokenizer()


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


# Kinds of images.


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp"])
def test_files(kind, tmp_path):
    path = tmp_path / f"image.{kind}"
    PIL.fromarray(picture(7, 11)).save(path)
    array = as_rgb(path)
    assert array.shape == (7, 11, 3) and array.dtype == np.uint8
    with PIL.open(path) as image:
        np.testing.assert_array_equal(array, np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(as_rgb(str(path)), array)


def test_grey_and_transparent():
    grey = picture(5, 3, 1)
    for given in (grey, grey[..., 0], PIL.fromarray(grey[..., 0]), jnp.asarray(grey)):
        np.testing.assert_array_equal(as_rgb(given), np.repeat(grey, 3, axis=-1))
    colours = picture(5, 3, 4)
    colours[..., 3] = [255, 0, 128]
    for given in (colours, PIL.fromarray(colours)):
        shown = as_rgb(given)
        np.testing.assert_array_equal(shown[:, 0], colours[:, 0, :3])
        assert (shown[:, 1] == 255).all()
        half = colours[:, 2, :3] * (128 / 255) + 127
        np.testing.assert_allclose(shown[:, 2], half, atol=0.51)  # rounded
    both = np.concatenate([grey, colours[..., 3:]], axis=-1)
    np.testing.assert_array_equal(as_rgb(both)[:, 0], np.repeat(grey[:, 0], 3, axis=-1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_of_pillow(mode):
    image = PIL.fromarray(picture(5, 3))
    if mode == "I;16":
        image = PIL.fromarray(np.full((5, 3), 65_535, np.uint16))
    elif mode == "I":
        image = PIL.fromarray(np.full((5, 3), 65_535, np.int32))
    elif mode == "F":
        image = PIL.fromarray(np.ones((5, 3), np.float32))
    else:
        image = image.convert(mode)
    array = as_rgb(image)
    assert array.shape == (5, 3, 3) and array.dtype == np.uint8
    if mode in ("I;16", "I", "F"):
        assert (array == 255).all()


def test_how_the_camera_was_held(tmp_path):
    image = PIL.fromarray(picture(5, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "held.png", exif=exif)
    np.testing.assert_array_equal(as_rgb(tmp_path / "held.png"), np.rot90(picture(5, 3), -1))
    np.testing.assert_array_equal(as_rgb(image), np.rot90(picture(5, 3), -1))
    with PIL.open(tmp_path / "held.png") as opened:
        np.testing.assert_array_equal(as_rgb(opened), np.rot90(picture(5, 3), -1))


def test_numbers_of_many_bits():
    values = np.array([[-3, 0, 100, 255, 256, 9000]])
    shown = [0, 0, 100, 255, 255, 255]
    assert as_rgb(PIL.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == shown
    assert as_rgb(PIL.fromarray(values.astype(np.float32)))[0, :, 0].tolist() == shown
    assert as_rgb(PIL.fromarray(values.clip(0).astype(np.uint16)))[0, :, 0].tolist() == shown
    # Pillow would show these black.
    shares = np.array([[0, 0.5, 1]], np.float32)
    assert as_rgb(PIL.fromarray(shares))[0, :, 0].tolist() == [0, 128, 255]


def test_a_path_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    PIL.fromarray(picture(5, 3)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(as_rgb("~/x.png"), picture(5, 3))


def test_an_image_in_a_url(tmp_path):
    PIL.fromarray(picture(5, 3)).save(tmp_path / "x.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "x.png").read_bytes()).decode()
    np.testing.assert_array_equal(as_rgb(url), picture(5, 3))
    shown = Picture(url)
    assert shown == Picture(tmp_path / "x.png") and shown.path == url
    assert repr(shown) == f"Picture({url[:40]}…, 5 by 3 pixels)"


def test_damaged_files(tmp_path):
    whole = io.BytesIO()
    PIL.fromarray(picture(99, 99)).save(whole, "jpeg")
    says = {
        "cut.jpg": (whole.getvalue()[:700], r"it is damaged or cut off \(.*truncated"),
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"hello", "it is no image that is known"),
    }
    for name, (data, reason) in says.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: {reason}"):
            as_rgb(tmp_path / name)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((3, 3, 3)), r"uint8\[height, width\].*got float64\[3, 3, 3\]"),
        (np.zeros((3, 3, 5), np.uint8), r"1 to 4 channels, got uint8\[3, 3, 5\]"),
        (np.zeros((2, 3, 3, 3), np.uint8), r"got uint8\[2, 3, 3, 3\]"),
        (np.zeros((0, 3, 3), np.uint8), "at least one pixel"),
        ("nowhere.png", "nowhere.png cannot be read as an image: there is no such file"),
        (__file__, "cannot be read as an image: it is no image"),
        (".", "cannot be read as an image: it is a folder"),
        ("", "cannot be read as an image"),
        ("~nobody-here/x.png", "cannot be read as an image: there is no such user"),
        (
            "https://example.com/cat.png",
            "nothing is downloaded here. `curl -LO https://example.com/cat.png` does it; pass the",
        ),
        (Path("https://example.com/cat.png"), "nothing is downloaded here"),
        ("file:///cat.png", "it must be a path, without a protocol in front"),
        ("data:image/png;base64,???", "with the file in base64 after the comma"),
        ("data:image/png,abc", "with the file in base64 after the comma"),
        ("data:image/png;base64,aGVsbG8=", "data:image/png.* it is no image that is known"),
        (None, r"An image must be uint8.*, got object\[\]; or else a path or an image of Pi"),
    ],
)
def test_what_is_no_image(image, says):
    with pytest.raises(ValueError, match=says):
        as_rgb(image)


# Prompts.


def test_images_stand_where_the_prompt_says():
    image = picture(9, 5)
    tokens, soft = encode_prompts(
        MODEL, TOKENIZER, ["he<start_of_image>llo<start_of_image>", "hello"], [[image] * 2, image]
    )
    first, second = tokens.tolist()
    he, llo = TOKENIZER.encode("he"), TOKENIZER.encode("llo", bos=False)

    def block(*ids):
        return [108, 273, *ids, 274, 108]

    assert first == [*he, *block(-2, -3, -4, -5), *llo, *block(-6, -7, -8, -9)]
    bos, *rest = TOKENIZER.encode("hello")
    expected = [bos, *block(-2, -3, -4, -5), *rest]
    assert second == expected + [-1] * (len(first) - len(expected))
    assert soft.shape == (2, 2, 4, CONFIG.width)
    seen = tiny.call(MODEL, "encode_images", tiny.host(image, np.uint8))
    np.testing.assert_allclose(soft[0, 0], seen, atol=1e-5)
    np.testing.assert_array_equal(soft[1, 1], 0)


def test_other_special_tokens_stay_text():
    tokens, _ = encode_prompts(MODEL, TOKENIZER, ["<start_of_image><end_of_turn>"], [picture(2, 2)])
    end_of_turn = TOKENIZER.special.end_of_turn
    assert end_of_turn is not None and end_of_turn not in tokens[0].tolist()


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("<start_of_image>hello", [picture(2, 2)] * 2, r"1 times, and 2 image\(s\) were given"),
        (["a", "b"], [[picture(2, 2)]], "2 prompts and images for 1"),
        (["a", "<start_of_image>"], [[picture(2, 2)], []], r"1 times, and 0 image\(s\)"),
        (["a", ""], [[picture(2, 2)], []], "A prompt is empty"),
    ],
)
def test_images_that_fit_no_prompt(prompt, images, says):
    with pytest.raises(ValueError, match=says):
        eg.generate(MODEL, TOKENIZER, prompt, images=images)


def test_a_model_of_text_says_so():
    text = formats.model(formats.CONFIGS["gemma3"])
    with pytest.raises(ValueError, match="this model reads text only: it has no vision tower"):
        eg.generate(text, TOKENIZER, "hello", images=picture(2, 2))


# Generation.


@pytest.mark.slow
def test_generated_tokens_are_those_of_whole_passes():
    images = [picture(9, 5, seed=1), picture(31, 7, seed=2)]
    tokens, soft = encode_prompts(MODEL, TOKENIZER, ["hello"], [images])
    generated = sampling.generate(MODEL, tokens, max_new_tokens=5, soft_tokens=soft).tokens[0]
    seen = np.full(tokens.shape[1] + 5, -1)
    seen[: tokens.shape[1]] = tokens[0]
    for step in range(5):
        hidden, _ = tiny.call(MODEL, "trunk", tiny.host(seen, np.int32), soft_tokens=soft[0])
        logits = tiny.call(MODEL, "unembed", hidden)
        seen[tokens.shape[1] + step] = logits[tokens.shape[1] + step - 1].argmax()
    assert generated.tolist() == seen[tokens.shape[1] :].tolist()


@pytest.mark.slow
def test_a_list_gives_what_each_prompt_gives_alone():
    prompts = ["hello<start_of_image>hotel", "h", "to <start_of_image> and <start_of_image>"]
    images = [[picture(5, 5)], [], [picture(9, 3, seed=1), picture(3, 9, 4, seed=2)]]
    options = {"max_new_tokens": 7, "stop_tokens": ()}
    together = eg.generate(MODEL, TOKENIZER, prompts, images=images, **options)
    alone = [
        eg.generate(MODEL, TOKENIZER, prompt, images=each or None, **options)
        for prompt, each in zip(prompts, images, strict=True)
    ]
    assert together == alone
    other = [[picture(5, 5, seed=3)], *images[1:]]
    assert eg.generate(MODEL, TOKENIZER, prompts, images=other, **options)[1:] == together[1:]


@pytest.mark.slow
def test_streamed_pieces_join_to_the_whole_text():
    options = {"images": picture(4, 6), "max_new_tokens": 9, "stop_tokens": ()}
    pieces = eg.stream(MODEL, TOKENIZER, "hello", **options)
    assert "".join(pieces) == eg.generate(MODEL, TOKENIZER, "hello", **options)


@pytest.mark.slow
@pytest.mark.parametrize("before", range(27, 33))
def test_long_prompts_are_cut_between_images_only(before):
    # 32 is the smallest chunk: one image begins before that place, or ends behind it.
    row = np.full(before + 40, 3)
    row[before : before + 4] = [-2, -3, -4, -5]
    row[before + 10 : before + 14] = [-6, -7, -8, -9]
    soft = tiny.normal(0, 1, 2, 4, CONFIG.width)
    tokens = tiny.host(row[None], np.int32)
    cache = tiny.empty_cache(CONFIG, (1,), capacity=128)

    @jax.jit
    def read(chunk_of_32):
        return sampling._state.prefill_cache(MODEL, tokens, cache, 32, soft)

    hidden, after = read(True)
    whole, expected = tiny.call(MODEL, "trunk", tokens, soft_tokens=soft, cache=cache)
    # The same sums over other numbers of keys; hidden states are of size 3.
    np.testing.assert_allclose(hidden, whole[:, -1], atol=1e-4)
    assert after.length.tolist() == expected.length.tolist() == [before + 40]


def test_prepared_and_quantised_models_see_the_same():
    image = tiny.host(picture(12, 12), np.uint8)
    seen = tiny.call(MODEL, "encode_images", image)
    for changed in (eg.prepare(MODEL), int8(MODEL)):
        np.testing.assert_array_equal(tiny.call(changed, "encode_images", image), seen)


# Files.


@pytest.mark.slow
@pytest.mark.parametrize("format", ["huggingface", "orbax", "orbax-flat"])
def test_files_keep_the_tower(format, tmp_path):
    if format != "huggingface":
        pytest.importorskip("orbax.checkpoint", reason="Orbax folders are the extra `orbax`")
    eg.save(MODEL, tmp_path / "model", format=format)
    again = load_model(tmp_path / "model", dtype="float32")
    # Ids of newlines are no option of a config.json.
    if format != "huggingface":
        assert again.config.vision == VISION
    for ours, theirs in zip(jax.tree.leaves(MODEL), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    text = load_model(tmp_path / "model", dtype="float32", text_only=True)
    assert text.vision is None
    np.testing.assert_array_equal(text.embedding.table, MODEL.embedding.table)


def test_a_gguf_file_needs_a_vocabulary_with_images(tmp_path):
    error = "lacks '<start_of_image>' and .* around an image. Give the tokenizer of a Gemma 3 that"
    with pytest.raises(CheckpointError, match=error):
        eg.save(MODEL, tmp_path / "model.gguf", tokenizer=TOKENIZER)
    assert not list(tmp_path.iterdir())


# The command line.


@pytest.mark.slow
def test_generate_takes_files(tmp_path, monkeypatch):
    testing = pytest.importorskip("typer.testing", reason="the command line is the extra `cli`")
    from equigemma.cli._app import app

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = jax.config.values["jax_compilation_cache_dir"]
    eg.save(MODEL, tmp_path / "sees", tokenizer=TOKENIZER)
    eg.save(formats.model(formats.CONFIGS["gemma3"]), tmp_path / "reads", tokenizer=TOKENIZER)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for seed, file in enumerate(files):
        PIL.fromarray(picture(5 + seed, 9, 4, seed=seed)).save(file)

    def run(model, *images):
        options = [option for image in images for option in ("--image", str(image))]
        command = ["generate", "hello", "-m", str(tmp_path / model), "-n", "5"]
        return testing.CliRunner().invoke(app, [*command, "--dtype", "float32", *options])

    answer = run("sees", *files)
    jax.config.update("jax_compilation_cache_dir", folder)
    assert answer.exit_code == 0, answer.stderr
    expected = eg.generate(MODEL, TOKENIZER, "hello", images=files, max_new_tokens=5)
    assert answer.stdout == f"hello{expected}\n"
    blind = run("reads", files[0])
    jax.config.update("jax_compilation_cache_dir", folder)
    assert blind.exit_code == 2 and "reads text only" in blind.stderr
    missing = run("sees", tmp_path / "none.png")
    jax.config.update("jax_compilation_cache_dir", folder)
    assert missing.exit_code == 2 and "there is no such file" in missing.stderr


# The shim.


@pytest.mark.slow
def test_the_shim_sees_what_the_model_sees():
    shim = linen.Transformer(config=CONFIG, dtype=jnp.float32)
    tokens = tiny.host([[2, 5, 273, 7, 273, 9], [2, 273, 3, 0, 0, 0]], np.int32)
    images = tiny.host(np.stack([np.stack([picture(9, 5)] * 2)] * 2), np.uint8)
    output = shim.apply(linen.to_variables(MODEL), tokens, images=images)
    ours = tiny.run(MODEL, jnp.where(tokens == 0, -1, tokens), images=images)
    real = np.asarray(tokens) != 0
    np.testing.assert_allclose(output.logits[real], ours.logits[real], atol=1e-4)
    # Text alone, and parameters without the tower.
    params = linen.to_variables(MODEL)["params"]
    del params["vision_encoder"]
    params["embedder"] = {"input_embedding": params["embedder"]["input_embedding"]}
    text = shim.apply({"params": params}, tokens)
    np.testing.assert_allclose(
        text.logits[real], shim.apply(linen.to_variables(MODEL), tokens).logits[real], atol=1e-5
    )
    with pytest.raises(ValueError, match="reads text only"):
        shim.apply({"params": params}, tokens, images=images)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 2, 5, 5, 4), "its axis C is 4, but every image has C = 3"),
        ((3, 2, 5, 5, 3), r"its axis \*B is 3, but `tokens` has \*B = 2"),
        ((5, 5, 3), "`images` must be"),
    ],
)
def test_the_shim_names_what_does_not_fit(shape, says):
    shim = linen.Transformer(config=CONFIG, dtype=jnp.float32)
    tokens = tiny.host([[2, 5, 273, 7], [2, 273, 3, 0]], np.int32)
    with pytest.raises(ValueError, match=says):
        shim.apply(linen.to_variables(MODEL), tokens, images=jnp.zeros(shape, jnp.uint8))


@pytest.mark.slow
def test_positions_are_of_all_tokens():
    shim = linen.Transformer(config=CONFIG, dtype=jnp.float32)
    tokens = tiny.host([[2, 5, 273, 7]], np.int32)
    images = tiny.host(picture(5, 5)[None], np.uint8)
    length = 4 + nn.insert_image_tokens(tokens, VISION, 1).shape[1] - 4
    variables = linen.to_variables(MODEL)
    positions = jnp.arange(length)[None]
    np.testing.assert_allclose(
        shim.apply(variables, tokens, images=images, positions=positions).logits,
        shim.apply(variables, tokens, images=images).logits,
        atol=1e-6,  # two programs; logits are of size 1
    )
    with pytest.raises(ValueError, match="its axis L_with_images is 4"):
        shim.apply(variables, tokens, images=images, positions=positions[:, :4])
