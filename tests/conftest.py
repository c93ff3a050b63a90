"""What holds in every test: no silent promotion of dtypes or ranks, and no accelerator needed."""

import jax
import pytest


# A silent promotion is how a float64 constant or a missing axis slips into a model. Set on import,
# so that it also holds for what test modules compute when they are imported.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Forgets compiled programs: thousands of them use up the mappings that Linux gives a process,
    and then the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs are compiled fast rather than well: on tiny arrays compiling takes all the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
