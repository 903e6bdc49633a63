"""GPU tests: skipped with the reason where there is no CUDA device; a run can be recorded in ``record.json``.

``pytest tests/gpu --record`` (or ``HF_FLASH_PLUS_RECORD=1``) writes ``tests/gpu/record.json``: when, on what, with
which versions, and how many tests passed. The file is written by this plugin only, never by hand. ``--record-file
PATH`` writes a copy (or, without ``--record``, just that).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
RECORD = HERE / "record.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_flash_plus", "GPU test record")
    group.addoption("--record", action="store_true", help=f"write {RECORD.name} beside the GPU tests after the run")
    group.addoption("--record-file", default=None, help="write the record of the GPU run to this file")


def pytest_configure(config: pytest.Config) -> None:
    paths = _record_paths(config)
    if paths and not hasattr(config, "workerinput"):  # with pytest-xdist only the controller sees all results
        config.pluginmanager.register(GpuRecord(paths), "hf_flash_plus_gpu_record")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a GPU test, marked or not."""
    missing = _missing_reason()
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def _missing_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"needs a CUDA device: torch {torch.__version__} is built without CUDA"
    return "needs a CUDA device: torch sees none"


def _record_paths(config: pytest.Config) -> list[Path]:
    paths = []
    if config.getoption("--record", default=False) or os.environ.get("HF_FLASH_PLUS_RECORD", "") not in ("", "0"):
        paths.append(RECORD)
    extra = config.getoption("--record-file", default=None)
    return [*paths, Path(extra)] if extra else paths


class GpuRecord:
    """Counts the outcomes of the tests in this folder and writes them at the end of a run on a GPU."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.begin = time.monotonic()
        self.files: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        if not file.startswith("tests/gpu/") and HERE.name not in Path(file).parts:
            return
        outcome = self._outcome(report)
        if outcome:
            self.files.setdefault(Path(file).name, Counter())[outcome] += 1
        if outcome in ("failed", "error"):
            self.failures.append(report.nodeid)

    @staticmethod
    def _outcome(report: pytest.TestReport) -> str | None:
        """A test counts once: by its call, or by the setup or teardown that kept it from being one."""
        if hasattr(report, "wasxfail"):
            return ("xfailed" if report.skipped else "xpassed") if report.when == "call" or report.skipped else None
        if report.when == "call" or (report.when == "setup" and report.skipped):
            return report.outcome
        return "error" if report.failed else None

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not torch.cuda.is_available() or session.config.option.collectonly:
            return
        text = json.dumps(self.record(int(exitstatus)), indent=2) + "\n"
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def record(self, exitstatus: int) -> dict[str, Any]:
        """The record, as JSON data."""
        from hf_flash_plus.bench import environment

        total = sum(self.files.values(), Counter())
        found = environment.describe()
        keep = ("python", "torch", "cuda", "triton", "transformers", "flag_gems", "hf_flash_plus")
        return {
            "date": found["date"],
            "gpu": found["gpu"],
            "driver": found["driver"],
            "commit": found["commit"],
            "versions": {name: found["versions"][name] for name in keep},
            "command": _command(sys.argv[1:]),
            "duration_s": round(time.monotonic() - self.begin, 1),
            "exit_status": exitstatus,
            "passed": total["passed"],
            "failed": total["failed"] + total["error"],
            "skipped": total["skipped"],
            "xfailed": total["xfailed"],
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(self.files.items())},
            "failures": self.failures,
        }


def _command(arguments: list[str]) -> str:
    """The command line, without the folders that a run's outputs went to."""
    return shlex.join(["pytest", *(Path(word).name if word.startswith("/") else word for word in arguments)])


@pytest.fixture
def device() -> torch.device:
    """The CUDA device, with a fixed seed."""
    torch.manual_seed(0)
    return torch.device("cuda")
