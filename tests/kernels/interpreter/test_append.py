"""The kernel that writes continuous batching's new tokens into their pages, and a whole step with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_flash_plus.dispatch import use_provider
from hf_flash_plus.integration import continuous

append = pytest.importorskip("hf_flash_plus.kernels.append").append


@pytest.mark.parametrize("window", [2**30, 3])
@pytest.mark.parametrize("dims", [(8, 8), (24, 40)])
@pytest.mark.parametrize("table_type", [torch.int32, torch.int64])
def test_append(window: int, dims: tuple[int, int], table_type: torch.dtype) -> None:
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 3, dim).transpose(0, 1) for dim in dims)  # three requests, two heads
    k_cache, v_cache = (torch.randn(6, 4, 2, dim) for dim in dims)
    want = k_cache.clone(), v_cache.clone()
    # Six keys, eight keys, and a row that is no request: it must write nowhere, page -1 is no page.
    table = torch.tensor([[2, 4, -1], [3, 0, -1], [-1, -1, -1]], dtype=torch.int32)
    cu_k = torch.tensor([0, 6, 14, 14, 14], dtype=table_type)
    intervals = append(keys, values, k_cache, v_cache, table, cu_k, window)
    for cache, new in zip(want, (keys, values)):
        cache[4, 1], cache[0, 3] = new[0], new[1]
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])
    assert intervals.tolist() == [[[max(0, total - window), total]] for total in (6, 8, 0)]


class _Cache:
    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return key_states, value_states


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("provider", ["triton", "reference"])
def test_a_step_equals_the_torch_operations(window: int | None, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    module = torch.nn.Module()
    module.layer_idx = 0
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        k_cache, v_cache = torch.randn(6, 4, 2, 16), torch.randn(6, 4, 2, 16)
        kwargs = {
            "block_table": torch.tensor([[2, 4], [3, 5], [-1, -1]], dtype=torch.int32),
            "cu_seq_lens_k": torch.tensor([0, 6, 9, 9], dtype=torch.int32),
            "k_cache": k_cache,
            "v_cache": v_cache,
        }
        monkeypatch.setattr(continuous, "_appends_in_one_launch", lambda *_, answer=fused: answer)
        with torch.no_grad(), use_provider(provider):
            out = continuous._by_block_table(module, q, k, v, _Cache(), 0.0, None, window, None, None, kwargs)
        results.append((out[:, :2], k_cache, v_cache))  # the third row only fills up a graph
    for fused, torch_made in zip(results[1], results[0]):
        assert (fused - torch_made).abs().max() < 2e-6
