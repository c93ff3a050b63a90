"""What holds in every test: no silent promotion of dtypes or ranks, and no accelerator needed."""

import gc
import os
import shutil

import jax
import pytest


# A silent promotion is how a float64 constant or a missing axis slips into a model. Set on import,
# so that it also holds for what test modules compute when they are imported.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs are compiled fast rather than well, also by processes that tests start: on tiny arrays
# compiling takes all the time. Tests about programs call `hlo.as_users_compile`, and those of large
# models take `whole_compiler`. XLA ends a process that gives it an unknown flag, so this one is for
# versions that are known to have it.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11) and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

# Tracing makes many objects that stay, and each collection looks through all of them.
gc.set_threshold(100_000, 20, 100)


# Of few tests that take long. Files go to workers as a whole, and by default those with most tests
# go first: then at the end all workers but one would wait.
LONG = ("test_readme", "test_finetune_images", "test_finetune", "test_train_loop", "test_compiled")


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def whole_compiler(monkeypatch):
    """For models that are not tiny, in this process and in others."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Forgets compiled programs: thousands of them use up the mappings that Linux gives a process,
    and then the compiler crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def kernel():
    """For tests of the C++ kernel: where there is a compiler, it must have been built."""
    from equigemma._kernels import _native

    if os.environ.get("EQUIGEMMA_NATIVE") == "0" or shutil.which("c++") is None:
        pytest.skip("no kernel is built here: that takes a C++ compiler, and EQUIGEMMA_NATIVE=1")
    assert _native.calls() is not None, "there is a compiler, and it could not build the kernel"
