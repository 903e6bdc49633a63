"""Read a sweep of ``tune_decode``: ratios to torch's SDPA, the best candidates, and entries for ``_SM90_WAYS``.

Usage::

    python -m hf_flash_plus.kernels.tune_decode_report sweep.json

A ratio is torch's time over ours: above 1 is faster than torch. Of candidates within 1.5 percent of a shape's best, the
proposal takes the one that is good for the most shapes, so that few kernels serve all.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from .decode_launch import PADDED, PAGED, WHOLE, keys_class, programs_class

_NEAR = 1.015


def _spread(values: list[float]) -> float:
    """Half the distance between the outer rounds, in percent of the median."""
    return 50.0 * (max(values) - min(values)) / statistics.median(values)


def measured(row: dict[str, Any], launches: int | None = None) -> dict[str, float]:
    """The candidates that took turns, with ``launches`` launches where that is said (a single split has one)."""
    found = {}
    for name, us in row["us"].items():
        candidate = row["candidates"].get(name)
        if candidate is None or name == row["before"]:
            continue
        if launches is None or candidate["splits"] == 1 or launches == 1 + candidate["two"]:
            found[name] = us
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """One line for each shape."""
    out = [
        "shape: floor us | sdpa | before, now, best (ratio to sdpa, best over floor) | best candidate, gain over now"
    ]
    for row in found["rows"]:
        us, best = row["us"], measured(row)
        if not best:
            out.append(f"{row['name']}: no candidate was right")
            continue
        name = min(best, key=lambda n: best[n])
        sdpa, before, now = us["sdpa"], us[row["before"]], us["now"]
        like = f" contiguous {us['contiguous']:.2f} ({us['contiguous'] / best[name]:.2f})" if "contiguous" in us else ""
        out.append(
            f"{row['name']}: {row['floor_us']:.2f} | {sdpa:.2f}{like} | {before:.2f} ({sdpa / before:.2f}) "
            f"{now:.2f} ({sdpa / now:.2f}) {best[name]:.2f} ({sdpa / best[name]:.2f}, "
            f"{best[name] / row['floor_us']:.2f}) | {name} {100 * (now / best[name] - 1):+.1f}% "
            f"(rounds +-{_spread(row['rounds_us'][name]):.1f}%)"
        )
    return out


def summary(found: dict[str, Any]) -> list[str]:
    """Geometric means and the least of the ratios to torch, over shapes in one piece."""
    plain = [r for r in found["rows"] if not r["spec"]["page_size"] and not r["spec"]["padded"] and measured(r)]
    out = []
    for label, pick in (
        ("before", lambda row: row["us"][row["before"]]),
        ("now", lambda row: row["us"]["now"]),
        ("best", lambda row: min(measured(row).values())),
        ("best in one launch", lambda row: min(measured(row, 1).values(), default=math.inf)),
        ("best in two", lambda row: min(measured(row, 2).values(), default=math.inf)),
    ):
        ratios = [row["us"]["sdpa"] / pick(row) for row in plain]
        ratios = [ratio for ratio in ratios if ratio > 0]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            out.append(f"{label}: {mean:.3f} of sdpa's speed, least {min(ratios):.3f}, {len(ratios)} shapes")
    return out


def proposal(found: dict[str, Any]) -> list[str]:
    """Entries of ``_SM90_WAYS``, from the candidates that a call outside of eager steps can take (two launches)."""
    cores = found["cores"]
    classes: dict[tuple[int, int, int, int], dict[str, list[tuple[float, dict[str, Any]]]]] = {}
    popular: dict[tuple[int, ...], int] = {}
    for row in found["rows"]:
        spec, times = row["spec"], measured(row, 2)
        if not times:
            continue
        kind = PAGED if spec["page_size"] else PADDED if spec["padded"] else WHOLE
        programs = spec["batch"] * spec["nheads_k"]
        key = (2 * spec["head_dim"], programs_class(programs, cores), keys_class(spec["keys"]), kind)
        best = min(times.values())
        for name, us in times.items():
            candidate = row["candidates"][name]
            entry = _entry(candidate, programs, spec["keys"], cores)
            classes.setdefault(key, {}).setdefault(str(entry), []).append((us / best, {"entry": entry, **candidate}))
            if us <= best * _NEAR:
                popular[entry[:4]] = popular.get(entry[:4], 0) + 1
    out = ["_SM90_WAYS = {"]
    for key in sorted(classes):
        near = [
            (-popular.get(tries[0][1]["entry"][:4], 0), statistics.mean(t[0] for t in tries), tries[0][1]["entry"])
            for tries in classes[key].values()
            if len(tries) == max(map(len, classes[key].values()))  # measured on all of the class's shapes
        ]
        least = min(cost for _, cost, _ in near)
        _, cost, entry = min(item for item in near if item[1] <= least * _NEAR)
        out.append(f"    {key}: {entry},  # {100 * (cost - 1):.1f} percent over the best measured")
    return [*out, "}"]


def _entry(candidate: dict[str, Any], programs: int, keys: int, cores: int) -> tuple[int, ...]:
    """A candidate as an entry that gives its number of splits: programs for each multiprocessor and least keys."""
    splits = candidate["splits"]
    per_core = max(1, math.ceil(splits * programs / cores)) if splits > 1 else 1
    cap = max(1, cores * per_core // programs)
    least = candidate["block_n"] if splits >= min(cap, keys // candidate["block_n"]) else keys // splits
    if splits == 1 and cap > 1:
        least = keys  # the class's shorter ones are not split either
    return (candidate["block_n"], candidate["warps"], candidate["stages"], candidate["prefetch"], least, per_core)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    args = parser.parse_args()
    found = json.loads(args.sweep.read_text(encoding="utf-8"))
    for line in (*lines(found), "", *summary(found), "", *proposal(found)):
        print(line)


if __name__ == "__main__":
    main()
