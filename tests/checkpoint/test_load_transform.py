"""Weights that are transformed while they are read: the same model, part by part."""

import weakref

import formats
import jax
import pytest

import equigemma as eg
from equigemma import quantize


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("safetensors", reason='needs pip install "equigemma[hf]"')
    folder = tmp_path_factory.mktemp("model") / "x"
    model = formats.model(formats.CONFIGS["gemma3"])
    eg.save(model, folder, tokenizer=formats.tokenizer())
    return folder


@pytest.mark.parametrize("transform", [eg.prepare, quantize.int8, quantize.int4])
def test_it_is_the_model_transformed_as_a_whole(path, transform):
    expected = transform(eg.load(path, dtype="float32")[0])
    found, _ = eg.load(path, dtype="float32", transform=transform)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    formats.assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transform", [None, eg.prepare, quantize.int8, quantize.int4])
def test_shapes_are_told_before_any_weight_is_read(path, transform, dtype):
    told, read = [], []
    model, tokenizer = eg.load(
        path,
        dtype=dtype,
        transform=transform,
        on_shapes=lambda *arguments: told.append((*arguments, len(read))),
        progress=lambda *arguments: read.append(arguments),
    )
    ((shapes, its_tokenizer, before),) = told
    assert before == 0 < len(read)
    assert its_tokenizer is tokenizer
    assert jax.tree.structure(shapes) == jax.tree.structure(model)
    described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)] == described


def test_a_plain_layer_is_gone_before_the_next_is_read(path):
    weights, alive = [], []

    def transform(part):
        alive.append(sum(weight() is not None for weight in weights))
        prepared = eg.prepare(part)
        kept = {id(leaf) for leaf in jax.tree.leaves(prepared)}
        copied = [leaf for leaf in jax.tree.leaves(part) if id(leaf) not in kept]
        weights.extend(map(weakref.ref, copied))
        return prepared

    eg.load(path, dtype="float32", transform=transform)
    assert weights and alive[-1] <= 1  # the reader may hold the last array that it gave out
