"""A slot of a cache replaced, in the forms that XLA on CPU updates in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from equigemma._kernels import _slot_update


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("form", ["_update", "_select", "_select_in_loop"])
def test_every_form_replaces_one_slot_and_so_does_its_derivative(form, real):
    slots, moving = (tiny.normal(seed, 2, 5, 3) for seed in (0, 1))
    new, moving_too = (tiny.normal(seed, 2, 1, 3) for seed in (2, 3))
    slot = jnp.asarray(3, jnp.int32)

    def update(slots, new):
        return getattr(_slot_update, form)(1, slots, new, slot, jnp.asarray(real))

    def expected(slots, new):
        result = np.array(slots)
        if real:
            result[:, 3] = new[:, 0]
        return result

    program = jax.jit(lambda *given: jax.jvp(update, given[:2], given[2:]))
    result, tangent = program(slots, new, moving, moving_too)
    np.testing.assert_array_equal(result, expected(slots, new))
    np.testing.assert_array_equal(tangent, expected(moving, moving_too))
    of_slots, of_new = jax.jit(lambda *given: jax.vjp(update, *given[:2])[1](given[2]))(
        slots, new, moving
    )
    np.testing.assert_array_equal(of_slots, expected(moving, np.zeros(new.shape)))
    np.testing.assert_array_equal(of_new, real * np.asarray(moving)[:, 3:4])
