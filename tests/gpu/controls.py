"""Kernels that say what compute-sanitizer is worth: two with a planted fault, two without that look like a race.

``handshake`` hands data through shared memory from one warp to others with mbarriers, as the Hopper kernels do: an
arrival releases what was written before it, and a wait that succeeds acquires it. It is right. Where racecheck reports
it, it does not see that order, and what it reports of the Hopper kernels proves nothing.

``relay`` is the same by way of a third warp, which waits for the one and arrives for the others: what was written
before the first arrival is there after the last wait, too. So the Hopper forward's cards reach those that compute: with
the Q that another warp loads when it has the card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

WIDTH: gl.constexpr = gl.constexpr(128)


@gluon.jit
def _give(cell, ready, taken, in_ptr, out_ptr, rounds, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    columns = gl.arange(0, WIDTH, layout)
    for i in range(rounds):
        if WAIT:
            mbarrier.wait(taken.index(0), (i & 1) ^ 1)
        cell.store(gl.load(in_ptr + i * WIDTH + columns))
        mbarrier.arrive(ready.index(0), count=1)


@gluon.jit
def _take(cell, ready, taken, in_ptr, out_ptr, rounds, WAIT: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    columns = gl.arange(0, WIDTH, layout)
    for i in range(rounds):
        if WAIT:
            mbarrier.wait(ready.index(0), i & 1)
        gl.store(out_ptr + i * WIDTH + columns, cell.load(layout))
        mbarrier.arrive(taken.index(0), count=1)


@gluon.jit
def handshake(in_ptr, out_ptr, rounds, WAIT: gl.constexpr):
    """``out = in``, row by row through one cell of shared memory; without ``WAIT`` nobody waits for anybody."""
    cell = gl.allocate_shared_memory(gl.int32, [WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_take, (cell, ready, taken, in_ptr, out_ptr, rounds, WAIT)),
            (_give, (cell, ready, taken, in_ptr, out_ptr, rounds, WAIT)),
        ],
        [1],
        [48],
    )


@gluon.jit
def _pass_on(cell, ready, passed, taken, in_ptr, out_ptr, rounds):
    for i in range(rounds):
        mbarrier.wait(ready.index(0), i & 1)
        mbarrier.arrive(passed.index(0), count=1)


@gluon.jit
def _give_on(cell, ready, passed, taken, in_ptr, out_ptr, rounds):
    _give(cell, ready, taken, in_ptr, out_ptr, rounds, True)


@gluon.jit
def _take_on(cell, ready, passed, taken, in_ptr, out_ptr, rounds):
    _take(cell, passed, taken, in_ptr, out_ptr, rounds, True)


@gluon.jit
def relay(in_ptr, out_ptr, rounds):
    """:func:`handshake` by way of a third warp."""
    cell = gl.allocate_shared_memory(gl.int32, [WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    passed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(passed.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_take_on, (cell, ready, passed, taken, in_ptr, out_ptr, rounds)),
            (_give_on, (cell, ready, passed, taken, in_ptr, out_ptr, rounds)),
            (_pass_on, (cell, ready, passed, taken, in_ptr, out_ptr, rounds)),
        ],
        [1, 1],
        [48, 48],
    )


@triton.jit
def copy_beyond(in_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Copies without looking where the tensors end."""
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(in_ptr + columns))


def hand_over(wait: bool, rounds: int = 64) -> tuple[Tensor, Tensor]:
    """What went in, and what came out."""
    given = torch.arange(rounds * 128, dtype=torch.int32, device="cuda")
    taken = torch.zeros_like(given)
    handshake[(1,)](given, taken, rounds, wait, num_warps=4)
    return given, taken


def hand_on(rounds: int = 64) -> tuple[Tensor, Tensor]:
    """The same through :func:`relay`."""
    given = torch.arange(rounds * 128, dtype=torch.int32, device="cuda")
    taken = torch.zeros_like(given)
    relay[(1,)](given, taken, rounds, num_warps=4)
    return given, taken


def read_beyond() -> None:
    """A read and a write behind the end of two tensors."""
    first, second = (torch.zeros(1000, dtype=torch.int32, device="cuda") for _ in range(2))
    copy_beyond[(1,)](first, second, 1000, BLOCK=2048)
