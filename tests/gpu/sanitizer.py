"""NVIDIA's compute-sanitizer on our kernels: memcheck and racecheck over the calls of ``sanitized``, into a record.

    python -m tests.gpu.sanitizer --output sanitizer.json

Each tool and group of kernels runs in a process of its own, several at a time, each with a time limit. ``memcheck``
sees every access of global and shared memory: allocations are not cached (``PYTORCH_NO_CUDA_MEMORY_CACHING``), so that
a tensor's end is the allocation's. ``racecheck`` sees shared memory only. Exit code 1: errors, or a group that did not
run to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.gpu.sanitized import DONE, GROUPS

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ("memcheck", "racecheck")
#: Lines of the tool's report that a record keeps.
KEPT_LINES = 12
_SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error"),
    "racecheck": re.compile(
        r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"
    ),
}


@dataclass
class Finding:
    """What a tool said of a group of kernels.

    Attributes:
        status: ``clean``, ``errors``, ``timeout`` or ``failed`` (the calls, or the tool, did not run to their end).
        calls: how many calls ended under the tool.
        errors, warnings: as the tool counts them; None where it did not come to its summary.
        report: the beginning of what the tool printed.
    """

    tool: str
    group: str
    status: str = "failed"
    calls: int = 0
    errors: int | None = None
    warnings: int | None = None
    seconds: float = 0.0
    report: list[str] = field(default_factory=list)


def find_tool() -> str | None:
    """compute-sanitizer, from PATH or where CUDA puts it."""
    here = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return here or (str(usual) if usual.exists() else None)


def read(tool: str, group: str, code: int | None, text: str) -> Finding:
    """A tool's output as a finding; ``code`` is None after a time limit."""
    finding = Finding(tool, group, calls=text.count(DONE))
    lines = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
    summary = _SUMMARY[tool].search(text)
    if summary:
        finding.errors = int(summary["errors"])
        finding.warnings = int(summary.groupdict().get("warnings") or 0)
    if finding.errors or finding.warnings:
        finding.report = lines[:KEPT_LINES]
    if code is None:
        finding.status = "timeout"
    elif finding.errors:
        finding.status = "errors"
    elif code == 0 and finding.errors == 0 and finding.calls:
        finding.status = "clean"
    else:
        finding.report = text.splitlines()[-KEPT_LINES:]
    return finding


def examine(program: str, tool: str, group: str, timeout: float) -> Finding:
    """Run a group under a tool."""
    command = [program, "--tool", tool, "--print-limit", "20", "--error-exitcode", "9"]
    command += ["--padding", "128"] if tool == "memcheck" else []
    command += [sys.executable, "-m", "tests.gpu.sanitized", group]
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    code: int | None = None
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, cwd=ROOT, env=environment
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
    finding = read(tool, group, code, output.decode(errors="replace"))
    finding.seconds = round(time.monotonic() - begin, 1)
    return finding


def examine_all(program: str, tools: Sequence[str], groups: Sequence[str], timeout: float, jobs: int) -> list[Finding]:
    """Every tool on every group; first each group alone, so that no tool waits for a compiler."""

    def prepare(group: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "tests.gpu.sanitized", group], cwd=ROOT, timeout=timeout, capture_output=True
        )

    def one(pair: tuple[str, str]) -> Finding:
        finding = examine(program, *pair, timeout)
        print(f"{finding.tool}, {finding.group}: {finding.status}, {finding.calls} calls, {finding.errors} errors, "
              f"{finding.warnings} warnings, {finding.seconds:.0f} s", flush=True)  # fmt: skip
        for line in finding.report:
            print(f"    {line}", flush=True)
        return finding

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(prepare, group) for group in groups]
        for future in futures:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the tool's own run will say so
                future.result()
        return list(pool.map(one, [(tool, group) for tool in tools for group in groups]))


def version(program: str) -> str:
    """The tool's own words about its version."""
    lines = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if line.startswith("Version")), "unknown")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compute-sanitizer on our kernels")
    parser.add_argument("--output", type=Path, help="write the findings there as JSON")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one tool on one group")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    args = parser.parse_args(argv)
    program = find_tool()
    if program is None:
        print("compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin", file=sys.stderr)
        return 2
    findings = examine_all(program, args.tools.split(","), args.groups.split(","), args.timeout, args.jobs)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        data = {"tool": version(program), "findings": [asdict(one) for one in findings]}
        args.output.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if all(one.status == "clean" for one in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
