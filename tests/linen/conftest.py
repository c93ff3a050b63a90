"""All tests of the shim work on tiny arrays."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def always_quick(quick_compilation):
    """See `quick_compilation`."""
