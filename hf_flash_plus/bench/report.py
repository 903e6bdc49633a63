"""A benchmark's result: JSON, summary over groups, and a table."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from .config import BenchConfig, peer_name

SCHEMA = 1
Row = dict[str, Any]


def ratio(row: Row, baseline: Row) -> float:
    """How many times better a row is than the baseline's (above 1 is better, also where less is better)."""
    return baseline["value"] / row["value"] if row["unit"] == "MiB" else row["value"] / baseline["value"]


def add_ratios(rows: list[Row], baseline: str) -> None:
    """Put ``ratio`` into every measured row whose case the baseline was measured on, in the same way (alone, or so many
    layers in a row)."""
    base = {(r["direction"], r["case_name"]): r for r in rows if r["peer"] == baseline and r["status"] == "ok"}
    for row in rows:
        other = base.get((row["direction"], row["case_name"]))
        if row["status"] == "ok" and other is not None and row.get("layers", 1) == other.get("layers", 1):
            row["ratio"] = ratio(row, other)


def summarize(rows: list[Row]) -> list[Row]:
    """Per direction, group (and ``all``) and peer: the geometric mean, the least and the number of the ratios."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if "ratio" in row:
            for group in (row["group"], "all"):
                found.setdefault((row["direction"], group, row["peer"]), []).append(row["ratio"])
    return [
        {
            "direction": direction,
            "group": group,
            "peer": peer,
            "geomean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "least": min(ratios),
            "cases": len(ratios),
        }
        for (direction, group, peer), ratios in found.items()
    ]


def result(config: BenchConfig, rows: list[Row], environment: dict[str, Any], duration_s: float) -> dict[str, Any]:
    """Everything of a run, for JSON."""
    add_ratios(rows, config.baseline)
    return {
        "schema": SCHEMA,
        "kind": config.kind,
        "name": config.name,
        "baseline": config.baseline,
        "peers": [peer_name(entry) for entry in config.peers],
        "duration_s": round(duration_s, 1),
        "environment": environment,
        "config": config.raw,
        "summary": summarize(rows),
        "rows": rows,
    }


def write_json(found: dict[str, Any], path: Path) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_tables(found: dict[str, Any], console: Any) -> None:
    """One table per direction: cases down, peers across, each with its value and its ratio to the baseline."""
    for direction in dict.fromkeys(row["direction"] for row in found["rows"]):
        _print_direction(found, direction, console)
    reasons = dict.fromkeys(
        f"{row['peer']}: {row['status']}: {row['reason']}"
        for row in found["rows"]
        if row["status"] in ("declined", "wrong", "error")
    ) | dict.fromkeys(f"{row['peer']}*: {row['note']}" for row in found["rows"] if "note" in row)
    for reason in list(reasons)[:20]:
        console.print(reason, style="dim", markup=False, highlight=False)


def _print_direction(found: dict[str, Any], direction: str, console: Any) -> None:
    from rich.table import Table

    rows = [row for row in found["rows"] if row["direction"] == direction]
    units = dict.fromkeys(row["unit"] for row in rows if "unit" in row)
    title = (
        f"{found['name']}: {direction}, {', '.join(units)} (times {found['baseline']}: above 1 is better; ± of rounds)"
    )
    table = Table("case", title=title, title_justify="left")
    for peer in found["peers"]:
        table.add_column(peer, justify="right")
    cells = {(row["case_name"], row["peer"]): row for row in rows}
    for name in dict.fromkeys(row["case_name"] for row in rows):
        table.add_row(name, *(_cell(cells.get((name, peer))) for peer in found["peers"]))
    table.add_section()
    summary = {(entry["group"], entry["peer"]): entry for entry in found["summary"] if entry["direction"] == direction}
    for group in dict.fromkeys(group for group, _ in summary):
        means = (summary.get((group, peer)) for peer in found["peers"])
        table.add_row(
            f"geomean {group} (least)",
            *(f"{entry['geomean']:.2f}x ({entry['least']:.2f}x)" if entry else "-" for entry in means),
        )
    console.print(table)


def spread(row: Row) -> float | None:
    """How far the rounds of a row lie apart: half the distance between its best and worst, in percent of the median;
    None with less than two. A ratio nearer to 1 than the spreads of both rows says nothing."""
    rounds = row.get("seconds") or row.get("rounds_ms") or ()
    if len(rounds) < 2:
        return None
    return 50.0 * (max(rounds) - min(rounds)) / statistics.median(rounds)


def _cell(row: Row | None) -> str:
    if row is None or row["status"] == "skipped":
        return "-"
    if row["status"] != "ok":
        return f"[yellow]{row['status']}[/yellow]" if row["status"] == "declined" else f"[red]{row['status']}[/red]"
    value = row["value"]
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    text += f" [dim]{row['ratio']:.2f}x[/dim]" if "ratio" in row else ""
    apart = spread(row)
    text += f" [dim]±{apart:.0f}%[/dim]" if apart is not None else ""
    text += "*" if "note" in row else ""
    if row["direction"] == "decode":  # there the host's time decides, too
        text += f"\n[dim]{row['median_ms'] * 1e3:.1f} us, host {row['host_us']:.0f}[/dim]"
    return text
