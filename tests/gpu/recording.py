"""The record of a run of the GPU tests: counts, failures, random calls; kept up to date while the run goes on.

A run that is cut off leaves what it had, with ``"complete": false``. Records of several runs (the tests that share the
GPU, those that need it alone, the sanitizer) are merged into one by ``tests.gpu.suite``.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
#: Seconds after which a running record is written again.
SAVE_EVERY = 1.0
#: Characters of a line of a failure that a record keeps.
KEPT = 300
VERSIONS = ("python", "torch", "cuda", "triton", "transformers", "flag_gems", "hf_flash_plus")


class GpuRecord:
    """A pytest plugin: the outcomes of the tests in this folder, written every few seconds and at the end."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.begin = self.saved = time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.skips: Counter[str] = Counter()
        self.random_calls: list[dict[str, Any]] = []
        self.repeated = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        if not file.startswith("tests/gpu/") and HERE.name not in Path(file).parts:
            return
        outcome = outcome_of(report)
        if outcome is None:
            return
        # A worker that dies with a test reports it a second time: it still is one test.
        if self.outcomes.get(report.nodeid) not in ("failed", "error"):
            self.outcomes[report.nodeid] = outcome
        if outcome in ("failed", "error"):
            self.failures.setdefault(report.nodeid, brief(report))
        if outcome in ("skipped", "xfailed"):
            self.skips[reason(report)] += 1
        self.random_calls += [value for name, value in report.user_properties if name == "random_calls"]
        self.repeated += any(name == "repeated" for name, _ in report.user_properties)
        if outcome in ("failed", "error") or time.monotonic() - self.saved > SAVE_EVERY:
            self.save(None)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not session.config.option.collectonly:
            self.save(int(exitstatus))

    def save(self, exit_status: int | None) -> None:
        """Write the record; ``exit_status`` is None while the run goes on."""
        self.saved = time.monotonic()
        if not torch.cuda.is_available():
            return
        text = json.dumps(self.record(exit_status), indent=2) + "\n"
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def record(self, exit_status: int | None) -> dict[str, Any]:
        """The record, as JSON data."""
        files: dict[str, Counter[str]] = {}
        for test, outcome in self.outcomes.items():
            files.setdefault(Path(test.split("::")[0]).name, Counter())[outcome] += 1
        return {
            **where(),
            "command": _command(sys.argv[1:]),
            "complete": exit_status is not None,
            "exit_status": exit_status,
            "duration_s": round(time.monotonic() - self.begin, 1),
            **totals(files),
            "repeated_after_out_of_memory": self.repeated,
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(files.items())},
            "failures": self.failures,
            "skips": dict(self.skips.most_common()),
            "random_calls": sorted(self.random_calls, key=lambda row: (row["provider"], row["kind"], row["part"])),
        }


@cache
def where() -> dict[str, Any]:
    """When, on what, and with which versions."""
    from hf_flash_plus.bench import environment

    found = environment.describe()
    return {
        **{name: found[name] for name in ("date", "gpu", "driver", "commit")},
        "versions": {name: found["versions"][name] for name in VERSIONS},
    }


def totals(files: dict[str, Counter[str]]) -> dict[str, int]:
    """Counts over all files."""
    total = sum(files.values(), Counter())
    return {
        "passed": total["passed"],
        "failed": total["failed"] + total["error"],
        "skipped": total["skipped"],
        "xfailed": total["xfailed"],
    }


def merge_findings(runs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What the sanitizer found in several runs, of each tool and group the last; None where there is none. It is
    complete if every run is."""
    if not runs:
        return None
    findings = {(one["tool"], one["group"]): one for run in runs for one in run["findings"]}
    complete = all(run["complete"] for run in runs)
    return {**runs[-1], "complete": complete, "findings": [findings[key] for key in sorted(findings)]}


def merge(records: Sequence[dict[str, Any]], findings: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Runs of different tests as one record, dated by the last; a test file may come in several of them. ``findings``
    are runs of the sanitizer that no record holds yet."""
    files: dict[str, Counter[str]] = {}
    skips: Counter[str] = Counter()
    failures: dict[str, str] = {}
    for record in records:
        for name, counts in record["files"].items():
            files.setdefault(name, Counter()).update(counts)
        skips.update(record["skips"])
        failures |= record["failures"]
    crashed = {name: code for record in records for name, code in record.get("crashed_calls", {}).items()}
    first = records[0]
    sanitizer = merge_findings([*(record["sanitizer"] for record in records if "sanitizer" in record), *findings])
    # Merged records name several; those from outside of git none.
    commits = [commit for record in records if record["commit"] for commit in record["commit"].split(", ")]
    # 5: no tests were collected, as where nothing needs the GPU alone.
    statuses = [0 if record["exit_status"] == 5 else record["exit_status"] for record in records]
    return {
        "date": max(record["date"] for record in records),
        **{name: first[name] for name in ("gpu", "driver")},
        "commit": ", ".join(dict.fromkeys(commits)) or None,
        "versions": first["versions"],
        "commands": [command for record in records for command in record.get("commands") or [record["command"]]],
        "complete": all(record["complete"] for record in records),
        "exit_status": None if None in statuses else max(statuses),
        "duration_s": round(sum(record["duration_s"] for record in records), 1),
        **totals(files),
        "repeated_after_out_of_memory": sum(record["repeated_after_out_of_memory"] for record in records),
        "files": {name: dict(sorted(counts.items())) for name, counts in sorted(files.items())},
        "failures": failures,
        "skips": dict(skips.most_common()),
        "random_calls": [row for record in records for row in record["random_calls"]],
        **({"crashed_calls": crashed} if crashed else {}),
        **({"sanitizer": sanitizer} if sanitizer else {}),
    }


def with_crashed(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A record with the random calls at which processes crashed: the files that their tests left in ``folder``.

    A run that is cut off leaves calls that did nothing wrong; only those of tests that are on record as crashed count.
    """
    crashed = {}
    for file in sorted(folder.glob("*.py")):
        tests = [name for name, what in record["failures"].items() if f"[{file.stem}]" in name and "crashed" in what]
        crashed |= dict.fromkeys(tests, file.read_text(encoding="utf-8"))
    return {**record, "crashed_calls": crashed} if crashed else record


def outcome_of(report: pytest.TestReport) -> str | None:
    """A test counts once: by its call, or by the setup or teardown that kept it from being one."""
    if hasattr(report, "wasxfail"):
        return ("xfailed" if report.skipped else "xpassed") if report.when == "call" or report.skipped else None
    if report.when == "call" or (report.when == "setup" and report.skipped):
        return report.outcome
    return "error" if report.failed else None


def brief(report: pytest.TestReport) -> str:
    """The line that says what failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr).strip()
    lines = [line.strip()[:KEPT] for line in text.splitlines() if line.strip()] or ["no message"]
    return " / ".join(lines if len(lines) < 4 else [lines[0], "...", *lines[-2:]])


def reason(report: pytest.TestReport) -> str:
    """Why a test was skipped, or was expected to fail."""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"[:KEPT]
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").splitlines()[0][:KEPT]


def _command(arguments: list[str]) -> str:
    """The command line, without the folders that a run's outputs went to."""
    return shlex.join(["pytest", *(Path(word).name if word.startswith("/") else word for word in arguments)])
