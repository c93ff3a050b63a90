"""Draws what `context.py` measured: `python benchmarks/plots.py [FOLDER]`. Measures nothing."""

import json
import statistics
import sys
from pathlib import Path


# Okabe and Ito's colours, which all eyes can tell apart; markers and labels tell the same.
STYLES = {
    "ours": ("#0072B2", "o"),
    "ours in 8 bits": ("#56B4E9", "s"),
    "transformers": ("#D55E00", "^"),
    "gemma": ("#009E73", "v"),
    "llama.cpp in 8 bits": ("#CC79A7", "D"),
}
PLOTS = {
    "speed.png": (
        "tokens per second",
        lambda one: 1 / one["seconds"] if "seconds" in one else None,
    ),
    "memory.png": ("peak memory, GB", lambda one: one.get("peak")),
}


def draw(folder: Path) -> None:
    """Two plots from `results/context.json`, medians with the range."""
    kept = json.loads((folder / "results" / "context.json").read_text())
    for name, (label, value) in PLOTS.items():
        points: dict[str, dict[int, list[float]]] = {}
        for one in kept:
            if one["side"] in STYLES and (figure := value(one)) is not None:
                points.setdefault(one["side"], {}).setdefault(one["length"], []).append(figure)
        _draw(folder / name, label, points)


def _draw(path: Path, label: str, points: dict[str, dict[int, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    ends = {}
    for side in filter(points.get, STYLES):
        color, marker = STYLES[side]
        lengths = sorted(points[side])
        values = [points[side][length] for length in lengths]
        middle = [statistics.median(each) for each in values]
        below = [median - min(each) for median, each in zip(middle, values, strict=True)]
        above = [max(each) - median for median, each in zip(middle, values, strict=True)]
        axes.errorbar(lengths, middle, (below, above), color=color, marker=marker, capsize=3)
        ends[side] = lengths[-1], middle[-1]
    lengths = sorted({length for each in points.values() for length in each})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * max(max(each) for side in points.values() for each in side.values()))
    axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 1.1)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    for (side, (x, y)), at in zip(ends.items(), _apart(axes, ends), strict=True):
        axes.annotate(
            side, (x, y), (8, at), textcoords="offset points", color=STYLES[side][0], va="center"
        )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _apart(axes, ends: dict[str, tuple[int, float]], least: float = 12) -> list[float]:
    """How many points each label is moved up, so that none is on another."""
    low, high = axes.get_ylim()
    points = axes.get_window_extent().height * 72 / axes.figure.dpi / (high - low)
    moved: dict[str, float] = {}
    taken: dict[int, float] = {}
    for side, (x, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        place = max(y * points, taken.get(x, -least) + least)
        moved[side], taken[x] = place - y * points, place
    return [moved[side] for side in ends]


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent)
