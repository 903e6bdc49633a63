"""From one :class:`~hf_flash_plus.inputs.AttentionInputs` to kernel launches.

What depends on the structure of a call only (constexpr flags, tile sizes) is computed once and remembered; each call
then gathers pointers, strides and sizes, allocates its outputs and launches. :func:`forward_launch`,
:func:`preprocess_launch`, :func:`dq_launch` and :func:`dkdv_launch` build a :class:`Launch` without running it: the
ahead-of-time tests compile what users run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from ..inputs import AttentionInputs
from . import tiles
from .backward import attention_backward_dq, attention_backward_preprocess
from .backward_dkdv import attention_backward_dkdv
from .forward import attention_forward
from .machine_code import MiscompiledError, check, doubtful

#: Keys and values (or queries and their gradients) of the heads in flight should stay in the L2 cache together.
L2_BUDGET = 32 * 2**20

_NO_STRIDES = (None,) * 16

logger = logging.getLogger(__name__)


class Structure(NamedTuple):
    """What kernels are specialised by: everything about a call but its data, lengths and numbers."""

    device: tiles.DeviceInfo
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    has_left: bool
    has_right: bool
    has_intervals: bool
    has_key_mask: bool
    has_key_holes: bool
    bias: int
    has_alibi: bool
    has_positions: bool
    sinks: bool
    softcap: bool
    dropout: bool
    rows: int
    #: Tiles that need no ``wgmma`` (see :func:`be_careful`).
    careful: bool = False


class Call(NamedTuple):
    """One call, taken apart for its launches."""

    inputs: AttentionInputs
    structure: Structure
    sizes: tuple[int, int, int, int, int]  # batch, nheads, nheads_k, seqlen_q, seqlen_k
    window: tuple[int, int]
    pointers: tuple[Tensor | None, ...]  # intervals, key_mask, key_holes, bias, positions, slopes
    strides: tuple[int | None, ...]  # theirs
    dtypes: tuple[torch.dtype, ...]  # of those that may have several


class Plan:
    """What all calls of one structure share for one kernel: its tile, its constexprs, and what was compiled for them.

    Attributes:
        options: constexprs and compiler options, by name.
        reusable: compiled kernels may be launched without Triton's own look-up, which costs more than all the rest of
            a call. Only where we know everything they are specialised by (not on AMD, where sizes matter too).
        doubtful: what is compiled is looked at before it is launched (``machine_code``).
        compiled: by :attr:`Launch.key`.
    """

    def __init__(
        self, kernel: Any, tile: tiles.Tile, options: dict[str, Any], reusable: bool, doubtful: bool = False
    ) -> None:
        self.kernel = kernel
        self.tile = tile
        self.options = options
        self.reusable = reusable
        self.doubtful = doubtful
        self.constexprs = tuple(options[name] for name in kernel.arg_names if name in options)
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def find(self, key: tuple[Any, ...]) -> Any:
        """The kernel compiled for a key, or for another whose strides are of the same class."""
        found = self.compiled.get(key)
        if found is None:
            found = self.compiled.get(_stride_classes(key))
            if found is not None:
                self.remember(key, found)
        return found

    def remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        if len(self.compiled) > 4096:  # a cache that grows by one token a step never shows the same strides twice
            self.compiled.clear()
        self.compiled[key] = self.compiled[_stride_classes(key)] = compiled


def _stride_classes(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key with strides replaced by what Triton specialises integers by."""
    return tuple((s % 16 == 0, s == 1, s >= 2**31) if type(s) is int else s for s in key[1:]) + key[:1]


class Launch(NamedTuple):
    """A kernel with its grid and arguments; :meth:`run` launches it, or raises
    :class:`~.machine_code.MiscompiledError` before it does.

    ``tensors`` counts the arguments that come first and are tensors (or None); ``key`` holds the device's index, all
    strides, and the dtypes that the structure does not fix.
    """

    plan: Plan
    n_programs: int
    arguments: tuple[Any, ...]
    tensors: int
    key: tuple[Any, ...]

    def run(self) -> None:
        plan = self.plan
        if not plan.reusable:
            plan.kernel[(self.n_programs, 1, 1)](*self.arguments, **plan.options)
            return
        pointers, misaligned = addresses(self.arguments[: self.tensors])
        key = (*self.key, misaligned) if misaligned else self.key
        compiled = plan.find(key)
        if compiled is not None:
            arguments = (*pointers, *self.arguments[self.tensors :], *plan.constexprs)
            start(compiled, self.n_programs, self.key[0], arguments)
            return
        if plan.doubtful:
            check(plan.kernel.warmup(*self.arguments, grid=(self.n_programs, 1, 1), **plan.options))
        compiled = plan.kernel[(self.n_programs, 1, 1)](*self.arguments, **plan.options)
        if compiled is not None:
            plan.remember(key, compiled)


