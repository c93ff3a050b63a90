"""Labels and masks of parameters for `optax.multi_transform`, `optax.masked` and their kind."""

from collections.abc import Callable, Hashable
from typing import Any

import jax

from equigemma._typing import Array
from equigemma.train._checks import check_function


def param_labels(label: Callable[[str, Array], Hashable]) -> Callable[[Any], Any]:
    """A function of the parameters that gives the tree of their labels, as optax takes it.

    ```python
    >>> import optax
    >>> from equigemma import train
    >>> kinds = train.param_labels(lambda path, leaf: "slow" if "embedding" in path else "fast")
    >>> optimizer = optax.multi_transform({"slow": optax.sgd(0.01), "fast": optax.adam(0.1)}, kinds)

    ```

    The tree itself would do for most models, but not for those that can be called: optax takes a
    tree of labels of the class `Transformer` for a function, and calls it. `lambda params: labels`
    makes one of a tree that is there. Labels of True and False make a mask, as for
    `optax.adamw(mask=...)`.

    **Arguments:** `label`: told the path of a leaf, such as `layers.0.attention.output.weight`, and
    the leaf.

    **Returns:** a function `labels(params)`, whose result has the structure of `params`.
    """

    check_function("label", label, "a path and an array")

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: label(jax.tree_util.keystr(path, simple=True, separator="."), leaf),
            params,
        )

    return labels
