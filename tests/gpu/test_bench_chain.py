"""Decoding timed as layers in a row: every layer's call is in the CUDA graph; one that cannot be is timed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_flash_plus.bench import chain
from hf_flash_plus.bench import config as configuration
from hf_flash_plus.bench.kernels import run_kernels
from hf_flash_plus.bench.peers import PEERS, Peer, Prepared
from hf_flash_plus.bench.problem import Problem

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
DECODE: dict[str, Any] = {
    "kind": "kernels",
    "baseline": "sdpa",
    "peers": ["triton", "layer", "sdpa"],
    "layers": 12,
    "budget_s": 0.02,
    "rounds": 2,
    "cases": [
        {"batch": 2, "seqlen": 1024, "seqlen_q": 1, "heads": 8, "head_dim": 64, "gqa": 4, "page_size": [0, 16]},
        {"batch": 3, "seqlen": 300, "seqlen_q": 1, "heads": 8, "head_dim": 128, "gqa": 4, "mask": ["causal", "padded"]},
    ],
}


def test_layers_in_a_row() -> None:
    rows = run_kernels(configuration.parse(DECODE), CUDA, lambda _: None, lambda _: None)
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["peer"] for row in measured} == {"triton", "layer", "sdpa"} and len(measured) == 10
    assert all(row["layers"] == 12 and "note" not in row and row["errors"]["out"] < 2e-2 for row in measured)
    assert all(row["status"] in ("ok", "declined") for row in rows)


def test_a_call_that_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be captured: it is timed alone, and the others as before."""

    def build(problem: Problem, training: bool) -> Prepared:
        prepared = PEERS["sdpa"].build(problem, training)

        def forward() -> torch.Tensor:
            out = prepared.forward()
            out.sum().item()
            return out

        return Prepared(prepared.inputs, prepared.dout, forward, prepared.dense)

    monkeypatch.setitem(PEERS, "waits", Peer("waits", "", build))
    config = configuration.parse({**DECODE, "peers": ["waits", "sdpa", "triton"], "cases": DECODE["cases"][1:]})
    rows = run_kernels(config, CUDA, lambda _: None, lambda _: None)
    assert [row["layers"] for row in rows] == [1, 12, 12] * 2 and all(row["status"] == "ok" for row in rows)
    assert all(("note" in row) == (row["peer"] == "waits") for row in rows)


def test_what_escapes_the_capture_is_found() -> None:
    """A result that is computed while recording, and not by replays."""
    elsewhere = torch.cuda.Stream()
    source = torch.ones(16, device=CUDA)
    outs = [torch.zeros(16, device=CUDA) for _ in range(2)]

    def inside() -> torch.Tensor:
        return outs[0].copy_(source)

    def outside() -> torch.Tensor:
        with torch.cuda.stream(elsewhere):
            return outs[1].copy_(source)

    torch.cuda.synchronize()
    replay = chain.record([inside, outside], CUDA)
    torch.cuda.synchronize()
    found = chain.errors(replay, [lambda out: (out - 1).abs().max().item()] * 2)
    assert found[0] == 0.0 and found[1] != found[1]


def test_a_recording_holds_what_its_calls_read() -> None:
    """What a call made for itself is neither given to others nor back to the device while its graph is replayed."""

    def call() -> Callable[[], torch.Tensor]:
        own = torch.full((2**22,), 3.0, device=CUDA)
        return lambda: own + 1

    replay = chain.record([call(), call()], CUDA)
    chain.record([lambda: torch.zeros(4, device=CUDA) + 1], CUDA)  # empties torch's cache
    others = [torch.zeros(2**22, device=CUDA) for _ in range(4)]
    assert all((out == 4).all().item() for out in replay()) and not any(other.any().item() for other in others)
