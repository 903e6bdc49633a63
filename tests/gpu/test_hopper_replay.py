"""Backward calls like an earlier one, on a GPU: launched again elsewhere, the same gradients as launched anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus.interval_cache import share
from hf_flash_plus.kernels.hopper import backward_launch, forward_launch
from hf_flash_plus.masks import CAUSAL, FULL, AttentionMask

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = backward_launch._device_reason(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(backward_launch, "_replays", {})


def intervals(batch: int, seqlen: int, seed: int) -> AttentionMask:
    ends = torch.randint(1, seqlen + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(seqlen)[None]
    ends = torch.where(rows < ends, ends, 0)
    return AttentionMask(row_intervals=torch.stack((torch.zeros_like(ends), ends), -1).int().cuda())


def gradients(mask: AttentionMask, seed: int, dim: int, nheads_k: int, fused: bool) -> list[torch.Tensor]:
    """Of random tensors; ``fused``: q, k and v are views of one, as of one projection."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = 8 + 2 * nheads_k
    packed = torch.randn(3, 384, heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
    parts: Any = packed.split([8, nheads_k, nheads_k], dim=2)
    q, k, v = (part.detach() if fused else part.detach().clone() for part in parts)
    tensors = [each.requires_grad_() for each in (q, k, v)]
    out = hfp.attention(*tensors, mask)
    dout = torch.randn(out.shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    return list(torch.autograd.grad(out, tensors, dout))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("nheads_k", [8, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("kind", ["full", "causal", "intervals"])
def test_replayed_gradients(kind: str, fused: bool, nheads_k: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_launch, "mode_for", lambda inputs: "unordered")

    def mask(seed: int) -> AttentionMask:
        return {"full": FULL, "causal": CAUSAL}.get(kind) or intervals(3, 384, seed)

    first = gradients(mask(0), 0, dim, nheads_k, fused)
    kept = dict(backward_launch._replays)
    used = []
    for likeness, replay in kept.items():
        backward_launch._replays[likeness] = lambda given, replay=replay: used.append(1) or replay(given)
    replayed = [gradients(mask(seed), seed, dim, nheads_k, fused) for seed in (0, 1, 2)]
    assert len(used) == 3 * len(kept)
    for a, b in zip(first, replayed[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # sums in another order
    for seed in (1, 2):
        backward_launch._replays.clear()
        for a, b in zip(gradients(mask(seed), seed, dim, nheads_k, fused), replayed[seed], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    if nheads_k == 8:
        assert kept, "a call that is not split over programs is kept"


@pytest.mark.parametrize("dim", [64, 128])
def test_lists_kept_with_a_mask(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is known, call after call; another mask in the same memory."""
    monkeypatch.setattr(backward_launch, "mode_for", lambda inputs: "unordered")

    def fresh(seed: int) -> list[torch.Tensor]:
        backward_launch._replays.clear()
        return gradients(intervals(3, 384, seed), 5, dim, 8, False)

    masks = [intervals(3, 384, seed) for seed in (0, 1)]
    expected = [fresh(seed) for seed in (0, 1, 2)]
    backward_launch._replays.clear()
    for mask in masks:
        assert mask.row_intervals is not None
        share(mask.row_intervals)
    for _ in range(4):
        for which, mask in enumerate(masks):
            for a, b in zip(gradients(mask, 5, dim, 8, False), expected[which], strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    masks[0].row_intervals.copy_(intervals(3, 384, 2).row_intervals)
    for _ in range(3):
        for a, b in zip(gradients(masks[0], 5, dim, 8, False), expected[2], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mask", [FULL, None], ids=["full", "intervals"])
def test_compiled_code_that_becomes_cuda_graphs(mask: AttentionMask | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is kept may lie in the graphs' memory, where torch warms the code up on a stream of its own."""
    monkeypatch.setattr(forward_launch, "_counters", {})
    monkeypatch.setattr(forward_launch, "_known", {})
    mask = intervals(2, 256, 0) if mask is None else mask
    q, k, v = (torch.randn(2, 256, 8, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hfp.attention(q, k, v, mask) * 2

    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        q = q.clone().normal_()
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(q, k, v).clone()
        torch.testing.assert_close(found, attend(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_cuda_graph_of_a_replayed_call() -> None:
    q, k, v = (torch.randn(2, 256, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 256, 8, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(hfp.attention(q, k, v, FULL), (q, k, v), dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.normal_()
        dout.normal_()
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
