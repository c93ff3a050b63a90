"""Loss curves and learning rate as a PNG file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equigemma._atomic_file import replaced


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draws the losses and the learning rate of the lines of a metrics file into a PNG file.

    False if `matplotlib` is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", {"linewidth": 1, "alpha": 0.8}),
        ("validation_loss", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss per token")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")

    rates = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
    if rates:
        other = axes.twinx()
        other.plot(*zip(*rates, strict=True), color="0.6", linestyle=":", linewidth=1)
        other.set(ylabel="learning rate (dotted)")
        other.set_ylim(bottom=0)
    with replaced(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)
    return True
