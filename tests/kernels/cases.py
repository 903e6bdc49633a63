"""Attention calls for the kernel tests, with poisoned memory, their float64 oracle, and the error they may have.

A case names shapes and features. :func:`check` runs a provider's forward and backward on it and compares with
:class:`~hf_flash_plus.providers.ReferenceProvider` in float64. The budget is flash-attn's: the error of plain eager
attention *in the same dtype*, times 2 (gradients: times 3). NaN is put wherever a kernel must not look: keys and
values hidden from every row, queries that see nothing, the memory around strided views, and fresh allocations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hf_flash_plus.inputs import AttentionInputs, validate
from hf_flash_plus.masks import AttentionMask, additive, visible
from hf_flash_plus.providers import Provider, ReferenceProvider
from hf_flash_plus.providers.reference import alibi_bias, row_sinks

NAN = float("nan")
REFERENCE = ReferenceProvider()


@dataclass(frozen=True)
class Case:
    """One call; ``features`` are keys of :data:`FEATURES`."""

    features: tuple[str, ...] = ()
    batch: int = 2
    seqlen_q: int = 33
    seqlen_k: int = 63
    nheads: int = 2
    nheads_k: int = 1
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + (f"v{self.v_head_dim}" if self.v_head_dim != self.head_dim else "")
        return (
            f"{'+'.join(self.features) or 'full'}-b{self.batch}-{self.seqlen_q}x{self.seqlen_k}"
            f"-h{self.nheads}k{self.nheads_k}-d{dims}-{str(self.dtype)[6:]}"
        )


@dataclass
class Built:
    """A case as data: what the kernels get (poisoned), what the oracle gets, and the gradient of the output."""

    inputs: AttentionInputs
    clean: AttentionInputs
    dout: Tensor
    keep: Tensor | None


def philox_keep(seed: int, p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Which weights dropout keeps, by an independent Philox4x32-7: bool (batch, nheads, seqlen_q, seqlen_k)."""
    batch, nheads, seqlen_q, seqlen_k = shape
    blocks = -(-seqlen_k // 8)
    grid = (batch * nheads, seqlen_q, blocks)
    counter = np.zeros((4, *grid), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = np.arange(seqlen_q, dtype=np.uint64)[:, None]
    counter[2] = np.arange(batch * nheads, dtype=np.uint64)[:, None, None]
    low = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(7):
        product = (np.uint64(0xD2511F53) * counter[0], np.uint64(0xCD9E8D57) * counter[2])
        counter = np.stack(
            (
                (product[1] >> np.uint64(32)) ^ counter[1] ^ key[0],
                product[1] & low,
                (product[0] >> np.uint64(32)) ^ counter[3] ^ key[1],
                product[0] & low,
            )
        )
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    halves = np.stack((counter & np.uint64(0xFFFF), counter >> np.uint64(16)), axis=-1)  # (word, ..., half)
    words = halves.reshape(2, 2, *grid, 2)  # word = 2 * c + d, lies at key % 8 = 4 * d + 2 * c + half
    bits = np.moveaxis(words, (1, 0), (-3, -2)).reshape(*grid[:2], blocks * 8)[..., :seqlen_k]
    keep = bits >= round(p * 65536)
    return torch.from_numpy(keep.reshape(batch, nheads, seqlen_q, seqlen_k))


def _packed(case: Case, causal: bool = True) -> Tensor:
    """Three sequences packed into each row, three unused keys behind each, and two padded rows at the end."""
    intervals = torch.zeros(case.batch, case.seqlen_q, 2, dtype=torch.int32)
    real = max(case.seqlen_q - 2, 1)
    for b in range(case.batch):
        for doc in range(3):
            rows = range(real * doc // 3, real * (doc + 1) // 3 + b * (doc < 2))
            first, last = case.seqlen_k * doc // 3, max(case.seqlen_k * (doc + 1) // 3 - 3, 1)
            for n, i in enumerate(rows):
                end = last - len(rows) + n + 1 if causal else last
                intervals[b, i] = torch.tensor((first, max(end, first)))
    return intervals


def _left_padding(case: Case) -> Tensor:
    start = torch.tensor([3 + 5 * b for b in range(case.batch)])[:, None].expand(-1, case.seqlen_q)
    end = torch.arange(case.seqlen_q).expand(case.batch, -1) + (case.seqlen_k - case.seqlen_q + 1)
    return torch.stack((start, end), dim=-1).to(torch.int32)


def _right_padding(case: Case) -> Tensor:
    """Causal batch elements of which the first is full, the second empty, the third (and so on) a third as long."""
    real = torch.tensor([(case.seqlen_q, 0, case.seqlen_q // 3)[b % 3] for b in range(case.batch)])[:, None]
    row = torch.arange(case.seqlen_q)[None]
    end = torch.where(row < real, (row + 1).clamp(max=case.seqlen_k), 0)
    return torch.stack((torch.zeros_like(end), end), dim=-1).to(torch.int32)


def _ends(case: Case) -> Tensor:
    """The first and the last quarter of the rows see a quarter of the keys, the first and the last; others nothing."""
    rows, keys = case.seqlen_q // 4, max(case.seqlen_k // 4, 1)
    intervals = torch.zeros(case.batch, case.seqlen_q, 2, dtype=torch.int32)
    intervals[:, :rows, 1] = keys
    intervals[:, case.seqlen_q - rows :] = torch.tensor((case.seqlen_k - keys, case.seqlen_k), dtype=torch.int32)
    return intervals


def _random_intervals(case: Case) -> Tensor:
    first = torch.randint(-5, case.seqlen_k, (case.batch, case.seqlen_q, 1))
    return torch.cat((first, first + torch.randint(-3, case.seqlen_k, first.shape)), dim=-1).to(torch.int32)


def _bias(case: Case, *broadcast: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = [case.batch, case.nheads, case.seqlen_q, case.seqlen_k]
    for dim in broadcast:
        shape[dim] = 1
    return torch.randn(shape).to(dtype or case.dtype)


def _very_low_bias(case: Case) -> Tensor:
    """finfo.min and -inf here and there, one row that is finfo.min throughout, one that is -inf throughout."""
    bias = _bias(case, 0, 1)
    bias[torch.rand_like(bias.float()) < 0.2] = torch.finfo(case.dtype).min
    bias[torch.rand_like(bias.float()) < 0.1] = float("-inf")
    bias[0, 0, 0] = torch.finfo(case.dtype).min
    bias[0, 0, -1] = float("-inf")
    return bias


def _holes(case: Case) -> dict[str, object]:
    """A key mask with holes in the last batch element only, and row intervals that say all about the others."""
    keep = torch.ones(case.batch, case.seqlen_k, dtype=torch.bool)
    keep[-1] = torch.rand(case.seqlen_k) < 0.6
    full = torch.tensor((0, case.seqlen_k), dtype=torch.int32).expand(1, case.seqlen_q, 2)
    holes = torch.tensor([0] * (case.batch - 1) + [1], dtype=torch.int32)
    return {"key_mask": keep, "key_holes": holes, "row_intervals": full}


def _scattered_key_mask(case: Case) -> dict[str, object]:
    keep = torch.rand(case.batch, case.seqlen_k) < 0.7
    keep[0, : case.seqlen_k // 2] = True  # whole tiles to keep
    keep[-1, case.seqlen_k // 2 :] = False  # and whole tiles to skip
    return {"key_mask": keep}


#: What a feature adds to the mask, and to the call.
FEATURES = {
    "causal": lambda c: ({"causal": True}, {}),
    "window": lambda c: ({"window": (7, 4)}, {}),
    "left_window": lambda c: ({"window": (9, -1), "causal": True}, {}),
    "right_window": lambda c: ({"window": (-1, 3)}, {}),
    "packed": lambda c: ({"row_intervals": _packed(c)}, {}),
    "documents": lambda c: ({"row_intervals": _packed(c, causal=False)}, {}),
    "left_padding": lambda c: ({"row_intervals": _left_padding(c)}, {}),
    "right_padding": lambda c: ({"row_intervals": _right_padding(c)}, {}),
    "ends": lambda c: ({"row_intervals": _ends(c)}, {}),
    "intervals": lambda c: ({"row_intervals": _random_intervals(c)}, {}),
    "one_interval": lambda c: ({"row_intervals": _random_intervals(replace(c, batch=1))}, {}),
    "nothing": lambda c: ({"row_intervals": torch.zeros(1, 1, 2, dtype=torch.int32).expand(1, c.seqlen_q, 2)}, {}),
    "key_mask": lambda c: (_scattered_key_mask(c), {}),
    "holes": lambda c: (_holes(c), {}),
    "bool_bias": lambda c: ({"bias": _bias(c, 1) > -0.3}, {}),
    "bias": lambda c: ({"bias": _bias(c)}, {}),
    "head_bias": lambda c: ({"bias": _bias(c, 0, dtype=torch.float32)}, {}),
    "key_bias": lambda c: ({"bias": _bias(c, 1, 2)}, {}),
    "transposed_bias": lambda c: ({"bias": _bias(replace(c, seqlen_q=c.seqlen_k, seqlen_k=c.seqlen_q)).mT}, {}),
    "low_bias": lambda c: ({"bias": _very_low_bias(c)}, {}),
    "alibi": lambda c: ({}, {"alibi_slopes": torch.rand(c.nheads)}),
    "batch_alibi": lambda c: ({}, {"alibi_slopes": torch.rand(c.batch, c.nheads)}),
    "positions": lambda c: (
        {"row_positions": torch.randint(0, c.seqlen_k + 1, (c.batch, c.seqlen_q), dtype=torch.int32)},
        {"alibi_slopes": torch.rand(c.nheads)},
    ),
    "softcap": lambda c: ({}, {"softcap": 1.5}),
    "sinks": lambda c: ({}, {"sinks": torch.randn(c.nheads)}),
    "row_sinks": lambda c: ({}, {"sinks": torch.randn(c.batch, c.nheads, c.seqlen_q)}),
    "dropout": lambda c: ({}, {"dropout_p": 0.3, "dropout_seed": torch.tensor([0x123456789ABCDEF])}),
}


def _in_slack(data: Tensor) -> Tensor:
    """The same values as a strided view, with NaN in the memory around and between."""
    batch, seqlen, heads, dim = data.shape
    around = torch.full((batch, heads + 1, seqlen + 3, dim + 8), NAN, dtype=data.dtype, device=data.device)
    view = around[:, :heads, 1 : 1 + seqlen, :dim].transpose(1, 2)
    view.copy_(data)
    return view


def build(case: Case, device: str = "cpu", seed: int = 0) -> Built:
    """Random data for a case; the same for every dtype but for rounding."""
    torch.manual_seed(seed)
    mask_fields: dict[str, object] = {}
    fields: dict[str, object] = {}
    for feature in case.features:
        for target, more in zip((mask_fields, fields), FEATURES[feature](case)):
            target.update(more)

    def move(values: dict[str, object]) -> dict[str, object]:
        return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()}

    mask = AttentionMask(**move(mask_fields))
    q = torch.randn(case.batch, case.seqlen_q, case.nheads, case.head_dim).to(case.dtype).to(device)
    k = torch.randn(case.batch, case.seqlen_k, case.nheads_k, case.head_dim).to(case.dtype).to(device)
    v = torch.randn(case.batch, case.seqlen_k, case.nheads_k, case.v_head_dim).to(case.dtype).to(device)
    dout = torch.randn(case.batch, case.seqlen_q, case.nheads, case.v_head_dim).to(case.dtype).to(device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    clean = AttentionInputs(q, k, v, scale, mask, needs_lse=True, **move(fields))
    keep = None
    if clean.dropout_p:
        shape = (case.batch, case.nheads, case.seqlen_q, case.seqlen_k)
        keep = philox_keep(int(clean.dropout_seed), clean.dropout_p, shape).to(device)
    q, k, v = q.clone(), k.clone(), v.clone()
    seen = visible(mask, case.seqlen_q, case.seqlen_k, torch.device(device))
    if seen is not None and seen.numel():
        seen = seen.expand(case.batch, -1, -1, -1)
        hidden = ~seen.any(dim=(1, 2))
        k[hidden], v[hidden] = NAN, NAN
        q[~seen.any(dim=(1, 3))] = NAN
    inputs = replace(clean, query=_in_slack(q), key=_in_slack(k), value=_in_slack(v))
    validate(inputs)
    return Built(inputs, clean, _in_slack(dout), keep)


def _leaves(inputs: AttentionInputs, dtype: torch.dtype) -> tuple[AttentionInputs, list[Tensor]]:
    """The call in ``dtype`` with gradients: q, k, v, then a floating bias and sinks where there are any."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    q, k, v = leaf(inputs.query), leaf(inputs.key), leaf(inputs.value)
    leaves, mask, sinks = [q, k, v], inputs.mask, inputs.sinks
    if additive(mask) is not None:
        # float32's finfo.min stays what it was in the dtype of the call.
        mask = replace(mask, bias=leaf(mask.bias))
        leaves.append(mask.bias)
    if sinks is not None:
        sinks = leaf(sinks)
        leaves.append(sinks)
    return replace(inputs, query=q, key=k, value=v, mask=mask, sinks=sinks), leaves


@contextmanager
def _dropping(keep: Tensor | None, p: float) -> Iterator[None]:
    """torch's dropout replaced by a known choice."""
    if keep is None:
        yield
        return
    with mock.patch.object(torch.nn.functional, "dropout", lambda x, _p: x * keep / (1 - p)):
        yield


def oracle(built: Built) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``(out, lse, gradients)`` in float64."""
    inputs, leaves = _leaves(built.clean, torch.float64)
    with _dropping(built.keep, inputs.dropout_p):
        output = REFERENCE.forward(inputs)
    grads = torch.autograd.grad(output.out, leaves, built.dout.double(), allow_unused=True)
    grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads)]
    return output.out.detach(), output.softmax_lse.detach(), grads


def eager(built: Built) -> tuple[Tensor, list[Tensor]]:
    """``(out, gradients)`` of eager attention as models write it: products in the dtype, softmax in fp32."""
    inputs, leaves = _leaves(built.clean, built.clean.query.dtype)
    q, k, v = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    groups = inputs.nheads // inputs.nheads_k
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT * inputs.softmax_scale
    if inputs.softcap:
        scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    if inputs.alibi_slopes is not None:
        scores = scores + alibi_bias(inputs).to(scores.dtype)
    if additive(inputs.mask) is not None:
        scores = scores + inputs.mask.bias
    seen = visible(inputs.mask, inputs.seqlen_q, inputs.seqlen_k, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    if inputs.sinks is not None:
        sink = row_sinks(inputs.sinks).expand(inputs.batch, inputs.nheads, inputs.seqlen_q, 1)
        scores = torch.cat((scores, sink.to(scores.dtype)), dim=-1)
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0).float(), dim=-1).masked_fill(empty, 0.0).to(q.dtype)
    weights = weights[..., : inputs.seqlen_k]
    if built.keep is not None:
        weights = weights * built.keep / (1 - inputs.dropout_p)
    out = (weights @ v).transpose(1, 2)
    return out.detach(), list(torch.autograd.grad(out, leaves, built.dout, allow_unused=True))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """``torch.empty`` returns NaN (integers: a large number), so that what a kernel leaves unwritten shows."""
    real = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(NAN if tensor.is_floating_point() else 2**30)

    with mock.patch.object(torch, "empty", empty):
        yield


def _worst(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).abs().max().item() if actual.numel() else 0.0


def assert_within(name: str, actual: Tensor, expected: Tensor, budget: float) -> None:
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    assert not actual.isnan().any(), f"{name} has NaN"
    error = _worst(actual, expected)
    assert error <= budget, f"{name}: error {error:.3g}, allowed {budget:.3g}"


def check(provider: Provider, case: Case, device: str = "cpu", seed: int = 0) -> None:
    """Forward and backward of ``provider`` on a case against the float64 oracle."""
    built = build(case, device, seed)
    inputs = built.inputs
    reasons = provider.not_supported_reasons(inputs.signature())
    assert not reasons, reasons
    bias_grad = additive(inputs.mask) is not None
    with poisoned_allocations():
        output = provider.forward(inputs)
        assert output.out.is_contiguous() and output.softmax_lse.is_contiguous()
        grads = provider.backward(
            inputs,
            output.out,
            output.softmax_lse,
            built.dout,
            bias_grad=bias_grad,
            sinks_grad=inputs.sinks is not None,
        )
    out, lse, expected = oracle(built)
    eager_out, eager_grads = eager(built)
    tiny = 3e-6 if case.dtype == torch.float32 else 1e-4
    if "low_bias" in case.features:
        tiny = 1e-2  # a row with nothing but finfo.min keeps its weights to three digits (primitives.LOWEST_SCORE)

    def budget(times: float, eager_value: Tensor | None, exact: Tensor) -> float:
        size = exact.abs().max().item() if exact.numel() else 0.0
        return times * (0.0 if eager_value is None else _worst(eager_value, exact)) + tiny * (1.0 + size)

    assert output.out.dtype == case.dtype
    assert_within("out", output.out, out, budget(2, eager_out, out))
    empty = lse == float("-inf")
    assert torch.equal(output.softmax_lse == float("-inf"), empty), "lse is -inf on other rows than expected"
    if "low_bias" not in case.features:
        # A lse of finfo.min means no more than that the row has nothing to see; it need not be exact.
        lse = lse.double().masked_fill(empty, 0.0)
        assert_within("lse", output.softmax_lse.masked_fill(empty, 0.0), lse, 1e-5 + budget(0, None, lse))
    names = ["dq", "dk", "dv"] + ["dbias"] * bias_grad + ["dsinks"] * (inputs.sinks is not None)
    for name, exact, eager_grad in zip(names, expected, eager_grads):
        grad = getattr(grads, name)
        assert grad.is_contiguous(), name
        assert_within(name, grad, exact, budget(3, eager_grad, exact))