def addresses(tensors: Iterable[Tensor | None]) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """The addresses of tensors, and which are no multiples of 16: Triton compiles narrower loads for those. Where all
    are (the rule), the second is empty."""
    pointers = tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)
    if any(pointer & 15 for pointer in pointers if pointer is not None):
        return pointers, tuple(pointer is not None and pointer & 15 != 0 for pointer in pointers)
    return pointers, ()


def hooked() -> bool:
    """Whether somebody watches Triton's launches (a profiler)."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def start(compiled: Any, n_programs: int, device: int, arguments: tuple[Any, ...]) -> None:
    """Launch a compiled kernel on the current stream of the current device, whose index is ``device``.

    The same as ``compiled[n_programs, 1, 1](*arguments)``, which asks for device and stream, makes a dictionary and
    calls two hooks even where nobody is hooked in: half of what a launch costs the host. Tensors come as addresses,
    because Triton's launcher asks the driver about each pointer that it gets from a tensor.
    """
    if hooked():
        compiled[n_programs, 1, 1](*arguments)
        return
    launcher, first = starter(compiled, n_programs, raw_stream(device))
    launcher(*first, *arguments)


def starter(compiled: Any, n_programs: int, stream: int) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What launches a compiled kernel, and the arguments that come before the kernel's own."""
    run = compiled.run  # first: it loads the binary
    grid = (n_programs, 1, 1, stream, compiled.function)
    packed = (compiled.packed_metadata, None, None, None)
    if _KNOWN_LAUNCHER and not (run.global_scratch_size or run.profile_scratch_size):
        # What `run` itself would call, without the two closures that it makes to find no scratch memory needed.
        return run.launch, (*grid, run.launch_cooperative_grid, run.launch_pdl, None, None, *packed)
    return run, (*grid, *packed)


#: Whether Triton's ``CudaLauncher`` is the one of version 3.6, whose inner function takes these arguments.
_KNOWN_LAUNCHER = triton.__version__.startswith("3.6.") and torch.version.cuda is not None


#: The handle of a device's current stream, without making an object of it. Only where torch is built for CUDA.
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _device: 0)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, with 0 where a dimension is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))


def _window(inputs: AttentionInputs) -> tuple[int, int]:
    """``(left, right)`` with causal folded in, clamped so that row + window stays far from overflow; -1 is none."""
    mask = inputs.mask
    left, right = mask.window
    if mask.causal:
        # The only row of a decoding step sees every key.
        right = -1 if inputs.seqlen_q == 1 else 0
    limit = inputs.seqlen_q + inputs.seqlen_k
    return min(left, limit), min(right, limit)


def prepare(inputs: AttentionInputs) -> Call:
    """Take a call apart: its structure, sizes and the arguments that all kernels share."""
    q, mask = inputs.query, inputs.mask
    batch, seqlen_q, nheads, head_dim = q.shape
    seqlen_k, nheads_k, v_head_dim = inputs.value.shape[1:]
    left, right = _window(inputs)
    intervals, key_mask, holes, bias = mask.row_intervals, mask.key_mask, mask.key_holes, mask.bias
    slopes = inputs.alibi_slopes
    positions = mask.row_positions if slopes is not None else None
    device = tiles.device_info(q.device)
    structure = Structure(
        device,
        q.dtype,
        head_dim,
        v_head_dim,
        left >= 0,
        right >= 0,
        intervals is not None,
        key_mask is not None,
        holes is not None,
        0 if bias is None else 1 if bias.dtype == torch.bool else 2,
        slopes is not None,
        positions is not None,
        inputs.sinks is not None,
        inputs.softcap > 0.0,
        inputs.dropout_p > 0.0,
        tiles.row_class(seqlen_q, batch * nheads, device),
    )
    if (_careful and structure in _careful) or _narrow(device, head_dim, v_head_dim):
        structure = structure._replace(careful=True)
    pointers = (intervals, key_mask, holes, bias, positions, slopes)
    if intervals is key_mask is bias is slopes is None:
        strides: tuple[int | None, ...] = _NO_STRIDES[:14]
    else:
        strides = (
            *(_NO_STRIDES[:3] if intervals is None else _strides(intervals)),
            *(_NO_STRIDES[:2] if key_mask is None else _strides(key_mask)),
            *(_NO_STRIDES[:1] if holes is None else _strides(holes)),
            *(_NO_STRIDES[:4] if bias is None else _strides(bias)),
            *(_NO_STRIDES[:2] if positions is None else _strides(positions)),
            *(_NO_STRIDES[:2] if slopes is None else (0, *_strides(slopes))[-2:]),
        )
    sizes = (batch, nheads, nheads_k, seqlen_q, seqlen_k)
    dtypes = () if bias is None else (bias.dtype,)
    return Call(inputs, structure, sizes, (left, right), pointers, strides, dtypes)


