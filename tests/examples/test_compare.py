"""The scripts that compare trainings: their verdicts on known curves, and both end to end with tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import compare_curves
import compare_engines
from common.jobs import Job, run_jobs

TINY = (
    "--hidden_size 48 --intermediate_size 32 --num_layers 1 --vocab_size 300 --seq_length 32 --batch_size 2 "
    "--max_documents 8 --max_eval_rows 2"
).split()


def curves(**offsets: float) -> dict[str, dict[str, list[float]]]:
    """Three falling seeds; each implementation an offset and its own small noise."""
    steps = np.arange(100)
    return {
        name: {
            str(seed): (
                4 - steps / 50 + 0.1 * seed + offset + 0.01 * np.sin(steps / 7 + 3 * index + seed)
            ).tolist()
            for seed in range(3)
        }
        for index, (name, offset) in enumerate(offsets.items())
    }  # fmt: skip


def test_a_curve_among_the_others_is_within_their_spread():
    verdict = compare_curves.judge(curves(flash_plus=0, sdpa=0, eager=0))
    assert verdict["within"] and verdict["inside"] == 1
    assert 0 < verdict["nearest"] <= verdict["others_apart"]


@pytest.mark.parametrize("offset", [0.06, -0.06])
def test_a_curve_beside_the_others_is_not(offset):
    """Less than the seeds differ by: step by step and seed by seed it shows all the same."""
    verdict = compare_curves.judge(curves(flash_plus=offset, sdpa=0, eager=0))
    assert not verdict["within"]
    assert verdict["end"]["flash_plus"] - verdict["end"]["sdpa"] == pytest.approx(offset, abs=0.02)


def test_one_seed_that_diverges_is_not_within():
    lines = curves(flash_plus=0, sdpa=0, eager=0)
    lines["flash_plus"]["2"][60:] = [loss + 1 for loss in lines["flash_plus"]["2"][60:]]
    assert not compare_curves.judge(lines)["within"]


def test_what_chance_explains_is_told_from_what_it_does_not():
    """The same noise in all, a little more in ours at one step: not rare. Ours lower throughout: rarer than 1 in 20."""
    lines = curves(flash_plus=0, sdpa=0, eager=0)
    smooth = {name: np.array(list(seeds.values())) for name, seeds in lines.items()}
    assert compare_curves.by_chance(smooth) > compare_curves.SIGNIFICANT
    smooth["flash_plus"] = smooth["flash_plus"] - 0.06
    assert compare_curves.by_chance(smooth) == pytest.approx(1 / 27)


@pytest.mark.parametrize("seed, within", [(1, True), (7, False)])
def test_a_mean_may_leave_the_band_by_chance_only(seed, within):
    """Nothing but noise in all curves; the second draw is one of the few in a hundred that chance does not explain."""
    noise = np.random.default_rng(seed)
    falling = [4 - np.arange(100) / 50 + 0.02 * n for n in range(3)]
    lines = {
        name: {str(n): (falling[n] + 0.3 * noise.standard_normal(100)).tolist() for n in range(3)}
        for name in ("flash_plus", "sdpa", "eager")
    }
    verdict = compare_curves.judge(lines)
    assert verdict["inside"] < 1 and verdict["nearest"] <= verdict["others_apart"]
    assert verdict["within"] == within == (verdict["chance"] > compare_curves.SIGNIFICANT)


@pytest.mark.slow
def test_curves_from_end_to_end(tmp_path, capsys):
    options = ["--models", "llama", "--seeds", "0,1", "--dropouts", "0,0.5", "--steps", "4", "--mixed_precision", "no"]
    options += ["--parallel", "2", "--output_dir", str(tmp_path / "record"), "--work", str(tmp_path / "work"), *TINY]
    assert compare_curves.main(options) == 0
    record = json.loads((tmp_path / "record/curves.json").read_text())
    assert list(record["cases"]) == ["llama, dropout 0", "llama, dropout 0.5"]
    case, other = record["cases"].values()
    assert case["curves"]["sdpa"] != other["curves"]["sdpa"]
    assert case["verdict"]["within"] and case["providers"] == {"flash_plus": ["torch_sdpa"], "sdpa": [], "eager": []}
    assert set(case["curves"]) == {"flash_plus", "sdpa", "eager"}
    assert all(sorted(seeds) == ["0", "1"] for seeds in case["curves"].values())
    first, second = case["curves"]["flash_plus"].values()
    assert len(first) == 4 and first != second
    assert (tmp_path / "record/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "stays within the spread" in capsys.readouterr().out
    assert compare_curves.main(options) == 0
    assert capsys.readouterr().out.count("has run before") == 2
    (tmp_path / "work/llama-seed0/dropout0.5/eager.json").unlink()  # as where a training was stopped
    (tmp_path / "work/llama-seed0/dropout0.5/result.json").unlink()
    kept = (tmp_path / "work/llama-seed0/dropout0.5/sdpa.json").read_bytes()
    assert compare_curves.main(options) == 0
    assert capsys.readouterr().out.count("has run before") == 1
    assert json.loads((tmp_path / "record/curves.json").read_text())["cases"] == record["cases"] | {
        name: {**found, "seconds": mock.ANY} for name, found in record["cases"].items()
    }
    assert (tmp_path / "work/llama-seed0/dropout0.5/sdpa.json").read_bytes() == kept
    (tmp_path / "record/curves.png").unlink()
    assert compare_curves.main(["--draw", "--output_dir", str(tmp_path / "record")]) == 0
    assert (tmp_path / "record/curves.png").exists()


def test_jobs_that_fail_or_last_too_long_are_missing(tmp_path, capsys):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'result.json').write_text('{\"a\": 1}')"
    scripts = {"good": write, "bad": "raise SystemExit(3)", "slow": "import time; time.sleep(60)"}
    jobs = [Job(name, ("-c", text, str(tmp_path / name)), tmp_path / name) for name, text in scripts.items()]
    assert run_jobs(jobs, parallel=3, budget=5) == {"good": {"a": 1}}
    printed = capsys.readouterr().out
    assert "bad: failed (3)" in printed and "slow: failed (stopped: no time is left)" in printed
    changed = Job("good", ("-c", "raise SystemExit(4)", str(tmp_path / "good")), tmp_path / "good")
    assert run_jobs([changed], parallel=1, budget=5) == {}  # another command: what is saved is not its result


def test_jobs_are_spread_over_devices_and_each_end_is_told(tmp_path):
    text = "import json, os, pathlib, sys; seen = json.dumps({'on': os.environ['CUDA_VISIBLE_DEVICES']});"
    text += "pathlib.Path(sys.argv[1], 'result.json').write_text(seen)"
    jobs = [Job(str(n), ("-c", text, str(tmp_path / str(n))), tmp_path / str(n)) for n in range(4)]
    ends = []
    results = run_jobs(jobs, parallel=2, budget=60, devices=["3", "5"], ended=lambda: ends.append(1))
    assert {result["on"] for result in results.values()} == {"3", "5"} and len(results) == len(ends) == 4


def test_what_was_started_ends_with_its_starter(tmp_path):
    inner = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()));"
    inner += "time.sleep(60)"
    outer = "import pathlib; from common.jobs import Job, run_jobs;"
    outer += f"run_jobs([Job('slow', ('-c', {inner!r}), pathlib.Path({str(tmp_path / 'slow')!r}))], 1, 60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    starter = subprocess.Popen([sys.executable, "-c", outer], env=environment)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    starter.terminate()
    assert starter.wait(timeout=30) == 128 + signal.SIGTERM
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """A process that has ended and waits for its parent (which is gone) counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_engines_share_the_rows_of_a_step():
    parts = {name: compare_engines.data_parallel(name) for name in ("single_gpu", "ddp", "fsdp2", "tp", "fsdp2_tp")}
    assert parts == {"single_gpu": 1, "ddp": 2, "fsdp2": 2, "tp": 1, "fsdp2_tp": 2}


