"""Trainings as processes of their own, several at a time, for the scripts that compare them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A command that writes ``output/result.json``."""

    name: str
    command: tuple[str, ...]
    output: Path

    def saved(self) -> dict | None:
        """What it wrote, if the very same command has run to its end before."""
        command, result = self.output / "command.txt", self.output / "result.json"
        if result.exists() and command.exists() and command.read_text() == shlex.join(self.command):
            return json.loads(result.read_text())
        return None


def run_jobs(jobs: list[Job], parallel: int, budget: float) -> dict[str, dict]:
    """The results by name, without those that failed or did not end in time; what has run before is not run again.

    Args:
        parallel: processes at a time.
        budget: seconds for all together; what still runs then is stopped.
    """
    end = time.monotonic() + budget
    with ThreadPoolExecutor(parallel) as pool:
        results = pool.map(lambda job: _run(job, end), jobs)
        return {job.name: result for job, result in zip(jobs, results) if result is not None}


def _run(job: Job, end: float) -> dict | None:
    found = job.saved()
    if found is not None:
        print(f"{job.name}: has run before", flush=True)
        return found
    job.output.mkdir(parents=True, exist_ok=True)
    (job.output / "result.json").unlink(missing_ok=True)
    # One thread each: as many processes as cores would otherwise take turns.
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.monotonic()
    code: int | str = "not started: no time is left"
    if end > started:
        with (job.output / "log.txt").open("w") as log:
            command = [sys.executable, *job.command]
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
            try:
                code = process.wait(timeout=end - started)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 15)  # the launchers of several processes, too, stop what they started
                code = "stopped: no time is left"
                process.wait(timeout=30)
    (job.output / "command.txt").write_text(shlex.join(job.command))
    found = job.saved() if code == 0 else None
    state = f"{time.monotonic() - started:.0f} s" if found else f"failed ({code}), see {job.output / 'log.txt'}"
    print(f"{job.name}: {state}", flush=True)
    return found
