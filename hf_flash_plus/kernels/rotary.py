"""Rotary position embedding of queries and keys in one launch, and its gradient.

Written out in torch it is ten kernels a layer, each of which reads and writes queries or keys once more. A program
rotates some heads of one token; products and sums are rounded where torch's own kernels round them, so that the bits of
the result are the same (``enable_fp_fusion`` is off: a product and a sum are two roundings).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launch import Launch, Plan, _cdiv, addresses, hooked, raw_stream, starter

#: Elements of a head block that a program of four warps rotates at once.
_BLOCK = 2048


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """A float32 value as it is after a stop in ``DTYPE``."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    x_stride_h,
    out_stride_h,
    first_head,
    nheads,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF_TABLE: tl.constexpr,
    ROUNDED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Heads ``first_head`` to ``first_head + BLOCK_H`` of one token; pointers are the token's."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    pair = tl.arange(0, BLOCK_R)
    pair_ok = pair < HALF
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    if HALF_TABLE:
        at_first, at_second = pair, pair
    else:
        at_first, at_second = first, second
    cos_first = tl.load(cos_ptr + at_first, mask=pair_ok, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_ptr + at_second, mask=pair_ok, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_ptr + at_first, mask=pair_ok, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_ptr + at_second, mask=pair_ok, other=0.0).to(tl.float32)
    if BACKWARD:
        from_second, from_first = sin_second, -sin_first
    else:
        from_second, from_first = -sin_first, sin_second
    head = first_head + tl.arange(0, BLOCK_H)
    head_ok = head < nheads
    rows = x_ptr + head.to(tl.int64)[:, None] * x_stride_h
    out_rows = out_ptr + head.to(tl.int64)[:, None] * out_stride_h
    ok = head_ok[:, None] & pair_ok[None, :]
    a = tl.load(rows + first[None, :], mask=ok, other=0.0).to(tl.float32)
    b = tl.load(rows + second[None, :], mask=ok, other=0.0).to(tl.float32)
    a_own, a_other = a * cos_first[None, :], b * from_second[None, :]
    b_own, b_other = b * cos_second[None, :], a * from_first[None, :]
    if ROUNDED:
        DTYPE: tl.constexpr = out_ptr.dtype.element_ty
        a_own, a_other = _rounded(a_own, DTYPE), _rounded(a_other, DTYPE)
        b_own, b_other = _rounded(b_own, DTYPE), _rounded(b_other, DTYPE)
    tl.store(out_rows + first[None, :], (a_own + a_other).to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(out_rows + second[None, :], (b_own + b_other).to(out_ptr.dtype.element_ty), mask=ok)
    if HEAD_DIM > ROTARY_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)
        ok = head_ok[:, None] & (rest < HEAD_DIM)[None, :]
        tl.store(out_rows + rest[None, :], tl.load(rows + rest[None, :], mask=ok), mask=ok)


