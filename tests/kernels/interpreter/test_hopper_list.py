"""The list of tiles that row intervals leave, in Triton's interpreter, and which tile of it each number stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels.hopper import config, forward_launch, schedule
from hf_flash_plus.masks import AttentionMask

BLOCK_M, BLOCK_N = 128, 64


def _intervals(lengths: list[list[int]], rows: int) -> torch.Tensor:
    """By batch element: rows of a causal mask, of which those see nothing that do not lie in the first
    ``lengths[b][i]`` of the i-th 128."""
    row = torch.arange(rows)
    inside = torch.stack([row % BLOCK_M < torch.tensor(tiles)[row // BLOCK_M] for tiles in lengths])
    end = torch.where(inside, row + 1, 0)
    return torch.stack((torch.zeros_like(end), end), dim=-1)


def _documents(rows: int, starts: list[int], seen_from: int) -> torch.Tensor:
    """Causal documents that begin with these rows; the first rows and keys, up to ``seen_from``, are padding."""
    row = torch.arange(rows)
    start = torch.tensor([max(at for at in starts if at <= r) for r in range(rows)]).clamp(min=seen_from)
    return torch.stack((start, row + 1), dim=-1)[None]


def _apart(rows: int) -> torch.Tensor:
    """Causal, but a few rows behind a tile's end, and keys, are padding; and so in the middle of a tile."""
    causal = _documents(rows, [0, 140, 300], 0)
    causal[:, 128:140] = causal[:, 280:300] = 0
    return causal


CASES = {
    "documents": (_documents(700, [0, 100, 256, 300], 0), 1, 2, 1),
    "documents after padding": (_documents(700, [0, 300], 170), 2, 2, 1),
    "keys that nobody sees": (_apart(700), 1, 3, 1),
    "padded": (_intervals([[128] * n + [70] * (n < 5) + [0] * (4 - n) for n in (5, 3, 1, 4)], 600), 4, 2, 2),
    "an element without tiles": (_intervals([[0, 0], [128, 3], [0, 0], [1, 0], [0, 0]], 200), 5, 3, 1),
    "holes": (_intervals([[0, 1, 0, 128, 0, 7], [1, 0, 1, 0, 1, 0]], 768), 2, 4, 2),
    "shared by all": (_intervals([[128, 0, 5, 128]], 512), 3, 4, 4),
    "no tile at all": (_intervals([[0, 0, 0]], 384), 2, 2, 1),
    "no tile at all, by element": (_intervals([[0, 0]] * 3, 256), 3, 2, 1),
    "all tiles": (_intervals([[128] * 3] * 2, 384), 2, 6, 2),
    "one tile each": (_intervals([[5], [0], [1], [64], [0], [0], [9]] * 3, 64), 21, 1, 1),
    "more tiles than are listed at a time": (_intervals([[128, 0, 3] * 3, [0] * 8 + [1], [128] * 9], 1150), 3, 2, 1),
}


class _Pointer:
    """A pointer into a list of numbers."""

    def __init__(self, numbers: list[int], at: int = 0) -> None:
        self.numbers, self.at = numbers, at

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.numbers, self.at + int(offset))

    def load(self) -> int:
        return self.numbers[self.at]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """``schedule`` as plain Python: numbers instead of tensors."""
    monkeypatch.setattr(schedule, "gl", SimpleNamespace(load=_Pointer.load, static_range=range))
    for name, value in vars(schedule).copy().items():
        if name.isupper() and hasattr(value, "value"):
            monkeypatch.setattr(schedule, name, value.value)


def _known_end(launch: forward_launch.SummaryLaunch, lists: int, b: int, row_tile: int) -> int:
    """To where a tile's keys go on, if the next tile of rows sees them, by looking at every row."""
    bounds = launch.bounds.view(lists, -1, BLOCK_M, 2)[b]
    key = torch.arange(int(bounds.max()) + 2)
    sees = ((key >= bounds[..., :1]) & (key < bounds[..., 1:])).any(1)  # of each tile of rows
    last = end = int(sees[row_tile].nonzero().max()) + 1
    if row_tile + 1 < len(sees) and sees[row_tile + 1].any():
        first, behind = (int(at) for at in sees[row_tile + 1].nonzero()[[0, -1], 0])
        if first <= last and sees[row_tile + 1, first:behind].all():
            end = max(last, behind + 1)
    return end


