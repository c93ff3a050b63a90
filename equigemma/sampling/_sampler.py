"""Samplers: from logits to a token, greedily or at random, after a transform of the logits."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_id_tuple, as_number
from equigemma._kernels import argmax, barrier_on_cpu
from equigemma._typing import Array, Float, Int, Key, PRNGKeyArray, typed
from equigemma.sampling import _transforms, _truncation
from equigemma.sampling._transforms import Transform, as_module, chain


class AbstractSampler(eqx.Module):
    """A sampler: logits to the next token of every row."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        """Chooses one token per row.

        **Arguments:**

        - `logits`: those of the next token.
        - `tokens`: prompt and text so far, −1 where empty.
        - `key`: one per row, or one for all; None: no chance is involved.

        **Returns:** ids, −1 in rows in which none can be chosen.
        """


class Greedy(AbstractSampler):
    """The most probable token; of equals, the first."""

    transform: Transform | None = eqx.field(default=None, converter=as_module)

    @typed
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        del key
        if self.transform is not None:
            logits = self.transform(logits, tokens)
        return argmax(logits)


class Sample(AbstractSampler):
    """A token drawn from the softmax of the transformed logits.

    Each token's logit gets a random number of its own and the largest sum wins. Rows with equal
    keys, or with one for all of them, have equal numbers: a row's text depends on its prompt and
    key alone.

    **Source:** Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030. The numbers are those of
    `jax.random.categorical`.
    """

    transform: Transform | None = eqx.field(default=None, converter=as_module)

    @typed
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        if key is None:
            raise ValueError("Drawing a token needs randomness: pass key=jax.random.key(seed).")
        if self.transform is not None:
            logits = self.transform(logits, tokens)

        def draw(key: PRNGKeyArray):
            return jax.random.gumbel(key, logits.shape[-1:], logits.dtype)

        for _ in range(key.ndim):
            draw = jax.vmap(draw)
        # Made once: the search for the largest reads them twice, and they cost more than all else.
        noise = barrier_on_cpu(draw(key))
        return argmax(logits + jnp.broadcast_to(noise, logits.shape))


def make_sampler(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    forbid: Iterable[int] = (),
) -> AbstractSampler:
    """A sampler of the usual controls, in the order in which `transformers` applies them.

    That order is: biases, penalties, forbidden tokens, temperature, top-k, top-p, min-p, typical.
    At temperature 0 the likeliest token is taken, so that what follows the temperature is left out.
    For another order write the chain: `Sample(chain(top_p(0.9), temperature(0.7)))`. None leaves a
    control out, and each is explained at the transform of its name.

    **Arguments:**

    - `temperature`: logits are divided by it; 0 takes the likeliest token.
    - `top_k`: keeps so many of the likeliest tokens.
    - `top_p`: keeps the likeliest tokens that have this probability together (nucleus sampling).
    - `min_p`: keeps tokens with at least this share of the probability of the likeliest.
    - `typical`: keeps the most typical tokens that have this probability together.
    - `repetition_penalty`: above 1 makes tokens that have occurred less likely, by a factor.
    - `presence_penalty`: is taken from the logits of tokens that have occurred.
    - `frequency_penalty`: is taken from a token's logit each time that it has occurred.
    - `logit_bias`: what is added to logits, by id.
    - `forbid`: ids that are never chosen.

    **Returns:** `Greedy` at temperature 0, else `Sample`, which needs a `key`.

    **Raises:** `ValueError` for a number out of range.
    """
    before = _given(
        (_transforms.LogitBias, logit_bias or None),
        (_transforms.RepetitionPenalty, repetition_penalty),
        (_transforms.PresencePenalty, presence_penalty),
        (_transforms.FrequencyPenalty, frequency_penalty),
        (_transforms.forbid, as_id_tuple("forbid", forbid) or None),
    )
    after = _given(
        (_truncation.TopK, top_k),
        (_truncation.TopP, top_p),
        (_truncation.MinP, min_p),
        (_truncation.Typical, typical),
    )
    if as_number("temperature", temperature) == 0:
        return Greedy(chain(*before) if before else None)
    return Sample(chain(*before, _transforms.Temperature(temperature), *after))


def _given(*controls: tuple[Callable[..., Transform], object]) -> list[Transform]:
    return [make(value) for make, value in controls if value is not None]
