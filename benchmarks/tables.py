"""How figures of several runs are put into a table."""

import statistics
from collections.abc import Callable, Iterable, Sequence


Rounds = Sequence[dict[str, dict]]
"""What each side measured, round by round: see `processes.by_turns`."""


def spread(values: Iterable[float]) -> str:
    """The median, and the smallest and the largest; one value alone as it is."""
    values = list(values)
    if len(values) == 1:
        return _digits(values[0])
    least, greatest = map(_digits, (min(values), max(values)))
    return f"{_digits(statistics.median(values))} ({least}-{greatest})"


def _digits(value: float) -> str:
    """Three that count."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def column(rounds: Rounds, side: str, figure: str | Callable[[dict], float]) -> list[float]:
    """One figure of a side, in each round."""
    value = figure if callable(figure) else lambda found: found[figure]
    return [value(found[side]) for found in rounds]


def ratios(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """In pairs: both of a ratio come from the same round."""
    return [one / other for one, other in zip(over, under, strict=True)]


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"
