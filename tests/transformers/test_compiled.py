"""``torch.compile`` of whole models at lengths that change: one graph for all of them, and eager's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from .tiny import build, ids


def _said(batch: int, length: int, padded: bool, two: bool) -> dict[str, Any]:
    said: dict[str, Any] = dict(input_ids=ids(batch, length))
    if padded:
        said["attention_mask"] = torch.ones(batch, length, dtype=torch.long)
        said["attention_mask"][0, : length // 3] = 0
    if two:
        said["decoder_input_ids"] = ids(batch, length + 2)
    return said


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bert", "modernbert", "t5", "bart"])
def test_lengths_that_change(name: str, padded: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    eager, ours = build(name, "eager"), build(name, "flash_plus")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    two = name in ("t5", "bart")
    for length in (9, 14, 23, 31):
        said = _said(2, length, padded, two) | dict(use_cache=False)
        if name in ("bert", "modernbert"):
            said.pop("use_cache")
        got, want = compiled(**said).logits, eager(**said).logits
        rows = slice(None) if not padded or two else said["attention_mask"].bool()
        torch.testing.assert_close(got[rows], want[rows], atol=3e-5, rtol=3e-5)
    assert counter.frame_count == 2, "one graph of the first length, one of all others"
