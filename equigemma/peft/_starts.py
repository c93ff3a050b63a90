"""Initialisations that take from the base what adapters begin with.

PEFT does so each time that such an adapter is loaded: W becomes W − s·B₀A₀, with B₀A₀ computed from
W anew. Here the base stays as it is, and an adapter of twice the rank says the same.

**Source:** Meng et al. 2024, arXiv:2404.02948 (PiSSA); Büyükakyüz 2024, arXiv:2406.01775 (OLoRA).
"""

import numpy as np


def beginning(start: str, weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, ...]:
    """A₀ and B₀ of a weight `[outputs, inputs]`, such that scale · B₀ · A₀ is taken off it.

    Signs of singular vectors are anybody's choice; of their products they are not.
    """
    if start == "pissa":
        left, values, right = np.linalg.svd(weight.astype(np.float32), full_matrices=False)
        roots = np.sqrt(values[:rank] / np.float32(scale))
        return roots[:, None] * right[:rank], left[:, :rank] * roots
    left, right = np.linalg.qr(weight.astype(np.float32))
    return right[:rank], left[:, :rank]
