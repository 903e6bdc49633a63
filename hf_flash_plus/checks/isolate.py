"""Cells in a process of their own, so that a crash or a hang is a row of the table and not its end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from .compare import BAD, CRASH, ERROR, HANG, Row

#: Seconds that starting a process and importing torch and transformers may take, beside the time of its first cell.
STARTING = 120.0

#: Seconds that one may take to end once it is not asked any more.
LEAVING = 5.0


class Cell(NamedTuple):
    """What is to be run: a feature or a model's check, of a provider, in a dtype, on a device."""

    provider: str
    feature: str
    dtype: str
    device: str


Runner = Callable[[str, str, str, str], Row]


def run_here(run: Runner, cells: Sequence[Cell]) -> Iterator[Row]:
    """Every cell in this process."""
    for cell in cells:
        yield run(*cell)


class Deal:
    """Cells that several processes take one after the other, once it is known whether they are wanted."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._cells = deque(cells)
        self._known = threading.Event()

    def release(self, wanted: bool = True) -> Deal:
        """Let them be taken; or say that none are wanted."""
        if not wanted:
            self._cells.clear()
        self._known.set()
        return self

    def take(self) -> Cell | None:
        """The next cell; None where there is none left. Waits for :meth:`release`."""
        self._known.wait()
        try:
            return self._cells.popleft()
        except IndexError:
            return None


#: What takes seconds to import. Only what this process has imported: it would not be here if that ended processes.
_SLOW = ("torch", "triton", "transformers", "hf_flash_plus.checks.compare", "hf_flash_plus.checks.models")


def _context() -> Any:
    """How processes start: as copies of one that has imported what all need, where the system can (a dozen that import
    torch at the same time take some ten seconds of all cores); else they are spawned. That one never touches a GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in _SLOW if name in sys.modules])
    return context


def run_apart(run: Runner, cells: Sequence[Cell] | Deal, timeout: float) -> Iterator[Row]:
    """Every cell in a process of its own; after a crash or a hang a fresh one goes on with the next cell.

    The first process starts at once, so that what it imports is there when the cells are released.

    Args:
        run: an importable function.
        timeout: seconds that one cell may take, compiling its kernels included.
    """
    deal = cells if isinstance(cells, Deal) else Deal(cells).release()
    context = _context()
    started, cell = False, None
    while True:
        if started:
            cell = deal.take()
            if cell is None:
                return
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, run, dict(os.environ)), daemon=True)
        process.start()
        there.close()
        started, lost = True, True
        try:
            patience = timeout + STARTING
            while True:
                cell = cell or deal.take()
                if cell is None:
                    lost = False
                    return
                begin = time.monotonic()
                row = _ask(here, process, cell, patience)
                row.seconds = row.seconds or round(time.monotonic() - begin, 1)
                cell = None
                yield row
                if row.status in (CRASH, HANG) or row.note.endswith(LOST):
                    break
                patience = timeout
        finally:
            here.close()  # a process that waits for a cell ends by itself, and tidies up what libraries left
            process.join(0 if lost else LEAVING)
            process.kill()
            process.join()


#: Ends the note of a row after which the device answers nobody in its process.
LOST = "(the device is lost to this process)"


def _ask(pipe: Connection, process: Any, cell: Cell, timeout: float) -> Row:
    lost = Row(cell.provider, cell.feature, cell.dtype, CRASH)
    try:
        pipe.send(cell)
        if pipe.poll(timeout):
            row: Row = pipe.recv()
            return row
    except (EOFError, OSError):
        process.join(10)
        lost.note = _describe_exit(process.exitcode)
        return lost
    lost.status, lost.note = HANG, f"no answer within {timeout:.0f} s"
    return lost


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _serve(pipe: Connection, run: Runner, environ: dict[str, str]) -> None:
    """The loop of the process: cells in, rows out. ``environ`` is that of who asks, which may have changed since the
    process that this one is a copy of has started."""
    os.environ.clear()
    os.environ.update(environ)
    # What libraries print in here (compilers, CUDA's asserts) would tear the parent's table apart.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while True:
        try:
            cell: Cell = pipe.recv()
        except EOFError:  # nobody asks any more
            return
        row = run(*cell)
        if row.status in BAD and not _device_answers(cell.device):
            row.status, row.note = (CRASH if row.status == ERROR else row.status), f"{row.note} {LOST}"
        pipe.send(row)
        if row.note.endswith(LOST):
            return


def _device_answers(device: str) -> bool:
    """Whether the device still works: after an illegal memory access every later call in the process fails."""
    if not device.startswith("cuda"):
        return True
    import torch

    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=device).item() == 1.0)
    except Exception:
        return False
