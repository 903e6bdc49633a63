"""Trainings as processes of their own, several at a time, for the scripts that compare them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A command that writes ``result.json`` into ``output``, or into each of the ``folders`` below it."""

    name: str
    command: tuple[str, ...]
    output: Path
    folders: tuple[Path, ...] = ()

    def saved(self) -> dict | None:
        """What it wrote (last), if the very same command has run to its end before."""
        command = self.output / "command.txt"
        results = [folder / "result.json" for folder in self.folders or (self.output,)]
        same = command.exists() and command.read_text() == shlex.join(self.command)
        return json.loads(results[-1].read_text()) if same and all(result.exists() for result in results) else None

    def begin(self) -> None:
        """Make its folder; what another command wrote there is removed."""
        self.output.mkdir(parents=True, exist_ok=True)
        command, text = self.output / "command.txt", shlex.join(self.command)
        same = command.exists() and command.read_text() == text
        for folder in self.folders or (self.output,):
            for old in [folder / "result.json"] if same else folder.glob("*.json"):
                old.unlink(missing_ok=True)
        command.write_text(text)


def run_jobs(
    jobs: list[Job],
    parallel: int,
    budget: float,
    devices: Sequence[str] = (),
    ended: Callable[[], None] = lambda: None,
) -> dict[str, dict]:
    """The results by name, without those that failed or did not end in time; what has run before is not run again.

    Args:
        parallel: processes at a time.
        budget: seconds for all together; what still runs then is stopped.
        devices: values of ``CUDA_VISIBLE_DEVICES``, over which the processes are spread evenly; none: as it is.
        ended: called after each job, one call at a time, so that a record grows while jobs run.
    """
    end = time.monotonic() + budget
    places: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for number in range(parallel):
        places.put(devices[number % len(devices)] if devices else None)
    lock = threading.Lock()
    running: set[subprocess.Popen[bytes]] = set()

    def run(job: Job) -> dict | None:
        place = places.get()
        try:
            return _run(job, end, place, running)
        finally:
            places.put(place)
            with lock:
                ended()

    with _stopped_with_us(running), ThreadPoolExecutor(parallel) as pool:
        return {job.name: result for job, result in zip(jobs, pool.map(run, jobs)) if result is not None}


@contextlib.contextmanager
def _stopped_with_us(running: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """A signal that ends this process ends those that it started, too: they lead sessions of their own."""

    def stop(number: int, frame: Any) -> None:
        for process in tuple(running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may listen to signals
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(job: Job, end: float, device: str | None, running: set[subprocess.Popen[bytes]]) -> dict | None:
    found = job.saved()
    if found is not None:
        print(f"{job.name}: has run before", flush=True)
        return found
    job.begin()
    # One thread each: as many processes as cores would otherwise take turns.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    started = time.monotonic()
    code: int | str = "not started: no time is left"
    if end > started:
        with (job.output / "log.txt").open("w") as log:
            command = [sys.executable, *job.command]
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
            running.add(process)
            try:
                code = process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = "stopped: no time is left"
                _stop(process)
            running.discard(process)
    found = job.saved() if code == 0 else None
    state = f"{time.monotonic() - started:.0f} s" if found else f"failed ({code}), see {job.output / 'log.txt'}"
    print(f"{job.name}: {state}", flush=True)
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: launchers of several processes pass the first signal on, the second is for
    those that do not listen."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
