"""Files of which each line is read on its own: all that is wrong is said at once."""

from collections.abc import Sequence


MOST_NAMED = 10


def check_lines(name: object, bad: Sequence[str]) -> None:
    """Refuses a file of which something is bad.

    **Arguments:** `bad`: what is wrong, line by line.

    **Raises:** `ValueError` naming the first ten.
    """
    if bad:
        more = f"\nand {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise ValueError(f"{name}:\n" + "\n".join(bad[:MOST_NAMED]) + more)
