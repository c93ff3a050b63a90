"""Draws the pictures of the site that come from code: `python docs/pictures.py`.

The layers of each generation come from `equigemma.variants`, who may import whom from
`tests/test_imports.py`. Each file carries what it shows as its description, from which a test sees
that it is up to date.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import equigemma as eg


ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "pictures"

CONTEXT = 32_768
MODELS = {
    "Gemma 1 2B": "gemma1-2b",
    "Gemma 2 2B": "gemma2-2b",
    "Gemma 3 270M": "gemma3-270m",
    "Gemma 3n E2B": "gemma3n-e2b",
    "Gemma 4 E2B": "gemma4-e2b",
    "Gemma 4 26B-A4B": "gemma4-26b-a4b",
}

# Okabe and Ito's colors, which all eyes can tell apart.
LOCAL, GLOBAL = "#56B4E9", "#D55E00"


# What is drawn.


def layers() -> dict[str, Any]:
    """Of each layer of each model its window, and the layer whose keys it attends to."""
    return {
        title: [
            [layer.attention.window, getattr(layer.attention.kv, "layer", index)]
            for index, layer in enumerate(eg.variants.get(name).layers)
        ]
        for title, name in MODELS.items()
    }


def imports() -> dict[str, Any]:
    """Of each part what it may import, without what follows from the rest; helpers left out."""
    table = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))["MAY_IMPORT"]
    parts = [part for part in table if part and (part[0] != "_" or part in ("_typing", "_kernels"))]
    allowed = {part: set(parts) - {part} if table[part] is None else table[part] for part in parts}
    below = {part: (allowed[part] | {"_typing"}) & set(parts) - {part} for part in parts}
    below["_typing"] = set()
    return {
        part: sorted(
            other for other in below[part] if not any(other in below[b] for b in below[part])
        )
        for part in parts
    }


# How it is drawn.


def draw_layers(found: dict[str, Any]) -> Any:
    """A bar for each layer with a cache, as high as the tokens that the cache holds."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, rows = pyplot.subplots(
        len(found), figsize=(8, 8), layout="constrained", sharex=True, sharey=True
    )
    for axes, (title, model) in zip(rows, found.items(), strict=True):
        for index, (window, owner) in enumerate(model):
            color = LOCAL if window else GLOBAL
            if owner == index:
                axes.bar(index, min(window or CONTEXT, CONTEXT), color=color, width=0.8)
            else:
                axes.bar(index, 190, color="white", edgecolor=color, width=0.7)
        owners = sorted({owner for index, (_, owner) in enumerate(model) if owner != index})
        if owners:
            first = next(index for index, (_, owner) in enumerate(model) if owner != index)
            text = f"keys and values of layers {' and '.join(map(str, owners))}"
            axes.text(first, 400, text, fontsize=8, va="bottom")
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_yscale("log", base=2)
        axes.set_ylim(128, 2 * CONTEXT)
        axes.set_yticks([512, 4096, CONTEXT], ["512", "4,096", f"{CONTEXT:,}"], fontsize=8)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("layer")
    figure.supylabel(f"tokens in the KV cache, context of {CONTEXT:,}", fontsize=9)
    handles = [
        Patch(color=GLOBAL, label="global attention"),
        Patch(color=LOCAL, label="sliding window (ring buffer)"),
        Patch(facecolor="white", edgecolor="black", label="shared keys and values: no cache"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_imports(found: dict[str, Any]) -> Any:
    """Boxes in rows, each above all that it imports."""
    from matplotlib import pyplot

    heights: dict[str, int] = {}
    while len(heights) < len(found):
        for part, others in found.items():
            if part not in heights and all(other in heights for other in others):
                heights[part] = 1 + max((heights[other] for other in others), default=-1)
    rows = [
        [part for part in found if heights[part] == row] for row in range(max(heights.values()) + 1)
    ]
    places: dict[str, tuple[float, float]] = {}
    for height, row in enumerate(rows):
        # Near the middle of what they import, so that few lines cross.
        row.sort(key=lambda part: sum(places[o][0] for o in found[part]) / max(len(found[part]), 1))
        for number, part in enumerate(row):
            # Staggered, so that a line between distant rows does not run through a box.
            stagger = 0.045 * (2 * height % 3 - 1)
            places[part] = ((number + 0.5) / len(row) * 0.9 + 0.05 + stagger, float(height))
    figure, axes = pyplot.subplots(figsize=(8, 6.5), layout="constrained")
    for part, others in found.items():
        for other in others:
            (x, y), (under, base) = places[part], places[other]
            axes.annotate(
                "",
                (under, base + 0.2),
                (x, y - 0.2),
                arrowprops=dict(arrowstyle="-|>", color="#888888", linewidth=0.7),
            )
    for part, (x, y) in places.items():
        box = dict(boxstyle="round,pad=0.35", facecolor="#E8F3FA", edgecolor="#0072B2")
        axes.text(x, y, part, ha="center", va="center", fontsize=9, family="monospace", bbox=box)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.axis("off")
    return figure


PICTURES = {"layers.png": (layers, draw_layers), "imports.png": (imports, draw_imports)}


def description(name: str) -> str:
    """What a picture shows, as it stands in the file."""
    return json.dumps(PICTURES[name][0](), separators=(",", ":"))


def main(folder: Path) -> None:
    """Writes all pictures to a folder."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, (find, draw) in PICTURES.items():
        figure = draw(find())
        metadata = {"Description": description(name), "Software": None}
        figure.savefig(folder / name, dpi=110, metadata=metadata)
        pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FOLDER)
