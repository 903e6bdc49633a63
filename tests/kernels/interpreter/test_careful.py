"""A call some kernel of which is compiled wrong is computed with smaller tiles, from its first launch on."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import decode_launch, decode_step, launch, machine_code
from hf_flash_plus.masks import CAUSAL


@pytest.fixture(autouse=True)
def _faulty(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every kernel is found wrong unless its tile is small; the names of those that ran."""
    ran: list[str] = []
    original = launch.Launch.run

    def run(self: launch.Launch) -> None:
        rows, keys = self.plan.options.get("BLOCK_M", 0), self.plan.options.get("BLOCK_N", 0)
        key_stationary = "dkdv" in self.plan.kernel.__name__
        if "BLOCK_N" in self.plan.options and (keys if key_stationary else rows) > 32:
            raise machine_code.MiscompiledError(f"{self.plan.kernel.__name__}: as if")
        ran.append(self.plan.kernel.__name__)
        original(self)

    monkeypatch.setattr(launch.Launch, "run", run)
    monkeypatch.setattr(launch, "_careful", set())
    return ran


def _inputs(rows: int, group: int = 1) -> AttentionInputs:
    q, k, v = torch.randn(1, rows, group, 16), torch.randn(1, 65, 1, 16), torch.randn(1, 65, 1, 16)
    return AttentionInputs(q, k, v, 0.25, CAUSAL, needs_lse=True)


def _expected(inputs: AttentionInputs) -> torch.Tensor:
    rows, keys = inputs.seqlen_q, inputs.seqlen_k
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs.query, inputs.key.expand(-1, -1, inputs.nheads, -1)) * 0.25
    hidden = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, inputs.value.expand(-1, -1, inputs.nheads, -1))


def _large(monkeypatch: pytest.MonkeyPatch) -> Any:
    from hf_flash_plus.kernels import tiles

    large = tiles.Tile(64, 64, 4, 1)
    monkeypatch.setattr(tiles, "select", lambda key: large)
    launch._cached_plan.cache_clear()
    return large


def test_forward_and_backward(monkeypatch: pytest.MonkeyPatch, _faulty: list[str], caplog: Any) -> None:
    _large(monkeypatch)
    inputs = _inputs(48)
    try:
        with caplog.at_level(logging.INFO, logger="hf_flash_plus"):
            out, lse = launch.forward(inputs)
        torch.testing.assert_close(out, _expected(inputs))
        assert _faulty == ["attention_forward"] and caplog.text.count("smaller tiles") == 1
        dout = torch.randn_like(out)
        found = launch.backward(inputs, out, lse, dout, bias_grad=False)
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value)]
        again = AttentionInputs(*leaves, 0.25, CAUSAL)
        for got, want in zip(found, torch.autograd.grad(_expected(again), leaves, dout)):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert launch.prepare(inputs).structure.careful
    finally:
        launch._cached_plan.cache_clear()


def test_a_backward_that_is_found_wrong_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is looked at on its own: the forward may have been right."""
    _large(monkeypatch)
    inputs = _inputs(48)
    try:
        out, lse = launch.forward(inputs)
        launch._careful.clear()
        dout = torch.randn_like(out)
        first = launch.backward(inputs, out, lse, dout, bias_grad=False)
        second = launch.backward(inputs, out, lse, dout, bias_grad=False)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3]))
    finally:
        launch._cached_plan.cache_clear()


def test_decoding(_faulty: list[str]) -> None:
    inputs = _inputs(4, group=16)  # 64 pairs of a row and a head: one tile of 64 rows
    out, lse = decode_launch.forward(inputs)
    torch.testing.assert_close(out, _expected(inputs))
    assert lse is not None and _faulty[0] == "attention_decode"


def test_steps_of_decoding(_faulty: list[str]) -> None:
    inputs = _inputs(1, group=48)
    step = decode_step.Step(inputs)
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.query, inputs.key, inputs.value))
    assert step(q, k, v, CAUSAL) is None, "the ordinary way serves this one"
    found = step(q, k, v, CAUSAL)
    assert found is not None
    torch.testing.assert_close(found[0], _expected(inputs))