@triton.jit(do_not_specialize=("seqlen", "nheads", "nheads_k"))
def rotate_query_and_key(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    q_out_stride_b,
    q_out_stride_h,
    q_out_stride_s,
    k_out_stride_b,
    k_out_stride_h,
    k_out_stride_s,
    seqlen,
    nheads,
    nheads_k,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF_TABLE: tl.constexpr,
    ROUNDED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Programs are numbered by token, and for each first by the heads of q, then by those of k."""
    q_blocks = tl.cdiv(nheads, BLOCK_H)
    blocks = q_blocks + tl.cdiv(nheads_k, BLOCK_H)
    token, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, row = (token // seqlen).to(tl.int64), (token % seqlen).to(tl.int64)
    cos_row = cos_ptr + batch * cos_stride_b + row * cos_stride_s
    sin_row = sin_ptr + batch * sin_stride_b + row * sin_stride_s
    if block < q_blocks:
        _rotate_heads(
            q_ptr + batch * q_stride_b + row * q_stride_s, q_out_ptr + batch * q_out_stride_b + row * q_out_stride_s,
            cos_row, sin_row, q_stride_h, q_out_stride_h, block * BLOCK_H, nheads,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, HALF_TABLE, ROUNDED, BACKWARD, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr + batch * k_stride_b + row * k_stride_s, k_out_ptr + batch * k_out_stride_b + row * k_out_stride_s,
            cos_row, sin_row, k_stride_h, k_out_stride_h, (block - q_blocks) * BLOCK_H, nheads_k,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, HALF_TABLE, ROUNDED, BACKWARD, BLOCK_H, BLOCK_R, BLOCK_REST,
        )  # fmt: skip


class Rotation(NamedTuple):
    """What the kernel is specialised by.

    Attributes:
        device: of the tensors.
        head_dim, rotary_dim: columns of a head, and how many of them, from the first on, are rotated.
        interleaved: pairs are columns (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1), ...
        half_table: pair i has the angle of column i of the tables; otherwise each column has its own.
        rounded: products are rounded to the dtype of the result before they are added.
        backward: multiplies with the transposed matrix.
    """

    device: tiles.DeviceInfo
    head_dim: int
    rotary_dim: int
    interleaved: bool
    half_table: bool
    rounded: bool
    backward: bool


@cache
def _plan(rotation: Rotation) -> Plan:
    block_r = triton.next_power_of_2(max(rotation.rotary_dim // 2, 1))
    options = {
        "HEAD_DIM": rotation.head_dim,
        "ROTARY_DIM": rotation.rotary_dim,
        "INTERLEAVED": rotation.interleaved,
        "HALF_TABLE": rotation.half_table,
        "ROUNDED": rotation.rounded,
        "BACKWARD": rotation.backward,
        "BLOCK_H": min(32, max(1, _BLOCK // (2 * block_r))),
        "BLOCK_R": block_r,
        "BLOCK_REST": triton.next_power_of_2(max(rotation.head_dim - rotation.rotary_dim, 1)),
        "num_warps": 4,
        "enable_fp_fusion": False,
    }
    reusable = rotation.device.arch.startswith("sm") and hasattr(rotate_query_and_key, "warmup")
    return Plan(rotate_query_and_key, tiles.Tile(options["BLOCK_H"], block_r, 4, 1), options, reusable)


def rotary_launch(
    rotation: Rotation, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor
) -> Launch:
    """The launch that writes ``q_out`` and ``k_out``.

    Args:
        q, k, q_out, k_out: ``(batch, nheads or nheads_k, seqlen, head_dim)``, any strides but a contiguous last
            dimension; not empty. q and k have one dtype, q_out and k_out have one.
        cos, sin: ``(batch or 1, seqlen, rotary_dim)``, the last dimension contiguous.
    """
    plan = _plan(rotation)
    batch, nheads, seqlen, _ = q.shape
    nheads_k = k.shape[1]
    block_h = plan.tile.block_m
    tensors = (q, k, cos, sin, q_out, k_out)
    tables = (
        stride for table in (cos, sin) for stride in (0 if table.shape[0] == 1 else table.stride(0), table.stride(1))
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *tables, *q_out.stride()[:3], *k_out.stride()[:3])
    index = q.device.index
    key = (0 if index is None else index, *strides, q.dtype, cos.dtype, q_out.dtype)
    n_programs = batch * seqlen * (_cdiv(nheads, block_h) + _cdiv(nheads_k, block_h))
    return Launch(plan, n_programs, (*tensors, *strides, seqlen, nheads, nheads_k), len(tensors), key)


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Ticket | None]:
    """``q`` and ``k`` rotated (shapes as in :func:`rotary_launch`), in new tensors of a dtype and, where they have no
    gaps, of their strides; and a ticket for calls that differ in their data only, where there is one."""
    q_out, k_out = torch.empty_like(q, dtype=dtype), torch.empty_like(k, dtype=dtype)
    launch = rotary_launch(rotation, q, k, cos, sin, q_out, k_out)
    launch.run()
    return q_out, k_out, Ticket.of(launch)


def _signature(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[object, ...]:
    """All of a call but its data."""
    return (
        q.shape, k.shape, cos.shape, sin.shape, q.stride(), k.stride(), cos.stride(), sin.stride(),
        q.dtype, k.dtype, cos.dtype, sin.dtype, q.device, k.device, cos.device, sin.device,
    )  # fmt: skip


class Ticket:
    """A launch with everything fixed but the addresses: in eager decoding all layers of all steps ask for the same, and
    the host's time decides.

    It looks itself at what may differ from the call that it was made from: the tensors' shapes, strides, dtypes and
    devices, the current device and stream, somebody who watches Triton's launches, and addresses that are no multiples
    of 16.
    """

    __slots__ = ("_device", "_first", "_launcher", "_outputs", "_rest", "_signature", "_stream")

    def __init__(self, launch: Launch, compiled: Any) -> None:
        q, k, cos, sin, q_out, k_out = launch.arguments[: launch.tensors]
        self._signature = _signature(q, k, cos, sin)
        self._device = launch.key[0]
        self._stream = raw_stream(self._device)
        self._launcher, self._first = starter(compiled, launch.n_programs, self._stream)
        self._rest = (*launch.arguments[launch.tensors :], *launch.plan.constexprs)
        options = {"dtype": q_out.dtype, "device": q_out.device}
        self._outputs = [(tuple(x.shape), x.stride(), options) for x in (q_out, k_out)]

    @classmethod
    def of(cls, launch: Launch) -> Ticket | None:
        """The ticket of a launch that took place; None where each such call must be launched anew."""
        if not launch.plan.reusable or addresses(launch.arguments[: launch.tensors])[1]:
            return None
        compiled = launch.plan.find(launch.key)
        return None if compiled is None else cls(launch, compiled)

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
        """What :func:`rotate` returns but the ticket; None where the call must be launched anew."""
        device = self._device
        pointers = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr()
        if (
            (pointers[0] | pointers[1] | pointers[2] | pointers[3]) & 15
            or _signature(q, k, cos, sin) != self._signature
            or raw_stream(device) != self._stream
            or torch._C._cuda_getDevice() != device
            or hooked()
        ):
            return None
        (q_shape, q_strides, options), (k_shape, k_strides, _) = self._outputs
        q_out = torch.empty_strided(q_shape, q_strides, **options)
        k_out = torch.empty_strided(k_shape, k_strides, **options)
        self._launcher(*self._first, *pointers, q_out.data_ptr(), k_out.data_ptr(), *self._rest)
        return q_out, k_out
