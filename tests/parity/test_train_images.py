"""One step of gradient descent on texts about images, here and with `transformers` and torch.

The model of `transformers`, trained by one step, goes through a file; ours takes the same step.
"""

import copy

import jax
import numpy as np
import optax
import pytest
import tiny

from equigemma import nn, train
from equigemma.checkpoint import load_model


torch = pytest.importorskip("torch", reason="transformers runs on torch, which is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from parity import test_vision as vision  # noqa: E402
from parity.test_vision import pair  # noqa: E402, F401  (a fixture)


@pytest.fixture(autouse=True, scope="module")
def promotion():
    # optax raises a Python float to the power of an integer array.
    with jax.numpy_dtype_promotion("standard"):
        yield


PICTURES = vision.pictures(vision.PIXELS, vision.PIXELS)
IMAGES = [list(PICTURES[row, :count]) for row, count in enumerate([2, 1, 0])]


def examples(images=IMAGES) -> list[train.Example]:
    """Two images, one and none; the texts of three rows, of whose beginnings nothing is learned."""
    rows = [row[row >= 0] for row in vision.prompts()]
    pairs = zip(rows, images, strict=True)
    return [train.Example(row, np.arange(len(row)) > 1, shown) for row, shown in pairs]


def test_a_batch_by_hand():
    example = train.Example([2, vision.START, 5, 6], [0.0, 1.0, 0.5, 1.0], [PICTURES[0, 0]])
    config = tiny.replace(tiny.VISION, start=vision.START)
    batch = train.collate_images([example], config, length=13)
    block = [28, vision.START, -2, -3, -4, -5, 30, 28]
    assert batch.tokens.tolist() == [[2, *block, 5, 6, 0, 0]]
    assert batch.positions.tolist() == [[*range(11), -1, -1]]
    targets = [28, vision.START, 0, 0, 0, 0, 30, 28, 5, 6, 0, 0, 0]
    assert batch.targets.tolist() == [targets]
    assert batch.weights.tolist() == [[0] * 8 + [0.5, 1, 0, 0, 0]]
    np.testing.assert_array_equal(
        batch.pixels[0, 0], nn.preprocess_images(tiny.host(PICTURES[0, 0], np.uint8), config.pixels)
    )


def their_loss(model, batch: train.ImageBatch):
    tokens, positions = np.asarray(batch.tokens), np.asarray(batch.positions)
    used = [pixels[: len(images)] for pixels, images in zip(batch.pixels, IMAGES, strict=True)]
    is_image_token = tokens < -1
    output = model(
        input_ids=torch.tensor(np.where(is_image_token, model.config.image_token_id, tokens)),
        attention_mask=torch.tensor(positions >= 0).long(),
        token_type_ids=torch.tensor(is_image_token).long(),
        pixel_values=torch.tensor(np.moveaxis(np.concatenate(used), -1, 1).copy()),
        use_cache=False,
    )
    losses = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1),
        torch.tensor(np.asarray(batch.targets)).long().flatten(),
        reduction="none",
    )
    weights = torch.tensor(np.asarray(batch.weights)).flatten()
    return (losses * weights).sum() / weights.sum()


def test_a_step_is_that_of_torch(pair, tmp_path):  # noqa: F811
    theirs, ours = copy.deepcopy(pair[0]), pair[1]
    batch = train.collate_images(examples(), ours.config.vision, length=31)
    loss = their_loss(theirs, batch)
    loss.backward()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.grad is not None:
                weight -= weight.grad
    theirs.save_pretrained(tmp_path / "stepped")
    expected = load_model(tmp_path / "stepped", dtype="float32")

    before = jax.tree.map(np.asarray, ours)
    step = train.make_step(train.image_loss, optax.sgd(1.0))
    state, metrics = step(train.init(jax.tree.map(jax.numpy.array, ours), optax.sgd(1.0)), batch)
    assert bool(metrics.finite) and float(metrics.weight) == 18
    np.testing.assert_allclose(metrics.loss, loss.item(), rtol=1e-5)
    moved = {}
    paths = jax.tree_util.tree_leaves_with_path(train.merge(state))
    for (path, new), its, old in zip(
        paths, jax.tree.leaves(expected), jax.tree.leaves(before), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        moved[name] = np.abs(new - old).max()
        # Float32 sums in another order; grads reach 10.
        np.testing.assert_allclose(new, its, rtol=0, atol=1e-4, err_msg=name)
    # The tower learns too, and so do the words.
    for name in ("vision.tower.patches.linear.weight", "vision.projection.weight"):
        assert moved[name] > 1e-3
    assert moved["embedding.weight"] > 1e-3


@pytest.mark.parametrize(
    ("images", "length", "says"),
    [
        ([[], [], []], 31, r"An example has 0 image\(s\), and 2 token\(s\) 109"),
        ([IMAGES[0], IMAGES[0], []], 31, r"An example has 2 image\(s\), and 1 token\(s\) 109"),
        (IMAGES, 26, r"An example has 27 tokens with its 2 image\(s\), and a row has 26"),
    ],
)
def test_what_is_no_batch(images, length, says):
    config = tiny.replace(tiny.VISION, start=vision.START)
    with pytest.raises(ValueError, match=says):
        train.collate_images(examples(images), config, length=length)


def test_a_model_of_text_learns_nothing_of_images():
    config = tiny.replace(tiny.VISION, start=vision.START)
    batch = train.collate_images(examples(), config, length=31)
    with pytest.raises(ValueError, match="reads text only: it has no tower"):
        train.image_loss(tiny.model(tiny.GEMMA3), batch)
