"""What holds in the tests of modules: programs are compiled fast rather than well."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Compiling takes nearly all the time of tests on tiny arrays."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
