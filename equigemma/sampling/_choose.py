"""From logits to a token: the two ways to choose, each after a transform of the logits."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp

from equigemma._arguments import as_id_tuple, as_number
from equigemma._kernels import argmax, barrier_on_cpu
from equigemma._typing import Array, Float, Int, Key, typed
from equigemma.sampling import _transforms, _truncation
from equigemma.sampling._transforms import Transform, as_module, chain


class AbstractChoice(eqx.Module):
    """A sampler: logits to the next token of every row."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Array, "*B V"],
        tokens: Int[Array, "*B T"],
        key: Key[Array, "..."] | None,
    ) -> Int[Array, "*B"]:
        """One token per row, −1 where none can be chosen. `key` is one per row, or one for all;
        None: no chance is involved.
        """


class Greedy(AbstractChoice):
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


class Sample(AbstractChoice):
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

        def draw(key):
            return jax.random.gumbel(key, logits.shape[-1:], logits.dtype)

        for _ in range(key.ndim):
            draw = jax.vmap(draw)
        # Made once: the search for the largest reads them twice, and they cost more than all else.
        noise = barrier_on_cpu(draw(key))
        return argmax(logits + jnp.broadcast_to(noise, logits.shape))


def at_temperature(value: float, *transforms: Transform) -> AbstractChoice:
    """Greedy at temperature 0, else drawn at that temperature, in both cases after `transforms`.

    **Raises:** `ValueError` if `value` is negative or not a number.
    """
    if as_number("temperature", value) == 0:
        return Greedy(chain(*transforms) if transforms else None)
    return Sample(chain(_transforms.temperature(value), *transforms))


def choice(
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
) -> AbstractChoice:
    """All controls that people know by name, in the order in which `transformers` applies them.

    That order is: biases, penalties, forbidden tokens, temperature, top-k, top-p, min-p, typical.
    At temperature 0 the likeliest token is taken, so that what follows the temperature is left out.
    For another order write the chain: `Sample(chain(top_p(0.9), temperature(0.7)))`. None leaves a
    control out, and each is explained at the function of its name.

    **Raises:** `ValueError` for a number out of range.
    """
    before = _made(
        (_transforms.logit_bias, logit_bias or None),
        (_transforms.repetition_penalty, repetition_penalty),
        (_transforms.presence_penalty, presence_penalty),
        (_transforms.frequency_penalty, frequency_penalty),
        (_transforms.forbid, as_id_tuple("forbid", forbid) or None),
    )
    after = _made(
        (_truncation.top_k, top_k),
        (_truncation.top_p, top_p),
        (_truncation.min_p, min_p),
        (_truncation.typical, typical),
    )
    if as_number("temperature", temperature) == 0:
        return Greedy(chain(*before) if before else None)
    return Sample(chain(*before, _transforms.temperature(temperature), *after))


def _made(*controls: tuple[Callable[..., Transform], object]) -> list[Transform]:
    return [make(value) for make, value in controls if value is not None]
