"""How runs of the GPU tests are recorded: tried on a folder of small tests, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import memory, recording, sanitizer, suite

ROOT = Path(recording.__file__).resolve().parent.parent.parent

#: Plays the part of tests/gpu: its own folder of that name, the record's plugin, and a GPU that is said to be there.
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os, pathlib, torch
torch.cuda.is_available = lambda: True
from tests.gpu import conftest, memory, recording
conftest.device_answers = lambda: not os.path.exists("lost")
recording.SAVE_EVERY = 0.0
memory.wait_for_memory = lambda gib: None
from tests.gpu.conftest import (  # noqa
    once, pytest_addoption, pytest_runtest_call, pytest_configure, pytest_runtest_makereport, pytest_runtest_teardown)
"""
TESTS = """
import os, pytest
import torch
@pytest.mark.parametrize("full", [
    [torch.OutOfMemoryError("CUDA out of memory")], [RuntimeError("Triton Error [CUDA]: out of memory")]])
def test_full_for_a_moment(full):
    if full and "PYTEST_XDIST_WORKER" in os.environ: raise full.pop()
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("no second device")
@pytest.mark.xfail(reason="known")
def test_known(): assert 0
def test_random(record_property):
    record_property("random_calls", {"provider": "p", "kind": "k", "part": 0, "seed": 7, "calls": 3})
@pytest.fixture
def broken(): raise RuntimeError("no setup")
def test_error(broken): pass
@pytest.mark.parametrize("i", range(4))
def test_once(once, i):
    assert once("work", lambda: (open("times", "a").write("x"), "done")[1]) == "done"
"""


def run(folder: Path, tests: str, *options: str) -> dict[str, object]:
    here = folder / "tests" / "gpu"
    here.mkdir(parents=True)
    (here / "conftest.py").write_text(CONFTEST)
    (here / "test_some.py").write_text(tests)
    record = folder / "record.json"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", *options]
    # These tests may themselves run in one of several processes of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, "--record-file", str(record)], cwd=folder, capture_output=True, text=True, env=env)
    assert record.exists(), done.stdout + done.stderr
    loaded: dict[str, object] = json.loads(record.read_text())
    return loaded


def test_tests_wait_for_memory_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([4.2, 4.2, 45.0])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**32, 80 * 2**30))
    monkeypatch.setattr(memory, "free_gib", lambda: next(free))
    memory.needs_memory(12)  # it comes
    assert next(free, None) is None
    with pytest.raises(pytest.skip.Exception, match="needs 90 GiB of GPU memory, the GPU has 80"):
        memory.needs_memory(90)
    monkeypatch.setattr(memory, "wait_for_memory", lambda gib: 4.2)
    with pytest.raises(pytest.skip.Exception, match=r"needs 12 GiB of free GPU memory, others leave 4.2 of 80"):
        memory.needs_memory(12)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "two processes"])
def test_a_run(tmp_path: Path, options: tuple[str, ...]) -> None:
    record = run(tmp_path, TESTS, *options)
    assert (record["passed"], record["failed"], record["skipped"], record["xfailed"]) == (8, 2, 1, 1)
    assert record["files"] == {"test_some.py": {"error": 1, "failed": 1, "passed": 8, "skipped": 1, "xfailed": 1}}
    assert record["complete"] and record["exit_status"] == 1
    assert record["repeated_after_out_of_memory"] == len(options)
    failures = record["failures"]
    assert isinstance(failures, dict) and "one is not two" in failures["tests/gpu/test_some.py::test_bad"]
    assert "no setup" in failures["tests/gpu/test_some.py::test_error"]
    assert record["skips"] == {"no second device": 1, "expected to fail: known": 1}
    assert record["random_calls"] == [{"provider": "p", "kind": "k", "part": 0, "seed": 7, "calls": 3}]
    assert (tmp_path / "times").read_text() == "x", "all processes together did it once"


@pytest.mark.slow
def test_a_run_that_is_cut_off(tmp_path: Path) -> None:
    record = run(tmp_path, "import os\ndef test_good(): pass\ndef test_end(): os._exit(5)\n")
    assert record["passed"] == 1 and not record["complete"] and record["exit_status"] is None


@pytest.mark.slow
def test_a_process_that_lost_its_device_is_replaced(tmp_path: Path) -> None:
    """The tests after it run in a fresh one, and the test that lost it is one failure."""
    tests = """
import os, time
def test_loses():
    open("lost", "w").close()
    assert False, "illegal memory access"
def test_after():
    while not os.path.exists("lost"): time.sleep(0.01)
    os.unlink("lost")
"""
    record = run(tmp_path, tests, "-n", "1")
    assert record["passed"] == 1 and record["failed"] == 1
    assert "illegal memory access" in record["failures"]["tests/gpu/test_some.py::test_loses"]  # type: ignore[index]


