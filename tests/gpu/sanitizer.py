"""NVIDIA's compute-sanitizer on our kernels: memcheck, racecheck and synccheck over the calls of ``sanitized``.

    python -m tests.gpu.sanitizer --output sanitizer.json

Each tool and group of kernels runs in a process of its own, several at a time, each with a time limit. ``memcheck``
sees every access of global and shared memory: allocations are not cached (``PYTORCH_NO_CUDA_MEMORY_CACHING``), so that
a tensor's end is the allocation's. ``racecheck`` sees shared memory, ``synccheck`` barriers.

What a tool says is worth what it says of the controls: it must find the planted fault, and must not find one in
handshakes of mbarriers that are right. Where it does, the same finding in kernels of that kind is ``inconclusive``.
Exit code 1: errors, a control that was not seen, or a group that did not run to its end.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from tests.gpu.sanitized import DONE, GROUPS

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = ("portable", "decode", "hopper_forward", "hopper_backward")
#: Kernels whose warps meet at mbarriers, and right ones that do the same.
MBARRIERS = ("hopper_forward", "hopper_backward")
HANDSHAKES = ("handshake", "relay")
#: By tool the groups it is run on, the control with the planted fault first.
TOOLS = {
    "memcheck": ("bounds", *OURS),
    "racecheck": ("race", *HANDSHAKES, *OURS),
    "synccheck": (*HANDSHAKES, *OURS),
}
PLANTED = {"memcheck": "bounds", "racecheck": "race"}
#: Lines of the tool's report that a record keeps.
KEPT_LINES = 8
_ERRORS = re.compile(r"ERROR SUMMARY: (?P<errors>\d+) error")
_RACES = re.compile(
    r"RACECHECK SUMMARY: \d+ hazards? displayed \((?P<errors>\d+) errors?, (?P<warnings>\d+) warnings?\)"
)
_ACCESS = re.compile(r"(?P<what>Read|Write) access at \S+ in (?P<line>\S+:\d+)")


@dataclass
class Finding:
    """What a tool said of a group of kernels.

    Attributes:
        status: ``clean``, ``errors``, ``inconclusive`` (the tool finds errors in a right kernel of this kind, too),
            ``timeout`` or ``failed`` (the calls, or the tool, did not run to their end).
        expected: the status that a control must have; empty for our kernels.
        calls: how many calls ended under the tool.
        errors, warnings: as the tool counts them; None where it did not come to its summary.
        races: racecheck's reports by the two lines of source.
        report: the beginning of what the tool printed.
    """

    tool: str
    group: str
    status: str = "failed"
    expected: str = ""
    calls: int = 0
    errors: int | None = None
    warnings: int | None = None
    seconds: float = 0.0
    races: dict[str, int] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.status == (self.expected or "clean") or (self.status == "inconclusive" and not self.expected)


def find_tool() -> str | None:
    """compute-sanitizer, from PATH or where CUDA puts it."""
    here = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return here or (str(usual) if usual.exists() else None)


def read(tool: str, group: str, code: int | None, text: str) -> Finding:
    """A tool's output as a finding; ``code`` is None after a time limit."""
    finding = Finding(tool, group, calls=text.count(DONE))
    finding.expected = "errors" if PLANTED.get(tool) == group else ""
    summary = (_RACES if tool == "racecheck" else _ERRORS).search(text)
    if summary:
        finding.errors = int(summary["errors"])
        finding.warnings = int(summary.groupdict().get("warnings") or 0)
    lines = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
    finding.races = dict(_races(lines).most_common())
    if finding.errors or finding.warnings:
        finding.report = [line for line in lines if line not in ("", "COMPUTE-SANITIZER")][:KEPT_LINES]
    if code is None:
        finding.status = "timeout"
    elif finding.errors:
        finding.status = "errors"
    elif code == 0 and finding.errors == 0 and finding.calls:
        finding.status = "clean"
    else:
        finding.report = text.splitlines()[-KEPT_LINES:]
    return finding


