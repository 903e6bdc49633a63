"""The command line ``hf-flash-plus``: one verb per file, each importing what it needs when it runs."""

from __future__ import annotations

import typer

from .bench import bench
from .check import check
from .coverage import coverage
from .explain import explain
from .info import info

app = typer.Typer(
    name="hf-flash-plus",
    help="Attention for Hugging Face Transformers, by FlagGems, Triton, flash-attn or torch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for _verb in (info, explain, check, bench, coverage):
    app.command()(_verb)


def main() -> None:
    """Entry point of ``hf-flash-plus`` and ``python -m hf_flash_plus``."""
    app()


__all__ = ["app", "main"]
