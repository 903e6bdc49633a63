"""The result of a check as tables for people: who is right at what, why not, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .compare import BAD, CRASH, DTYPES, ERROR, HANG, OK, REFUSED, WRONG, Row, names
from .models import AUTOMATIC
from .run import Result, main_dtype

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {
    OK: "[green]ok[/green]",
    REFUSED: "[dim]-[/dim]",
    WRONG: "[bold red]WRONG[/bold red]",
    ERROR: "[bold red]ERROR[/bold red]",
    CRASH: "[bold red]CRASH[/bold red]",
    HANG: "[bold red]HANG[/bold red]",
}

#: What to do, by what an error says; the first that fits.
_ADVICE = (
    (("c compiler", "gcc", "cc1"), "Triton needs a C compiler: install gcc or clang, or set CC to one"),
    (
        ("permission denied", "read-only file system"),
        "the kernel cache cannot be written: set TRITON_CACHE_DIR to a folder that can",
    ),
    (("no space left",), "the disk is full: clean up, or set TRITON_CACHE_DIR to a folder on another one"),
    (("out of memory",), "the device's memory is full: end what else runs on it, then check again"),
    (("no kernel image", "unsupported gpu", "ptxas"), "torch or Triton was built for other GPUs: install newer ones"),
)


def advice(row: Row) -> str:
    """What a person can do about a failed row."""
    text = row.note.lower()
    for words, what in _ADVICE:
        if row.status in (ERROR, CRASH) and any(word in text for word in words):
            return what
    if row.provider == AUTOMATIC:
        return "load models with attn_implementation='sdpa' until this is understood, and report it"
    if row.provider in ("reference", "torch_sdpa"):
        return "torch itself errs here: try another version of torch, and report it"
    if row.provider in ("flaggems", "triton"):
        return "set FLASH_ATTENTION_USE_FLAGGEMS=FALSE (torch's own kernels serve), and report it"
    return "set HF_FLASH_PLUS_PROVIDER=torch_sdpa, or install another version of it, and report it"


def print_result(result: Result, console: Console) -> None:
    """Everything: the matrix, the models, failures with advice, what was not checked, the verdict."""
    from rich.markup import escape

    _print_matrix(result, console)
    _print_models(result, console)
    _print_failures(result, console)
    for line in result.missing:
        console.print(f"[red]asked for, but cannot be used here: {line}[/red]")
    if result.not_checked:
        console.print("[bold]Not checked[/bold]")
        for line in result.not_checked:
            console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    good = sum(row.status == OK for row in (*result.rows, *result.models))
    refused = sum(row.status == REFUSED for row in result.rows)
    word = "[bold green]passed[/bold green]" if result.passed else "[bold red]failed[/bold red]"
    console.print(
        f"{word}: {good} right, {len(result.failures)} failed, {refused} declined, on {result.device}, "
        f"in {result.seconds:.0f} s",
        highlight=False,
    )


def _print_matrix(result: Result, console: Console) -> None:
    from rich.table import Table

    providers = list(dict.fromkeys(row.provider for row in result.rows))
    if not providers:
        return
    cells = {(row.provider, row.feature, row.dtype): row for row in result.rows}
    main = main_dtype(result.device)
    title = f"Against float64, in {main}"
    table = Table("feature", *providers, title=title, title_justify="left")
    for feature in names():
        rows = [cells.get((provider, feature, main)) for provider in providers]
        table.add_row(feature, *(_MARKS[row.status] if row else "" for row in rows))
    for dtype in DTYPES:
        if dtype == main:
            continue
        for index, feature in enumerate(dict.fromkeys(row.feature for row in result.rows if row.dtype == dtype)):
            if index == 0:
                table.add_section()
            rows = [cells.get((provider, feature, dtype)) for provider in providers]
            table.add_row(f"{feature}, {dtype}", *(_MARKS[row.status] if row else "" for row in rows))
    console.print(table)
    declined = [row for row in result.rows if row.status == REFUSED]
    if declined:
        console.print("[dim]-[/dim] declined, another provider serves:")
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in declined:
            reasons.setdefault((row.provider, row.note), []).append(row.feature)
        for (provider, note), features in reasons.items():
            what = ", ".join(dict.fromkeys(features))
            console.print(f"  {provider}, {what}: {note}", markup=False, highlight=False, soft_wrap=True)


def _print_models(result: Result, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not result.models:
        return
    table = Table(
        "model", "provider", "dtype", "verdict", "note", title="Whole models against eager", title_justify="left"
    )
    for row in result.models:
        note = escape(row.note) if row.status == OK else ""
        table.add_row(row.feature, row.provider, row.dtype, _MARKS[row.status], note)
    console.print(table)


def _print_failures(result: Result, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    failures = [row for row in (*result.rows, *result.models) if row.status in BAD]
    if not failures:
        return
    table = Table("provider", "feature", "verdict", "what, and what to do", title="Failures", title_justify="left")
    shown: set[str] = set()
    for row in failures:
        todo = advice(row)
        # Said once per provider: twenty rows with the same advice hide what differs.
        mark = f"{row.provider}: {todo}"
        tail = "" if mark in shown else f"\n[yellow]{escape(todo)}[/yellow]"
        shown.add(mark)
        table.add_row(row.provider, f"{row.feature}, {row.dtype}", _MARKS[row.status], escape(row.note) + tail)
    console.print(table)
