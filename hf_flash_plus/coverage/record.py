"""Results as data: ``coverage.json``, one line a model type."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .cells import CHECKS, DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from .subject import Settings
from .worker import Row


@dataclass
class Record:
    """A sweep: where it ran, and its rows."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the record, one line a model type, so that two sweeps can be compared line by line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"  {json.dumps(row.model_type)}: {json.dumps(row.as_json())}" for row in self.rows]
        header = json.dumps(self.header, indent=1)[1:-1].strip("\n")
        path.write_text("{\n" + header + ',\n "models": {\n' + ",\n".join(lines) + "\n }\n}\n")

    @staticmethod
    def load(path: Path) -> Record:
        """Read a record."""
        data = json.loads(path.read_text())
        models = data.pop("models")
        return Record(data, [Row.from_json(name, row) for name, row in models.items()])

    def updated(self, newer: Record) -> Record:
        """This record with the rows of a newer one in place of its own.

        A sweep may go on with another GPU of the same compute capability, for which the same kernels serve: the
        record names both.

        Raises:
            ValueError: they were made by different versions, settings, or kinds of device.
        """
        for key in ("versions", "dtype", "tolerance", "checks"):
            if self.header[key] != newer.header[key]:
                raise ValueError(f"the records differ in {key}: {self.header[key]} and {newer.header[key]}.")
        header = {**newer.header, "device": _both_devices(self.header, newer.header)}
        rows = newer.by_type()
        known = self.by_type()
        kept = [rows.get(row.model_type, row) for row in self.rows]
        return Record(header, kept + [row for row in newer.rows if row.model_type not in known])

    def by_type(self) -> dict[str, Row]:
        """The rows by model type."""
        return {row.model_type: row for row in self.rows}


def _both_devices(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The devices of two headers in one text."""
    kinds, names = zip(*(str(header["device"]).rstrip(")").partition(" (")[::2] for header in (first, second)))
    if kinds[0] != kinds[1] or first.get("capability") != second.get("capability"):
        raise ValueError(f"the records differ in device: {first['device']} and {second['device']}.")
    known = dict.fromkeys(name for text in names for name in text.split(", ") if name)
    return f"{kinds[0]} ({', '.join(known)})" if known else str(kinds[0])


def make_header(settings: Settings, checks: list[str]) -> dict[str, Any]:
    """Versions and settings of this sweep."""
    import torch
    import transformers

    from .. import __version__

    device, capability = settings.device, {}
    if device.startswith("cuda"):
        index = torch.device(device)
        capability = {"capability": ".".join(map(str, torch.cuda.get_device_capability(index)))}
        device = f"{device} ({torch.cuda.get_device_name(index)})"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {
            "hf_flash_plus": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": device,
        **capability,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "tolerance": settings.tolerance,
        "checks": checks,
    }


@dataclass(frozen=True)
class Summary:
    """Counts of model types."""

    total: int
    run: int
    refused: int
    switched: int
    exact: int
    partly: int
    different: int
    idle: int
    cells: dict[str, dict[str, int]]


def summarize(rows: list[Row]) -> Summary:
    """Count a sweep's rows and cells."""
    run = [row for row in rows if row.runs]
    refused = [row for row in run if row.refused]
    idle = [row for row in run if not row.calls and not row.refused and row.outcome() != DIFFERENT]
    switched = [row for row in run if row not in refused and row not in idle]
    cells = {
        name: {
            word: sum(1 for row in run if row.cells.get(name, Cell("")).outcome == word)
            for word in (EXACT, REFUSED, NOT_RUNNABLE, DIFFERENT)
        }
        for name in CHECKS
    }
    return Summary(
        total=len(rows),
        run=len(run),
        refused=len(refused),
        switched=len(switched),
        exact=sum(1 for row in switched if row.outcome() == EXACT),
        partly=sum(1 for row in switched if row.outcome() == REFUSED),
        different=sum(1 for row in run if row.outcome() == DIFFERENT),
        idle=len(idle),
        cells=cells,
    )


def losses(before: Record, after: list[Row]) -> list[str]:
    """What a newer sweep of some model types lost: rows that ran and cells that were exact; and every difference."""
    old = before.by_type()
    found = []
    for row in after:
        for name, cell in row.cells.items():
            if cell.outcome == DIFFERENT:
                found.append(f"{row.model_type} {name}: DIFFERENT {cell.error} {cell.note}")
        known = old.get(row.model_type)
        if known is None or not known.runs:
            continue
        if not row.runs:
            found.append(f"{row.model_type}: ran before, now: {row.reason}")
            continue
        for name, cell in known.cells.items():
            now = row.cells.get(name)
            if cell.outcome == EXACT and (now is None or now.outcome not in (EXACT, DIFFERENT)):
                found.append(f"{row.model_type} {name}: was exact, now {now or 'absent'}")
    return found
