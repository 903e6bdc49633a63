"""The decoding kernels (split keys, packed query heads, pages) against float64, in Triton's interpreter.

``check`` runs the provider's forward, which takes these kernels for at most 16 rows, and its ordinary backward.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_flash_plus import flash_attn_with_kvcache, use_provider
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers import ReferenceProvider
from hf_flash_plus.providers.triton import TritonProvider
from tests.kernels.cases import Case, check

decode_launch = pytest.importorskip("hf_flash_plus.kernels.decode_launch")
SPLITS = decode_launch.n_splits
PROVIDER = TritonProvider()
ONE = dict(seqlen_q=1, seqlen_k=129, nheads=4, nheads_k=2)

CASES = [
    Case(**ONE),
    Case(**ONE, dtype=torch.float16),
    Case(("causal",), seqlen_q=5, seqlen_k=97, nheads=6, nheads_k=2),
    Case(("causal", "window"), seqlen_q=3, seqlen_k=97),
    Case(("causal",), seqlen_q=16, seqlen_k=70, nheads=8, nheads_k=1),
    Case(("causal",), seqlen_q=7, seqlen_k=3, nheads=2, nheads_k=2),
    Case(("intervals",), seqlen_q=4, seqlen_k=97),
    Case(("left_padding",), seqlen_q=4, seqlen_k=97),
    Case(("nothing",), **ONE),
    Case(("holes",), **ONE),
    Case(("key_mask",), **ONE),
    Case(("bool_bias",), **ONE),
    Case(("bias",), **ONE),
    Case(("head_bias",), **ONE),
    Case(("alibi", "causal"), seqlen_q=3, seqlen_k=97),
    Case(("softcap",), **ONE),
    Case(("sinks",), **ONE),
    Case(("intervals", "sinks"), seqlen_q=3, seqlen_k=97),
    Case(("row_sinks",), **ONE),
    Case(head_dim=24, v_head_dim=16, **ONE),
    Case(head_dim=40, v_head_dim=40, **ONE),
    Case(seqlen_q=1, seqlen_k=1),
    Case(seqlen_q=1, seqlen_k=0),
    Case(("left_padding",), seqlen_q=1, seqlen_k=700),  # more splits than the combination takes at a time
]


@pytest.fixture(autouse=True)
def many_splits(monkeypatch) -> None:
    """Splits even for small calls: one for each tile of keys."""
    monkeypatch.setattr(decode_launch, "n_splits", lambda programs, keys, block_n, cores: max(1, -(-keys // block_n)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding(case: Case, monkeypatch) -> None:
    calls = []
    original = decode_launch.forward
    monkeypatch.setattr(decode_launch, "forward", lambda *a: calls.append(1) or original(*a))
    check(PROVIDER, case)
    assert calls, "served by the decoding kernels"


def test_split_counts() -> None:
    assert SPLITS(10_000, 4096, 64, 132) == 1, "the device is full already"
    assert SPLITS(100, 4096, 64, 132) == 1, "no second round for a quarter of the device"
    assert SPLITS(32, 4096, 64, 132) == 4, "one program for each multiprocessor"
    assert SPLITS(8, 512, 64, 132) == 8, "a tile of keys at least"
    assert SPLITS(8, 10**6, 64, 132) == 16
    assert SPLITS(1, 10**6, 64, 264) == 128
    assert SPLITS(1, 0, 64, 132) == 1


@pytest.mark.parametrize("page_size", (16, 48, 64))  # the interpreter's tiles are 32 keys: in one page of 64
@pytest.mark.parametrize("seqlen_q", (1, 4))
def test_pages(page_size: int, seqlen_q: int, monkeypatch) -> None:
    """``flash_attn_with_kvcache`` reads pages in place; slots behind the lengths hold NaN."""
    gathered = []
    monkeypatch.setattr("hf_flash_plus.ops.gather_pages", lambda *a: gathered.append(1))
    torch.manual_seed(0)
    batch, nheads, nheads_k, dim, pages = 2, 4, 2, 16, 6
    q = torch.randn(batch, seqlen_q, nheads, dim)
    lengths = torch.tensor([page_size * 2 + 5, seqlen_q], dtype=torch.int32)
    table = torch.randperm(batch * pages).view(batch, pages).int()
    k_cache, v_cache = (torch.full((batch * pages, page_size, nheads_k, dim), float("nan")) for _ in range(2))
    k, v = (torch.randn(batch, pages * page_size, nheads_k, dim) for _ in range(2))
    for b in range(batch):
        for j in range(int(lengths[b])):
            k_cache[table[b, j // page_size], j % page_size] = k[b, j]
            v_cache[table[b, j // page_size], j % page_size] = v[b, j]
    with use_provider("triton"):
        out, lse = flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True, return_softmax_lse=True
        )
    assert not gathered
    for b in range(batch):
        n = int(lengths[b])
        inputs = AttentionInputs(
            q[b : b + 1].double(), k[b : b + 1, :n].double(), v[b : b + 1, :n].double(), dim**-0.5,
            AttentionMask(causal=True), needs_lse=True,
        )  # fmt: skip
        exact = ReferenceProvider().forward(inputs)
        assert (out[b].double() - exact.out[0]).abs().max() < 2e-6
        assert (lse[b] - exact.softmax_lse[0]).abs().max() < 1e-5


def test_long_queries_over_pages_are_gathered() -> None:
    """More than 16 rows: the ordinary kernels, over a copy of the pages."""
    torch.manual_seed(0)
    q, cache = torch.randn(1, 20, 2, 16), torch.randn(4, 16, 2, 16)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    lengths = torch.tensor([40], dtype=torch.int32)
    with use_provider("triton"):
        out = flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, block_table=table, causal=True)
    keys = cache[table[0].long()].flatten(0, 1)[None, :40]
    inputs = AttentionInputs(q, keys, keys, 16**-0.5, AttentionMask(causal=True))
    exact = ReferenceProvider().forward(replace(inputs, query=q.double(), key=keys.double(), value=keys.double()))
    assert (out.double() - exact.out).abs().max() < 2e-6
