"""The command line: what its verbs print, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_flash_plus import dispatch
from hf_flash_plus.cli import app
from hf_flash_plus.cli.explain import build_signature
from hf_flash_plus.providers import PROVIDERS

runner = CliRunner()


@pytest.fixture(autouse=True)
def _fresh_selection() -> Any:
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


def run(*arguments: str, code: int = 0) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_help_lists_the_verbs() -> None:
    output = run("--help")
    assert all(verb in output for verb in ("info", "explain", "bench"))
    for verb in ("info", "explain", "bench"):
        assert "--help" in run(verb, "--help")


def test_module_entry_point() -> None:
    done = subprocess.run([sys.executable, "-m", "hf_flash_plus", "explain"], capture_output=True, text=True)
    assert done.returncode == 2 and "--shape" in done.stderr


def test_verbs_load_lazily() -> None:
    """The command line itself brings in neither rich nor the benchmarks."""
    code = (
        "import sys, hf_flash_plus; before = set(sys.modules); import hf_flash_plus.cli; "
        "print([m for m in set(sys.modules) - before if m.startswith(('hf_flash_plus.bench', 'matplotlib', 'yaml'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- info ---


def test_info() -> None:
    output = run("info")
    for word in ("torch", torch.__version__, "FLASH_ATTENTION_USE_FLAGGEMS", "HF_FLASH_PLUS_PROVIDER", "(current)"):
        assert word in output
    assert all(name in output for name in PROVIDERS)
    assert "disable_splitkv" in output  # the known-bad list


def test_info_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "off")
    report = json.loads(run("info", "--json"))
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert [provider["name"] for provider in report["providers"]] == list(PROVIDERS)
    for provider in report["providers"]:
        assert provider["usable"] == (provider["reason"] is None)
    assert report["paths"]["current"] == "FALSE"
    assert report["settings"][0] == {**report["settings"][0], "value": "off", "default": "TRUE"}


@pytest.mark.parametrize(
    "name,value,word",
    [
        ("FLASH_ATTENTION_USE_FLAGGEMS", "maybe", "not a valid setting"),
        ("HF_FLASH_PLUS_PROVIDER", "cudnn", "unknown provider"),
    ],
)
def test_info_survives_wrong_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str, word: str) -> None:
    monkeypatch.setenv(name, value)
    assert word in run("info")


def test_info_survives_a_provider_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("out of cheese")

    monkeypatch.setattr(PROVIDERS["reference"], "unavailable_reason", broken)
    report = json.loads(run("info", "--json"))
    reasons = {provider["name"]: provider["reason"] for provider in report["providers"]}
    assert reasons["reference"] == "RuntimeError: out of cheese"


# --- explain ---


def explain(*arguments: str, code: int = 0) -> dict[str, Any]:
    return json.loads(run("explain", *arguments, "--json", code=code))


def test_explain_table() -> None:
    output = run("explain", "--shape", "2,128,8,64", "--causal", "--device", "cpu")
    assert "cpu bfloat16 head_dim 64 heads 8/8 [causal]" in output
    assert "chosen" in output and "torch_sdpa" in output


def test_explain_gives_every_reason() -> None:
    report = explain("--shape", "2,128,8,64", "--device", "cpu", "--softcap", "30", "--lse")
    rows = {row["provider"]: row for row in report["providers"]}
    assert rows["torch_sdpa"]["reasons"] == ["does not serve softcap", "does not serve returning softmax_lse"]
    assert rows["reference"]["chosen"] and rows["reference"]["would_serve"]
    assert report["served"]


def test_explain_nobody_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "torch_sdpa")
    assert not explain("--shape", "1,8,2,16", "--device", "cpu", "--softcap", "1", code=1)["served"]
    assert "nobody would serve" in run("explain", "--shape", "1,8,2,16", "--device", "cpu", "--softcap", "1", code=1)


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["--shape", "1,2,3"], "--shape takes 4 integers"),
        (["--shape", "1,2,x,4"], "--shape takes 4 integers"),
        (["--shape", "1,8,4,16", "--kv-heads", "3"], "multiple"),
        (["--shape", "1,8,4,16", "--window", "5"], "--window takes 2 integers"),
        (["--shape", "1,8,4,16", "--window", "-3,0"], "window_size"),
        (["--shape", "1,8,4,16", "--dropout", "1.5"], "dropout_p"),
        (["--shape", "2,8,4,16", "--packed"], "must begin with 1"),
        (["--shape", "1,-8,4,16"], "--shape takes sizes, which are not negative; got -8"),
        (["--shape", "1,8,4,16", "--kv-heads", "-1"], "--kv-heads takes sizes"),
        (["--shape", "1,8,4,16", "--seqlen-k", "-2"], "--seqlen-k takes sizes"),
        (["--shape", "1,8,4,16", "--v-head-dim", "-2"], "--v-head-dim takes sizes"),
        (["--shape", "1,999999999999999999999,4,16"], "give smaller sizes"),
        (["--shape", "1,8,4,16", "--device", "nope"], "--device 'nope' is none that torch knows"),
        (["--shape", "1,8,4,16", "--device", "cpu:"], "--device 'cpu:' is none that torch knows"),
    ],
    ids=str,
)
def test_explain_says_what_is_wrong(arguments: list[str], word: str) -> None:
    assert word in run("explain", *arguments, code=2)


def test_explain_wrong_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "cudnn")
    assert "unknown provider" in run("explain", "--shape", "1,8,4,16", code=2)


def test_explain_covers_every_field() -> None:
    """Each option reaches the signature, on a device that need not be there."""
    plain = build_signature(shape=(2, 64, 8, 64), device="cuda")
    assert plain.device_type == "cuda" and not plain.needs_grad and plain.bias == "none"
    full = build_signature(
        shape=(1, 1, 8, 64), kv_heads=2, seqlen_k=9, v_head_dim=32, dtype="fp16", device="cpu", causal=True,
        window=(3, 0), softcap=1.0, dropout=0.1, alibi=True, sinks=True, packed=True, key_mask=True, bias="float",
        training=True, bias_grad=True, lse=True, deterministic=True,
    )  # fmt: skip
    assert full._replace(device_type="cuda") != plain
    off = {name for name, value in full._asdict().items() if value in (False, "none")}
    assert off == {"oversized"}, "which is a number of batch elements that no grid holds"
    assert build_signature(shape=(65536, 1, 8, 64)).oversized == 65536
    assert (full.head_dim, full.v_head_dim, full.nheads, full.nheads_k) == (64, 32, 8, 2)
    assert build_signature(shape=(2, 64, 8, 64), bias="bool").bias == "bool"
    intervals = build_signature(shape=(2, 64, 8, 64), intervals=True)
    assert intervals.intervals and not intervals.packed


def test_explain_options() -> None:
    report = explain(
        "--shape", "1,16,4,32", "--kv-heads", "2", "--device", "cpu", "--window", "3,0", "--alibi", "--sinks",
        "--intervals", "--key-mask", "--bias", "float", "--training", "--dtype", "fp32", "--deterministic",
    )  # fmt: skip
    for word in ("window", "alibi", "sinks", "row intervals", "key_mask", "float bias", "needs_grad", "4/2"):
        assert word in report["call"]


# --- bench and coverage: what is wrong is said before anything runs ---


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--device", "nope"], ["--device 'nope'", "give cpu, cuda or cuda:N"]),
        (["--device", "cpu:0"], ["--device 'cpu:0'", "give cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["--device 'cuda:99' is not there", "Give cpu"]),
        (["--models", "llamax"], ["--models", "no model type 'llamax'", "near ones are llama"]),
        (["--models", "llama,qqqqqqqq"], ["no model type 'qqqqqqqq'", "COVERAGE.md"]),
        (["--checks", "forwrd"], ["--checks", "no check 'forwrd'", "checks are forward, left"]),
        (["--subset", "{folder}/none"], ["--subset", "cannot be read: No such file"]),
        (["--subset", "{folder}"], ["--subset", "cannot be read: Is a directory"]),
        (["--subset", "{folder}/text"], ["--subset", "none of its lines is a model type"]),
        (["--subset", "{folder}/binary"], ["--subset", "it is no text"]),
        (["--from-json", "{folder}/none"], ["--from-json", "cannot be read: No such file"]),
        (["--from-json", "{folder}/text"], ["--from-json", "holds no results of hf-flash-plus coverage"]),
        (["--from-json", "{folder}/list"], ["--from-json", "holds no results of hf-flash-plus coverage"]),
        (["--from-json", "{folder}/binary"], ["--from-json", "holds no results of hf-flash-plus coverage"]),
        (["--against", "{folder}/none"], ["--against", "cannot be read: No such file"]),
        (["--beside", "{folder}/none"], ["--beside", "cannot be read: No such file"]),
        (["--output", "{folder}/text", "--resume"], ["--output", "holds no results of hf-flash-plus coverage"]),
    ],
    ids=lambda part: " ".join(part) if part[0].startswith("--") else None,
)
def test_coverage_says_what_is_wrong(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("no-model-type\n")
    (tmp_path / "list").write_text("[1]")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    from hf_flash_plus.coverage import pool

    monkeypatch.setattr(pool, "run_all", lambda *_: pytest.fail("it ran"))
    output = run("coverage", *(part.format(folder=tmp_path) for part in arguments), code=2)
    assert all(word in output for word in words), output
    assert "Traceback" not in output


@pytest.mark.parametrize("device", ["nope", "cuda:x", "cuda:99"])
def test_bench_wrong_device(device: str) -> None:
    assert f"--device {device!r} is" in run("bench", "configs/bench/forward.yaml", "--device", device, code=2)
