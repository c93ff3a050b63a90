"""Fine-tuning as pure functions over pytrees: losses, steps, data."""

from equigemma.train._cross_entropy import cross_entropy as cross_entropy
