"""A provider with "kernels" of its own, for tests of the library op: forward by the reference, backward by formula.

Inside a library op autograd records nothing, so the gradients are written out; they are those of
``softmax(softcap(scale * q k^T) + alibi + bias + mask)`` with sinks and dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hf_flash_plus import dispatch
from hf_flash_plus.inputs import DTYPES, AttentionInputs
from hf_flash_plus.providers import ALL_FEATURES, PROVIDERS, AttentionGradients, AttentionOutput, Provider


class ToyProvider(Provider):
    name = "toy"
    summary = "for tests"
    differentiable = False
    dtypes = frozenset(DTYPES)
    max_head_dim = 2**31
    features = ALL_FEATURES

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seeds: list[int] = []
        self.inputs: list[AttentionInputs] = []

    def _keep(self, inputs: AttentionInputs) -> Tensor | None:
        """1 / (1 - p) for weights that are kept, 0 for others; a function of the seed alone."""
        if not inputs.dropout_p:
            return None
        assert inputs.dropout_seed is not None and inputs.dropout_seed.shape == (1,)
        generator = torch.Generator().manual_seed(int(inputs.dropout_seed))
        shape = (inputs.batch, inputs.nheads, inputs.seqlen_q, inputs.seqlen_k)
        keep = torch.rand(shape, generator=generator, dtype=torch.float64) >= inputs.dropout_p
        return keep.double() / (1 - inputs.dropout_p)

    def _weights(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        wide = replace(
            inputs,
            query=inputs.query.double(),
            key=inputs.key.double(),
            value=inputs.value.double(),
            dropout_p=0.0,
        )
        output = PROVIDERS["reference"].forward(wide)
        assert output.probabilities is not None and output.softmax_lse is not None
        return output.probabilities, output.softmax_lse

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        self.calls.append("forward")
        self.inputs.append(inputs)
        if inputs.dropout_seed is not None:
            self.seeds.append(int(inputs.dropout_seed))
        weights, lse = self._weights(inputs)
        keep = self._keep(inputs)
        value = inputs.value.double().repeat_interleave(inputs.nheads // inputs.nheads_k, dim=2)
        out = torch.einsum("bhij,bjhd->bihd", weights if keep is None else weights * keep, value)
        return AttentionOutput(out.to(inputs.query.dtype).contiguous(), lse.clone())

    def backward(
        self,
        inputs: AttentionInputs,
        out: Tensor,
        softmax_lse: Tensor,
        dout: Tensor,
        *,
        bias_grad: bool,
        sinks_grad: bool,
    ) -> AttentionGradients:
        self.calls.append("backward")
        self.inputs.append(inputs)
        if inputs.dropout_seed is not None:
            self.seeds.append(int(inputs.dropout_seed))
        groups = inputs.nheads // inputs.nheads_k
        query, grad = inputs.query.double(), dout.double()
        key, value = (t.double().repeat_interleave(groups, dim=2) for t in (inputs.key, inputs.value))
        weights, _ = self._weights(inputs)
        keep = self._keep(inputs)
        dropped = weights if keep is None else weights * keep
        dvalue = torch.einsum("bhij,bihd->bjhd", dropped, grad)
        dweights = torch.einsum("bihd,bjhd->bhij", grad, value)
        if keep is not None:
            dweights = dweights * keep
        delta = (dweights * weights).sum(-1, keepdim=True)
        dscores = weights * (dweights - delta)
        dbias = dsinks = None
        if bias_grad:
            bias = inputs.mask.bias
            assert bias is not None
            dims = [d for d in range(4) if bias.shape[d] == 1 and dscores.shape[d] != 1]
            dbias = (dscores.sum(dims, keepdim=True) if dims else dscores).to(bias.dtype)
        if sinks_grad:
            sinks = inputs.sinks
            assert sinks is not None
            logits = sinks.double()[None, :, None] if sinks.dim() == 1 else sinks.double()
            by_row = -torch.exp(logits - softmax_lse.double()) * delta[..., 0]
            dsinks = (by_row.sum((0, 2)) if sinks.dim() == 1 else by_row).float()
        if inputs.softcap:
            raw = torch.einsum("bihd,bjhd->bhij", query, key) * inputs.softmax_scale
            dscores = dscores * (1 - torch.tanh(raw / inputs.softcap) ** 2)
        dscores = dscores * inputs.softmax_scale
        dquery = torch.einsum("bhij,bjhd->bihd", dscores, key)
        dkey = torch.einsum("bhij,bihd->bjhd", dscores, query)
        dkey, dvalue = (t.unflatten(2, (inputs.nheads_k, groups)).sum(3) for t in (dkey, dvalue))
        dtype = inputs.query.dtype
        return AttentionGradients(
            dquery.to(dtype).contiguous(), dkey.to(dtype).contiguous(), dvalue.to(dtype).contiguous(), dbias, dsinks
        )


@contextmanager
def registered(*providers: Provider) -> Iterator[None]:
    """Providers added to the registry for a while, with nothing remembered before and after."""
    dispatch.clear_cache()
    for provider in providers:
        assert provider.name not in PROVIDERS
        PROVIDERS[provider.name] = provider
    try:
        yield
    finally:
        for provider in providers:
            del PROVIDERS[provider.name]
        dispatch.clear_cache()
