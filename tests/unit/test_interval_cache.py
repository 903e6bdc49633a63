"""What is kept with row intervals: for whom, and when it must be forgotten."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from hf_flash_plus import ops
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
