"""Collects the errors of a file that is read line by line and raises them together."""

from collections.abc import Sequence


MOST_NAMED = 10


def raise_line_errors(name: object, bad: Sequence[str]) -> None:
    """Refuses a file of which something is bad.

    **Arguments:** `bad`: what is wrong, line by line.

    **Raises:** `ValueError` naming the first ten.
    """
    if bad:
        more = f"\nand {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise ValueError(f"{name}:\n" + "\n".join(bad[:MOST_NAMED]) + more)
