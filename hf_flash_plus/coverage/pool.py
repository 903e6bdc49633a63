"""Rows in subprocesses: a crash, a hang or a full memory costs one row."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .cells import DIFFERENT, Cell
from .memory import out_of_memory
from .subject import Settings
from .worker import Row, run_row

#: Rows a process does before a fresh one takes its place: the modules that models import pile up.
ROWS_PER_PROCESS = 40
#: Seconds to wait for memory that others use.
MEMORY_WAIT = 60.0


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    model_type: str | None = None
    since: float = 0.0
    done: int = 0


def _serve(pipe: Connection, settings: Settings) -> None:
    """The loop of a worker process: a model type and its checks in, a row out."""
    import warnings

    import torch
    from huggingface_hub import constants
    from transformers.utils import logging

    for stop in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group: the parent alone decides what ends
        signal.signal(stop, signal.SIG_IGN)
    if settings.device.startswith("cuda"):
        _limit_memory(settings)
    constants.HF_HUB_OFFLINE = True  # nothing is downloaded: every configuration is made up
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gc.freeze()  # collecting what the libraries hold would take longer than most models
    while True:
        work = pipe.recv()
        if work is None:
            return
        model_type, checks = work
        row = run_row(model_type, checks, settings)
        gc.collect()
        if row.short_of_memory() and _memory_came_back(settings):
            row = run_row(model_type, checks, settings)
            gc.collect()
        pipe.send((row, _usable(settings.device)))


def _limit_memory(settings: Settings) -> None:
    """Bound what this process takes of the GPU. Where others have filled it, even CUDA cannot start: wait for them."""
    import torch

    end = time.monotonic() + MEMORY_WAIT
    while True:
        try:
            total = torch.cuda.get_device_properties(settings.device).total_memory
            fraction = min(1.0, settings.memory_gib * 2**30 / total)
            # It wants a number where "cuda" has none; None is the current device.
            torch.cuda.set_per_process_memory_fraction(fraction, torch.device(settings.device).index)
            return
        except RuntimeError as problem:
            if not out_of_memory(problem) or time.monotonic() > end:
                raise
            time.sleep(1.0)


def _memory_came_back(settings: Settings) -> bool:
    """Whether others had taken what this process may take of the GPU, and it is free now, or in a while."""
    waited = False
    end = time.monotonic() + MEMORY_WAIT
    while _free_memory(settings.device) < settings.memory_gib * 2**30:
        if time.monotonic() > end:
            return False
        waited = True
        time.sleep(0.5)
    return waited


def _free_memory(device: str) -> float:
    """Bytes that are free on the GPU; on the CPU nobody counts them."""
    import torch

    if not device.startswith("cuda"):
        return math.inf
    try:
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(device)[0])
    except RuntimeError:
        return math.inf  # there is no use in waiting for a device that does not answer


def _usable(device: str) -> bool:
    """Whether the device still works: after a fault on it, everything else that this process does there would fail."""
    import torch

    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def run_all(
    model_types: Sequence[str],
    checks: Sequence[str],
    settings: Settings,
    processes: int = 2,
    timeout: float = 240.0,
    report: Callable[[Row, float], None] | None = None,
    budget: float = math.inf,
) -> list[Row]:
    """All rows, in the order of ``model_types``; after an interrupt (Ctrl-C) those that are done.

    Args:
        timeout: seconds after which a row is given up.
        report: called with each row and its seconds as they come.
        budget: seconds after which what is not done is left out.
    """
    rows: dict[str, Row] = {}
    try:
        for row, seconds in _rows(model_types, checks, settings, processes, timeout, time.monotonic() + budget):
            rows[row.model_type] = row
            if report is not None:
                report(row, seconds)
    except KeyboardInterrupt:
        pass
    return [rows[name] for name in model_types if name in rows]


def _context(device: str) -> Any:
    """How processes start: with the libraries imported, which takes longer than a row, but without CUDA's state."""
    if not hasattr(os, "fork"):
        return multiprocessing.get_context("spawn")
    if device == "cpu":
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_flash_plus.coverage.pool", "hf_flash_plus.integration.registration"])
    return context


def _rows(
    model_types: Sequence[str],
    checks: Sequence[str],
    settings: Settings,
    processes: int,
    timeout: float,
    end: float,
) -> Iterator[tuple[Row, float]]:
    context = _context(settings.device)

    def start() -> _Worker:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, settings), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    waiting = [(name, list(checks)) for name in reversed(model_types)]
    begun: dict[str, Row] = {}  # rows whose process lost the device before it had seen all
    workers = [start() for _ in range(max(1, min(processes, len(waiting))))]
    try:
        while time.monotonic() < end and (waiting or any(worker.model_type for worker in workers)):
            for index, worker in enumerate(workers):
                if worker.model_type is None and waiting:
                    if worker.done >= ROWS_PER_PROCESS:
                        _stop(worker)
                        worker = workers[index] = start()
                    work = waiting.pop()
                    worker.model_type, worker.since = work[0], time.monotonic()
                    worker.pipe.send(work)
            busy = [worker for worker in workers if worker.model_type]
            ready = wait([worker.pipe for worker in busy], timeout=1.0)
            for worker in busy:
                name = worker.model_type
                assert name is not None
                seconds = time.monotonic() - worker.since
                if worker.pipe in ready:
                    try:
                        row, usable = worker.pipe.recv()
                        worker.model_type, worker.done = None, worker.done + 1 if usable else ROWS_PER_PROCESS
                        row = _joined(begun, row)
                        if row.unseen:
                            begun[name] = row
                            waiting.append((name, row.unseen))
                        else:
                            yield row, seconds
                        continue
                    except (EOFError, OSError):
                        worker.process.join(5)
                        row = _lost(name, f"the process ended with code {worker.process.exitcode}")
                elif seconds > timeout:
                    row = _lost(name, f"no result after {timeout:.0f} seconds")
                else:
                    continue
                _stop(worker)
                workers[workers.index(worker)] = start()
                yield _joined(begun, row), seconds
    finally:
        for worker in workers:
            _stop(worker)


def _joined(begun: dict[str, Row], row: Row) -> Row:
    """A row with what another process saw of it before."""
    first = begun.pop(row.model_type, None)
    return row if first is None else first.completed(row)


def _lost(model_type: str, reason: str) -> Row:
    """The row of a process that did not answer: a failure until it is understood."""
    return Row(model_type, runs=True, cells={"forward": Cell(DIFFERENT, note=reason)})


def is_lost(row: Row) -> bool:
    """Whether a row is to be run again: nobody answered for it (it has no class then, since that is found out in the
    process), or the GPU had no memory for it."""
    return (row.runs and not row.cls) or row.short_of_memory()


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
