"""The soak, for seconds: it passes, and it sees what it is there to see."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import soak

from hf_flash_plus import ops

SHORT = "--minutes 2 --max_length 24 --max_batch 2 --max_new_tokens 4 --device cpu".split()


def test_a_short_soak(tmp_path: Path) -> None:
    path = tmp_path / "out" / "soak.json"
    record = soak.main([*SHORT, "--max_steps", "15", "--check_every", "3", "--result_file", str(path)])
    assert record["passed"] and not record["failures"]
    assert record["steps"] == dict.fromkeys(soak.TASKS, 3) and record["checks"] == 5
    assert record["providers"] == ["torch_sdpa"] and 0 < record["worst_error"] < 1
    assert json.loads(path.read_text()) == record and record["finished"]


def test_a_record_of_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    """A soak that is cut off leaves its last record, which has not passed."""
    args = soak.SoakArguments(minutes=0.2, max_steps=400, max_length=8, max_batch=1, max_new_tokens=1, device="cpu")
    args.check_every = 1
    records: list[dict[str, Any]] = []
    last = soak.Soak(args).run(records.append)
    assert records and records[0]["checks"] and not any(r["passed"] or r["finished"] for r in records)
    assert last["finished"] and records[0]["seconds"] < last["seconds"]
    assert capsys.readouterr().out.startswith("running: ")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_step_is_seen(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = ops.attention, []

    def sometimes_wrong(*args: Any) -> Any:
        output = right(*args)
        calls.append(1)
        return output._replace(out=output.out * factor) if len(calls) > 10 else output

    monkeypatch.setattr(ops, "attention", sometimes_wrong)
    record = soak.main([*SHORT, "--max_steps", "10", "--check_every", "1"])
    assert not record["passed"] and any("step" in failure for failure in record["failures"])


def sample(host: float = 500.0, device: float = 10.0, kernels: float = 30.0, warm: bool = True) -> dict[str, float]:
    return {"step": 0, "host_mib": host, "device_mib": device, "kernels": kernels, "warm": float(warm)}


def test_growth_is_seen() -> None:
    assert soak.growth([sample(host=500 + n % 7, device=10 + n % 2) for n in range(100)]) == []
    assert soak.growth([sample(kernels=min(n, 20), warm=n >= 25) for n in range(100)]) == [], "warming up"
    (leak,) = soak.growth([sample(host=500 + n) for n in range(100)])
    assert "host_mib grew" in leak
    assert "device_mib grew" in soak.growth([sample(device=10 + n / 10) for n in range(100)])[0]
    assert "kernels grew from 30 to 31" in soak.growth([sample(kernels=30 + n // 80) for n in range(100)])[0]
    assert soak.growth([sample()] * 3) == soak.growth([sample(warm=False)] * 100) == [], "too short to say"


def test_every_class_comes_before_chance() -> None:
    """Both sides of the limits, one row and the most, padded and not, for each task; and each really looks like it."""
    args = soak.SoakArguments(device="cpu", max_length=300, max_batch=3)
    run, found = soak.Soak(args), soak.classes(args)
    assert {task for task, _ in found} == set(soak.TASKS)
    for task in ("train bert", "train llama, padded", "generate"):
        shapes = {(s.rows, s.length, s.padded) for name, s in found if name == task}
        assert {
            (r, n, p) for r in (1, 3) for n in (2, 16, 17, 128, 129, 256, 257, 300) for p in (True, False)
        } <= shapes
    longest = [shape for name, shape in found if name == "generate" and shape.checked]
    assert {(s.rows, s.padded) for s in longest} == {(r, p) for r in (1, 3) for p in (True, False)}
    assert {(s.length, s.new_tokens) for s in longest} == {(300, args.max_new_tokens)}, "trained longer than any batch"
    for task, shape in found:
        batch = run.batch(task, shape)
        assert tuple(batch["input_ids"].shape) == (shape.rows, shape.length) and shape.length <= 300
        if "attention_mask" in batch:
            assert bool(batch["attention_mask"].all()) != shape.padded and batch["attention_mask"].any(1).all()
        if "position_ids" in batch:
            assert int((batch["position_ids"] == 0).sum()) == min(shape.documents, shape.length)


def test_the_longest_generations_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of the step is: they have kernels that no batch for training has."""
    args = soak.SoakArguments(device="cpu", max_length=8, max_batch=2, check_every=10**6, minutes=0.2)
    run, done = soak.Soak(args), []
    monkeypatch.setattr(run, "step", lambda task, check, shape=None: done.append((task, check, shape)))
    monkeypatch.setattr(run, "sample", lambda: None)
    args.max_steps = 10 * len(soak.TASKS) + len(soak.classes(args))
    run.run()
    checked = [(task, shape.rows, shape.padded) for task, check, shape in done if check]
    assert sorted(checked) == [("generate", rows, padded) for rows in (1, 2) for padded in (False, True)]


def test_late_kernels_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here for a GPU that is not there, by Triton itself."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    @triton.jit
    def copied(source, to, BLOCK: triton.language.constexpr):  # type: ignore[no-untyped-def]
        at = triton.language.arange(0, BLOCK)
        triton.language.store(to + at, triton.language.load(source + at))

    if not hasattr(copied, "arg_names") or not hasattr(copied, "warmup"):
        pytest.skip("Triton's interpreter compiles nothing")

    def compiled(block: int) -> None:
        source = triton.compiler.ASTSource(
            fn=copied, signature={"source": "*fp32", "to": "*fp32", "BLOCK": "constexpr"}, constexprs={"BLOCK": block}
        )
        triton.compile(source, target=GPUTarget("cuda", 90, 32))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = triton.knobs.compilation.listener
    with soak.Kernels() as kernels:
        compiled(64)
        assert kernels.late() == [] and "copied" in soak.compiled_kernels().values()
        kernels.warm()
        assert kernels.late() == []
        compiled(128)
        (late,) = kernels.late()
    assert triton.knobs.compilation.listener is before
    assert "after the warm-up: copied" in late and "BLOCK=128" in late
    with soak.Kernels() as unheard:  # where Triton tells nothing, its cache does
        unheard.warm()
        triton.knobs.compilation.listener = None
        compiled(256)
        assert [line.rpartition(" ")[2] for line in unheard.late()] == ["copied"]
