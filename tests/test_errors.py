"""Wrong calls over the whole interface: short errors that name the argument and say what to do."""

import equinox as eqx
import formats
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from beartype import beartype
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

import equigemma as eg
from equigemma import lora, quantize, text


pytest.importorskip("jinja2", reason='needs pip install "equigemma[chat]"')

from wrong_calls import MODELS, SAMPLING  # noqa: E402
from wrong_changes import CHANGES  # noqa: E402
from wrong_training import ADAPTERS, BATCHES, TRAINING  # noqa: E402
from wrong_words import PIXELS, WORDS  # noqa: E402


CALLS = [
    (f"{table}: {name}", *row)
    for table, rows in {
        "models": MODELS,
        "sampling": SAMPLING,
        "changes": CHANGES,
        "words": WORDS,
        "training": TRAINING,
        "batches": BATCHES,
        "adapters": ADAPTERS,
    }.items()
    for name, row in rows.items()
]


@pytest.mark.parametrize(
    ("call", "says"), [row[1:] for row in CALLS], ids=[row[0] for row in CALLS]
)
def test_the_error_says_what_to_do(call, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    message = str(error.value)
    assert says in message
    assert len(message.splitlines()) <= 10 and max(map(len, message.splitlines())) < 400
    assert not list(tmp_path.iterdir()), "what is refused leaves nothing behind"


def parts(node):
    """A module and all modules within it."""
    if isinstance(node, eqx.Module):
        yield node
    children = jax.tree.flatten(node, is_leaf=lambda leaf: leaf is not node)[0]
    for child in children:
        if child is not node:
            yield from parts(child)


MODELS_OF = {
    "plain": lambda model: model,
    "prepared": eg.prepare,
    "int8": quantize.int8,
    "int4": quantize.int4,
    "lora": lambda model: lora.add(model, rank=1, key=jax.random.key(0)),
    "remat": eg.train.remat,
}


@pytest.mark.parametrize("form", MODELS_OF)
@pytest.mark.parametrize("name", ["gemma3n", "gemma4 small", "gemma4 experts", "gemma3"])
def test_every_part_prints_in_a_few_lines(name, form):
    """Also where jaxtyping prints it as an argument of a function that is not ours."""
    seen = name == "gemma3" and form == "plain"
    config = tiny.GEMMA3_SEEING if seen else tiny.CONFIGS[name]
    model = tiny.model(config)
    # Shapes are all that is printed.
    shapes = eqx.filter_eval_shape(MODELS_OF[form], model)
    for part in {type(part): part for part in parts(shapes)}.values():
        assert len(eqx.tree_pformat(part, struct_as_array=True).splitlines()) <= 10, type(part)


def test_a_model_as_an_argument_of_ones_own_function():
    @jaxtyped(typechecker=beartype)
    def loss(model: eg.Transformer, cache: eg.Cache, x: Float[Array, "L D"]):
        return x

    model = tiny.model(tiny.GEMMA3)
    with pytest.raises(TypeCheckError, match="Type-check error") as error:
        loss(model, tiny.empty_cache(model.config, capacity=3), jnp.arange(3))
    message = str(error.value)
    assert "'model': Transformer(2 layers, " in message
    assert "'cache': Cache(2 layers, length=i32[])" in message
    assert len(message.splitlines()) <= 12


def test_a_part_of_ones_own_that_gives_another_type():
    model = tiny.model(tiny.GEMMA3)
    integers = eqx.tree_at(lambda m: m.final_norm, model, lambda x: x.astype(jnp.int32))
    with pytest.raises(TypeCheckError, match="Transformer.trunk gave .*is expected") as error:
        jax.eval_shape(integers.trunk, np.arange(3))
    assert len(str(error.value).splitlines()) == 1


def test_prompts_in_any_sequence():
    model, tokenizer = formats.model(formats.CONFIGS["gemma1 mqa"]), formats.tokenizer()
    options = {"max_new_tokens": 2, "stop_tokens": ()}
    expected = eg.generate(model, tokenizer, ["hello", "h"], **options)
    for prompts in (("hello", "h"), np.array(["hello", "h"]), iter(["hello", "h"])):
        assert eg.generate(model, tokenizer, prompts, **options) == expected
    assert eg.chat.Piece("h").text == "h"
    assert text.IMAGE in eg.chat.User("h", [PIXELS]).text
