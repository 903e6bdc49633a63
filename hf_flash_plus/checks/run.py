"""The whole check: who is asked what, where it runs, and what came of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ..inputs import AttentionInputs
from ..providers import PROVIDERS
from . import compare, models
from .compare import BAD, OK, REFUSED, Row
from .features import FEATURES
from .isolate import Cell, Deal, Runner, run_apart, run_here

#: Plain torch calls: on the CPU they cannot take the process with them.
HARMLESS = frozenset({"reference", "torch_sdpa"})

#: For so many processes in all one takes the cells of a provider that compiles. On 16 cores with nothing compiled yet
#: triton's took 186 to 265 seconds of a core, flaggems' 85 to 136, the models' 25 to 34 and torch's 20 to 26.
PARTS = {"triton": 2, "flaggems": 4, models.AUTOMATIC: 8}

#: Memory of a GPU that a process may need: its context, and the largest cell.
PER_PROCESS = 3 * 2**29

#: The "feature" of a row about a provider that ended the process that asked whether it can be used.
LOADING = "loading"


@dataclass
class Usable:
    """Whether a provider claims to serve on the device, or why not."""

    provider: str
    reason: str | None


@dataclass
class Result:
    """What a check found.

    Attributes:
        providers: every provider, asked or not.
        rows: the cells of the feature matrix.
        models: the checks of whole models.
        not_checked: what this machine could not show, in words.
        missing: providers asked for by name that cannot be used here.
    """

    device: str
    providers: list[Usable]
    rows: list[Row] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[Row]:
        return [row for row in (*self.rows, *self.models) if row.status in BAD]

    @property
    def passed(self) -> bool:
        """Nothing failed, nothing that was asked for is missing, and something was checked at all."""
        checked = any(row.status == OK for row in self.rows) and any(row.status == OK for row in self.models)
        return checked and not self.failures and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON data, with where it was found."""
        from ..bench.environment import describe

        return {
            "passed": self.passed,
            "device": self.device,
            "seconds": round(self.seconds, 1),
            "environment": describe(),
            "providers": [{"name": one.provider, "usable": not one.reason, "reason": one.reason}
                          for one in self.providers],
            "missing": self.missing,
            "not_checked": self.not_checked,
            "rows": [row.as_dict() for row in self.rows],
            "models": [row.as_dict() for row in self.models],
        }  # fmt: skip


def usable(name: str, device: str) -> Usable:
    """Whether a provider claims to serve on a device."""
    provider = PROVIDERS[name]
    try:
        reason = provider.unavailable_reason()
        if reason is None:
            # Some serve a type of device in certain cases only: ask about a plain call in two dtypes.
            kind = torch.device(device).type
            reasons = []
            for dtype in (torch.float32, torch.float16):
                q = torch.empty(1, 8, 2, 64, dtype=dtype)
                signature = AttentionInputs(q, q, q, 0.125).signature()._replace(device_type=kind)
                reasons.append("; ".join(provider.not_supported_reasons(signature)))
            reason = reasons[0] if all(reasons) else None
    except Exception as error:  # must not happen; a check is where one learns of it
        reason = f"{type(error).__name__}: {error}"
    return Usable(name, reason)


def usable_row(provider: str, feature: str, dtype: str, device: str) -> Row:
    """:func:`usable` as a cell, for a process of its own: importing a broken binary package can end a process."""
    reason = usable(provider, device).reason
    return Row(provider, feature, dtype, OK if reason is None else REFUSED, note=reason or "")


def _all_usable(device: str, timeout: float) -> tuple[list[Usable], list[Row]]:
    """Whom to ask, and the rows of those that did not survive the question."""
    if not device.startswith("cuda"):
        return [usable(name, device) for name in PROVIDERS], []
    risky = [name for name in PROVIDERS if name not in HARMLESS]

    def ask(name: str) -> Row:
        return next(run_apart(usable_row, [Cell(name, LOADING, main_dtype(device), device)], timeout))

    with ThreadPoolExecutor(len(risky)) as pool:
        rows = {row.provider: row for row in pool.map(ask, risky)}
    found = [Usable(n, (rows[n].note or None) if n in rows else usable(n, device).reason) for n in PROVIDERS]
    return found, [row for row in rows.values() if row.status in BAD]


def main_dtype(device: str) -> str:
    """The dtype in which everything is asked; the others are asked the core features."""
    return "bf16" if device.startswith("cuda") else "fp32"


def matrix(provider: str, device: str) -> list[Cell]:
    """What a provider is asked."""
    main = main_dtype(device)
    cells = [Cell(provider, name, main, device) for name in compare.names()]
    for dtype in compare.DTYPES:
        if dtype != main:
            cells += [Cell(provider, one.name, dtype, device) for one in FEATURES if one.core]
    return cells


