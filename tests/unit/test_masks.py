"""The mask language against brute force: every function asked row by row and key by key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_flash_plus.masks import (
    CAUSAL,
    FULL,
    TO_LAST_KEY,
    AttentionMask,
    PackedSequences,
    additive,
    document_intervals,
    intersect_intervals,
    key_mask_intervals,
    run_bounds,
    varlen_mask,
    visible,
    window_intervals,
    with_intervals,
)

from .oracle import sees_flags

CPU = torch.device("cpu")
many = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(0, 7)
windows = st.tuples(st.integers(-1, 5), st.integers(-1, 5))
seeds = st.integers(0, 10**6)


def dense(intervals: Tensor, seqlen_k: int) -> Tensor:
    """What row intervals mean, key by key: bool ``(batch, seqlen_q, seqlen_k)``."""
    rows = [[[start <= j < end for j in range(seqlen_k)] for start, end in row] for row in intervals.tolist()]
    return torch.tensor(rows, dtype=torch.bool).reshape(*intervals.shape[:2], seqlen_k)


def expand(seen: Tensor | None, batch: int, nheads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    if seen is None:
        return torch.ones(batch, nheads, seqlen_q, seqlen_k, dtype=torch.bool)
    assert seen.dim() == 4 and seen.dtype == torch.bool and seen.shape[2:] == (seqlen_q, seqlen_k)
    return seen.expand(batch, nheads, seqlen_q, seqlen_k)


@many
@given(sizes, sizes, st.booleans(), windows)
def test_visible_of_flags(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> None:
    seen = expand(visible(AttentionMask(causal, window), seqlen_q, seqlen_k, CPU), 1, 1, seqlen_q, seqlen_k)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            assert bool(seen[0, 0, i, j]) == sees_flags(i, j, seqlen_q, seqlen_k, causal, window), (i, j)


def test_visible_draws_what_the_documentation_draws() -> None:
    def draw(seqlen_q: int, seqlen_k: int) -> list[list[int]]:
        seen = visible(CAUSAL, seqlen_q, seqlen_k, CPU)
        assert seen is not None
        drawn: list[list[int]] = seen[0, 0].int().tolist()
        return drawn

    assert draw(2, 5) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert draw(5, 2) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


@many
@given(st.integers(1, 3), st.integers(0, 5), st.integers(1, 6), st.booleans(), windows, st.integers(0, 15), seeds)
def test_visible_of_all_parts(
    batch: int, seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int], parts: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    nheads = 2

    def some(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) > 0.35

    def rows_of(n: int) -> Tensor:
        start = torch.randint(-3, seqlen_k + 2, (n, seqlen_q), generator=generator)
        return torch.stack((start, start + torch.randint(-2, 9, (n, seqlen_q), generator=generator)), -1).int()

    rows = rows_of(1 if parts & 8 else batch) if parts & 1 else None
    key_mask = some(batch, seqlen_k) if parts & 2 else None
    bias = some(batch, 1 if parts & 8 else nheads, seqlen_q, seqlen_k) if parts & 4 else None
    mask = AttentionMask(causal, window, row_intervals=rows, key_mask=key_mask, bias=bias)
    seen = expand(visible(mask, seqlen_q, seqlen_k, CPU), batch, nheads, seqlen_q, seqlen_k)
    for b in range(batch):
        for h in range(nheads):
            for i in range(seqlen_q):
                for j in range(seqlen_k):
                    want = sees_flags(i, j, seqlen_q, seqlen_k, causal, window)
                    if rows is not None:
                        start, end = rows[b % len(rows), i].tolist()
                        want = want and start <= j < end
                    if key_mask is not None:
                        want = want and bool(key_mask[b, j])
                    if bias is not None:
                        want = want and bool(bias[b, h % bias.shape[1], i, j])
                    assert bool(seen[b, h, i, j]) == want


def test_full_needs_no_mask_and_a_floating_bias_is_not_visibility() -> None:
    bias = torch.zeros(1, 1, 3, 4)
    assert visible(FULL, 3, 4, CPU) is None
    assert visible(AttentionMask(bias=bias), 3, 4, CPU) is None
    assert additive(AttentionMask(bias=bias)) is bias
    assert additive(AttentionMask(bias=bias > 0)) is None
    assert additive(FULL) is None


@many
@given(st.integers(1, 3), sizes, sizes, st.booleans(), windows, seeds)
def test_window_intervals_about_any_diagonal(
    batch: int, seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.randint(-4, seqlen_k + 5, (batch, seqlen_q), generator=generator)
    first = torch.randint(0, 4, (batch, 1), generator=generator)
    last = torch.randint(0, seqlen_k + 3, (batch, 1), generator=generator)
    intervals = window_intervals(AttentionMask(causal, window), diagonal, first, last)
    assert intervals.dtype == torch.int32 and intervals.shape == (batch, seqlen_q, 2)
    seen = dense(intervals, seqlen_k)
    for b in range(batch):
        for i in range(seqlen_q):
            for j in range(seqlen_k):
                place = int(diagonal[b, i])
                want = int(first[b]) <= j < int(last[b])
                # A square of flags whose row `place` is this one; rows and keys may be moved together.
                want = want and sees_flags(place + 100, j + 100, 1000, 1000, causal, window)
                assert bool(seen[b, i, j]) == want


def test_window_intervals_without_bounds_reach_the_last_key() -> None:
    intervals = window_intervals(FULL, torch.zeros(1, 2, dtype=torch.int64))
    assert intervals.tolist() == [[[0, TO_LAST_KEY]] * 2]
    assert intervals.dtype == torch.int32


@many
@given(st.integers(0, 6), st.integers(0, 6), st.booleans(), windows, st.booleans(), seeds)
def test_with_intervals_means_the_same(
    seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int], rows: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-2, seqlen_k + 2, (2, seqlen_q), generator=generator)
    end = start + torch.randint(-1, 6, (2, seqlen_q), generator=generator)
    row_intervals = torch.stack((start, end), -1).int() if rows else None
    key_mask = torch.rand(2, seqlen_k, generator=generator) > 0.3
    mask = AttentionMask(causal, window, row_intervals=row_intervals, key_mask=key_mask)
    turned = with_intervals(mask, seqlen_q, seqlen_k, CPU)
    assert not turned.causal and not turned.windowed and turned.key_mask is key_mask
    if causal or min(window) >= 0 or rows:
        assert turned.row_intervals is not None and turned.row_intervals.dtype == torch.int32
    shape = (2, 1, seqlen_q, seqlen_k)
    before, after = visible(mask, seqlen_q, seqlen_k, CPU), visible(turned, seqlen_q, seqlen_k, CPU)
    assert torch.equal(expand(before, *shape), expand(after, *shape))


def test_with_intervals_drops_the_second_telling_and_keeps_what_needs_no_turning() -> None:
    rows = torch.tensor([[[0, 2], [1, 3]]], dtype=torch.int32)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    packed = PackedSequences(cu, cu, 2, 2, False, (-1, -1))
    mask = AttentionMask(row_intervals=rows, packed=packed)
    assert with_intervals(mask, 2, 3, CPU) is mask
    turned = with_intervals(AttentionMask(causal=True, row_intervals=rows, packed=packed), 2, 3, CPU)
    assert turned.packed is None, "the cumulative lengths no longer say all of the mask"


@many
@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_intersect_intervals(seqlen_q: int, seqlen_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-2, seqlen_k + 3, (n, seqlen_q, 2), generator=generator).int() for n in (1, 2))
    both = intersect_intervals(a, b)
    assert torch.equal(dense(both, seqlen_k), dense(a, seqlen_k) & dense(b, seqlen_k))


lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=5)


@many
@given(lengths, st.booleans(), windows, st.integers(0, 2), st.booleans(), seeds)
def test_varlen_mask(
    pairs: list[tuple[int, int]], causal: bool, window: tuple[int, int], beyond: int, use_fewer: bool, seed: int
) -> None:
    cu_q = [sum(q for q, _ in pairs[:n]) for n in range(len(pairs) + 1)]
    cu_k = [sum(k for _, k in pairs[:n]) for n in range(len(pairs) + 1)]
    generator = torch.Generator().manual_seed(seed)
    used = [int(torch.randint(0, k + 1, (), generator=generator)) if use_fewer else k for _, k in pairs]
    total_q = cu_q[-1] + beyond
    mask = varlen_mask(
        torch.tensor(cu_q, dtype=torch.int32),
        torch.tensor(cu_k, dtype=torch.int32),
        total_q,
        causal=causal,
        window=window,
        seqused_k=torch.tensor(used, dtype=torch.int32) if use_fewer else None,
    )
    assert not mask.causal and not mask.windowed
    assert mask.row_intervals is not None and mask.row_positions is not None
    assert mask.row_intervals.dtype == mask.row_positions.dtype == torch.int32
    assert mask.row_positions.shape == (1, total_q)
    seen = dense(mask.row_intervals, cu_k[-1])
    want = torch.zeros(1, total_q, cu_k[-1], dtype=torch.bool)
    for n, (length_q, _) in enumerate(pairs):
        for i in range(length_q):
            place = int(mask.row_positions[0, cu_q[n] + i])
            assert place - cu_k[n] == i + used[n] - length_q
            for j in range(used[n]):
                want[0, cu_q[n] + i, cu_k[n] + j] = sees_flags(i, j, length_q, used[n], causal, window)
    assert torch.equal(seen, want)


@many
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())
def test_document_intervals(documents: list[list[int]], start_elsewhere: bool) -> None:
    length = max(sum(row) for row in documents)
    position_ids, want = [], []
    for row in documents:
        parts = [*row, length - sum(row)] if length > sum(row) else row
        ids: list[int] = []
        spans: list[list[int]] = []
        for size in parts:
            # A document need not begin at 0 (packed with a cache); it only must not continue the one before it.
            begin = 7 * (len(ids) + 1) if start_elsewhere else 0
            spans += [[len(ids), len(ids) + size]] * size
            ids += range(begin, begin + size)
        position_ids.append(ids)
        want.append(spans)
    intervals = document_intervals(torch.tensor(position_ids))
    assert intervals.dtype == torch.int32
    assert intervals.tolist() == want


@many
@given(st.integers(1, 3), st.integers(1, 9), seeds)
def test_run_bounds(batch: int, length: int, seed: int) -> None:
    begins = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.6
    begins[:, 0] = True
    first, end = run_bounds(begins)
    for b in range(batch):
        for i in range(length):
            assert int(first[b, i]) == max(j for j in range(i + 1) if begins[b, j])
            assert int(end[b, i]) == min([j for j in range(i + 1, length) if begins[b, j]], default=length)


@many
@given(st.integers(1, 4), st.integers(1, 8), st.floats(0, 1), seeds)
def test_key_mask_intervals(batch: int, seqlen_k: int, threshold: float, seed: int) -> None:
    key_mask = torch.rand(batch, seqlen_k, generator=torch.Generator().manual_seed(seed)) > threshold
    start, end, holes = key_mask_intervals(key_mask)
    assert start.dtype == end.dtype == holes.dtype == torch.int32
    for b in range(batch):
        real = [j for j in range(seqlen_k) if key_mask[b, j]]
        if real:
            assert (int(start[b]), int(end[b])) == (real[0], real[-1] + 1)
            assert int(holes[b]) == int(len(real) != real[-1] + 1 - real[0])
        else:
            assert (int(start[b]), int(end[b]), int(holes[b])) == (0, 0, 0)


ROWS = torch.zeros(1, 1, 2, dtype=torch.int32)
KINDS = [
    (FULL, "full"),
    (CAUSAL, "causal"),
    (AttentionMask(window=(3, -1)), "window"),
    (AttentionMask(window=(-1, 0)), "window"),
    (AttentionMask(causal=True, window=(3, 0)), "causal+window"),
    (AttentionMask(row_intervals=ROWS), "intervals"),
    (AttentionMask(row_intervals=ROWS, packed=PackedSequences(ROWS, ROWS, 1, 1, True, (-1, -1))), "packed"),
    (AttentionMask(causal=True, row_intervals=ROWS, key_mask=ROWS > 0, bias=ROWS), "causal+intervals+key_mask+bias"),
]


@pytest.mark.parametrize(("mask", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_kind(mask: AttentionMask, kind: str) -> None:
    assert mask.kind == kind


def test_builders_wait_for_no_device() -> None:
    # On the meta device there are no values to read, so anything that reads one fails.
    cu = torch.zeros(3, dtype=torch.int32, device="meta")
    mask = varlen_mask(cu, cu, 5, causal=True, window=(2, 0))
    assert mask.row_intervals is not None and mask.row_intervals.device.type == "meta"
    assert document_intervals(torch.zeros(2, 5, dtype=torch.int64, device="meta")).shape == (2, 5, 2)
    assert key_mask_intervals(torch.zeros(2, 5, dtype=torch.bool, device="meta"))[0].shape == (2,)
    assert with_intervals(AttentionMask(causal=True), 3, 4, torch.device("meta")).row_intervals is not None
