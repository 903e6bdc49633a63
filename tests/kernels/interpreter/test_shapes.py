"""Odd lengths, head counts, head dimensions, strides and numbers, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers.triton import TritonProvider
from tests.kernels.cases import Case, assert_within, build, check, oracle

PROVIDER = TritonProvider()


@pytest.mark.parametrize("features", [(), ("causal",), ("window",)], ids=lambda f: "+".join(f) or "full")
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 65), (65, 1), (17, 33), (33, 17), (64, 129)])
def test_lengths(seqlen_q: int, seqlen_k: int, features: tuple[str, ...]) -> None:
    check(PROVIDER, Case(features, seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1, nheads=2))


def test_many_tiles() -> None:
    """Enough tiles for masked and wholly visible ones on every side, in both directions."""
    check(PROVIDER, Case(("causal", "window"), batch=1, seqlen_q=129, seqlen_k=200, nheads=1, nheads_k=1))
    check(PROVIDER, Case(("packed",), batch=1, seqlen_q=200, seqlen_k=230, nheads=1, nheads_k=1))
    check(PROVIDER, Case(("left_padding",), batch=2, seqlen_q=129, seqlen_k=129, nheads=1, nheads_k=1))


@pytest.mark.parametrize("seqlen_q, seqlen_k, batch", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (5, 5, 0)])
@pytest.mark.parametrize("features", [(), ("causal",), ("sinks",)], ids=lambda f: "+".join(f) or "full")
def test_empty(seqlen_q: int, seqlen_k: int, batch: int, features: tuple[str, ...]) -> None:
    check(PROVIDER, Case(features, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k))


@pytest.mark.parametrize("nheads, nheads_k", [(1, 1), (3, 3), (6, 2), (5, 1)])
def test_heads(nheads: int, nheads_k: int) -> None:
    check(PROVIDER, Case(("causal",), nheads=nheads, nheads_k=nheads_k, seqlen_q=17, seqlen_k=33))


@pytest.mark.parametrize(
    "head_dim, v_head_dim", [(8, 8), (24, 16), (16, 40), (192, 128), (80, 80), (96, 96), (512, 512), (5, 5), (20, 3)]
)
def test_head_dims(head_dim: int, v_head_dim: int) -> None:
    case = Case(("causal",), batch=1, head_dim=head_dim, v_head_dim=v_head_dim, nheads=2, nheads_k=1)
    check(PROVIDER, replace(case, dtype=torch.float16))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 7.0])
def test_scale(scale: float) -> None:
    check(PROVIDER, Case(("causal",), scale=scale, seqlen_q=17, seqlen_k=33))


def test_expanded_inputs() -> None:
    """Strides of 0: the same memory stands for every batch element, head or key."""
    built = build(Case(("causal",), nheads=2))
    clean = built.clean
    expanded = replace(
        clean,
        query=clean.query[:1].expand(2, -1, -1, -1),
        key=clean.key[:, :, :1].expand(-1, -1, 2, -1),
        value=clean.value[:, :1].expand(-1, clean.seqlen_k, 2, -1),
    )
    dout = built.dout[..., :1].expand(-1, -1, -1, 16)  # what sum().backward() sends
    built.clean, built.dout = expanded, dout
    output = PROVIDER.forward(expanded)
    grads = PROVIDER.backward(expanded, output.out, output.softmax_lse, dout, bias_grad=False, sinks_grad=False)
    out, _, (dq, dk, dv) = oracle(built)
    actuals = (output.out, grads.dq, grads.dk, grads.dv)
    for name, actual, exact in zip(("out", "dq", "dk", "dv"), actuals, (out, dq, dk, dv)):
        assert_within(name, actual, exact, 1e-5)


def test_huge_logits() -> None:
    """Scores of some thousands, and a sink far above them, overflow nothing."""
    case = Case(("causal", "sinks"), scale=300.0, seqlen_q=17, seqlen_k=33)
    built = build(case)
    inputs = replace(built.clean, sinks=torch.tensor([5e4, float("-inf")]))
    output = PROVIDER.forward(inputs)
    grads = PROVIDER.backward(inputs, output.out, output.softmax_lse, built.dout, bias_grad=False, sinks_grad=True)
    for tensor in (output.out, output.softmax_lse, *grads):
        assert tensor is None or tensor.isfinite().all()


def test_other_forward() -> None:
    """The backward takes another provider's output: lse of +inf on empty rows, strided tensors."""
    case = Case(("causal",), seqlen_q=33, seqlen_k=17)
    built = build(case)
    output = PROVIDER.forward(built.inputs)
    lse = output.softmax_lse
    expected = PROVIDER.backward(built.inputs, output.out, lse, built.dout, bias_grad=False, sinks_grad=False)
    foreign = lse.masked_fill(lse == float("-inf"), float("inf")).transpose(1, 2).contiguous().transpose(1, 2)
    out = output.out.transpose(1, 2).contiguous().transpose(1, 2)
    got = PROVIDER.backward(built.inputs, out, foreign, built.dout, bias_grad=False, sinks_grad=False)
    for a, b in zip(expected[:3], got[:3]):
        assert torch.equal(a, b)


def test_repeatable() -> None:
    built = build(Case(("packed", "dropout")))
    runs = []
    for _ in range(2):
        output = PROVIDER.forward(built.inputs)
        grads = PROVIDER.backward(
            built.inputs, output.out, output.softmax_lse, built.dout, bias_grad=False, sinks_grad=False
        )
        runs.append((output.out, *grads[:3]))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_reasons() -> None:
    def reasons(dtype: torch.dtype, head_dim: int = 16) -> str:
        q = torch.empty(1, 4, 1, head_dim, dtype=dtype)
        return "; ".join(PROVIDER.not_supported_reasons(AttentionInputs(q, q, q, 1.0, AttentionMask()).signature()))

    assert reasons(torch.float32) == ""
    assert "bfloat16" in reasons(torch.bfloat16)
    assert "float64" in reasons(torch.float64)
    assert "512" in reasons(torch.float32, 520)