def _record(**values: object) -> dict[str, object]:
    base = {
        "date": "d", "gpu": "g", "driver": "1", "commit": "c", "versions": {}, "command": "pytest", "complete": True,
        "exit_status": 0, "duration_s": 1.5, "files": {"test_a.py": {"passed": 2}}, "failures": {}, "skips": {},
        "random_calls": [], "repeated_after_out_of_memory": 0,
    }  # fmt: skip
    return {**base, **values}


def test_merging() -> None:
    bad = _record(files={"test_a.py": {"passed": 1, "failed": 1}, "test_b.py": {"error": 1}}, exit_status=1)
    merged = recording.merge([_record(skips={"why": 2}), bad, _record(files={}, exit_status=5)])
    assert merged["files"] == {"test_a.py": {"failed": 1, "passed": 3}, "test_b.py": {"error": 1}}
    assert (merged["passed"], merged["failed"], merged["exit_status"]) == (3, 2, 1)
    assert merged["complete"] and merged["duration_s"] == 4.5 and merged["skips"] == {"why": 2}
    again = recording.merge([merged, _record()])
    assert again["passed"] == 5 and again["commands"] == ["pytest"] * 4, "what was merged can be merged again"
    commits = [_record(commit=name) for name in ("b", "a", "b", None)]
    merged = recording.merge([recording.merge(commits), *commits])
    assert merged["commit"] == "b, a", "all that were tested, each once"
    assert recording.merge([_record(commit=None)])["commit"] is None
    cut = recording.merge([_record(), _record(complete=False, exit_status=None)])
    assert not cut["complete"] and cut["exit_status"] is None


def test_the_call_at_which_a_process_crashed_is_kept(tmp_path: Path) -> None:
    """Not those of tests that were cut off, nor of tests that failed: hypothesis prints theirs."""
    names = {name: f"tests/gpu/test_fuzz.py::test_random_calls[torch_sdpa-masked-{name}]" for name in (1, 2, 3)}
    failures = {names[1]: "worker 'gw10' crashed while running it", names[2]: "AssertionError: out differs"}
    for number in names:
        (tmp_path / f"torch_sdpa-masked-{number}.py").write_text(f"call {number}")
    record = recording.with_crashed({"failures": failures}, tmp_path)
    assert record["crashed_calls"] == {names[1]: "call 1"}
    assert "crashed_calls" not in recording.with_crashed({"failures": {}}, tmp_path)


def test_the_suite_asks_for_calls_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "tests/gpu/test_fuzz.py::test_random_calls[triton-flash-0]"

    def run(command: list[str], seconds: float) -> int:
        record = _record(failures={test: "worker 'gw1' crashed while running it"})
        Path(command[command.index("--record-file") + 1]).write_text(json.dumps(record))
        Path(os.environ["HF_FLASH_PLUS_FUZZ_CALLS"], "triton-flash-0.py").write_text("the call")
        return 1

    monkeypatch.setattr(suite, "run", run)
    for name in ("CALLS", "EXAMPLES", "PARTS"):  # what the suite sets is undone
        monkeypatch.setenv(f"HF_FLASH_PLUS_FUZZ_{name}", "1")
    assert suite.main(["--parts", "fuzz", "--output", str(tmp_path / "record.json")]) == 1
    assert json.loads((tmp_path / "record.json").read_text())["crashed_calls"] == {test: "the call"}


def test_the_suite_leaves_no_test_out() -> None:
    """Random calls are a part of their own; every other test is marked exclusive or is not."""
    parts = suite.pytest_parts(3, [])
    marked = {name: arguments[arguments.index("-m", 2) + 1] for name, arguments in parts.items() if name != "fuzz"}
    assert marked == {"parallel": "gpu and not exclusive", "exclusive": "gpu and exclusive"}
    for name, arguments in parts.items():
        assert (suite.FUZZ in arguments) == (name == "fuzz") and ("tests/gpu" in arguments) == (name != "fuzz")
        assert f"--ignore={suite.FUZZ}" in arguments or name == "fuzz"
    assert set(parts) < set(suite.PARTS) and Path(ROOT, suite.FUZZ).exists()


def test_parts_of_several_runs(tmp_path: Path) -> None:
    parts = {"a": _record(), "b": _record(), "sanitizer": {"tool": "t", "complete": True, "findings": []}}
    for name, data in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))

    def merged(name: str, *parts: str) -> dict[str, object]:
        added = [option for part in parts for option in ("--with-part", str(tmp_path / f"{part}.json"))]
        assert suite.main(["--parts", "", "--output", str(tmp_path / f"{name}.json"), *added]) == 0
        data: dict[str, object] = json.loads((tmp_path / f"{name}.json").read_text())
        return data

    record = merged("some", "a", "sanitizer")
    assert record["passed"] == 2 and record["sanitizer"] == parts["sanitizer"]
    record = merged("all", "b", "some")
    assert record["passed"] == 4 and record["sanitizer"] == parts["sanitizer"]


