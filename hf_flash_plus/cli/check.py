"""``hf-flash-plus check``: every usable provider and two models, compared with float64 and eager on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import make_console
from .usage import check_device, refuse

if TYPE_CHECKING:
    from ..checks.compare import Row


def check(
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N [default: cuda where there is one].")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Only this provider (repeatable) [default: all that can serve here].")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result there as JSON.")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that one feature may take.")] = 60.0,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time [default: by cores].")] = None,
) -> None:
    """Check on this machine that each provider computes what it claims to. Exit code 1: something is wrong.

    Each provider that can take the device with it runs in a process of its own, so that a crash is a row of the table.
    """
    import torch

    from ..checks.report import print_result
    from ..checks.run import check as run_check
    from ..providers import PROVIDERS

    names = None if not provider else [name.strip().lower() for name in provider]
    unknown = [name for name in names or () if name not in PROVIDERS]
    if unknown:
        refuse(f"--provider {unknown[0]!r} is none; the providers are: {', '.join(PROVIDERS)}.")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(where, "that can be checked")
    console = make_console()
    done = 0

    with console.status("checking ...") as status:

        def show(row: Row) -> None:
            nonlocal done
            done += 1
            status.update(f"{done} done: {row.provider}, {row.feature}, {row.dtype}")

        result = run_check(where, names, timeout, jobs, show)
    print_result(result, console)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    if not result.passed:
        raise typer.Exit(1)
