"""Arithmetic on the tiles that one consumer warpgroup holds, 64 rows by BLOCK_N keys of scores, in registers; and what
warps agree with by other means than mbarriers: turns, and the counter of tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
#: How far, as a power of 2, a row's weights may grow beyond 1 before what was summed is scaled.
MAX_GROWTH = gl.constexpr(8.0)


@gluon.jit
def retire(barriers):
    """Invalidate mbarriers, at the end of a kernel.

    For its own sake it would be needless there. But it keeps their memory theirs until then, also that of those that a
    variant of the kernel initialises and does not use. Left to itself the compiler puts something else there (what
    it hands to the warps' partitions, or parts of results), and when the device is taken from the kernel in favour of
    another process, that is not saved as it is: 8 bytes come back changed (seen on H100s; PTX, too, wants no other
    access to such memory before ``mbarrier.inval``).
    """
    N: gl.constexpr = barriers.shape[0]
    for i in gl.static_range(N):
        mbarrier.invalidate(barriers.index(i))


@gluon.constexpr_function
def _pack_asm(dtype):
    return f"cvt.rn.{'bf16x2' if dtype.is_bf16() else 'f16x2'}.f32 $0, $2, $1;"


@gluon.jit
def pack(p, BLOCK_N: gl.constexpr, DTYPE: gl.constexpr):
    """fp32 (64, BLOCK_N) to int32 (64, BLOCK_N / 2), pairs of DTYPE.

    The weights cross loop iterations in this form: as single 16-bit values ptxas keeps them unpacked, at 64 byte
    permutations an iteration.
    """
    even, odd = p.reshape([64, BLOCK_N // 2, 2]).split()
    asm: gl.constexpr = _pack_asm(DTYPE)
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(pairs, BLOCK_N: gl.constexpr, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of :func:`pack`, as the first operand of a matrix product."""
    even = (pairs & 0xFFFF).to(gl.int16).to(DTYPE, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(even, odd).reshape([64, BLOCK_N]), LAYOUT)


@gluon.jit
def opaque(x):
    """``x``, an int32, of which the compiler does not know where it comes from.

    Knowing it, ptxas computes masks ahead, before the branch that asks whether they are needed, and spills them.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def tanh(x2):
    """``tanh(x)`` of ``x2 = 2 * log2(e) * x``, to an absolute error of 1e-7."""
    denominator = 1.0 + gl.exp2(x2)
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=gl.float32, is_pure=True, pack=1
    )
    return 1.0 - 2.0 * inverse


@gluon.jit
def tanh_approx(x):
    """``tanh(x)`` in one instruction, to a relative error of 2^-11."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softmax_step(scores, top, factor, MAY_BE_EMPTY: gl.constexpr):
    """What rows' weights are relative to (base 2), the factor for what came before, and the weights of one tile.

    ``factor`` turns scores to base 2, inside the exponent. MAY_BE_EMPTY: a row may have seen nothing yet.

    A row keeps its ``top`` until a score exceeds it by more than MAX_GROWTH, so that the factor is nearly always 1
    (:func:`rescale`). Weights then reach 2^MAX_GROWTH instead of 1: within float16, whose rounding is relative like
    bfloat16's, and far from the end of the sums in float32.
    """
    highest = gl.max(scores, 1) * factor
    new_top = gl.where(highest > top + MAX_GROWTH, highest, top)
    shift = new_top
    if MAY_BE_EMPTY:
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    weights = gl.exp2(scores * factor - shift[:, None])
    decay = gl.exp2(top - shift)
    return new_top, decay, weights


@gluon.constexpr_function
def _rescale_asm(n):
    """``$0 .. = $n .. * $2n ..``, all of them or none in a warp. A thread's part of an accumulator begins with two
    numbers of one row and two of another, and has no third row."""
    copies = " ".join(f"mov.f32 ${i}, ${n + i};" for i in range(n))
    products = " ".join(f"mul.rn.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return f"""{{
        .reg .pred some;
        setp.neu.f32 some, ${2 * n}, 0f3F800000;
        setp.neu.or.f32 some, ${2 * n + 2}, 0f3F800000, some;
        vote.sync.any.pred some, some, 0xffffffff;
        {copies}
        @!some bra SAME;
        {products}
        SAME:
    }}"""


@gluon.constexpr_function
def _rescale_registers(n):
    return ",".join(["=&f"] * n + ["f"] * (2 * n))


@gluon.jit
def rescale(acc, decay):
    """``acc * decay`` of an accumulator (64, at least 64) and (64, 1), left out by warps all of whose rows have the
    factor 1. In PTX, since a condition that Triton knows of would be one for the whole warpgroup, through shared
    memory."""
    asm: gl.constexpr = _rescale_asm(32)
    registers: gl.constexpr = _rescale_registers(32)
    return gl.inline_asm_elementwise(asm, registers, [acc, decay], dtype=gl.float32, is_pure=True, pack=32)


@gluon.constexpr_function
def _turn_asm(op, barrier):
    return f"bar.{op} {barrier}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(W: gl.constexpr, C: gl.constexpr):
    """Wait until the other of two warpgroups has started its matrix products (named barriers 8 and 9)."""
    if C.turns:
        asm: gl.constexpr = _turn_asm("sync", 8 + W)
        gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def give_turn(W: gl.constexpr, C: gl.constexpr):
    """Let the other warpgroup start."""
    if C.turns:
        asm: gl.constexpr = _turn_asm("arrive", 9 - W)
        gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


_CLAIM = gl.constexpr("""{
    .reg .pred first;
    .reg .u32 lane;
    mov.u32 lane, %laneid;
    setp.eq.u32 first, lane, 0;
    mov.u32 $0, 0;
    @first atom.global.add.u32 $0, [$1], 1;
}""")


@gluon.jit
def start_claim(counter_ptr):
    """Ask for the next number of a counter, in a warp of its own. ``gl.atomic_add`` would wait for the answer."""
    return gl.inline_asm_elementwise(_CLAIM, "=r,l", [counter_ptr], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def finish_claim(claimed):
    """The number, in all threads of the warp."""
    asm: gl.constexpr = "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;"
    return gl.inline_asm_elementwise(asm, "=r,r", [claimed], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def raise_flag(pointer):
    """Say in global memory that all that a warpgroup has written to it is there. (Not in PTX that asks for the thread:
    after that ptxas does without uniform registers, also in the loops.)"""
    gl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
    gl.atomic_xchg(pointer, 1)


@gluon.jit
def lower_flag(pointer):
    """Take the flag back for the next launch, once all threads of the warpgroup have seen it."""
    gl.thread_barrier()
    gl.atomic_xchg(pointer, 0, sem="relaxed")


#: All threads of a warp leave the loop together.
_AWAIT = gl.constexpr("""{
    .reg .pred there;
    AGAIN:
    ld.acquire.gpu.global.u32 $0, [$1];
    setp.ne.u32 there, $0, 0;
    vote.sync.all.pred there, there, 0xffffffff;
    @!there bra AGAIN;
}""")


@gluon.jit
def await_flag(pointer):
    """Wait for :func:`raise_flag`."""
    gl.inline_asm_elementwise(_AWAIT, "=&r,l", [pointer], dtype=gl.int32, is_pure=False, pack=1)


_ZEROS = gl.constexpr("""{
    .reg .pred wanted;
    setp.ne.s32 wanted, $2, 0;
    mov.u32 $0, 0;
    @wanted st.global.v4.u32 [$1], {$0, $0, $0, $0};
}""")


@gluon.jit
def write_zeros(pointers, wanted):
    """16 bytes of zeros at each of the pointers, which are multiples of 16. (Of a pointer that kernels are not compiled
    for, ``gl.store`` does not know that.)"""
    gl.inline_asm_elementwise(_ZEROS, "=r,l,r", [pointers, wanted.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)
