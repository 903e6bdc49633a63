"""The decoding kernels (split keys, packed query heads, pages) against float64, in Triton's interpreter.

``check`` runs the provider's forward, which takes these kernels for at most 16 rows, and its ordinary backward.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from hf_flash_plus import flash_attn_with_kvcache, use_provider
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers import ReferenceProvider
from hf_flash_plus.providers.triton import TritonProvider
from tests.kernels.cases import Case, build, check

decode_launch = pytest.importorskip("hf_flash_plus.kernels.decode_launch")
launch = pytest.importorskip("hf_flash_plus.kernels.launch")
tiles = pytest.importorskip("hf_flash_plus.kernels.tiles")
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


@pytest.mark.parametrize("page_size", (16, 64))
@pytest.mark.parametrize("window", (5, 40))
def test_pages_before_a_window_may_be_gone(page_size: int, window: int) -> None:
    """Table entries of keys that a row does not see are never followed: caches free those pages."""
    torch.manual_seed(0)
    pages, dim = 4, 16
    length = pages * page_size - 3
    q, k, v = (
        torch.randn(1, rows, heads, dim) for rows, heads in ((1, 4), (pages * page_size, 2), (pages * page_size, 2))
    )
    first = length - window
    k[:, :first], v[:, :first] = float("nan"), float("nan")
    k[:, length:], v[:, length:] = float("nan"), float("nan")
    table = torch.arange(pages, dtype=torch.int32)[None]
    table[0, : first // page_size] = 2**30
    mask = AttentionMask(row_intervals=torch.tensor([[[first, length]]], dtype=torch.int32))
    cache = [t.view(pages, page_size, 2, dim) for t in (k, v)]
    out = decode_launch.forward(AttentionInputs(q, *cache, dim**-0.5, mask), table)[0]
    seen = [t[:, first:length].double() for t in (k, v)]
    exact = ReferenceProvider().forward(AttentionInputs(q.double(), *seen, dim**-0.5, AttentionMask()))
    assert (out.double() - exact.out).abs().max() < 2e-6


@pytest.mark.parametrize("page_size", (16, 64))
@pytest.mark.parametrize("start", (0, 5, 70))
@pytest.mark.parametrize("splits", (1, 3, 16))
def test_splits_of_pages(page_size: int, start: int, splits: int) -> None:
    """Splits of several tiles, of one and of none, over pages in any order; elsewhere the table is garbage."""
    torch.manual_seed(0)
    pages, dim, length = 512 // page_size, 16, 395
    q, k, v = (torch.randn(1, rows, heads, dim) for rows, heads in ((1, 4), (512, 2), (512, 2)))
    order = torch.randperm(pages)
    cache = [
        torch.empty(pages, page_size, 2, dim).index_copy_(0, order, t.view(pages, page_size, 2, dim)) for t in (k, v)
    ]
    seen = torch.arange(pages) * page_size
    table = torch.where((seen + page_size > start) & (seen < length), order, 2**30).to(torch.int32)[None]
    mask = AttentionMask(row_intervals=torch.tensor([[[start, length]]], dtype=torch.int32))
    with mock.patch.object(decode_launch, "n_splits", lambda *_: splits):
        out = decode_launch.forward(AttentionInputs(q, *cache, dim**-0.5, mask), table)[0]
    exact = ReferenceProvider().forward(
        AttentionInputs(q.double(), *(t[:, start:length].double() for t in (k, v)), dim**-0.5, AttentionMask())
    )
    assert (out.double() - exact.out).abs().max() < 2e-6


@pytest.mark.parametrize("features", [(), ("softcap", "sinks"), ("head_bias",), ("holes",)], ids=str)
def test_one_row_equals_several(features: tuple[str, ...]) -> None:
    """A row alone takes a way of its own; without it, the loops of several rows compute the same."""
    inputs = build(Case(features, **ONE)).inputs
    general = decode_launch.make_recipe

    def several(s, way, pairs, page_size, one_row):
        return general(s, way, pairs, page_size, False)

    out = decode_launch.forward(inputs)[0]
    with mock.patch.object(decode_launch, "make_recipe", several):
        decode_launch.find_recipe.cache_clear()
        expected = decode_launch.forward(inputs)[0]
    decode_launch.find_recipe.cache_clear()
    assert torch.allclose(out, expected, atol=2e-6)


def test_measured_ways_come_first(monkeypatch) -> None:
    """What was measured on Hopper is used for its class alone; kinds that are missing take that of whole keys."""
    q, k = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16), torch.empty(1, 2048, 8, 128, dtype=torch.bfloat16)
    structure = launch.prepare(AttentionInputs(q, k, k, 0.1, AttentionMask()))[1]
    structure = structure._replace(device=tiles.DeviceInfo("sm90", 132))
    monkeypatch.setattr(decode_launch, "_SM90_WAYS", {})
    decode_launch._way.cache_clear()
    rule = decode_launch._way(structure, 16, 8, 1, decode_launch.WHOLE)
    assert (rule.prefetch, rule.least_keys, rule.per_core) == (0, 64, 1)
    table = {
        (256, 0, 1, decode_launch.WHOLE): (128, 8, 2, 512, 256, 2),
        (256, 0, 1, decode_launch.PADDED): (32, 4, 4, 0, 32, 1),
    }
    monkeypatch.setattr(decode_launch, "_SM90_WAYS", table)
    decode_launch._way.cache_clear()
    try:
        ways = [decode_launch._way(structure, 16, 8, 1, kind) for kind in range(3)]
        assert [way.tile.block_n for way in ways] == [128, 32, 128]
        assert ways[0] == decode_launch.Way(tiles.Tile(16, 128, 8, 2), 512, 256, 2)
        assert decode_launch._way(structure, 16, 8, 2, 0) == rule, "another class of keys"
        assert decode_launch._way(structure, 32, 8, 1, 0).tile.block_m == 32, "more rows"
        assert decode_launch._way(structure._replace(dtype=torch.float32), 16, 8, 1, 0).prefetch == 0
        recipe = decode_launch.make_recipe(structure, ways[0], 4, 0, True)
        assert recipe.plan.options["PREFETCH"] == 512 and recipe.cores == 264
        assert SPLITS(8, 2048, recipe.least_keys, recipe.cores) == 8
    finally:
        decode_launch._way.cache_clear()
        decode_launch._decode_plan.cache_clear()


@pytest.mark.parametrize("keys,expected", [(1, 0), (1023, 0), (1024, 1), (4095, 1), (4096, 2), (16384, 3)])
def test_classes_of_keys(keys: int, expected: int) -> None:
    assert decode_launch.keys_class(keys) == expected


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
