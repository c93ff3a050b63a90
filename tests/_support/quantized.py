"""What quantized models are held against: the same models with rounded weights as floats."""

import equinox as eqx
import jax
import numpy as np

import equigemma as eg
from equigemma import lora, quantize


def check_close(actual, expected) -> None:
    # Sums of a few units in float32, taken in another order, layer after layer.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def check_gradient(quantized: eg.Transformer, tokens: np.ndarray) -> None:
    """The adapters of a model learn as they would over floats."""

    @jax.jit
    @jax.grad
    def gradient(learned, frozen):
        return jax.nn.logsumexp(eqx.combine(learned, frozen)(tokens).logits)

    grads, expected = (
        jax.tree.leaves(gradient(*lora.split(model)))
        for model in (quantized, quantize.dequantize(quantized))
    )
    assert max(np.abs(one).max() for one in expected) > 0.01
    jax.tree.map(check_close, grads, expected)
