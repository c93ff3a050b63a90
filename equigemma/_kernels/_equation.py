"""The axes of an equation `"...D,NDH->...NH"`: activation, weight, result."""


def activation_axes(eqn: str) -> str:
    """The letters of the activation without its batch: `"...D,NDH->...NH"` gives `"D"`.

    **Arguments:** `eqn`: of an einsum, such as `"...D,NDH->...NH"`.

    **Returns:** letters, one for each axis.
    """
    return eqn.split(",")[0].removeprefix("...")


def weight_axes(eqn: str) -> str:
    """The letters of the weight: `"...D,NDH->...NH"` gives `"NDH"`.

    **Arguments:** `eqn`: of an einsum, such as `"...D,NDH->...NH"`.

    **Returns:** letters, one for each axis.
    """
    return eqn.split("->")[0].split(",")[1]


def result_axes(eqn: str) -> str:
    """The letters of the result without its batch: `"...D,NDH->...NH"` gives `"NH"`.

    **Arguments:** `eqn`: of an einsum, such as `"...D,NDH->...NH"`.

    **Returns:** letters, one for each axis.
    """
    return eqn.split("->")[1].removeprefix("...")
