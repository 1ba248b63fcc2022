"""Pictures of results, with matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIDES = ("plain", "proxy-tuning", "dynamic fusion", "generate", "generate, static cache", "generate, compiled")


def draw(result: dict[str, Any], out: Path) -> list[str]:
    """Write `out` with .png and .svg for the results of `benchmarks.gpu`; says what it did in lines."""
    try:
        import matplotlib
    except ImportError:
        return ["No pictures: they need matplotlib, which the dev extra installs (pip install matplotlib)."]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(result["bases"]), 2, figsize=(14, 4 * len(result["bases"])), squeeze=False)
    for (base, found), (left, right) in zip(result["bases"].items(), grid, strict=True):
        steps = found["settings"]["default"]
        _bars(left, steps, {batch: bound["plain"] for batch, bound in found["bound_ms"].items()})
        left.set_title(f"{base}, {result['device']}: a decode step")
        for kind in ("drafter", "prediction"):
            for batch, sides in steps.items():
                plain = sides.get("plain", {}).get("step_ms")
                drafted = [
                    (side["acceptance"], plain / side["step_ms"])
                    for name, side in sides.items()
                    if name.startswith(kind) and not name.endswith("auto") and plain and "step_ms" in side
                ]
                if drafted:
                    right.plot(*zip(*sorted(drafted), strict=True), marker="o", label=f"{kind}, batch {batch}")
        right.axhline(1.0, color="grey", linewidth=0.8)
        right.set(xlabel="acceptance, measured", ylabel="speed-up over plain", title=f"{base}: four drafts a pass")
        right.legend(fontsize="small")
    figure.tight_layout()
    paths = [out.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path)
    pyplot.close(figure)
    return [f"Drew {path.name}." for path in paths]


def _bars(axes: Any, steps: dict[str, Any], bound: dict[str, float]) -> None:
    """A bar for each side and batch, and plain decoding's bound as a line."""
    width = 0.8 / len(SIDES)
    for i, side in enumerate(SIDES):
        heights = [sides.get(side, {}).get("step_ms", 0.0) for sides in steps.values()]
        axes.bar([j + i * width for j in range(len(steps))], heights, width, label=side)
    for j, batch in enumerate(steps):
        axes.hlines(
            bound[batch], j - width / 2, j + 0.8 - width / 2, color="black", label=None if j else "bound, plain"
        )
    axes.set_xticks([j + 0.4 - width / 2 for j in range(len(steps))], [f"batch {batch}" for batch in steps])
    axes.set_ylabel("ms")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
