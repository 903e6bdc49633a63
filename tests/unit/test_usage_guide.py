"""The user's own usage guide (``usage_guide.md``, as it was written): its code runs, in order, unchanged.

Where no GPU is visible ``'cuda'`` becomes ``'cpu'``, the only edit. A few names that the guide takes for granted
(``math``, ``YourTransformerModel``, ``input_ids``, ``batch_q``, ...) are there before it starts.
"""

from __future__ import annotations

import ast
import logging
import math
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus import settings

from . import oracle

GUIDE = Path(__file__).with_name("usage_guide.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
BLOCKS = [textwrap.dedent(match["code"]) for match in FENCE.finditer(GUIDE)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setenv(settings.USE_FLAGGEMS, "TRUE")  # the guide sets it; this puts it back afterwards
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    hfp.install_as_flash_attn()
    x = torch.randn(2, 16, 16, 64, device=DEVICE, dtype=torch.float16)
    yield {
        "math": math,
        "YourTransformerModel": _model,
        "input_ids": torch.randint(0, 32, (2, 12), device=DEVICE),
        "batch_q": x,
        "batch_k": x,
        "batch_v": x,
    }
    hfp.uninstall_as_flash_attn()
    root.handlers[:] = handlers
    root.setLevel(level)


def _model() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="flash_plus")
    return model.to(DEVICE)


def run(block: str, namespace: dict[str, Any]) -> None:
    code = block if DEVICE == "cuda" else block.replace("'cuda'", "'cpu'")
    exec(compile(code, "usage_guide.md", "exec"), namespace)


def test_every_block_of_the_guide_was_found() -> None:
    assert len(BLOCKS) == GUIDE.count("```python") == 11
    for block in BLOCKS:
        ast.parse(block)


def test_the_guide_runs(namespace: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "hf_flash_plus")
    for block in BLOCKS:
        run(block, namespace)
        if "dropout_p" in block or "class " in block or "output" not in namespace:
            continue
        output = namespace["output"]
        if isinstance(output, torch.Tensor):
            assert output.shape == namespace["q"].shape and output.dtype == torch.float16
            assert torch.isfinite(output).all()
    assert os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] == "TRUE", "the guide ends on the FlagGems path"
    # The last block asks for details of the computation in the log, and they are there.
    last = [r.getMessage() for r in caplog.records if r.name == "hf_flash_plus" and r.levelno == logging.DEBUG][-1]
    assert last.startswith("flash_attn_func:") and "(2, 1024, 16, 64)" in last


def test_results_of_the_guide_are_right(namespace: dict[str, Any]) -> None:
    # The numbers behind the snippets: causal, scaled, bidirectional, on a corner of the same tensors.
    run(next(b for b in BLOCKS if "seq_length = 1024" in b), namespace)
    q, k, v = (namespace[n][:1, :6, :2].cpu() for n in "qkv")
    causal = namespace["output"][:1, :6, :2].cpu()
    oracle.assert_close(causal, oracle.attention(q, k, v, causal=True).out, torch.float16)
    for marker in ("softmax_scale=scale", "causal=False)"):
        block = next(b for b in BLOCKS if marker in b)
        small = {**namespace, "q": q.to(DEVICE), "k": k.to(DEVICE), "v": v.to(DEVICE)}
        run(block, small)
        want = oracle.attention(q, k, v, causal="causal=True" in block).out
        oracle.assert_close(small["output"].cpu(), want, torch.float16)


def test_the_guides_module_trains(namespace: dict[str, Any]) -> None:
    namespace["torch"] = torch
    run(next(b for b in BLOCKS if "class FlashSelfAttention" in b), namespace)
    torch.manual_seed(0)
    module = namespace["FlashSelfAttention"](32, 4).to(DEVICE)
    x = torch.randn(2, 6, 32, device=DEVICE)
    for causal in (False, True):
        module.zero_grad()
        out = module(x, causal=causal)
        out.square().sum().backward()
        q, k, v = module.qkv(x).reshape(2, 6, 3, 4, 8).unbind(2)
        want = module.out_proj(
            oracle.attention(q.cpu(), k.cpu(), v.cpu(), causal=causal).out.reshape(2, 6, 32).float().to(DEVICE)
        )
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert namespace["FlashSelfAttention"](32, 4, dropout=0.5).to(DEVICE)(x).shape == (2, 6, 32)


def test_the_guides_model_really_computes_with_flash_plus(
    namespace: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    namespace["os"] = os
    with caplog.at_level(logging.DEBUG, "hf_flash_plus"):
        run(next(b for b in BLOCKS if "YourTransformerModel" in b), namespace)
    assert namespace["output"].logits.shape == (2, 12, 32)
    assert any(r.getMessage().startswith("flash_plus:") for r in caplog.records)
