"""A benchmark's result as a picture: bars by case and peer, one panel per direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class NoMatplotlib(ImportError):
    """matplotlib is not installed; the message says how to get it."""


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a result into a PNG file.

    Raises:
        NoMatplotlib: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NoMatplotlib("no picture: matplotlib is not installed (pip install 'hf_flash_plus[bench]')") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    directions = list(dict.fromkeys(row["direction"] for row in found["rows"]))
    cases = {d: list(dict.fromkeys(r["case_name"] for r in found["rows"] if r["direction"] == d)) for d in directions}
    width = max(8.0, 1.5 + 0.16 * len(found["peers"]) * max(len(names) for names in cases.values()))
    figure, axes = pyplot.subplots(len(directions), 1, figsize=(min(width, 40), 4.2 * len(directions)), squeeze=False)
    colors = pyplot.get_cmap("tab10")
    for axis, direction in zip(axes[:, 0], directions):
        rows = {(r["case_name"], r["peer"]): r for r in found["rows"] if r["direction"] == direction}
        bar = 0.8 / len(found["peers"])
        unit = next((row["unit"] for row in rows.values() if "unit" in row), "")
        for index, peer in enumerate(found["peers"]):
            heights = [rows.get((name, peer), {}).get("value", 0.0) for name in cases[direction]]
            places = [place + (index - (len(found["peers"]) - 1) / 2) * bar for place in range(len(heights))]
            axis.bar(places, heights, bar, label=peer, color=colors(index % 10))
        axis.set_xticks(range(len(cases[direction])), cases[direction], rotation=60, ha="right", fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(direction, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        axis.margins(x=0.01)
    environment = found["environment"]
    device = environment["gpu"] or "CPU"
    figure.suptitle(f"{found['name']} on {device}, torch {environment['versions']['torch']}, {environment['date']}")
    axes[0, 0].legend(fontsize=8, ncols=len(found["peers"]))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
