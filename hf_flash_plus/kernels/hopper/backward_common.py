"""What the loops of the Hopper backward kernels share: barriers, flags, and how numbers change hands."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

#: Named barriers between the 8 warps that compute and one other, beyond those that Triton uses itself: a step's dq is
#: in shared memory; a stage is free (one barrier for each).
DQ_BARRIER = gl.constexpr(8)
STAGE_BARRIER = gl.constexpr(9)
THREADS = gl.constexpr(9 * 32)


@builtin
def reduce_add(desc, coordinates, source, _semantic=None):
    """Start the addition of ``source``, in shared memory, to a block in global memory; wait with ``tma.store_wait``.

    Gluon's builder has the operation, its Python front end has no name for it (Triton 3.6). Triton's cache does not
    look into functions like this one: another thing to do needs another name.
    """
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coordinates, source.handle)


@gluon.constexpr_function
def _meet_asm(op, threads):
    return f"bar.{op} $1, {threads}; mov.u32 $0, 0;"


@gluon.jit
def meet(OP: gl.constexpr, barrier):
    """At a named barrier of THREADS, wait ("sync"), or only say that one has come ("arrive")."""
    asm: gl.constexpr = _meet_asm(OP, THREADS)
    gl.inline_asm_elementwise(asm, "=r,r", [barrier], dtype=gl.int32, is_pure=False, pack=1)


#: Which steps of a program mask: none; the first ones (a causal mask), which get a loop of their own; or any, by a
#: branch (windows, lists of query tiles; causal masks with grouped heads: nested loops spill registers).
MASK_NONE = gl.constexpr(0)
MASK_LEADING = gl.constexpr(1)
MASK_ANY = gl.constexpr(2)

#: An entry of the list of query tiles: the tile's index, and what needs doing.
ENTRY_MASKED = gl.constexpr(1 << 29)
ENTRY_DIRTY = gl.constexpr(1 << 30)
ENTRY_TILE = gl.constexpr((1 << 29) - 1)
#: The count of a list's entries, and whether each key of the tile is known to be seen by some row.
COUNT_COVERED = gl.constexpr(1 << 30)
COUNT_ENTRIES = gl.constexpr((1 << 30) - 1)
#: How rows' bounds lie in shared memory, for reading a few of them.
BOUNDS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

#: Keys of a tile; half of them belong to each warpgroup that computes.
BLOCK_N = gl.constexpr(128)


@gluon.jit
def _hand_over(dq, step, dq_smem, dq_free):
    """Leave a step's dq in shared memory for the storer, once what lay there is gone.

    Two parts of 64 by 64, one of each warpgroup: the halves of the columns (64 rows), or of the rows. Numbers lie in
    the order in which threads hold them, four neighbours a thread: 16-byte stores without conflicts
    (``backward_prepare`` brings them into rows).
    """
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0], [8, 0], [16, 0]],
        [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]],
        [[1, 0], [2, 0], [32, 0]],
        [],
        [64, 128],
    )
    # Warp, half of its 16 rows, row, and the columns' blocks of 8, pair of lane, column; the warpgroup comes first.
    if dq.shape[0] == 64:
        x = dq.reshape([4, 2, 8, 2, 8, 4, 2]).permute((3, 4, 0, 2, 5, 1, 6)).reshape([64, 128])
    else:
        x = dq.reshape([2, 4, 2, 8, 8, 4, 2]).permute((0, 4, 1, 3, 5, 2, 6)).reshape([64, 128])
    x = gl.convert_layout(x, LAYOUT, assert_trivial=True)
    mbarrier.wait(dq_free, (step & 1) ^ 1)
    dq_smem.store(x)
    fence_async_shared()
    meet("arrive", DQ_BARRIER)


@gluon.constexpr_function
def scores_layout(columns):
    """How a tile of BLOCK_N keys by ``columns`` lies in registers: 64 keys in each of two warpgroups."""
    return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, columns, 16])


@gluon.jit
def _read(buffer):
    """The number that the producer has put there."""
    return gl.max(buffer.load(gl.BlockedLayout([1], [32], [8], [0])), 0)


@gluon.jit
def _zero_not_finite(part):
    """Zero the NaN and inf in k or v: keys that no row sees may hold them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    for piece in gl.static_range(4):
        rows = part.slice(32 * piece, 32, dim=0)
        x = rows.load(LAYOUT)
        rows.store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, 0.0).to(part.dtype))
    fence_async_shared()


@gluon.jit
def _store_rows(ptr, stride, n_keys, x, DIM: gl.constexpr):
    """Store the first ``n_keys`` rows of dk or dv; ``ptr`` points at the tile's first row."""
    BLOCK_D: gl.constexpr = x.shape[1]
    PIECES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [8, 1], [1, 0])
    # fp32 is stored as it lies in registers, which fills sectors of 32 bytes.
    LAYOUT: gl.constexpr = x.type.layout if ptr.dtype.element_ty.primitive_bitwidth == 32 else PIECES
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    inside = (rows < n_keys)[:, None]
    if DIM != BLOCK_D:
        inside = inside & (columns < DIM)[None, :]
    at = ptr + rows[:, None] * stride + columns[None, :]
    gl.store(at, gl.convert_layout(x.to(ptr.dtype.element_ty), LAYOUT), mask=inside)


@gluon.jit
def _store_rows_through(ptr, stride, n_keys, x, buffer, DIM: gl.constexpr):
    """As :func:`_store_rows`, of any number of keys.

    ``buffer`` is shared memory of the tile's shape that nobody needs any more, through which threads get whole rows.
    """
    KEYS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    PIECES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [8, 1], [1, 0])
    # fp32 is stored as it lies in registers, which fills sectors of 32 bytes.
    DIRECT: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth == 32
    LAYOUT: gl.constexpr = x.type.layout if DIRECT else PIECES
    rows = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    inside = (rows < n_keys)[:, None]
    if DIM < WIDTH:
        inside = inside & (columns < DIM)[None, :]
    at = ptr + rows[:, None] * stride + columns[None, :]
    if DIRECT:
        gl.store(at, x, mask=inside)
    else:
        buffer.store(x.to(buffer.dtype))
        gl.thread_barrier()
        gl.store(at, buffer.load(LAYOUT), mask=inside)
