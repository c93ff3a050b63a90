"""How figures of several runs are put into a table."""

import statistics


def spread(values: list[float]) -> str:
    """The median, and the smallest and the largest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"
