"""A benchmark's result as a picture: bars by case and peer, one panel per direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Cases beside one another, at most.
CASES = 12


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

    strips = []  # of up to CASES cases of one direction
    for direction in dict.fromkeys(row["direction"] for row in found["rows"]):
        names = list(dict.fromkeys(row["case_name"] for row in found["rows"] if row["direction"] == direction))
        count = -(-len(names) // CASES)
        each = -(-len(names) // count)
        strips += [(direction, names[i : i + each]) for i in range(0, len(names), each)]
    measured = {row["peer"] for row in found["rows"] if "value" in row}
    peers = [peer for peer in found["peers"] if peer in measured] or found["peers"]
    width = max(8.0, 1.5 + 0.16 * len(peers) * max(len(names) for _, names in strips))
    figure, axes = pyplot.subplots(len(strips), 1, figsize=(min(width, 40), 4.2 * len(strips)), squeeze=False)
    colors = pyplot.get_cmap("tab10")
    for axis, (direction, names) in zip(axes[:, 0], strips):
        rows = {(r["case_name"], r["peer"]): r for r in found["rows"] if r["direction"] == direction}
        bar = 0.8 / len(peers)
        unit = next((row["unit"] for row in rows.values() if "unit" in row), "")
        for index, peer in enumerate(peers):
            heights = [rows.get((name, peer), {}).get("value", 0.0) for name in names]
            places = [place + (index - (len(peers) - 1) / 2) * bar for place in range(len(heights))]
            axis.bar(places, heights, bar, label=peer, color=colors(index % 10))
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(direction, fontsize=10, loc="left")
        axis.grid(axis="y", alpha=0.3)
        axis.margins(x=0.01, y=0.05)
    environment = found["environment"]
    device = environment["gpu"] or "CPU"
    figure.suptitle(f"{found['name']} on {device}, torch {environment['versions']['torch']}, {environment['date']}")
    # Beside the title, not over the bars.
    axes[0, 0].legend(fontsize=8, ncols=min(len(peers), 5), loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