#: Up to this padded head dimension, of q or of v, nothing is computed by ``wgmma`` where the assembler is in doubt
#: (:mod:`machine_code`): there it made errors that the look does not find. Five of 3000 random calls gave wrong results
#: or illegal accesses on an H200 (2026-11-28), all with values of 16 columns beside queries of 40 or 96.
NARROW = 32


@cache
def _narrow(device: tiles.DeviceInfo, head_dim: int, v_head_dim: int) -> bool:
    return min(tiles.padded(head_dim), tiles.padded(v_head_dim)) <= NARROW and doubtful(device.arch)


#: Structures some kernel of which is compiled wrong here.
_careful: set[Structure] = set()


def be_careful(structure: Structure, fault: MiscompiledError) -> None:
    """Compute calls of a structure with smaller tiles from now on, whose products are those of older GPUs (``mma``).

    Raises:
        MiscompiledError: they are already.
    """
    if structure.careful:
        raise fault
    logger.info("triton: smaller tiles serve calls like this one, because the assembler makes an error here: %s", fault)
    _careful.add(structure)


def _numbers(call: Call) -> tuple[int | float, ...]:
    """window_left, window_right, dropout_threshold, scale, softcap, keep_scale."""
    inputs = call.inputs
    p = inputs.dropout_p
    threshold = min(round(p * 65536), 65535)
    return (*call.window, threshold, float(inputs.softmax_scale), float(inputs.softcap), 1.0 / (1.0 - p))


