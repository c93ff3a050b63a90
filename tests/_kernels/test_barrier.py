"""Barriers for CPU alone: the identity under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from stablehlo import barriers, exported

from equigemma._kernels import barrier_on_cpu


def tied(x, y, index):
    x, y, index = barrier_on_cpu((x, y, index))
    return jnp.sin(x[index]) * y


def free(x, y, index):
    return jnp.sin(x[index]) * y


ARGS = tiny.normal(0, 5, 3), tiny.normal(1, 3), jnp.asarray(2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        jax.jit,
        lambda f: jax.vmap(f, (None, 0, None)),
        lambda f: jax.vmap(f, (1, None, None)),
        lambda f: jax.grad(lambda *args: f(*args).sum(), (0, 1)),
        lambda f: jax.jit(jax.grad(lambda *args: f(*args).sum(), 1)),
        lambda f: lambda x, y, index: jax.jvp(lambda x: f(x, y, index), (x,), (x,)),
        lambda f: jax.hessian(lambda *args: f(*args).sum()),
        lambda f: jax.grad(jax.checkpoint(lambda *args: f(*args).sum())),
    ],
)
def test_it_changes_nothing(transform):
    ours, expected = (jax.tree.leaves(transform(function)(*ARGS)) for function in (tied, free))
    assert len(ours) == len(expected) > 0
    for left, right in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_it_is_there_on_cpu_alone():
    found = {name: barriers(exported(jax.jit(tied), name, *ARGS)) for name in ("cpu", "cuda")}
    assert [len(barrier.makes) for barrier in found["cpu"]] == [3]
    assert found["cuda"] == []
