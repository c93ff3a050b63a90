"""Initialisations that take from the base what adapters begin with.

PEFT does so each time that such an adapter is loaded: W becomes W − s·B₀A₀, with B₀A₀ computed from
W anew. Here the base stays as it is, and an adapter of twice the rank says the same.

**Source:** Meng et al. 2024, arXiv:2404.02948 (PiSSA); Büyükakyüz 2024, arXiv:2406.01775 (OLoRA).
"""

import numpy as np


def beginning(start: str, weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, ...]:
    """A₀ and B₀ of a weight `[outputs, inputs]`, such that scale · B₀ · A₀ is taken off it.

    How the product is shared out between the two is of no account, and neither are signs.
    """
    weight = weight.astype(np.float64)
    if start == "pissa":
        down, up = _largest(weight, rank)
        down = down / scale
    else:
        up, down = np.linalg.qr(weight)
    return down[:rank].astype(np.float32), up[:, :rank].astype(np.float32)


def _largest(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Two factors of the part of a weight that belongs to its largest singular values.

    Singular vectors are those of the smaller of its two squares, which are found in a tenth of the
    time of the whole decomposition; in float64 the square loses nothing that float32 had.
    """
    outputs, inputs = weight.shape
    if outputs <= inputs:
        vectors = np.linalg.eigh(weight @ weight.T)[1][:, ::-1][:, :rank]
        return vectors.T @ weight, vectors
    vectors = np.linalg.eigh(weight.T @ weight)[1][:, ::-1][:, :rank]
    return vectors.T, weight @ vectors