def _section(seqlen: int, bytes_per_row: int, n_heads: int) -> int:
    """How many heads of ``seqlen`` rows fit the L2 budget, at least one."""
    return max(1, min(n_heads, L2_BUDGET // max(1, seqlen * bytes_per_row)))


def tile_key(kind: str, s: Structure) -> tiles.TileKey:
    """What the tile of a kernel is chosen by."""
    masked = s.has_intervals or s.has_key_mask or s.bias > 0 or s.has_alibi
    dim = tiles.padded(max(s.head_dim, s.v_head_dim))
    return tiles.TileKey(kind, s.device.arch, s.dtype == torch.float32, dim, s.rows, masked, s.dropout)


_KERNELS = {
    "forward": attention_forward,
    "preprocess": attention_backward_preprocess,
    "dq": attention_backward_dq,
    "dkdv": attention_backward_dkdv,
}


def _make_plan(kind: str, s: Structure, bias_grad: bool = False) -> Plan:
    # The summaries that preprocess writes are of dkdv's query tiles.
    tile_kind = "dkdv" if kind == "preprocess" else kind
    tile = tiles.select(tile_key(tile_kind, s))
    if s.careful:
        tile = tiles.without_wgmma(tile_kind, tile)
    everything = {
        "HEAD_DIM": s.head_dim,
        "V_HEAD_DIM": s.v_head_dim,
        "HAS_LEFT": s.has_left,
        "HAS_RIGHT": s.has_right,
        "HAS_INTERVALS": s.has_intervals,
        "HAS_KEY_MASK": s.has_key_mask,
        "HAS_KEY_HOLES": s.has_key_holes,
        "BIAS": s.bias,
        "BIAS_GRAD": bias_grad,
        "HAS_ALIBI": s.has_alibi,
        "HAS_POSITIONS": s.has_positions,
        "HAS_SINKS": s.sinks,
        "HAS_SOFTCAP": s.softcap,
        "HAS_DROPOUT": s.dropout,
        "INPUT_PRECISION": s.device.fp32_precision if s.dtype == torch.float32 else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tiles.padded(s.head_dim),
        "BLOCK_DV": tiles.padded(s.v_head_dim),
        "BLOCK_SUMMARY": 128,
    }
    kernel = _KERNELS[kind]
    options = {name: everything[name] for name in kernel.arg_names if name in everything}
    options["num_warps"] = 4 if kind == "preprocess" else tile.num_warps
    options["num_stages"] = tile.num_stages
    # The default of Triton up to 3.9; the scale belongs into the exponent's multiply-add.
    options["enable_fp_fusion"] = True
    return Plan(kernel, tile, options, _reusable(s, kernel), doubtful(s.device.arch))


def _reusable(s: Structure, kernel: Any) -> bool:
    """Whether compiled kernels may be launched directly (see :class:`Plan`); the interpreter compiles none."""
    return s.device.arch.startswith("sm") and hasattr(kernel, "warmup") and not tiles.overridden()


_cached_plan = cache(_make_plan)


def _plan(kind: str, structure: Structure, bias_grad: bool = False) -> Plan:
    make = _make_plan if tiles.overridden() else _cached_plan
    return make(kind, structure, bias_grad)


def forward_launch(call: Call, out: Tensor, lse: Tensor) -> Launch:
    """The forward kernel's launch."""
    inputs = call.inputs
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, nheads, nheads_k, seqlen_q, seqlen_k = call.sizes
    plan = _plan("forward", call.structure)
    group, n_heads = nheads // nheads_k, batch * nheads
    section = group * _section(seqlen_k, (k.shape[3] + v.shape[3]) * k.itemsize, batch * nheads_k)
    if sinks is None:
        sinks_strides: tuple[int | None, ...] = _NO_STRIDES[:3]
    else:
        sinks_strides = (0, *_strides(sinks), 0) if sinks.dim() == 1 else _strides(sinks)
    tensors = (q, k, v, out, lse, *call.pointers, sinks, inputs.dropout_seed)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.strides, *sinks_strides)
    arguments = (*tensors, *strides, nheads, group, seqlen_q, seqlen_k, n_heads, section, *_numbers(call))
    key = (q.device.index, *strides, *call.dtypes, None if sinks is None else sinks.dtype)
    return Launch(plan, _cdiv(seqlen_q, plan.tile.block_m) * n_heads, arguments, len(tensors), key)


def preprocess_launch(
    call: Call, out: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, summary: Tensor | None
) -> Launch:
    """The launch that computes ``delta``, and with row intervals the summaries of the query tiles of dkdv."""
    batch, nheads, _, seqlen_q, seqlen_k = call.sizes
    plan, n_heads = _plan("preprocess", call.structure), batch * nheads
    tensors = (out, dout, lse, delta, summary, call.pointers[0])
    strides = (*dout.stride()[:3], *call.strides[:3])
    arguments = (*tensors, *strides, nheads, seqlen_q, seqlen_k, n_heads, *call.window)
    key = (out.device.index, *strides)
    return Launch(plan, _cdiv(seqlen_q, plan.tile.block_m) * n_heads, arguments, len(tensors), key)


def dq_launch(call: Call, dout: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dscores: Tensor | None) -> Launch:
    """The launch that computes ``dq`` and, where ``dscores`` is given, the gradient of the scores."""
    inputs = call.inputs
    q, k, v = inputs.query, inputs.key, inputs.value
    batch, nheads, nheads_k, seqlen_q, seqlen_k = call.sizes
    plan = _plan("dq", call.structure, dscores is not None)
    group, n_heads = nheads // nheads_k, batch * nheads
    section = group * _section(seqlen_k, (k.shape[3] + v.shape[3]) * k.itemsize, batch * nheads_k)
    tensors = (q, k, v, dout, lse, delta, dq, dscores, *call.pointers, inputs.dropout_seed)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *call.strides)
    arguments = (*tensors, *strides, nheads, group, seqlen_q, seqlen_k, n_heads, section, *_numbers(call))
    key = (q.device.index, *strides, *call.dtypes)  # that of dscores follows from the bias's
    return Launch(plan, _cdiv(seqlen_q, plan.tile.block_m) * n_heads, arguments, len(tensors), key)


def dkdv_splits(call: Call) -> int:
    """Into how many parts the query heads of a group are dealt so that key tiles fill the device; divides the group."""
    batch, nheads, nheads_k, _, seqlen_k = call.sizes
    group = nheads // nheads_k
    programs = _cdiv(seqlen_k, _plan("dkdv", call.structure).tile.block_n) * batch * nheads_k
    for splits in range(1, group):
        if group % splits == 0 and programs * splits >= call.structure.device.n_cores:
            return splits
    return group