def test_engines_are_measured_by_noise():
    def run(*losses: float) -> dict:
        return {"losses": list(losses), **dict.fromkeys(compare_engines.KEYS)}

    reference = {"runs": {"flash_plus": run(4.0, 3.0)}, "largest_loss_gap": 0.05}
    found = compare_engines.judge({"one": reference, "near": run(4.0, 3.14), "far": run(4.2, 3.0)}, "one")
    assert found["tolerance"] == pytest.approx(0.15)
    assert {name: engine["same"] for name, engine in found["engines"].items()} == {
        "one": True,
        "near": True,
        "far": False,
    }


def test_engines_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    engines = {name: {"losses": [3.0, 2.0], "tokens_per_second": 10.0, "processes": 1} for name in ("one", "two")}
    (tmp_path / "engines.json").write_text(json.dumps({"engines": engines}))
    assert compare_engines.main(["--draw", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / "engines.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.distributed
@pytest.mark.slow
def test_ddp_on_two_processes_trains_like_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"document {i}: " + "abc def " * 40}) + "\n" for i in range(40)))
    options = ["--engines", "cpu,cpu_ddp", "--steps", "4", "--batch_size", "4", "--train_file", str(corpus)]
    options += ["--hidden_size", "48", "--intermediate_size", "32", "--num_layers", "1", "--vocab_size", "300"]
    options += ["--seq_length", "64", "--max_eval_rows", "6", "--learning_rate", "1e-2", "--warmup_steps", "2"]
    options += ["--mixed_precision", "no", "--output_dir", str(tmp_path), "--work", str(tmp_path / "work")]
    code = compare_engines.main(options)
    logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.rglob("log.txt"))
    assert code == 0, capsys.readouterr().out + logs
    assert (tmp_path / "engines.png").exists()
    engines = json.loads((tmp_path / "engines.json").read_text())["engines"]
    one, two = engines["cpu"], engines["cpu_ddp"]
    assert (one["processes"], two["processes"], two["engine"]) == (1, 2, "MULTI_CPU")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert two["bits_per_byte_end"] == pytest.approx(one["bits_per_byte_end"], rel=1e-3)