def model_cells(provider: str, device: str) -> list[Cell]:
    """What the two models are asked."""
    dtypes = ("fp32", "bf16") if device.startswith("cuda") else ("fp32",)
    return [
        Cell(provider, check, dtype, device)
        for name in models.MODELS
        for dtype in dtypes
        for check in models.checks(name, dtype)
    ]


def is_apart(provider: str, device: str) -> bool:
    """Whether a provider runs in a process of its own."""
    return provider != "reference" if device.startswith("cuda") else provider not in (*HARMLESS, models.AUTOMATIC)


class _Work:
    """Cells of one kind that one provider is asked, by how many processes, and where the rows go."""

    def __init__(self, runner: Runner, cells: list[Cell], rows: list[Row], name: str, device: str, jobs: int) -> None:
        self.runner, self.cells, self.rows, self.name = runner, cells, rows, name
        self.apart = is_apart(name, device)
        self.processes = max(1, jobs // PARTS[name]) if name in PARTS else 1
        self.deal = Deal(cells)


def check(
    device: str,
    providers: Sequence[str] | None = None,
    timeout: float = 60.0,
    jobs: int | None = None,
    report: Callable[[Row], None] | None = None,
) -> Result:
    """Check providers and models on a device.

    Args:
        device: ``"cpu"`` or a CUDA device.
        providers: by name; None is every one that claims to serve there.
        timeout: seconds for one cell, compiling its kernels included.
        jobs: processes at a time; None chooses by the number of cores and the device's free memory.
        report: called with each row as it comes, from several threads but never from two at once.
    """
    begin = time.perf_counter()
    names = list(PROVIDERS) if providers is None else list(providers)
    result = Result(device, [])
    jobs = jobs or _jobs(device)
    whole = [models.AUTOMATIC] if providers is None else names
    work = [_Work(compare.run_cell, matrix(name, device), result.rows, name, device, jobs) for name in names]
    work += [_Work(models.run_check, model_cells(name, device), result.models, name, device, jobs) for name in whole]
    lock = threading.Lock()

    def run(one: _Work) -> None:
        rows = run_apart(one.runner, one.deal, timeout) if one.apart else run_here(one.runner, one.cells)
        for row in rows:
            with lock:
                one.rows.append(row)
                if report is not None:
                    report(row)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            # Processes start, and import what they need, while it is asked who can be used.
            apart_futures = [pool.submit(run, one) for one in work if one.apart for _ in range(one.processes)]
            found, lost = _all_usable(device, timeout)
            result.providers, result.rows[:0] = found, [row for row in lost if row.provider in names]
            reasons = {one.provider: one.reason for one in found}
            result.not_checked = _not_checked(device, [one for one in found if one.reason])
            if providers is not None:
                result.missing = [name for name in names if reasons[name] is not None]
            for one in work:
                one.deal.release(reasons.get(one.name) is None)
            # What runs here runs in this very thread: generators and autocast are its own.
            for one in work:
                if not one.apart and reasons.get(one.name) is None:
                    run(one)
        except BaseException:  # KeyboardInterrupt, too: nobody waits for the rest
            for one in work:
                one.deal.release(wanted=False)
            raise
        for future in apart_futures:
            future.result()
    _sort(result.rows, [cell for name in names for cell in matrix(name, device)])
    _sort(result.models, [cell for name in whole for cell in model_cells(name, device)])
    result.seconds = time.perf_counter() - begin
    return result


def _sort(rows: list[Row], cells: list[Cell]) -> None:
    """Rows in the order of their cells, those of no cell first."""
    order = {cell[:3]: i for i, cell in enumerate(cells)}
    rows.sort(key=lambda row: order.get((row.provider, row.feature, row.dtype), -1))


def _jobs(device: str) -> int:
    """How many processes at a time: most of their work is to compile, which keeps a core busy each."""
    if not device.startswith("cuda"):
        return max(1, min(12, _cores() // 2))
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return max(1, min(16, _cores(), free // PER_PROCESS))


def _cores() -> int:
    """How many cores this process may use, which in a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def _not_checked(device: str, unusable: Sequence[Usable]) -> list[str]:
    words = [f"{one.provider}: {one.reason}" for one in unusable]
    if not device.startswith("cuda"):
        if torch.cuda.is_available():
            words.append("the GPU: this check ran on the CPU (--device cuda checks the GPU)")
        else:
            words.append("GPU kernels: torch sees no CUDA or ROCm device")
    return words
