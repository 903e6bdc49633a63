"""The provider flash_attn before it calls a package: what must not reach the kernels. The package is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_flash_plus
from hf_flash_plus import dispatch, ops
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers import PROVIDERS, flash_attn


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches a stand-in for flash-attn 4, which gives zeros."""
    seen: list[tuple[Any, ...]] = []

    def function(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((q.shape, k.shape))
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    module = SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=function)
    monkeypatch.setattr(flash_attn, "_find", lambda: (flash_attn.GENERATIONS[0], module, "4.0"))
    return seen


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 5), (5, 0), (0, 0)])
def test_empty_calls_are_answered_here(seqlen_q: int, seqlen_k: int, calls: list[tuple[Any, ...]]) -> None:
    q = torch.full((2, seqlen_q, 4, 8), float("inf"), requires_grad=True)
    k, v = (torch.randn(2, seqlen_k, 2, dim, requires_grad=True) for dim in (8, 16))
    output = PROVIDERS["flash_attn"].forward(AttentionInputs(q, k, v, 0.3, AttentionMask(causal=True), needs_lse=True))
    assert not calls
    assert output.out.shape == (2, seqlen_q, 4, 16) and (output.out == 0).all() and output.out.is_contiguous()
    assert output.softmax_lse is not None and output.softmax_lse.shape == (2, 4, seqlen_q)
    assert (output.softmax_lse == float("-inf")).all()
    grads = torch.autograd.grad(output.out.sum(), (q, k, v))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("batch, heads, served", [(3, 4, True), (65535, 1, True), (65536, 1, False), (1, 65536, False)])
def test_what_no_grid_holds_goes_to_the_next(
    batch: int, heads: int, served: bool, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself torch's SDPA serves it; by name it is an error that says what came and what to do."""
    monkeypatch.setattr(flash_attn.FlashAttnProvider, "device_types", None)  # the stand-in runs on the CPU
    monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
    q = torch.randn(batch, 1, heads, 8, dtype=torch.float16)
    dispatch.clear_cache()
    try:
        out = hf_flash_plus.flash_attn_func(q, q, q)
        assert dispatch.providers_used() == ["flash_attn" if served else "torch_sdpa"]
        assert served or torch.allclose(out, q, atol=1e-3), "a row that sees itself alone"
        with hf_flash_plus.use_provider("flash_attn"):
            if served:
                hf_flash_plus.flash_attn_func(q, q, q)
            else:
                what = "heads, these are 65536" if heads > 1 else "batch elements, these are 65536: split the call"
                with pytest.raises(dispatch.NoProviderError, match=f"grid holds 65535 {what}"):
                    hf_flash_plus.flash_attn_func(q, q, q)
    finally:
        dispatch.clear_cache()
    assert bool(calls) == served


@pytest.mark.parametrize("generation, served", [(0, True), (1, True), (2, False)], ids=("4", "3", "2"))
def test_packed_sequences_are_a_grid_dimension_of_the_oldest_only(
    generation: int, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "_find", lambda: (flash_attn.GENERATIONS[generation], SimpleNamespace(), "1"))
    q = torch.zeros(1, 65536, 2, 8, dtype=torch.float16)
    cu = torch.arange(65537, dtype=torch.int32)
    signatures = []
    monkeypatch.setattr(ops, "attention", lambda inputs, *rest: (signatures.append(inputs.signature()), _stop())[0])
    with pytest.raises(_Stop):
        hf_flash_plus.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 1, 1)
    reasons = PROVIDERS["flash_attn"].extra_reasons(signatures[0])
    assert signatures[0].oversized == 65536 and signatures[0].packed
    assert served == (not reasons) and all("packed sequences, these are 65536" in reason for reason in reasons)


@pytest.mark.parametrize(
    "heads_k, v_dim, gradients, served",
    [(2, 8, True, False), (4, 8, True, True), (2, 16, True, True), (2, 8, False, True)],
    ids=("declined", "no groups", "one head dimension", "no gradients"),
)
def test_flash_attn_4_has_no_gradients_of_groups_with_two_head_dimensions(
    heads_k: int, v_dim: int, gradients: bool, served: bool, calls: list[tuple[Any, ...]]
) -> None:
    q, k, v = torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, heads_k, 16), torch.zeros(1, 3, heads_k, v_dim)
    signature = AttentionInputs(q.requires_grad_(gradients), k, v, 0.3, AttentionMask()).signature()
    reasons = PROVIDERS["flash_attn"].extra_reasons(signature)
    assert served == (not reasons) and all("grouped heads with head dimensions 16 and 8" in why for why in reasons)


class _Stop(Exception):
    pass


def _stop() -> None:
    raise _Stop
