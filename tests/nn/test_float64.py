"""Models of float64 compute in float64, so that derivatives can be checked by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny


CONFIGS = {
    "gemma2": tiny.GEMMA2,
    "gemma3": tiny.GEMMA3,
    "gemma3n": tiny.GEMMA3N,
    "gemma4 small": tiny.GEMMA4_SMALL,
    "gemma4 experts": tiny.GEMMA4_MOE,
}
STEP = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_derivatives_of_hidden_states_are_differences(kind):
    """A central difference is off by the third derivative times the step squared, 1e-10 here, and
    by the rounding of the value over the step: 1e-11 in float64, 1e-2 in float32."""
    with jax.enable_x64(True):
        narrow = tiny.model(CONFIGS[kind])
        rng = np.random.default_rng(3)
        model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), narrow)
        change = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), model)
        tokens = tiny.tokens(2, 7)
        cotangent = jnp.asarray(rng.normal(size=(2, 7, tiny.WIDTH)))

        @jax.jit
        def value(size):
            moved = jax.tree.map(lambda leaf, step: leaf + size * step, model, change)
            hidden, _ = moved.trunk(tokens)
            return jnp.sum(hidden * cotangent)

        differences = (value(STEP) - value(-STEP)) / (2 * STEP)
        grad = jax.jit(jax.grad(value))(0.0)
        assert grad.dtype == jnp.float64 and abs(grad) > 0.1
        np.testing.assert_allclose(differences, grad, rtol=1e-6)
