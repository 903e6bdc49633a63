"""Everything on the GPU in one command, into one record: what ``make gpu-test`` runs.

    python -m tests.gpu.suite --output tests/gpu/record.json

First the kernels are compiled in as many processes as there are cores; then the tests that can share the GPU, in
parallel; then random calls; then the tests that need the GPU alone; then compute-sanitizer. A part that is cut off
leaves what it had in the record, which says so. ``--parts`` chooses some, ``--with-part`` adds the record of others.
Options after ``--`` go to pytest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu import recording

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = Path(__file__).with_name("record.json")
PARTS = ("compile", "parallel", "fuzz", "exclusive", "sanitizer")
FUZZ = "tests/gpu/test_fuzz.py"


def pytest_parts(workers: int, more: Sequence[str]) -> dict[str, list[str]]:
    """The parts that pytest runs, as arguments of python."""
    common = ["-m", "pytest", "-q", "--tb=short", "--show-capture=no", "--durations=15"]
    common += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--dist", "worksteal", *more]
    limit = ["--timeout=300"] if importlib.util.find_spec("pytest_timeout") else []
    but_fuzz = [*common, "tests/gpu", f"--ignore={FUZZ}", *limit]
    return {
        "parallel": [*but_fuzz, "-m", "gpu and not exclusive", "-n", f"{workers}"],
        # Bounded by the number of examples: hypothesis takes an interruption for a failure, and shrinks it.
        "fuzz": [*common, FUZZ, "-n", f"{workers}"],
        # One worker, not none: a test that loses the CUDA context ends its process only.
        "exclusive": [*but_fuzz, "-m", "gpu and exclusive", "-n", "1"],
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 4


def run(command: Sequence[str], seconds: float) -> int:
    """A command's exit code; 124 where it took longer than it may."""
    print(f"== python {' '.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        print(f"stopped after {seconds:.0f} s", flush=True)
        return 124


def save(output: Path, parts: Sequence[dict[str, Any]], findings: Sequence[dict[str, Any]]) -> None:
    """The merged record so far, of pytest's ``parts`` and runs of the sanitizer."""
    if not parts:
        return
    record = recording.merge(parts, findings)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="all GPU tests, into one record")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--workers", type=int, default=max(1, cores() - 2), help="processes")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--fuzz-examples", type=int, default=1000, help="of each kind of call and provider")
    words = "a record to add: of other parts, or the sanitizer's"
    parser.add_argument("--with-part", type=Path, action="append", default=[], help=words)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("pytest", nargs="*", help="options of pytest, after --")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.budget
    chosen = args.parts.split(",")
    os.environ["HF_FLASH_PLUS_FUZZ_EXAMPLES"] = str(args.fuzz_examples)
    os.environ.setdefault("HF_FLASH_PLUS_FUZZ_PARTS", "5")
    codes: list[int] = []
    # Parts may run on several GPUs at once, and be put together by the last, or by a run of no part.
    added = [json.loads(path.read_text()) for path in args.with_part]
    records: list[dict[str, Any]] = [data for data in added if "findings" not in data]
    findings = [data for data in added if "findings" in data]
    save(args.output, records, findings)
    with tempfile.TemporaryDirectory() as folder:
        if "compile" in chosen:
            codes.append(run(["-m", "tests.gpu.compiling", "--jobs", f"{args.workers}"], end - time.monotonic()))
        for name, command in pytest_parts(args.workers, args.pytest).items():
            if name in chosen:
                path = Path(folder, f"{name}.json")
                calls = Path(folder, f"{name}-calls")
                calls.mkdir()
                os.environ["HF_FLASH_PLUS_FUZZ_CALLS"] = str(calls)
                codes.append(run([*command, "--record-file", str(path)], end - time.monotonic()))
                if path.exists():
                    records.append(recording.with_crashed(json.loads(path.read_text()), calls))
                    save(args.output, records, findings)
        if "sanitizer" in chosen:
            path = Path(folder, "sanitizer.json")
            codes.append(run(["-m", "tests.gpu.sanitizer", "--output", str(path)], end - time.monotonic()))
            if path.exists():
                findings.append(json.loads(path.read_text()))
                save(args.output, records, findings)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
