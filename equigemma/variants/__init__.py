"""Every Gemma by name: `get("gemma3-270m")` is its `ModelConfig`, `names()` lists them all.

Data only: one table per generation, each with what changed since the one before.
"""

from difflib import get_close_matches as _get_close_matches

from equigemma.config import ModelConfig as _ModelConfig
from equigemma.variants import gemma1, gemma2, gemma3, gemma3n, gemma4


_VARIANTS = gemma1.VARIANTS | gemma2.VARIANTS | gemma3.VARIANTS | gemma3n.VARIANTS | gemma4.VARIANTS


def names() -> tuple[str, ...]:
    """The names that `get` knows, oldest generation first, smallest model first.

    **Returns:** names such as `"gemma3-270m"`.
    """
    return tuple(_VARIANTS)


def get(name: str) -> _ModelConfig:
    """The config of the variant called `name`, such as `"gemma3-270m"`; capitals do not matter.

    **Arguments:** `name`: one of `names()`.

    **Returns:** the config, as DeepMind published the model.

    **Raises:** `ValueError` for an unknown name, with the nearest known one.
    """
    try:
        return _VARIANTS[str(name).lower()]
    except KeyError:
        nearest = _get_close_matches(str(name).lower(), _VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"There is no model called {name!r}; did you mean {nearest!r}? "
            f"Known names: {', '.join(_VARIANTS)}."
        ) from None
