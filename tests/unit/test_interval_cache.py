"""What is kept with row intervals: for whom, and when it must be forgotten."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from hf_flash_plus import interval_cache, ops
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.interval_cache import share, shared
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers import PROVIDERS
from hf_flash_plus.providers.base import AttentionGradients, AttentionOutput


def made() -> torch.Tensor:
    rows = torch.arange(5, dtype=torch.int32)
    return torch.stack((torch.zeros_like(rows), rows + 1), dim=-1)[None]


def test_kept_with_the_tensor_it_was_made_from() -> None:
    intervals = share(made())
    first = shared(intervals)
    assert first is not None
    first["summary"] = 1
    assert shared(intervals) is first
    other = shared(share(made()))
    assert other == {}


def test_tensors_of_others_are_not_known() -> None:
    intervals = share(made())
    assert shared(made()) is None
    assert shared(intervals[:, :3]) is None and shared(intervals.clone()) is None


def test_forgotten_after_a_change_in_place() -> None:
    intervals = share(made())
    kept = shared(intervals)
    assert kept is not None
    intervals[0, 0] = 0
    assert shared(intervals) is None

    intervals = share(made())
    intervals[:, None].mul_(2)  # through a view, as a model would change the mask that it was handed
    assert shared(intervals) is None


def test_inference_mode_keeps_nothing() -> None:
    with torch.inference_mode():
        intervals = share(made())
        assert shared(intervals) is None


class _OnAGpu:
    """What ``shared`` asks of a tensor."""

    is_cuda, device, _version = True, torch.device("cuda", 1), 0

    def __init__(self) -> None:
        setattr(self, interval_cache._ATTRIBUTE, interval_cache._Kept(0))


def test_streams_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stream has computed may not be there yet for another."""
    streams = {1: 7}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    intervals: Any = _OnAGpu()
    first = shared(intervals)
    assert first == {}
    first["summary"] = 1
    streams[1] = 8
    assert shared(intervals) == {}
    streams[1] = 7
    assert shared(intervals) is first


def test_nothing_is_kept_or_found_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    intervals: Any = _OnAGpu()
    for capturing in (False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert (shared(intervals) is None) == capturing
    monkeypatch.setattr(interval_cache, "capturing", lambda tensor: True)
    captured = share(made())
    monkeypatch.undo()
    assert shared(captured) is None, "replays write it anew"


def test_copies_are_not_known() -> None:
    intervals = share(made())
    kept = shared(intervals)
    assert kept is not None
    kept["summary"] = 1
    for twin in (copy.deepcopy(intervals), pickle.loads(pickle.dumps(intervals))):
        assert shared(twin) is None and torch.equal(twin, intervals)


def test_compiled_code_does_not_make_anything_known() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def make(rows: torch.Tensor) -> torch.Tensor:
        return share(torch.stack((rows, rows + 1), dim=-1)[None])

    assert shared(make(torch.arange(5, dtype=torch.int32))) is None


def test_backward_gets_the_same_tensor_as_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing that the forward has kept would be found."""
    intervals = share(made())
    seen: list[Any] = []

    class Watching:
        backward_provider = None
        differentiable = False

        def forward(self, inputs: AttentionInputs) -> AttentionOutput:
            seen.append(shared(inputs.mask.row_intervals))
            return AttentionOutput(torch.zeros_like(inputs.query), torch.zeros(1, 2, 5))

        def backward(self, inputs: AttentionInputs, out: torch.Tensor, *_: Any, **__: Any) -> AttentionGradients:
            seen.append(shared(inputs.mask.row_intervals))
            return AttentionGradients(out, out, out)

    monkeypatch.setitem(PROVIDERS, "watching", Watching())
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    inputs = AttentionInputs(q, q, q, 1.0, AttentionMask(row_intervals=intervals), needs_lse=True)
    out, _ = ops._Attention.apply(inputs, "watching", q, q, q, None, None)
    out.sum().backward()
    assert len(seen) == 2 and seen[0] is seen[1] is not None
