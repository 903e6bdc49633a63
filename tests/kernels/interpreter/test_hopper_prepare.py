"""What surrounds the Hopper backward kernel, in Triton's interpreter, with the kernel itself replaced by PyTorch.

The replacement walks over the same query tiles, in the same order, with the same numbers as the kernel: a wrong list,
bound, start value or place in the sums of dq shows here, without a GPU. What it cannot show is the pipeline.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from hf_flash_plus.kernels.hopper import backward, backward_config, backward_launch
from tests.kernels.cases import NAN, Case, assert_within, build, oracle

BASE = Case((), 2, 200, 300, 2, 1, 64, 64, torch.float16)
CASES = [
    BASE,
    replace(BASE, features=("causal",)),
    replace(BASE, features=("causal",), seqlen_q=300, seqlen_k=170),
    replace(BASE, features=("window",)),
    replace(BASE, features=("left_window",), seqlen_q=300, seqlen_k=270),
    replace(BASE, features=("packed", "softcap")),
    replace(BASE, features=("left_padding",), head_dim=96, v_head_dim=128),
    replace(BASE, features=("one_interval", "causal"), nheads=4, nheads_k=2),
    replace(BASE, features=("nothing",)),
    replace(BASE, features=("right_padding",), batch=3, seqlen_q=400, seqlen_k=390),
    replace(BASE, features=("ends",), seqlen_q=600, seqlen_k=700),
    replace(BASE, features=("ends",), seqlen_q=600, seqlen_k=700, head_dim=128, v_head_dim=128),
    *(
        replace(BASE, features=features, head_dim=dim, v_head_dim=v_dim)
        for features in (("causal",), ("packed", "softcap"))
        for dim, v_dim in ((192, 128), (256, 256))
    ),
    replace(BASE, features=("left_padding",), head_dim=160, v_head_dim=96),
    replace(BASE, features=("window",), head_dim=144, v_head_dim=200),
]


def _finite(tile: torch.Tensor) -> torch.Tensor:
    return torch.where(tile.isfinite(), tile, 0.0)


def _rows(tensor: torch.Tensor, batch: int, head: int, first: int, count: int, dim: int) -> torch.Tensor:
    """Rows of one head, with zeros beyond the ends, as a descriptor reads them."""
    rows = tensor[batch, first : first + count, head].float()
    return torch.nn.functional.pad(rows, (0, dim - rows.shape[1], 0, count - rows.shape[0]))


def _handed_over(dq: torch.Tensor) -> torch.Tensor:
    """The numbers of a tile of dq in the order in which they lie in the sums."""
    dim = dq.shape[1]
    if dim <= 128:
        shape = (1, 64, dim // 64, 64) if dim == 128 else (2, 64, 1, 64)
        halves = dq.reshape(shape).transpose(1, 2).reshape(2, 64, 64)
        return halves.reshape(2, 4, 2, 8, 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6).reshape(-1)
    if dim == 192:
        pieces = [dq[:, :128], dq[:, 128:]]
    else:  # halves of what each of two warpgroups has
        pieces = list(dq.reshape(64, 2, 2, 64).unbind(2))
    return torch.cat([x.reshape(4, 2, 8, 2, -1, 4, 2).permute(3, 4, 0, 2, 5, 1, 6).reshape(-1) for x in pieces])


def _kernel(parts: backward_launch.Parts, buffers: backward_launch.Buffers, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """``backward.attention_backward`` and ``backward_wide.attention_backward_wide`` in PyTorch."""
    batch, nheads, nheads_k, _, keys = parts.sizes
    block_m, block_n, dim, bounds = parts.config.block_m, parts.config.keys, parts.block_d, parts.bounds
    group = nheads // nheads_k // parts.splits
    n_heads = parts.splits * batch * nheads_k
    listed, softcap = parts.intervals is not None, parts.softcap
    sums = buffers.dq_sums.view(-1, block_m * dim)
    for pid in range(parts.n_tiles_k * n_heads):
        tile_n, split_batch_head = backward._schedule.fn(pid, parts.n_tiles_k, n_heads, 2)
        split, batch_head = divmod(split_batch_head, batch * nheads_k)
        b, k_head = divmod(batch_head, nheads_k)
        first_key = tile_n * block_n
        key = first_key + torch.arange(block_n)[:, None]
        first, n, n_before, n_full = backward._query_tiles.fn(
            first_key, parts.n_tiles_q, bounds.right, bounds.left, block_m, block_n, bounds.has_left, bounds.has_right
        )
        if listed:
            which = b if buffers.counts.shape[0] > 1 else 0
            count = int(buffers.counts[which, tile_n])
            n, covered = count & ((1 << 30) - 1), bool(count >> 30 & 1)
        k = _rows(parts.k, b, k_head, first_key, block_n, dim)
        v = _rows(parts.v, b, k_head, first_key, block_n, parts.v_block_d)
        if listed and n == 0:
            k, v = torch.zeros_like(k), torch.zeros_like(v)  # not read
        elif listed and not covered:
            k, v = _finite(k), _finite(v)
        dk_sum, dv_sum = torch.zeros_like(k), torch.zeros_like(v)
        first_head = k_head * (nheads // nheads_k) + split * group
        for head in range(first_head, first_head + group):
            for i in range(n):
                tile, masked, dirty = first + i, not n_before <= i < n_before + n_full, False
                if listed:
                    entry = int(buffers.entries[which, tile_n, i])
                    tile, masked, dirty = entry & ((1 << 29) - 1), bool(entry >> 29 & 1), bool(entry >> 30 & 1)
                row = tile * block_m + torch.arange(block_m)[None, :]
                q = _rows(parts.q, b, head, tile * block_m, block_m, dim)
                dout = _rows(parts.dout, b, head, tile * block_m, block_m, parts.v_block_d)
                visible = torch.ones(block_n, block_m, dtype=torch.bool)
                if listed:
                    start, end = buffers.row_bounds[which][:, row[0]]
                    visible = (key >= start) & (key < end)
                    hidden = int(buffers.summary[which, 4, tile])
                    assert dirty == (hidden > 0)
                    if dirty:
                        block = torch.arange(block_m) // 8
                        hides = (end <= start) & (block >= hidden & 255) & (block < hidden >> 8)
                        q, dout = (torch.where(hides[:, None], 0.0, x) for x in (q, dout))
                elif bounds.has_left or bounds.has_right:
                    visible = (key <= row + bounds.right) & (key >= row + bounds.left)
                at = (b * nheads + head) * parts.n_tiles_q + tile
                start = buffers.start.view(-1, block_m)[at]
                raw = k @ q.mT
                derivative = 1.0
                if softcap:
                    t = torch.tanh(raw * parts.scale / softcap)
                    p, derivative = torch.exp2(t * softcap * backward_launch.LOG2E + start), 1 - t * t
                elif backward_config.base2(parts.config, False):
                    p = torch.exp2(raw * parts.scale * backward_launch.LOG2E + start)
                else:
                    p = torch.exp2((raw + start) * parts.scale * backward_launch.LOG2E)
                p = torch.where(key < keys, p, 0.0)
                assert masked or bool((visible | (key >= keys) | (p == 0)).all())
                if masked:
                    p = torch.where(visible, p, 0.0)
                ds = p * derivative * (v @ dout.mT + buffers.minus_delta.view(-1, block_m)[at])
                dk_sum += ds @ q
                dv_sum += p @ dout
                sums[at] += _handed_over(ds.mT @ k)
        inside = min(block_n, keys - first_key)
        dk[split, b, first_key : first_key + inside, k_head] = (dk_sum * parts.scale)[:inside, : dk.shape[4]].to(
            dk.dtype
        )
        dv[split, b, first_key : first_key + inside, k_head] = dv_sum[:inside, : dv.shape[4]].to(dv.dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("feature", ["right_padding", "ends", "packed", "intervals", "one_interval", "nothing"])
def test_what_is_not_seen(feature: str, dim: int) -> None:
    """Of row tiles that see nothing no sum is zeroed or read; lists are exact, and where they say that all keys of a
    tile are seen, they are; for the loop in halves they begin with what masks, at least one."""
    case = replace(BASE, features=(feature,), batch=3, seqlen_q=600, seqlen_k=700, head_dim=dim, v_head_dim=dim)
    built = build(case)
    inputs, intervals = built.inputs, built.inputs.mask.row_intervals
    assert intervals is not None
    key = torch.arange(case.seqlen_k)
    seen = (key >= intervals[..., :1]) & (key < intervals[..., 1:])
    seen = seen.expand(case.batch, -1, -1) if intervals.shape[0] > 1 else seen
    out, dout = torch.ones(2, case.batch, case.seqlen_q, case.nheads, dim).to(case.dtype)
    lse = torch.zeros(case.batch, case.nheads, case.seqlen_q)
    parts = backward_launch.take_apart(inputs, out, lse, dout, "unordered")
    assert parts is not None
    buffers = backward_launch.allocate(parts)
    assert buffers.dq_sums is not None and buffers.summary is not None
    assert buffers.entries is not None and buffers.counts is not None
    delta = torch.full_like(lse, NAN)
    buffers.dq_sums.fill_(NAN)
    backward_launch.rows_launch(parts, buffers, delta).run()
    backward_launch.lists_launch(parts, buffers).run()

    block_m, block_n, n_q = parts.config.block_m, parts.config.keys, parts.n_tiles_q
    rows = torch.nn.functional.pad(seen, (0, 0, 0, n_q * block_m - case.seqlen_q)).unflatten(1, (n_q, block_m))
    real = torch.arange(n_q * block_m).view(n_q, block_m) < case.seqlen_q
    sees = rows.any(-1)  # list, tile, row
    busy = sees.any(-1).expand(case.batch, -1)[:, None].expand(-1, case.nheads, -1)
    sums = buffers.dq_sums.view(case.batch, case.nheads, n_q, -1)
    assert sums[~busy].isnan().all() and (sums[busy] == 0).all()
    expected = torch.where(seen.any(-1), float(dim), 0.0)[:, None].expand_as(delta)
    torch.testing.assert_close(delta, expected, rtol=0, atol=0)
    start = buffers.start.view(case.batch, case.nheads, n_q, block_m)
    assert torch.equal(start == float("-inf"), ~sees.expand(case.batch, -1, -1)[:, None].expand_as(start))
    for which in range(rows.shape[0]):
        for tile_n in range(parts.n_tiles_k):
            tile = rows[which, :, :, tile_n * block_n : (tile_n + 1) * block_n]
            count = int(buffers.counts[which, tile_n])
            entries = buffers.entries[which, tile_n, : count & ((1 << 30) - 1)].tolist()
            listed = [entry & ((1 << 29) - 1) for entry in entries]
            # Between the first and the last key that a row tile sees there may be some that it does not see.
            assert set(tile.flatten(1).any(1).nonzero().flatten().tolist()) <= set(listed)
            first = 0  # how many come first because they mask
            if parts.config.halves:
                first = int(buffers.entries[which, tile_n, -1])
                assert first >= min(len(listed), 1)
                assert all(bool(entry >> 29 & 1) == (i < first) for i, entry in enumerate(entries))
            assert listed == sorted(listed[:first]) + sorted(listed[first:])
            if count >> 30:
                assert tile.flatten(0, 1).any(0).all()
            for i, (entry, at) in enumerate(zip(entries, listed)):
                masks = not tile[at][sees[which, at]].all()
                assert bool(entry >> 29 & 1) == masks or (parts.config.halves and first == 1 and i == 0)
                hides = (real[at] & ~sees[which, at]).view(-1, 8).any(1).nonzero().flatten().tolist()
                assert bool(entry >> 30 & 1) == bool(hides)
                hidden = int(buffers.summary[which, 4, at])
                assert hidden == (hides[0] + 256 * (hides[-1] + 1) if hides else 0)

    sums[busy] = 1.0
    dq = torch.full((case.batch, case.seqlen_q, case.nheads, dim), NAN, dtype=case.dtype)
    backward_launch.dq_rows_launch(parts, buffers, dq).run()
    weighs = seen.any(-1).expand(case.batch, -1)
    assert (dq[~weighs] == 0).all() and (dq[weighs] == torch.tensor(parts.scale, dtype=case.dtype)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_surroundings(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(case)
    out, lse, expected = oracle(built)

    class Main:
        def __init__(self, *arguments: object) -> None:
            self.arguments = arguments[:4]
            self.with_dk = len(arguments) < 6 or arguments[5]  # of two kernels, ``_kernel`` does what both do

        def run(self) -> None:
            if self.with_dk:
                _kernel(*self.arguments)

    monkeypatch.setattr(backward_launch, "main_launch", Main)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: (lambda t: t.fill_(NAN if t.is_floating_point() else 2**30))(empty(*a, **k))
    )
    grads = backward_launch.backward(built.inputs, out.to(case.dtype), lse.float(), built.dout, mode="unordered")
    for name, grad, exact in zip(("dq", "dk", "dv"), grads, expected):
        assert grad.is_contiguous() and grad.dtype == case.dtype
        assert_within(name, grad, exact, 4e-3 * (1 + exact.abs().max().item()))
    delta = (out * built.dout.double()).sum(-1).transpose(1, 2)
    assert_within("delta", grads.delta, delta, 4e-3 * (1 + delta.abs().max().item()))
