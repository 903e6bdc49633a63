"""Transforms of ``torch.func`` and differentiation in forward mode: through kernels served right or refused, with
advice that works; never another derivative without an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, NoProviderError, use_provider
from hf_flash_plus.inputs import AttentionInputs, CallSignature
from hf_flash_plus.paged import gather_pages

from .toy import ToyProvider, registered


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    with registered(ToyProvider()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap says that it computes our op in a loop
        yield


_generator = torch.Generator().manual_seed(5)
Q, K, V, TANGENT = torch.randn(4, 2, 5, 2, 8, generator=_generator, dtype=torch.float64).unbind(0)
BIAS = torch.randn(1, 1, 5, 5, generator=_generator, dtype=torch.float64)
SINKS = torch.randn(2, generator=_generator, dtype=torch.float64)


def dense(q: Tensor) -> Tensor:
    out: Tensor = hfp.flash_attn_func(q, K, V, causal=True)
    return out


def one(q: Tensor) -> Tensor:
    """One element of the batch."""
    out: Tensor = hfp.flash_attn_func(q[None], K[:1], V[:1], causal=True)
    return out[0]


def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda q: function(q).square().sum()


def biased(bias: Tensor) -> Tensor:
    out: Tensor = hfp.attention(Q, K, V, AttentionMask(bias=bias))
    return out


def sunk(sinks: Tensor) -> Tensor:
    out: Tensor = hfp.flash_attn_func(Q, K, V, s_aux=sinks)
    return out


SERVED: dict[str, Callable[[], Tensor]] = {
    "grad": lambda: grad(loss(dense))(Q),
    "grad of the bias": lambda: grad(loss(biased))(BIAS),
    "grad of the sinks": lambda: grad(loss(sunk))(SINKS),
    "vjp": lambda: vjp(dense, Q)[1](TANGENT)[0],
    "jacrev": lambda: jacrev(lambda q: dense(q).sum((1, 2)))(Q),
    "vmap": lambda: vmap(one)(Q),
    "vmap of grad": lambda: vmap(grad(loss(one)))(Q),
    "grad of vmap": lambda: grad(loss(vmap(one)))(Q),
    "vmap of vmap of grad": lambda: vmap(lambda t: vmap(grad(lambda q: (one(q) * t).square().sum()))(Q))(TANGENT),
    "jvp of something else": lambda: jvp(lambda x: dense(Q) * x, (Q,), (TANGENT,))[1],
    "grad beside jvp": lambda: grad(lambda q: (jvp(torch.square, (q,), (TANGENT,))[1] * dense(q)).sum())(Q),
}


@pytest.mark.parametrize("case", SERVED)
def test_transforms_through_kernels_are_right(case: str) -> None:
    with use_provider("reference"):
        want = SERVED[case]()
    with use_provider("toy"):
        torch.testing.assert_close(SERVED[case](), want)


def dual(requires_grad: bool, kwargs: dict[str, Any] | None = None) -> Tensor | None:
    with forward_ad.dual_level():
        out = hfp.flash_attn_func(forward_ad.make_dual(Q.clone().requires_grad_(requires_grad), TANGENT), K, V)
        tangent: Tensor | None = forward_ad.unpack_dual(out).tangent
    return tangent


def dual_without_gradients() -> Tensor | None:
    with torch.no_grad():  # which does not reach differentiation in forward mode
        return dual(True)


def dual_over_pages() -> Tensor | None:
    pages = K.reshape(2, 5, 2, 8)
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    with forward_ad.dual_level():
        out = hfp.flash_attn_with_kvcache(
            forward_ad.make_dual(Q[:, :1], TANGENT[:, :1]), pages, pages, cache_seqlens=4, block_table=table
        )
        tangent: Tensor | None = forward_ad.unpack_dual(out).tangent
    return tangent


FORWARD_MODE: dict[str, Callable[[], Tensor | None]] = {
    "jvp": lambda: jvp(dense, (Q,), (TANGENT,))[1],
    "jvp of the bias": lambda: jvp(biased, (BIAS,), (BIAS + 1,))[1],
    "jvp of the sinks": lambda: jvp(sunk, (SINKS,), (SINKS + 1,))[1],
    "jacfwd": lambda: jacfwd(lambda q: dense(q).sum((1, 2)))(Q),
    "jvp of vmap": lambda: jvp(vmap(one), (Q,), (TANGENT,))[1],
    "vmap of jvp": lambda: vmap(lambda q, t: jvp(one, (q,), (t,))[1])(Q, TANGENT),
    "jvp of grad": lambda: jvp(grad(loss(dense)), (Q,), (TANGENT,))[1],
    "grad of jvp": lambda: grad(lambda q: jvp(dense, (q,), (TANGENT,))[1].square().sum())(Q),
    "dual tensor": lambda: dual(False),
    "dual tensor that requires a gradient": lambda: dual(True),
    "dual tensor, no_grad": dual_without_gradients,
    "dual tensor, paged cache": dual_over_pages,
}


def refused(compute: Callable[[], Tensor | None], why: str) -> Tensor | None:
    """What the advice of the refusal leads to."""
    with use_provider("toy"), pytest.raises(NotImplementedError, match=why) as caught:
        compute()
    assert 'with hf_flash_plus.use_provider("reference")' in str(caught.value)
    with use_provider("reference"):
        return compute()


@pytest.mark.parametrize("case", FORWARD_MODE)
def test_forward_mode_through_kernels_is_refused_with_advice_that_works(case: str) -> None:
    tangent = refused(FORWARD_MODE[case], "forward mode")
    assert tangent is not None and tangent.abs().sum() > 0


class PagedToy(ToyProvider):
    """Its kernel reads pages itself."""

    name = "paged_toy"

    def forward_paged(self, inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> Any:
        self.calls.append("paged")
        keys, values = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
        return self.forward(replace(inputs, key=keys, value=values))


def test_kernels_that_read_pages_never_see_a_transformed_tensor() -> None:
    toy = PagedToy()
    pages, table = K.reshape(2, 5, 2, 8), torch.tensor([[1], [0]], dtype=torch.int32)

    def decode(q: Tensor) -> Tensor:
        out: Tensor = hfp.flash_attn_with_kvcache(q[:, :1], pages, pages, cache_seqlens=4, block_table=table)
        return out

    with registered(toy), use_provider("paged_toy"):
        want = decode(Q)
        assert toy.calls == ["paged", "forward"]
        toy.calls.clear()
        got = vmap(decode)(Q[None])[0]
        with pytest.raises(NotImplementedError, match="forward mode"):
            jvp(decode, (Q,), (TANGENT,))
        assert "paged" not in toy.calls
    torch.testing.assert_close(got, want)


def test_forward_mode_of_inline_providers() -> None:
    """A difference quotient of the reference; torch's SDPA computes the same or says that it cannot."""
    step = 1e-6
    with use_provider("reference"):
        want = (dense(Q + step * TANGENT) - dense(Q - step * TANGENT)) / (2 * step)
        torch.testing.assert_close(jvp(dense, (Q,), (TANGENT,))[1], want, atol=1e-7, rtol=1e-6)
    with use_provider("torch_sdpa"):
        try:
            tangent = jvp(dense, (Q,), (TANGENT,))[1]
        except NotImplementedError as error:
            assert "forward AD" in str(error)
        else:
            torch.testing.assert_close(tangent, want, atol=1e-7, rtol=1e-6)


