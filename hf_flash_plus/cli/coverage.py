"""``hf-flash-plus coverage``: every model type of the installed Transformers, ``flash_plus`` against eager."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .console import make_console
from .usage import check_device, refuse

if TYPE_CHECKING:
    from ..coverage.record import Record
    from ..coverage.subject import Settings
    from ..coverage.worker import Row

#: Rows after which a running sweep writes what it has.
SAVE_EVERY = 20


class SweepDtype(str, Enum):
    """The dtypes of ``--dtype``."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def coverage(
    models: Annotated[str, typer.Option(help="Model types, separated by commas [default: all].")] = "",
    checks: Annotated[str, typer.Option(help="Checks, separated by commas [default: all].")] = "",
    subset: Annotated[Path | None, typer.Option(help="A file of model types, one a line; or 'ci'.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Subprocesses, with one thread each.")] = 2,
    limit: Annotated[int, typer.Option(min=0, help="Only the first of them; 0: all.")] = 0,
    budget: Annotated[float, typer.Option(help="Seconds after which the rest is left out; 0: none.")] = 0.0,
    memory: Annotated[float, typer.Option(help="GiB of GPU memory that a process may take.")] = 4.0,
    timeout: Annotated[float, typer.Option(help="Seconds after which a model type is given up.")] = 240.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        SweepDtype, typer.Option(help="fp32 against eager; bf16, fp16 against fp32 eager.")
    ] = SweepDtype.fp32,
    output: Annotated[Path | None, typer.Option(help="Write the results there as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the results there as a Markdown page.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Keep the other rows that --output already has.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on: run what --output does not have, or lost.")] = False,
    beside: Annotated[list[Path] | None, typer.Option(help="Other results that --report mentions.")] = None,
    from_json: Annotated[Path | None, typer.Option(help="Run nothing: take the results of an earlier run.")] = None,
    against: Annotated[Path | None, typer.Option(help="Fail where an earlier run's results are better.")] = None,
) -> None:
    """Compare flash_plus with eager on every model type. Exit code 1: something differs, or is lost."""
    from ..coverage.record import losses, summarize

    # What is read is read first: a wrong path must not cost a sweep.
    before = _load("--against", against) if against is not None else None
    others = {path.name: _load("--beside", path) for path in beside or []}
    if from_json is not None:
        record = _load("--from-json", from_json)
    else:
        plan = _plan(models, checks, subset, limit, device, dtype.value, memory)
        known = _load("--output", output) if (update or resume) and output is not None and output.exists() else None
        try:
            record = _sweep(plan, processes, timeout, budget, output, known, resume)
        except ValueError as problem:
            refuse(str(problem))
    if output is not None:
        record.save(output)
    if report is not None:
        from ..coverage.report import render

        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(render(record, others))
    summary = summarize(record.rows)
    console = make_console()
    console.print(
        f"{summary.total} model types: {summary.run} run; {summary.switched} switch, {summary.exact} of them exact in "
        f"every check, {summary.partly} refuse some; {summary.refused} refused; {summary.idle} never call attention; "
        f"{summary.different} differ"
    )
    lost = losses(before, record.rows) if before is not None else []
    for line in lost:
        console.print(f"lost: {line}", markup=False)
    if summary.different or lost:
        raise typer.Exit(1)


class Plan(NamedTuple):
    """What to run: model types, checks, and where."""

    models: list[str]
    checks: list[str]
    settings: Settings


def _plan(models: str, checks: str, subset: Path | None, limit: int, device: str, dtype: str, memory: float) -> Plan:
    import torch

    from ..coverage.cells import CHECKS
    from ..coverage.find import model_types
    from ..coverage.subject import Settings

    check_device(device, "that models can be compared on")
    chosen_checks = _names(checks) or list(CHECKS)
    bad_checks = [name for name in chosen_checks if name not in CHECKS]
    if bad_checks:
        refuse(f"--checks: there is no check {', '.join(map(repr, bad_checks))}; checks are {', '.join(CHECKS)}.")
    known = model_types()
    wanted = _names(models) or (_subset(subset) if subset is not None else known)
    if models:
        _refuse_unknown([name for name in wanted if name not in known], known)
    chosen = [name for name in known if name in wanted]
    if not chosen:
        refuse(f"--subset {subset}: none of its lines is a model type of the installed Transformers, such as llama.")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return Plan(chosen[: limit or None], chosen_checks, Settings(device, kind, memory_gib=memory))


def _refuse_unknown(unknown: list[str], known: list[str]) -> None:
    """End the command for model types that Transformers does not have."""
    import difflib

    import transformers

    if unknown:
        near = [name for wrong in unknown for name in difflib.get_close_matches(wrong, known)]
        refuse(
            f"--models: Transformers {transformers.__version__} has no model type {', '.join(map(repr, unknown))}"
            f"{'; near ones are ' + ', '.join(dict.fromkeys(near)) if near else ' (COVERAGE.md lists them)'}."
        )


def _load(option: str, path: Path) -> Record:
    """An earlier run's results; the command ends where the file holds none."""
    from ..coverage.record import Record

    try:
        return Record.load(path)
    except OSError as error:
        refuse(f"{option} {path} cannot be read: {error.strerror or error}.")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        refuse(
            f"{option} {path} holds no results of hf-flash-plus coverage, which --output writes "
            f"({type(error).__name__}: {error})."
        )


def _sweep(
    plan: Plan,
    processes: int,
    timeout: float,
    budget: float,
    output: Path | None,
    known: Record | None,
    resume: bool,
) -> Record:
    """Run a plan; what is done goes to ``output`` every now and then, so that a stop loses little."""
    import math
    import signal

    from ..coverage.pool import is_lost, run_all
    from ..coverage.record import Record, make_header

    header = make_header(plan.settings, plan.checks)
    done: list[Row] = []

    def record() -> Record:
        new = Record(header, done)
        return new if known is None else known.updated(new)

    record()  # refuses results of other versions or settings before the first minute is spent
    have = {row.model_type for row in known.rows if not is_lost(row)} if resume and known is not None else set()
    todo = [name for name in plan.models if name not in have]
    _quiet()
    console = make_console()

    def show(row: Row, seconds: float) -> None:
        done.append(row)
        if output is not None and len(done) % SAVE_EVERY == 0:
            record().save(output)
        console.print(f"{len(done)}/{len(todo)} {_describe(row)} ({seconds:.1f} s)", markup=False, highlight=False)
        console.file.flush()

    # A time limit's signal stops the sweep as Ctrl-C does: with what is done.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows = run_all(todo, plan.checks, plan.settings, processes, timeout, show, budget or math.inf)
    if len(rows) < len(todo):
        console.print(
            f"{len(todo) - len(rows)} of {len(todo)} model types are not done; --resume goes on", markup=False
        )
    done = rows
    return record()


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _subset(path: Path) -> list[str]:
    if str(path) == "ci":
        path = Path("tests/transformers/coverage_ci.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        refuse(f"--subset {path} cannot be read: {reason}. Give a file of model types, one a line.")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _quiet() -> None:
    """The warnings of refused models go into the record, not onto the screen."""
    import logging

    from transformers.utils import logging as transformers_logging

    logging.getLogger("hf_flash_plus").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()


def _describe(row: Row) -> str:
    if not row.runs:
        return f"{row.model_type}: not run: {row.reason}"
    words = [f"{name} {cell.outcome}" for name, cell in row.cells.items() if cell.outcome != "exact"]
    return f"{row.model_type}: {row.outcome()}" + (f" ({', '.join(words)})" if words else "")