def dkdv_launch(
    call: Call,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    summary: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    n_splits: int,
) -> Launch:
    """The launch that computes ``dk`` and ``dv``, ``(n_splits, batch, seqlen_k, nheads_k, head dim)`` each."""
    inputs = call.inputs
    q, k, v = inputs.query, inputs.key, inputs.value
    batch, nheads, nheads_k, seqlen_q, seqlen_k = call.sizes
    plan = _plan("dkdv", call.structure)
    group, n_heads = nheads // nheads_k, n_splits * batch * nheads_k
    heads_per_split = group // n_splits
    section = _section(seqlen_q, heads_per_split * (q.shape[3] + v.shape[3]) * q.itemsize, n_heads)
    intervals, key_mask, _, *rest = call.pointers
    tensors = (q, k, v, dout, lse, delta, dk, dv, summary, intervals, key_mask, *rest, inputs.dropout_seed)
    strides = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *call.strides[:5], *call.strides[6:]
    )  # fmt: skip
    sizes = (nheads, group, seqlen_q, seqlen_k, n_heads, section, heads_per_split, n_splits)
    arguments = (*tensors, *strides, *sizes, *_numbers(call))
    key = (q.device.index, *strides, *call.dtypes, dk.dtype)
    return Launch(plan, _cdiv(seqlen_k, plan.tile.block_n) * n_heads, arguments, len(tensors), key)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` (batch, seqlen_q, nheads, v_head_dim) and ``lse`` (batch, nheads, seqlen_q) of one call."""
    call = prepare(inputs)
    batch, nheads, _, seqlen_q, _ = call.sizes
    q = inputs.query
    out = torch.empty((batch, seqlen_q, nheads, call.structure.v_head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    if lse.numel():
        try:
            forward_launch(call, out, lse).run()
        except MiscompiledError as fault:
            be_careful(call.structure, fault)
            return forward(inputs)
    return out, lse


class Gradients(NamedTuple):
    """``dscores`` is (batch, nheads, seqlen_q, seqlen_k) where asked for; ``delta`` fp32 (batch, nheads, seqlen_q)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dscores: Tensor | None
    delta: Tensor


def dscores_dtype(bias: Tensor) -> torch.dtype:
    """What the gradient of the scores is stored in: as eager does, in half precision where the bias is."""
    return bias.dtype if bias.dtype in (torch.float16, torch.bfloat16) else torch.float32


def backward(inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, *, bias_grad: bool) -> Gradients:
    """Gradients of one call; ``bias_grad`` asks for that of the scores (before the scale) too."""
    call = prepare(inputs)
    batch, nheads, nheads_k, seqlen_q, seqlen_k = call.sizes
    q, s = inputs.query, call.structure
    device = q.device
    dq = torch.empty((batch, seqlen_q, nheads, s.head_dim), dtype=q.dtype, device=device)
    delta = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=device)
    dscores = None
    if bias_grad:
        assert inputs.mask.bias is not None
        dtype = dscores_dtype(inputs.mask.bias)
        dscores = torch.zeros((batch, nheads, seqlen_q, seqlen_k), dtype=dtype, device=device)
    splits = dkdv_splits(call)
    parts_dtype = q.dtype if splits == 1 else torch.float32
    dk = torch.empty((splits, batch, seqlen_k, nheads_k, s.head_dim), dtype=parts_dtype, device=device)
    dv = torch.empty((splits, batch, seqlen_k, nheads_k, s.v_head_dim), dtype=parts_dtype, device=device)
    if lse.numel():
        summary = None
        if s.has_intervals:
            n_tiles = _cdiv(seqlen_q, _plan("dkdv", s).tile.block_m)
            summary = torch.empty((batch, 4, n_tiles), dtype=torch.int32, device=device)
        try:
            preprocess_launch(call, out, dout, lse, delta, summary).run()
            dq_launch(call, dout, lse, delta, dq, dscores).run()
            if seqlen_k:
                dkdv_launch(call, dout, lse, delta, summary, dk, dv, splits).run()
        except MiscompiledError as fault:
            be_careful(s, fault)
            return backward(inputs, out, lse, dout, bias_grad=bias_grad)
    else:
        dk.zero_()
        dv.zero_()
    if splits == 1:
        return Gradients(dq, dk[0], dv[0], dscores, delta)
    return Gradients(dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype), dscores, delta)
