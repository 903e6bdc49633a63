"""Numbers and sizes that hurt, on a GPU: beyond 32 bits, beyond a grid's limits, beyond a dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, use_provider
from hf_flash_plus.checks import oracle
from hf_flash_plus.checks.compare import judge
from hf_flash_plus.providers import PROVIDERS
from tests.gpu.memory import needs_memory

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["triton", "flaggems", "torch_sdpa", "flash_attn"])
def provider(request: pytest.FixtureRequest) -> str:
    reason = PROVIDERS[request.param].unavailable_reason()
    if reason:
        pytest.skip(reason)
    return str(request.param)


def qkv(batch: int, seqlen: int, heads: int, dim: int, dtype: torch.dtype = BF16, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(batch, seqlen, heads, dim, device="cuda").to(dtype) for _ in range(3)]


def attend(provider: str, *tensors: Tensor, mask: AttentionMask | None = None, **options: object) -> Tensor:
    try:
        with use_provider(provider):
            return hfp.attention(*tensors, mask or AttentionMask(causal=True), **options)
    except NotImplementedError as error:
        pytest.skip(f"declines: {str(error).splitlines()[-2].strip() if chr(10) in str(error) else error}")


@pytest.mark.parametrize("seqlen", [200, 333])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_logits_of_ten_thousand(dtype: torch.dtype, seqlen: int, provider: str) -> None:
    leaves = [t.requires_grad_() for t in qkv(2, seqlen, 4, 64, dtype)]
    out = attend(provider, *leaves, mask=AttentionMask(), softmax_scale=400.0)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    judge(out, oracle.Dense(*leaves, scale=400.0), dout, dict(zip("qkv", grads)))


def test_scores_that_overflow_fp16(provider: str) -> None:
    q, k, v = qkv(1, 130, 2, 64, FP16)
    q, k = q.sign() * 43.0, q.sign() * 43.0
    assert attend(provider, q, k, v).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_keys_that_no_row_sees_may_hold_anything(bad: float) -> None:
    """Our kernels never read them: forward and backward."""
    q, k, v = qkv(2, 300, 4, 64)
    hidden = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    hidden[:, 200:] = True
    hidden[1, 17:40] = True
    mask = AttentionMask(key_mask=~hidden)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend("triton", *leaves, mask=mask)
        return [out.detach(), *torch.autograd.grad(out.float().sum(), leaves)]

    if PROVIDERS["triton"].unavailable_reason():
        pytest.skip("needs our kernels")
    expected = run()
    k[hidden], v[hidden] = bad, bad
    for got, want in zip(run(), expected):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("dim", [64, 128])
def test_deterministic_gradients(dim: int, mask: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times the same bits from everyone who says that it can; long enough for many parts to be added up."""
    leaves = [t.requires_grad_() for t in qkv(2, 1100, 8, dim)]
    rows = torch.arange(1100, dtype=torch.int32, device="cuda")
    documents = torch.stack((rows // 300 * 300, rows + 1), -1)[None]
    chosen = {
        "full": AttentionMask(),
        "causal": AttentionMask(causal=True),
        "window": AttentionMask(causal=True, window=(200, 0)),
        "documents": AttentionMask(row_intervals=documents),
    }[mask]
    dout = torch.randn_like(leaves[0])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(provider == "torch_sdpa")  # it relies on that, and says so
    try:
        first: list[Tensor] = []
        for _ in range(20):
            out = attend(provider, *leaves, mask=chosen, deterministic=True)
            found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kernels", ["auto", "portable"])
@pytest.mark.parametrize("seqlen", [1, 300], ids=["decoding", "forward"])
def test_a_bad_query_spoils_its_own_row_only(
    seqlen: int, kernels: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other row is what it was, to the bit; the row itself is NaN, not an answer that looks like one."""
    if PROVIDERS["triton"].unavailable_reason():
        pytest.skip("needs our kernels")
    monkeypatch.setenv("HF_FLASH_PLUS_KERNELS", kernels)
    q, k, v = qkv(2, 300, 4, 64)
    q = q[:, :seqlen].clone()
    expected = attend("triton", q, k, v)
    row = (1, seqlen // 2, 2)
    q[(*row, 5)] = bad
    got = attend("triton", q, k, v)
    assert got[row].isnan().all()
    spoiled = torch.zeros(2, seqlen, 4, dtype=torch.bool, device="cuda")
    spoiled[row] = True
    assert torch.equal(got[~spoiled], expected[~spoiled])


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_slots_of_a_cache_that_nobody_wrote_may_hold_anything(bad: float, provider: str) -> None:
    q, k, v = qkv(2, 300, 4, 64)
    lengths = torch.tensor([211, 3], dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        with use_provider(provider):
            out: Tensor = hfp.flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=lengths, causal=True)
            return out

    try:
        expected = run()
    except NotImplementedError:
        pytest.skip("declines")
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = bad, bad
    torch.testing.assert_close(run(), expected)


@pytest.mark.parametrize("kind", ["key mask", "boolean", "additive", "intervals"])
def test_no_row_sees_anything(kind: str, provider: str) -> None:
    leaves = [t.requires_grad_() for t in qkv(2, 150, 4, 64)]
    nothing = torch.zeros(2, 150, dtype=torch.bool, device="cuda")
    mask = {
        "key mask": AttentionMask(key_mask=nothing),
        "boolean": AttentionMask(bias=nothing[:, None, None].expand(2, 1, 150, 150)),
        "additive": AttentionMask(bias=torch.full((1, 1, 150, 150), -math.inf, dtype=BF16, device="cuda")),
        "intervals": AttentionMask(row_intervals=torch.zeros(1, 150, 2, dtype=torch.int32, device="cuda")),
    }[kind]
    out = attend(provider, *leaves, mask=mask)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(0, 9), (9, 0), (0, 0), (1, 1), (1, 300), (300, 1)])
def test_lengths_0_and_1(seqlen_q: int, seqlen_k: int, provider: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, seqlen_q, 4, 64, device="cuda").to(BF16).requires_grad_()
    k, v = (torch.randn(2, seqlen_k, 2, 64, device="cuda").to(BF16).requires_grad_() for _ in range(2))
    out = attend(provider, q, k, v)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, (q, k, v))]
    place = torch.arange(seqlen_q, device="cuda")[:, None] + (seqlen_k - seqlen_q)
    seen = torch.arange(seqlen_k, device="cuda")[None] <= place
    judge(out, oracle.Dense(q, k, v, seen=seen[None, None]), dout, dict(zip("qkv", grads)))


def test_head_dim_512(provider: str) -> None:
    leaves = [t.requires_grad_() for t in qkv(1, 200, 2, 512)]
    out = attend(provider, *leaves)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    seen = torch.ones(200, 200, device="cuda").tril().bool()[None, None]
    judge(out, oracle.Dense(*leaves, seen=seen), dout, dict(zip("qkv", grads)))


def test_131072_tokens(provider: str) -> None:
    """The last rows, which see everything, against float64; and that the backward ends with finite numbers."""
    seqlen = 131072
    leaves = [t.requires_grad_() for t in qkv(1, seqlen, 2, 64)]
    out = attend(provider, *leaves)
    last = slice(seqlen - 64, seqlen)
    place = torch.arange(seqlen - 64, seqlen, device="cuda")[:, None]
    seen = (torch.arange(seqlen, device="cuda")[None] <= place)[None, None]
    q, k, v = (t.detach() for t in leaves)
    judge(out[:, last].detach(), oracle.Dense(q[:, last], k, v, seen=seen), None, None)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(g.isfinite().all() for g in grads)
    # dv of the last key is its weight in the last row only.
    weights = torch.softmax(((q[0, -1].double()[:, None] * k[0].double().transpose(0, 1)).sum(-1)) / 8, -1)[:, -1]
    torch.testing.assert_close(grads[2][0, -1].double(), weights[:, None].expand(-1, 64), rtol=2e-2, atol=0)


def test_1024_tiny_sequences(provider: str) -> None:
    lengths = torch.randint(0, 4, (1024,), generator=torch.Generator().manual_seed(0))
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
    total = int(cu[-1])
    q, k, v = (t[0].requires_grad_() for t in qkv(1, total, 4, 64))
    try:
        with use_provider(provider):
            out = hfp.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, causal=True)
    except NotImplementedError:
        pytest.skip("declines")
    dout = torch.randn_like(out)
    grads = {name: g[None] for name, g in zip("qkv", torch.autograd.grad(out, (q, k, v), dout))}
    owner = torch.repeat_interleave(torch.arange(1024), lengths).cuda()
    row = torch.arange(total, device="cuda")
    seen = (owner[:, None] == owner[None]) & (row[None] <= row[:, None])
    judge(out[None], oracle.Dense(q[None], k[None], v[None], seen=seen[None, None]), dout[None], grads)


@pytest.mark.parametrize("batch, heads", [(1024, 80), (70000, 1)])
def test_more_batches_times_heads_than_65535(batch: int, heads: int, provider: str) -> None:
    leaves = [t.requires_grad_() for t in qkv(batch, 3, heads, 16)]
    out = attend(provider, *leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    end = slice(batch - 2, batch)
    part = [t[end].detach().requires_grad_() for t in leaves]
    seen = torch.ones(3, 3, device="cuda").tril().bool()[None, None]
    judge(
        out[end], oracle.Dense(*part, seen=seen), torch.ones_like(out[end]), dict(zip("qkv", [g[end] for g in grads]))
    )


@pytest.mark.exclusive
def test_gradients_beyond_2_to_the_31_elements() -> None:
    """q, k, v and their gradients of 2.3e9 elements each: the last batch element equals itself alone."""
    if PROVIDERS["triton"].unavailable_reason():
        pytest.skip("needs our kernels")
    needs_memory(32)
    shape = (23, 8192, 48, 256)
    assert math.prod(shape) > 2**31
    q = torch.zeros(shape, device="cuda", dtype=BF16)
    q[-1].normal_()
    q.requires_grad_()
    mask = AttentionMask(causal=True, window=(64, 0))

    def gradient(leaf: Tensor, dout: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = hfp.attention(leaf, leaf, leaf, mask, deterministic=True)
        dout = out.detach() if dout is None else dout
        return dout, torch.autograd.grad(out, leaf, dout)[0]

    with use_provider("triton"):
        out, grad = gradient(q)
        _, expected = gradient(q[-1:].detach().requires_grad_(), out[-1:])
    torch.testing.assert_close(grad[-1:], expected, atol=0, rtol=0)


def test_torch_whatever_the_layout_of_the_gradient() -> None:
    """torch's plan of cuDNN's backward is for the layout that the first call's gradient has."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 320, 4, 128, device="cuda", dtype=BF16).requires_grad_() for _ in range(3)]
    dout = torch.randn(2, 4, 320, 128, device="cuda", dtype=BF16).transpose(1, 2)

    def gradients(dout: Tensor) -> tuple[Tensor, ...]:
        with use_provider("torch_sdpa"):
            return torch.autograd.grad(hfp.attention(*leaves, AttentionMask()), leaves, dout)

    for got, want in zip(gradients(dout), gradients(dout.contiguous())):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


@pytest.mark.exclusive
def test_torch_beyond_what_its_kernels_count() -> None:
    """A query of more elements than torch's flash backward can count: in parts, each equal to itself alone."""
    needs_memory(40)
    torch.manual_seed(0)
    q = torch.randn(400, 1, 4, 128, device="cuda", dtype=BF16).expand(-1, 10496, -1, -1).contiguous().requires_grad_()
    k, v = (torch.randn(400, 128, 4, 128, device="cuda", dtype=BF16).requires_grad_() for _ in range(2))
    assert q.numel() > 2**31

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        with use_provider("torch_sdpa"):
            out = hfp.attention(*leaves, AttentionMask())
        return torch.autograd.grad(out, leaves, out.detach())

    whole = gradients(q, k, v)
    assert all(g.isfinite().all() for g in whole)
    for part in (slice(0, 1), slice(399, 400)):
        alone = gradients(*(t[part].detach().requires_grad_() for t in (q, k, v)))
        for got, want in zip(whole, alone):
            torch.testing.assert_close(got[part], want, atol=2e-2, rtol=2e-2)
