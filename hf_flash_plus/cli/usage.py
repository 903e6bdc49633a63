"""Usage errors of the verbs: one line on stderr, and exit code 2."""

from __future__ import annotations

from typing import NoReturn

import typer


def refuse(message: str) -> NoReturn:
    """End the command for what was asked of it."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def check_device(where: str, purpose: str) -> None:
    """End the command unless attention can run on that device here. ``purpose`` as in "that can be checked"."""
    import torch

    kind, _, index = where.partition(":")
    if kind not in ("cpu", "cuda") or (":" in where and not (kind == "cuda" and index.isdecimal())):
        refuse(f"--device {where!r} is none {purpose}; give cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        refuse(f"--device {where!r} is not there; torch sees {count} CUDA devices. Give cpu, or install a CUDA torch.")
