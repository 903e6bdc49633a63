"""The console the verbs print to."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """A rich console: as wide as the terminal, or 160 columns in a pipe or log, where 80 would break the tables."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)
