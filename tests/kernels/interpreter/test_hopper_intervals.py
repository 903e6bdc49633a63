"""The summary of row intervals for the Hopper forward kernel, in Triton's interpreter, against every row and key."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.interval_cache import share
from hf_flash_plus.kernels.hopper import config, forward_launch, schedule
from hf_flash_plus.masks import AttentionMask

BLOCK_N = 32
NO_WINDOW = (10**6, 10**6)


def _documents(seqlen: int, starts: list[int]) -> torch.Tensor:
    rows = torch.arange(seqlen)
    first = torch.tensor([max(s for s in starts if s <= row) for row in range(seqlen)])
    return torch.stack((first, rows + 1), dim=-1)[None]


def _padded(lengths: list[int], seqlen: int) -> torch.Tensor:
    rows = torch.arange(seqlen).expand(len(lengths), -1)
    end = torch.where(rows < torch.tensor(lengths)[:, None], rows + 1, 0)
    return torch.stack((torch.zeros_like(end), end), dim=-1)


def _scattered(batch: int, rows: int, keys: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bounds = torch.randint(-20, keys + 20, (batch, rows, 2), generator=generator).sort(dim=-1).values
    return torch.where(torch.rand(batch, rows, 1, generator=generator) < 0.2, 0, bounds)


CASES = {
    "documents": (_documents(300, [0, 64, 100, 230]), 300, NO_WINDOW),
    "padded": (_padded([300, 130, 0, 64], 300), 300, NO_WINDOW),
    "padded with a window": (_padded([300, 170], 300), 300, (50, 0)),
    "scattered": (_scattered(2, 260, 200), 200, NO_WINDOW),
    "nothing": (torch.zeros(1, 150, 2), 100, NO_WINDOW),
}


@pytest.mark.parametrize("empty_rows_hide", [False, True])
@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_summary(name: str, consumers: int, empty_rows_hide: bool) -> None:
    intervals, seqlen_k, window = CASES[name]
    batch, seqlen_q, _ = intervals.shape
    block_m = 64 * consumers
    q, k = (torch.empty(batch, n, 1, 8, dtype=torch.float16) for n in (seqlen_q, seqlen_k))
    inputs = AttentionInputs(q, k, k, 1.0, AttentionMask(row_intervals=intervals.to(torch.int32)))
    launch = forward_launch.SummaryLaunch(inputs, window, block_m, BLOCK_N, empty_rows_hide)
    assert launch.run() is not None and launch.listed is None
    n_tiles = -(-seqlen_q // block_m)
    bounds = launch.bounds.view(batch, n_tiles * block_m, 2)
    summary = launch.summary.view(batch, n_tiles, config.CARD)

    row, key = torch.arange(n_tiles * block_m)[:, None], torch.arange(seqlen_k + BLOCK_N)
    start, end = (torch.nn.functional.pad(t, (0, n_tiles * block_m - seqlen_q)) for t in intervals.unbind(-1))
    diagonal = row + seqlen_k - seqlen_q
    sees = (key >= start[..., None]) & (key < end[..., None]) & (key < seqlen_k) & (row < seqlen_q)
    sees &= (key >= diagonal - window[0]) & (key <= diagonal + window[1])
    assert torch.equal((key >= bounds[..., :1]) & (key < bounds[..., 1:]), sees)

    fields = {name: int(getattr(schedule, name).value) for name in ("N_BLOCKS", "N_END", "N_BEGIN", "FIRST", "LAST")}
    for b in range(batch):
        for i in range(n_tiles):
            numbers = summary[b, i].tolist()
            n_blocks, n_end, n_begin, first, last = (numbers[at] for at in fields.values())
            mine = sees[b, i * block_m : (i + 1) * block_m]
            some = mine.any(0)
            counts = torch.arange(block_m) < seqlen_q - i * block_m
            if not empty_rows_hide:
                assert numbers[schedule.SOME_EMPTY.value] == bool((counts & ~mine.any(1)).any())
                counts &= mine.any(1)
            assert last == (int(some.nonzero().max()) + 1 if some.any() else 0)
            tile = SimpleNamespace(n_blocks=n_blocks, n_end=n_end, n_begin=n_begin, first_key=first)
            shape = SimpleNamespace(mode=config.INTERVALS, block_n=BLOCK_N)
            keys = [int(schedule.block_key.fn(step, tile, shape)) for step in range(n_blocks)]
            assert sorted(keys) == [first + step * BLOCK_N for step in range(n_blocks)] and first >= 0
            outside = torch.ones_like(some)
            for step, at in enumerate(keys):
                block = slice(at, at + BLOCK_N)
                outside[block] = False
                if step >= n_end + n_begin:  # is not masked
                    assert mine[counts, block].all()
                for w in range(consumers):
                    whole_first, whole_last = numbers[schedule.WHOLE.value + 2 * w : schedule.WHOLE.value + 2 * w + 2]
                    rows = mine[w * 64 : (w + 1) * 64, block][counts[w * 64 : (w + 1) * 64]]
                    whole = whole_first <= at and at + BLOCK_N <= whole_last
                    assert not whole or rows.all()
                    # All that is whole is known, but in a warpgroup none of whose rows count.
                    assert whole or not len(rows) or not rows.all()
            assert not (some & outside).any()


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("empty_rows_hide", [False, True])
def test_summaries_are_kept_with_the_mask(empty_rows_hide: bool, listed: bool) -> None:
    """Of intervals that are known a summary is made once for each kernel that wants it, until they change."""

    def summarize(listed: bool = listed) -> forward_launch.SummaryLaunch:
        launch = forward_launch.SummaryLaunch(inputs, NO_WINDOW, 128, BLOCK_N, empty_rows_hide, listed)
        assert (launch.run() is None) == launch.known
        return launch

    intervals = _padded([300, 130, 0, 64], 300).to(torch.int32)
    q = torch.empty(4, 300, 1, 8, dtype=torch.float16)
    inputs = AttentionInputs(q, q, q, 1.0, AttentionMask(row_intervals=intervals))
    assert not summarize().known and not summarize().known
    share(intervals)
    first, second, other = summarize(), summarize(), summarize(not listed)
    assert not first.known and second.known and not other.known
    assert second.memory is first.memory and (second.listed is not None) == listed
    fields = [each.summary.view(-1, config.CARD)[:, 1:7] for each in (first, other)]
    assert torch.equal(first.bounds, other.bounds) and torch.equal(*fields)
    intervals[:, 0] = 0
    assert not summarize().known


def test_a_summary_serves_only_those_that_would_make_the_same() -> None:
    """All that it depends on beside the intervals is in the key by which it is kept."""
    q, longer = torch.empty(1, 300, 1, 8, dtype=torch.float16), torch.empty(1, 400, 1, 8, dtype=torch.float16)
    mask = AttentionMask(row_intervals=share(_documents(300, [0, 100]).to(torch.int32)))
    inputs = AttentionInputs(q, q, q, 1.0, mask)
    same = {
        "inputs": inputs, "window": NO_WINDOW, "block_m": 128, "block_n": BLOCK_N, "empty_rows_hide": False,
        "listed": False,
    }  # fmt: skip
    first = forward_launch.SummaryLaunch(**same)
    first.run()
    assert forward_launch.SummaryLaunch(**same).memory is first.memory
    others = {
        "inputs": AttentionInputs(q, longer, longer, 1.0, mask), "window": (50, 0), "block_m": 192, "block_n": 64,
        "empty_rows_hide": True, "listed": True,
    }  # fmt: skip
    for name, other in others.items():
        assert not forward_launch.SummaryLaunch(**{**same, name: other}).known, name
