"""llama.cpp with a tiny random Gemma 3 and its vision tower: the same probabilities."""

import base64
import io

import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from parity.test_checkpoints import CLOSE, NO_TEXT, llama, needs_llama

import equigemma as eg


pillow = pytest.importorskip("PIL.Image", reason="llama.cpp gets images as files, from Pillow")


def sent(image: np.ndarray) -> str:
    """The image as a PNG file, in letters."""
    file = io.BytesIO()
    pillow.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@needs_llama
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("3 averaged", "float32"), ("3 averaged", "float16"), ("4 averaged", "float32")],
)
def test_llama_cpp_sees_the_same(name, dtype, tmp_path):
    path = tmp_path / "x.gguf"
    eg.save(
        formats.model(formats.SEEING[name]),
        path,
        tokenizer=formats.tokenizer(images=True),
        dtype=dtype,
    )
    model, tokenizer = eg.load(path, dtype="float32")
    size = model.config.vision.pixels
    rng = np.random.default_rng(0)
    # Of that size none is resized, for which every library has its own way.
    images = rng.integers(0, 128, (3, size, size, 3)).astype(np.uint8)
    images[1] += 128
    # Ids from that of the line ends on are one higher than without them.
    banned = [i + (i >= formats.NEWLINE) for i in NO_TEXT] + [*range(272, formats.VOCAB)]
    tops = []
    with llama(path, "--mmproj", str(tmp_path / "mmproj-x.gguf")) as ask:
        for before, pictures in (("hello", images[:1]), ("hello", images[1:2]), ("lo", images[1:])):
            # The line ends around an image are ours to write there.
            places = "".join(f"{before}\n\n<image>\n\n" for _ in pictures)
            prompt = {"prompt_string": f"{places}tel", "multimodal_data": list(map(sent, pictures))}
            answer = ask(
                prompt=prompt, n_predict=1, n_probs=7, logit_bias=[[i, False] for i in banned]
            )
            ours = "".join(f"{before}<start_of_image>" for _ in pictures) + "tel"
            tokens = jnp.asarray(tokenizer.encode(ours, special=True), jnp.int32)
            output = tiny.run(model, tokens, images=jnp.asarray(pictures))
            expected = np.asarray(jax.nn.log_softmax(output.logits))[-1]
            soft = len(pictures) * (model.config.vision.num_soft_tokens + 3)
            assert answer["tokens_evaluated"] == len(tokens) + soft
            top = answer["completion_probabilities"][0]["top_logprobs"]
            assert len(top) == 7
            for one in top:
                assert abs(expected[one["id"]] - one["logprob"]) < CLOSE[dtype], one
            tops.append({one["id"]: one["logprob"] for one in top})
    # Another image makes another text: otherwise nothing would have been seen.
    shared = tops[0].keys() & tops[1].keys()
    assert max(abs(tops[0][index] - tops[1][index]) for index in shared) > 10 * CLOSE["float32"]
