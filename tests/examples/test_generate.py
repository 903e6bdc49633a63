"""The example script of generation, on the CPU with its fresh model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import generate

import hf_flash_plus


def run(folder: Path, *options: str) -> dict:
    prompts = folder / "prompts.txt"
    prompts.write_text("once upon a time\n\nhello\n")
    results = folder / "results.json"
    generate.main(["--prompts", str(prompts), "--max_new_tokens", "4", "--result_file", str(results), *options])
    return json.loads(results.read_text())


def test_modes_and_implementations_agree(tmp_path: Path) -> None:
    want = run(tmp_path, "--attn_implementation", "eager")
    for options in ((), ("--mode", "stream"), ("--cache", "static"), ("--batch_size", "1")):
        assert texts(run(tmp_path, *options)) == texts(want)


def test_fused_rotary_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = []
    fuse_rotary = hf_flash_plus.fuse_rotary
    monkeypatch.setattr(hf_flash_plus, "fuse_rotary", lambda model: handles.append(fuse_rotary(model)))
    assert texts(run(tmp_path, "--fuse_rotary")) == texts(run(tmp_path))
    assert len(handles) == 1 and len(handles[0].fused) == 4
    handles[0].remove()


def texts(result: dict) -> list[str]:
    return result["texts"]


def test_no_prompts(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit, match="no prompts in"):
        generate.main(["--prompts", str(tmp_path / "empty.txt")])