SECOND: dict[str, Callable[[], Tensor]] = {
    "grad of grad": lambda: grad(lambda q: grad(loss(dense))(q).sum())(Q),
    "vmap of grad of grad": lambda: vmap(grad(lambda q: grad(loss(one))(q).sum()))(Q),
    "grad of vmap of grad": lambda: grad(lambda q: vmap(grad(loss(one)))(q).sum())(Q),
}


@pytest.mark.parametrize("case", SECOND)
def test_second_derivatives_are_refused_with_advice_that_works(case: str) -> None:
    derivative = refused(SECOND[case], "second derivative")
    assert derivative is not None and derivative.abs().sum() > 0


def test_batched_tensors_that_need_gradients_choose_a_provider_that_has_them() -> None:
    """In ``grad(vmap(...))`` tensors say ``requires_grad=False``."""

    class NoGradients(ToyProvider):
        name = "no_gradients"
        features = ToyProvider.features - {"grad"}

    with registered(NoGradients()), use_provider("no_gradients"):
        assert vmap(one)(Q).shape == Q.shape
        with pytest.raises(NoProviderError, match="does not serve gradients"):
            grad(loss(vmap(one)))(Q)


def test_transforms_change_no_signature_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CallSignature] = []
    reasons = ToyProvider.extra_reasons
    monkeypatch.setattr(ToyProvider, "extra_reasons", lambda self, s: seen.append(s) or reasons(self, s))
    with use_provider("toy"), torch.no_grad():
        vmap(one)(Q.clone().requires_grad_())
    assert [s.needs_grad for s in seen] == [False]


def test_batched_gradients_reach_kernels_one_by_one() -> None:
    class Plain(ToyProvider):
        name = "plain"

        def backward(self, inputs: Any, out: Tensor, softmax_lse: Tensor, dout: Tensor, **kwargs: bool) -> Any:
            functorch = torch._C._functorch
            batched = functorch.is_batchedtensor(dout) or functorch.is_legacy_batchedtensor(dout)
            assert not batched, "kernels read memory"
            return super().backward(inputs, out, softmax_lse, dout, **kwargs)

    weights = torch.stack((TANGENT, 2 * TANGENT))
    gradients = []
    with registered(Plain()):
        for provider in ("plain", "reference"):
            with use_provider(provider):
                leaf = Q.clone().requires_grad_()
                out = dense(leaf)
                gradients += torch.autograd.grad(out, leaf, weights, is_grads_batched=True, retain_graph=True)
                gradients.append(vmap(lambda w, out=out, leaf=leaf: torch.autograd.grad(out, leaf, w)[0])(weights))
    for got in gradients:
        torch.testing.assert_close(got, gradients[-1])


COMPILED: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": lambda q: grad(loss(dense))(q),
    "grad of vmap": lambda q: grad(loss(vmap(one)))(q),
    "vmap": lambda q: vmap(one)(q),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_transforms(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile leaves such a transform out, or says that it cannot; its gradients were zero."""
    with use_provider("reference"):
        want = COMPILED[case](Q)
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "toy")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(COMPILED[case], backend="aot_eager")(Q), want)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"transforms of torch\.func"):
        torch.compile(COMPILED[case], backend="aot_eager", fullgraph=True)(Q)
    torch._dynamo.reset()


def test_compiled_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "toy")
    torch._dynamo.reset()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.compile(lambda q, t: jvp(dense, (q,), (t,))[1], backend="aot_eager")(Q, TANGENT)
    torch._dynamo.reset()


def test_code_compiled_before_is_not_run_with_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "toy")
    torch._dynamo.reset()
    compiled = torch.compile(dense, backend="aot_eager")
    torch.testing.assert_close(compiled(Q), dense(Q))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        compiled(forward_ad.make_dual(Q, TANGENT))
    torch.testing.assert_close(compiled(Q), dense(Q))
    torch._dynamo.reset()