@pytest.mark.parametrize("blocks_in_flight", [1, 6, 10**6])
@pytest.mark.parametrize("chunks", [(128, 1024), (4, 2)], ids=["long", "short"])
@pytest.mark.parametrize("name", CASES)
def test_list(
    name: str, chunks: tuple[int, int], blocks_in_flight: int, monkeypatch: pytest.MonkeyPatch, plain: None
) -> None:
    intervals, batch, nheads, group = CASES[name]
    lists, rows, _ = intervals.shape
    n_tiles = -(-rows // BLOCK_M)
    q = torch.empty(batch, rows, nheads, 8, dtype=torch.float16)
    k = torch.empty(batch, rows, nheads // group, 8, dtype=torch.float16)
    inputs = AttentionInputs(q, k, k, 1.0, AttentionMask(row_intervals=intervals.to(torch.int32)))
    launch = forward_launch.SummaryLaunch(inputs, (10**6, 10**6), BLOCK_M, BLOCK_N, False, listed=True)
    launch.list_options.update(zip(("CHUNK", "COUNTED"), chunks))
    launch.memory.fill_(-(10**6))
    launch.run()
    summary = launch.summary.view(lists, n_tiles, config.CARD)
    n_seen = int((summary[..., schedule.LAST] > 0).sum())
    assert launch.listed is not None and int(launch.listed[0]) == n_seen

    p = SimpleNamespace(
        n_heads_total=batch * nheads, nheads=nheads, group=group, section=blocks_in_flight,
        intervals_batch=int(lists > 1), summary_ptr=_Pointer(launch.listed.tolist()),
    )  # fmt: skip
    heads = schedule.listed_heads.fn(p)
    assert heads == batch * nheads // lists
    seen = []
    found = schedule.Group(0, 0, 0, 0)
    for number in range(n_seen * heads):
        if number >= found.end:
            found = schedule.find_group.fn(number, heads, p)
        assert found == schedule.find_group.fn(number, heads, p)
        entry, batch_of_heads, head = schedule.listed_place.fn(number, found, heads, p)
        card = launch.listed[entry * config.LISTED :][: config.CARD].tolist()
        b, row_tile = card[schedule.BATCH] + batch_of_heads, card[schedule.ROW] // BLOCK_M
        described = summary[b if lists > 1 else 0, row_tile].tolist()
        assert card[schedule.N_BLOCKS] > 0 and card[schedule.ROW] % BLOCK_M == 0 and card[schedule.HEAD] == 0
        for field in (*range(5), 6, *range(10, 14)):
            assert card[field] == described[field]
        assert card[schedule.LAST] == _known_end(launch, lists, b if lists > 1 else 0, row_tile)
        seen.append((b, head, row_tile))
        if found.section >= heads and seen[1:]:  # all heads of one row tile after another, from the last to the first
            assert seen[-2][0] < b or seen[-2][2] >= seen[-1][2] or lists > 1 or batch > 1
        assert found.section % group == 0 and found.section <= heads
    n_empty = (lists * n_tiles - n_seen) * heads
    empty = [schedule.empty_tile.fn(number, lists * n_tiles, heads, p) for number in range(n_empty)]
    empty = [(b, head, row // BLOCK_M) for row, b, head in empty]
    expected = [(b, h, tile) for b in range(batch) for h in range(nheads) for tile in range(n_tiles)]
    assert sorted(seen + empty) == expected
    for b, _, tile in empty:
        assert summary[b if lists > 1 else 0, tile, schedule.LAST] == 0
    order = [b for b, _, _ in seen] if lists > 1 else []
    assert order == sorted(order)