def _races(lines: Sequence[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    first = ""
    for line in lines:
        access = _ACCESS.search(line)
        if access and "Race reported" in line:
            first = f"{access['what']} {access['line']}"
        elif access and first:
            found[f"{first}, {access['what']} {access['line']}"] += 1
    return found


def weigh(findings: Sequence[Finding]) -> None:
    """Take back verdicts that a tool gives of a right kernel, too.

    Where a control with mbarriers has errors, those that kernels of its kind have in the same place are inconclusive:
    in the code by which Triton sends warps to their jobs (both accesses in the entry of a kernel), or anywhere.
    """
    for one in findings:
        controls = [
            other for other in findings if other.tool == one.tool and other.group in HANDSHAKES and other.errors
        ]
        if not controls or one.group not in (*MBARRIERS, *HANDSHAKES) or not one.errors or one.status == "timeout":
            continue
        entries_only = all(control.races and all(map(_is_entry, control.races)) for control in controls)
        explained = all(map(_is_entry, one.races)) if entries_only else True
        one.status = "inconclusive" if explained else "errors"


def _is_entry(race: str) -> bool:
    """Whether both accesses lie in functions that start the jobs of warps (``gl.warp_specialize``)."""
    places = [place.split()[1].split(":") for place in race.split(", ")]
    return all(int(line) in _entry_lines(name) for name, line in places)


@cache
def _entry_lines(name: str) -> frozenset[int]:
    lines: set[int] = set()
    for path in (ROOT / "hf_flash_plus" / "kernels" / "hopper" / name, Path(__file__).with_name(name)):
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            if any(isinstance(call, ast.Attribute) and call.attr == "warp_specialize" for call in calls):
                first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
                lines.update(range(first, (function.end_lineno or first) + 1))
    return frozenset(lines)


def examine(program: str, tool: str, group: str, timeout: float) -> Finding:
    """Run a group under a tool."""
    command = [program, "--tool", tool, "--print-limit", "300", "--error-exitcode", "9"]
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


def examine_all(
    program: str, pairs: Sequence[tuple[str, str]], timeout: float, jobs: int, save: Callable[[Finding], None]
) -> list[Finding]:
    """Every pair of a tool and a group; first each group alone, so that no tool waits for a compiler.

    Args:
        save: called with each finding as it comes, from several threads.
    """

    def prepare(group: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the tool's own run will say so
            command = [sys.executable, "-m", "tests.gpu.sanitized", group]
            subprocess.run(command, cwd=ROOT, timeout=timeout, capture_output=True)

    def one(pair: tuple[str, str]) -> Finding:
        finding = examine(program, *pair, timeout)
        counts = f"{finding.calls} calls, {finding.errors} errors, {finding.warnings} warnings"
        print(f"{finding.tool}, {finding.group}: {finding.status}, {counts}, {finding.seconds:.0f} s", flush=True)
        for line in finding.report if finding.status == "failed" else ():
            print(f"    {line}", flush=True)
        save(finding)
        return finding

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(prepare, dict.fromkeys(group for _, group in pairs)))
        return list(pool.map(one, pairs))


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
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    args = parser.parse_args(argv)
    program = find_tool()
    if program is None:
        print("compute-sanitizer is neither in PATH nor in /usr/local/cuda/bin", file=sys.stderr)
        return 2
    groups = args.groups.split(",")
    pairs = [(tool, group) for tool in args.tools.split(",") for group in TOOLS[tool] if group in groups]
    found: list[Finding] = []
    lock, words = threading.Lock(), version(program)

    def save(finding: Finding) -> None:
        with lock:
            found.append(finding)
            weigh(found)
            if args.output is not None:
                rows = sorted(found, key=lambda one: (list(TOOLS).index(one.tool), one.group))
                data = {"tool": words, "complete": len(found) == len(pairs), "findings": [asdict(one) for one in rows]}
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

    findings = examine_all(program, pairs, args.timeout, args.jobs, save)
    for one in findings:
        if not one.good:
            print(f"not as it should be: {one.tool}, {one.group}: {one.status}", flush=True)
    return 0 if all(one.good for one in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