REPORTS = {
    "clean": ("memcheck", 0, "sanitized: a\n========= ERROR SUMMARY: 0 errors\n"),
    "errors": ("memcheck", 9, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1 error\n"),
    "timeout": ("racecheck", None, "sanitized: a\n"),
    "failed": ("racecheck", 1, "Traceback\nRuntimeError: no\n"),
}


@pytest.mark.parametrize("status", REPORTS)
def test_reading_compute_sanitizer(status: str) -> None:
    tool, code, text = REPORTS[status]
    found = sanitizer.read(tool, "portable", code, text)
    assert found.status == status and found.calls == text.count("sanitized")
    assert (status != "errors") or (found.errors == 1 and "Invalid" in found.report[0])


def test_nothing_run_is_not_clean() -> None:
    assert sanitizer.read("memcheck", "portable", 0, "========= ERROR SUMMARY: 0 errors\n").status == "failed"


RACY = """sanitized: a
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at forward+0x170 in nowhere.py:550
=========     and Write access at forward+0x15b10 in nowhere.py:618 [13 hazards]
=========     and Write access at forward+0x15b20 in nowhere.py:618 [6 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 1 warning)
"""


def test_races() -> None:
    found = sanitizer.read("racecheck", "portable", 9, RACY)
    assert (found.errors, found.warnings, found.status, found.good) == (2, 1, "errors", False)
    assert found.races == {"Read nowhere.py:550, Write nowhere.py:618": 2}


CLEAN = "sanitized: a\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
ENTRY = min(sanitizer._entry_lines("controls.py"))
IN_ENTRY = RACY.replace("nowhere.py:550", f"controls.py:{ENTRY}").replace("nowhere.py:618", f"controls.py:{ENTRY + 1}")


@pytest.mark.parametrize(
    "control, kernel, verdict",
    [
        (CLEAN, RACY, "errors"),
        (CLEAN, CLEAN, "clean"),
        (RACY, RACY, "inconclusive"),  # the control has races in the middle: it does not see mbarriers
        (IN_ENTRY, IN_ENTRY, "inconclusive"),  # both have them where warps are sent to their jobs only
        (IN_ENTRY, IN_ENTRY + RACY, "errors"),  # one elsewhere is the kernel's own
        (RACY, CLEAN, "clean"),
    ],
)
@pytest.mark.parametrize("right", ["handshake", "relay"])
def test_a_tool_is_believed_as_far_as_its_controls_go(control: str, kernel: str, verdict: str, right: str) -> None:
    """Errors in kernels with mbarriers count unless a right kernel with mbarriers has the like; all others do."""
    texts = {"hopper_forward": kernel, "race": RACY, right: control, "portable": RACY, "hopper_backward": kernel}
    found: list[sanitizer.Finding] = []
    for group, text in texts.items():  # weighed as they come, in any order
        found.append(sanitizer.read("racecheck", group, 0 if text is CLEAN else 9, text))
        sanitizer.weigh(found)
    verdicts = {one.group: one.status for one in found}
    assert verdicts["hopper_forward"] == verdicts["hopper_backward"] == verdict
    assert verdicts["race"] == verdicts["portable"] == "errors"
    assert verdicts[right] == ("clean" if control is CLEAN else "inconclusive")


def test_one_of_two_right_kernels_explains_what_the_other_does_not() -> None:
    texts = {"handshake": IN_ENTRY, "relay": RACY, "hopper_forward": RACY}
    found = [sanitizer.read("racecheck", group, 9, text) for group, text in texts.items()]
    sanitizer.weigh(found)
    assert [one.status for one in found] == ["inconclusive"] * 3


def test_a_planted_fault_that_is_not_found_is_no_success() -> None:
    found = sanitizer.read("memcheck", "bounds", 0, "sanitized: a\n========= ERROR SUMMARY: 0 errors\n")
    assert found.status == "clean" and not found.good


def test_findings_of_several_runs() -> None:
    """The sanitizer's runs may cover other tools and groups each; what was looked at again is replaced."""
    first = {"tool": "a", "complete": False, "findings": [_finding("memcheck", "x", 1), _finding("racecheck", "x", 2)]}
    second = {"tool": "b", "complete": True, "findings": [_finding("racecheck", "x", 3), _finding("memcheck", "a", 4)]}
    merged = recording.merge_findings([first, second])
    assert merged is not None and (merged["tool"], merged["complete"]) == ("b", False)
    assert [one["errors"] for one in merged["findings"]] == [4, 1, 3]
    assert recording.merge_findings([]) is None
    records = [_record(sanitizer=first), _record(), _record(sanitizer=second)]
    assert recording.merge(records)["sanitizer"] == recording.merge(records[:2], [second])["sanitizer"] == merged
    dates = [_record(date="2026-11-29T06:00:00+00:00"), _record(date="2026-11-28T09:00:00+00:00")]
    assert recording.merge(dates)["date"] == dates[0]["date"] == recording.merge(dates[::-1])["date"]


def _finding(tool: str, group: str, errors: int) -> dict[str, object]:
    return {"tool": tool, "group": group, "errors": errors}
