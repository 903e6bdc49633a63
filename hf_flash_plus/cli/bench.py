"""``hf-flash-plus bench``: measure attention implementations side by side, as a YAML file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import make_console
from .usage import check_device, refuse

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    config: Annotated[Path | None, typer.Argument(help="A benchmark's YAML file (configs/bench/*.yaml).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for NAME.json and NAME.png.")] = Path("bench-results"),
    peers: Annotated[str | None, typer.Option(help="Only these peers, separated by commas.")] = None,
    cases: Annotated[str | None, typer.Option(help="Only cases whose name contains one of these texts.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu [default: cuda where there is one].")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of measuring per case and direction.")] = None,
    show: Annotated[Path | None, typer.Option(help="Run nothing: show this result (NAME.json) and draw it.")] = None,
    list_peers: Annotated[bool, typer.Option("--list-peers", help="List the peers and exit.")] = False,
) -> None:
    """Measure attention implementations side by side: a table, NAME.json and NAME.png."""
    from dataclasses import replace

    import torch

    from ..bench import config as configuration
    from ..bench.kernels import DeviceLost
    from ..bench.peers import PEERS
    from ..bench.run import run, select

    console = make_console()
    if list_peers:
        for peer in PEERS.values():
            console.print(f"{peer.name:16} {peer.summary}", highlight=False)
        return
    if show is not None:
        _show(_read(show), show, console)
        return
    if config is None:
        refuse("which benchmark? Give a YAML file, for example configs/bench/forward.yaml.")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where, "that can be measured")
    try:
        chosen = select(configuration.load(config), _split(peers), _split(cases))
        if budget is not None:
            chosen = replace(chosen, budget_s=budget)
        found = run(chosen, torch.device(where), out, lambda text: typer.echo(text, err=True))
    except (ValueError, DeviceLost) as error:
        refuse(str(error))
    _show(found, out / f"{chosen.name}.json", console)
    if not any(row["status"] == "ok" for row in found["rows"]):
        raise typer.Exit(1)


def _read(path: Path) -> dict[str, Any]:
    """An earlier result; the command ends with exit code 2 where the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"kind", "rows", "peers", "environment"} <= set(found):
            raise ValueError("it is no result of hf-flash-plus bench (kind, rows, peers and environment are missing)")
    except (OSError, ValueError) as error:
        refuse(f"cannot show {path}: {error}")
    return found


def _show(found: dict[str, Any], path: Path, console: Console) -> None:
    """Print a result's tables, and draw it beside its JSON file."""
    from ..bench.plot import NoMatplotlib, plot
    from ..bench.report import print_tables

    print_tables(found, console)
    console.print(f"{path}  ({found['duration_s']:.0f} s)", highlight=False)
    try:
        plot(found, path.with_suffix(".png"))
    except NoMatplotlib as error:
        console.print(str(error), style="yellow", markup=False)


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None
