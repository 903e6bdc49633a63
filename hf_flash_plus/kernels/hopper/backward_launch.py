"""From an attention call to the launches of the Hopper backward kernels: :func:`backward`, :func:`backward_reason`.

Query rows that the flags (causal, window) let see nothing, and keys that they hide from every row, are cut off here:
they lie at the front, where they have gradients of 0. So the kernels meet such rows and keys with row intervals only.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import settings
from ...inputs import AttentionInputs
from ...interval_cache import shared
from ...masks import AttentionMask
from .. import tiles
from . import backward_config, backward_dq_launch, forward_launch, replay
from .backward_config import Config
from .launching import Launch, Plan, descriptor, layout_reason, stride_classes

#: q, dout and the sums of dq of the heads in flight should stay in the L2 cache together.
L2_BUDGET = 32 * 2**20
#: Programs in flight together under row intervals, for each core. By simulation, padded B8 S2048: D128 H16/4 420 -> 335
#: us, D64 H32/8 396 -> 373; 0 to 2 percent without groups. One H200, with 1, 2, 4, 8: padded B8 S2048 D128 H16/4 461,
#: 427, 459, 460 us and H16 440, 439, 484, 592; one list for all heads (8 documents in 16384) D128 H16/4 838, 824, 797,
#: 797, H16 820, 809, 808, 796, D64 H32/8 965, 956, 932, 881.
LISTED_WAVES = 2
LISTED_WAVES_OF_ONE_LIST = 8
LAST_FIRST = True  # dq's sums are converted in the order opposite to that in which the main kernel makes them
#: From how many programs of one key head to a core on a program computes two heads, and four: with fewer, the last
#: ones run alone for long. One H200, D64: under a diagonal, where programs differ, four heads pay at 31. Under row
#: intervals, where they differ more, two pay at 31 (padded B8 S2048: 284 and 297 TFLOP/s), and at 62 two, not four
#: (389, 400, 391).
UNIT_WAVES = {"full": (6, 12), "diagonal": (14, 28), "listed": (28, 100)}
PADDED = 128  # rows are padded to a multiple of this
NO_BOUND = 2**30

#: How dq comes about: from a kernel of its own (bitwise repeatable), or by additions in any order.
MODES = {"split": 0, "unordered": 1}

#: Up to this many keys a row, by padded head dimension, a call is "split", and so repeatable, also where nobody asked
#: for that: it costs less than 10 percent there. Microseconds of the whole backward on an H200, split / unordered:
#: D128 B64 H16 S256 causal 330 / 342, full 356 / 378; B32 S512 causal 411 / 396, full 513 / 488; D64 H32 S256 causal
#: 417 / 410, full 429 / 436; S512 causal 511 / 481, full 627 / 583. More under row intervals: padded S512 369 / 329
#: and 476 / 403. (On an H100 split was up to 18 percent faster at S512.) Wider heads have no kernel for dq.
SPLIT_KEYS = {128: 512, 64: 256}

LOG2E = 1.4426950408889634


class Gradients(NamedTuple):
    """dq, dk and dv like q, k and v, contiguous; ``delta`` fp32 (batch, nheads, seqlen_q)."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    delta: Tensor


@cache
def gluon_reason() -> str | None:
    """Why the installed Triton cannot compile these kernels; None if it can."""
    reason = forward_launch.gluon_reason()
    if reason is not None:
        return reason
    try:
        from triton._C.libtriton import gluon_ir

        from . import backward  # noqa: F401

        gluon_ir.GluonOpBuilder.create_async_tma_reduce  # noqa: B018  (what `backward.reduce_add` calls)
    except Exception as error:  # experimental: what is there may differ between builds of one version
        return f"the Gluon of this Triton lacks something ({type(error).__name__}: {error})"
    return None


@cache
def _device_reason(device: torch.device) -> str | None:
    if device.type == "meta":  # `explain` asks about calls that have no data, for the device at hand
        return forward_launch.available_reason() or gluon_reason()
    if device.type != "cuda" or torch.version.hip:
        return f"needs a Hopper GPU, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"needs compute capability 9.x, the device has {capability[0]}.{capability[1]}"
    return gluon_reason()


@cache
def _structure_reason(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, dropout: bool, alibi: bool, key_mask: bool, bias: bool,
    repeatable: bool,
) -> str | None:  # fmt: skip
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes float16 and bfloat16, not {dtype}"
    dims = f"{head_dim} and {v_head_dim}"
    if max(head_dim, v_head_dim) > 256 or head_dim % 8 or v_head_dim % 8:
        return f"computes head dimensions that are multiples of 8 up to 256, not {dims}"
    width = backward_config.widths(head_dim, v_head_dim)[0]
    if width > 128 and repeatable:
        return f"computes repeatable gradients at head dimensions up to 128, not {dims}"
    for present, what in ((dropout, "dropout"), (alibi, "ALiBi"), (key_mask, "a key mask"), (bias, "a dense bias")):
        if present:
            return f"computes no {what}"
    return None


def _repeatable(inputs: AttentionInputs) -> bool:
    """Whether gradients have to be bitwise repeatable."""
    return inputs.deterministic or torch.are_deterministic_algorithms_enabled() or settings.deterministic()


def backward_reason(inputs: AttentionInputs) -> str | None:
    """Why the Hopper kernels do not compute the gradients of a call; None if they do."""
    q, mask = inputs.query, inputs.mask
    batch, seqlen_q, nheads, head_dim = q.shape
    seqlen_k, _, v_head_dim = inputs.value.shape[1:]
    reason = _device_reason(q.device) or _structure_reason(
        q.dtype, head_dim, v_head_dim, inputs.dropout_p > 0.0, inputs.alibi_slopes is not None,
        mask.key_mask is not None, mask.bias is not None, _repeatable(inputs),
    )  # fmt: skip
    if reason:
        return reason
    if not inputs.softmax_scale > 0.0:
        return f"computes positive softmax scales, not {inputs.softmax_scale}"
    if min(batch, seqlen_q, seqlen_k) == 0:
        return "computes no empty calls"
    if batch * nheads * (seqlen_q + PADDED) >= 2**31 or (seqlen_q + PADDED) * (seqlen_k + PADDED) >= 2**38:
        return f"computes no more than 2^31 rows of all heads, got {batch} x {nheads} x {seqlen_q}"
    for name, tensor in (("q", q), ("k", inputs.key), ("v", inputs.value)):
        reason = layout_reason(tensor)
        if reason:
            return f"{name}: {reason}"
    return None


def _keys_of_a_row(inputs: AttentionInputs) -> int:
    """How many keys rows see on average, by the flags; with row intervals twice what there are (:data:`SPLIT_KEYS`)."""
    mask, rows, keys = inputs.mask, inputs.query.shape[1], inputs.key.shape[1]
    if mask.row_intervals is not None:
        return 2 * keys
    left, right = mask.window
    if mask.causal:
        right = 0
    seen = keys if right < 0 else max(keys - rows // 2, keys // 2)
    return min(seen, left + max(right, 0) + 1) if left >= 0 else seen


def mode_for(inputs: AttentionInputs) -> str:
    """The mode of a call, see :data:`MODES`."""
    if _repeatable(inputs):
        return "split"
    dim, _ = backward_config.widths(inputs.query.shape[3], inputs.value.shape[3])
    return "split" if dim in SPLIT_KEYS and _keys_of_a_row(inputs) <= SPLIT_KEYS[dim] else "unordered"


class Bounds(NamedTuple):
    """What the flags say of a call without row intervals.

    ``first_row`` rows and ``first_key`` keys at the front take no part; of those that remain, row i sees keys from
    ``i + left`` to ``i + right``, and ``has_left``, ``has_right`` say whether that is any restriction.
    """

    first_row: int
    first_key: int
    left: int
    right: int
    has_left: bool
    has_right: bool


def flag_bounds(mask: AttentionMask, seqlen_q: int, seqlen_k: int) -> Bounds:
    """The :class:`Bounds` of the causal flag and the window."""
    left, right = mask.window
    if mask.causal:
        right = 0
    offset = seqlen_k - seqlen_q
    limit = seqlen_q + seqlen_k
    left, right = min(left, limit), min(right, limit)
    first_row = max(0, -offset - right) if right >= 0 else 0
    first_row = min(first_row, seqlen_q)
    # The first row that takes part sees no key before this.
    first_key = max(0, first_row + offset - left) if left >= 0 else 0
    first_key = min(first_key, seqlen_k)
    offset += first_row - first_key
    rows, keys = seqlen_q - first_row, seqlen_k - first_key
    has_left = left >= 0 and rows - 1 + offset - left > 0
    has_right = right >= 0 and offset + right < keys - 1
    return Bounds(
        first_row,
        first_key,
        offset - left if has_left else -NO_BOUND,
        offset + right if has_right else NO_BOUND,
        has_left,
        has_right,
    )


class Parts(NamedTuple):
    """A call cut to what takes part, with everything that its launches share."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor
    sizes: tuple[int, int, int, int, int]  # batch, nheads, nheads_k, rows, keys
    bounds: Bounds
    intervals: Tensor | None
    window: tuple[int, int]
    scale: float
    softcap: float
    config: Config
    block_d: int  # q's and k's width, and that of the sums of dq
    v_block_d: int
    mode: int
    splits: int
    n_tiles_q: int
    n_tiles_k: int


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def take_apart(
    inputs: AttentionInputs, out: Tensor, lse: Tensor, dout: Tensor, mode: str, config: Config | None = None
) -> Parts | None:
    """The :class:`Parts` of a call; None where nothing takes part."""
    q, k, v, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    seqlen_q, seqlen_k, window = q.shape[1], k.shape[1], (-1, -1)
    if mask.row_intervals is None:
        bounds = flag_bounds(mask, seqlen_q, seqlen_k)
    else:
        bounds = Bounds(0, 0, -NO_BOUND, NO_BOUND, False, False)
        left, right = mask.window[0], 0 if mask.causal else mask.window[1]
        window = (min(left, seqlen_q + seqlen_k), min(right, seqlen_q + seqlen_k))
    first_row, first_key = bounds.first_row, bounds.first_key
    if first_row:
        q, out, dout, lse = q[:, first_row:], out[:, first_row:], dout[:, first_row:], lse[:, :, first_row:]
    if first_key:
        k, v = k[:, first_key:], v[:, first_key:]
    batch, rows, nheads, _ = q.shape
    _, keys, nheads_k, v_head_dim = v.shape
    if min(rows, keys) <= 0:
        return None
    dim, v_dim = backward_config.widths(q.shape[3], v_head_dim)
    if config is None:
        listed = mask.row_intervals is not None
        masking = backward_config.mask_of(listed, bounds.has_left, bounds.has_right)
        config = backward_config.select(dim, MODES[mode] > 0, masking, listed, keys)
    n_tiles_k, splits, group = _cdiv(keys, config.keys), 1, nheads // nheads_k
    # Query heads of a group are dealt to several programs where there would be too few to fill the device.
    n_cores = tiles.device_info(q.device).n_cores
    while splits < group and (group % splits or n_tiles_k * batch * nheads_k * splits < n_cores):
        splits += 1
    return Parts(
        q, k, v, out, dout, lse, (batch, nheads, nheads_k, rows, keys), bounds, mask.row_intervals, window,
        float(inputs.softmax_scale), float(inputs.softcap), config, dim, v_dim, MODES[mode], splits,
        _cdiv(rows, PADDED) * (PADDED // config.block_m), n_tiles_k,
    )  # fmt: skip


class Lists(NamedTuple):
    """What row intervals come to, see ``backward_prepare``."""

    row_bounds: Tensor
    summary: Tensor
    entries: Tensor
    counts: Tensor


class Buffers(NamedTuple):
    """What the launches of a call hand on to each other."""

    start: Tensor
    minus_delta: Tensor
    dq_sums: Tensor | None
    row_bounds: Tensor | None
    summary: Tensor | None
    entries: Tensor | None
    counts: Tensor | None


def allocate(parts: Parts, lists: Lists | None = None) -> Buffers:
    """The buffers of a call; ``lists``: those that an earlier call has filled."""
    device = parts.q.device
    batch, nheads = parts.sizes[:2]
    n_rows = batch * nheads * parts.n_tiles_q * parts.config.block_m

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    sums = new(torch.float32, n_rows * parts.block_d) if parts.mode else None
    if parts.intervals is not None and lists is None:
        n_lists = parts.intervals.shape[0]
        lists = Lists(
            new(torch.int32, n_lists, 2, parts.n_tiles_q * parts.config.block_m),
            new(torch.int32, n_lists, 5, parts.n_tiles_q),
            new(torch.int32, n_lists, parts.n_tiles_k, parts.n_tiles_q + 2),
            new(torch.int32, n_lists, parts.n_tiles_k),
        )
    start, minus_delta = new(torch.float32, n_rows), new(torch.float32, n_rows)
    return Buffers(start, minus_delta, sums, *(lists or (None, None, None, None)))


#: As for the forward kernel: the default of Triton up to 3.9.
_COMPILER = {"num_warps": 4, "enable_fp_fusion": True}


@cache
def _plan(kind: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Plan:
    from . import backward, backward_parts, backward_prepare, backward_wide

    kernels = {
        "rows": backward_prepare.row_numbers,
        "lists": backward_prepare.query_tile_lists,
        "main": backward.attention_backward,
        "wide": backward_wide.attention_backward_wide,
        "part": backward_parts.attention_backward_part,
        "dq_rows": backward_prepare.dq_rows,
    }
    return Plan(kernels[kind], {**_COMPILER, **dict(zip(names, values))})


def _launch(
    kind: str, n_programs: int, arguments: tuple[Any, ...], options: dict[str, Any], key: tuple[Any, ...]
) -> Launch:
    return Launch(_plan(kind, tuple(options), tuple(options.values())), n_programs, arguments, key)


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides, with 0 where a dimension is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride()))


def rows_launch(parts: Parts, buffers: Buffers, delta: Tensor, summarize: bool = True) -> Launch:
    """The launch of ``row_numbers``; ``delta`` begins at the first row that takes part.

    ``summarize``: where there are row intervals, what rows see has to be worked out, too.
    """
    batch, nheads, _, rows, keys = parts.sizes
    intervals = parts.intervals
    n_lists = 0 if intervals is None or not summarize else intervals.shape[0]
    interval_strides = (None,) * 3 if intervals is None else _strides(intervals)
    strides = (*parts.out.stride()[:3], *parts.dout.stride()[:3])
    arguments = (
        parts.out, parts.dout, parts.lse, delta, buffers.start, buffers.minus_delta, buffers.dq_sums,
        buffers.row_bounds, buffers.summary, intervals, *strides,
        parts.lse.stride(1), *interval_strides, nheads, rows, keys, parts.n_tiles_q, n_lists, *parts.window,
        -LOG2E if backward_config.base2(parts.config, parts.softcap > 0.0) else -1.0 / parts.scale,
    )  # fmt: skip
    options = {
        "V_HEAD_DIM": parts.v.shape[3],
        "HAS_LEFT": parts.window[0] >= 0,
        "HAS_RIGHT": parts.window[1] >= 0,
        "HAS_INTERVALS": intervals is not None,
        "ZERO_DQ": parts.mode == MODES["unordered"],
        "BLOCK_M": parts.config.block_m,
        "BLOCK_D": parts.block_d,
        "BLOCK_DV": tiles.padded(parts.v.shape[3]),
    }
    # dout is aligned, see backward.
    key = (parts.q.device.index, parts.q.dtype, parts.out.data_ptr() & 15 == 0, *stride_classes(strides))
    return _launch("rows", batch * nheads * parts.n_tiles_q, arguments, options, key)


def lists_launch(parts: Parts, buffers: Buffers) -> Launch:
    """The launch of ``query_tile_lists``; with row intervals only."""
    assert parts.intervals is not None
    arguments = (
        buffers.summary, buffers.entries, buffers.counts, parts.sizes[4], parts.n_tiles_q, parts.n_tiles_k,
    )  # fmt: skip
    options = {"MASKED_FIRST": parts.config.halves, "BLOCK_N": parts.config.keys, "BLOCK": 128, "num_warps": 1}
    n_programs = parts.intervals.shape[0] * parts.n_tiles_k
    return _launch("lists", n_programs, arguments, options, (parts.q.device.index,))


@cache
def _layouts() -> tuple[Any, Any, Any]:
    """How tiles, and the numbers of rows, lie in shared memory."""
    from triton.experimental.gluon import language as gl

    return (
        gl.NVMMASharedLayout(128, 16, rank=4),
        gl.NVMMASharedLayout(0, 32, rank=1),
        gl.NVMMASharedLayout(0, 32, rank=2),
    )


def _descriptor(tensor: Tensor, block: int, dim: int) -> Any:
    """A (batch, seqlen, heads, head dim) tensor for copies of ``block`` rows of one head, ``dim`` wide."""
    return descriptor(tensor, [1, block, 1, dim], _layouts()[0])


def _row_descriptor(tensor: Tensor, block: int) -> Any:
    return descriptor(tensor.view(-1), [block], _layouts()[1])


def _sums_descriptor(sums: Tensor, rows: int = 64) -> Any:
    """The sums of dq for additions of whole tiles, which are 32 KiB each, or of smaller pieces."""
    return descriptor(sums.view(-1, 128), [rows, 128], _layouts()[2])


def _section(parts: Parts) -> int:
    """How many (key) heads have programs in flight together."""
    batch, nheads, nheads_k, rows, _ = parts.sizes
    heads = nheads // nheads_k // parts.splits
    of_row = (parts.q.shape[3] + parts.v.shape[3]) * 2 + (parts.block_d * 4 if parts.mode else 0)
    n_heads = parts.splits * batch * nheads_k
    section = max(1, min(n_heads, L2_BUDGET // (rows * heads * of_row)))
    # Under a diagonal each section begins with long programs and ends with short ones. With as many programs as cores
    # the next section's long ones follow on this one's short ones. With fewer, as several heads to a program leave them
    # of what fits the cache, or a small section at the end, long ones come last. One H200, B4 S4096 D128: H32/8 525 ->
    # 540 TFLOP/s, H32/4 473 -> 498 (538 without groups); D64 H32/8 464 -> 457. Twice as many heads, or half: slower.
    # Under row intervals programs differ more, and many may have no work.
    listed = parts.intervals is not None
    if listed or (parts.bounds.has_right and not parts.bounds.has_left):
        waves = 1
        if parts.intervals is not None:
            waves = LISTED_WAVES if parts.intervals.shape[0] > 1 else LISTED_WAVES_OF_ONE_LIST
        n_programs = waves * tiles.device_info(parts.q.device).n_cores
        section = max(section, n_programs // parts.n_tiles_k)
        even = (size for size in range(section, 2 * section + 1) if n_heads % size == 0)
        section = n_heads if section >= n_heads else next(even, section)
    return section


def _units(parts: Parts, section: int) -> int:
    """How many key heads a program computes one after the other: between them it loses less time than programs do."""
    batch, _, nheads_k, _, _ = parts.sizes
    kind = "listed" if parts.intervals is not None else "diagonal" if parts.bounds.has_right else "full"
    waves = parts.n_tiles_k * batch * nheads_k / tiles.device_info(parts.q.device).n_cores
    two, four = UNIT_WAVES[kind]
    units = min(parts.config.units, 4 if waves >= four else 2 if waves >= two else 1)
    while units > 1 and (parts.splits > 1 or nheads_k % units or section % units):
        units //= 2
    return units


def main_launch(
    parts: Parts, buffers: Buffers, dk: Tensor, dv: Tensor, section: int | None = None, with_dk: bool = True
) -> Launch:
    """The launch of the Gluon kernel; ``dk``, ``dv``: (splits, batch, keys, nheads_k, dim), from the first key that
    takes part on. ``with_dk``: which of two kernels it is, if the configuration says that there are two."""
    batch, nheads, nheads_k, _, keys = parts.sizes
    config, bounds, mode = parts.config, parts.bounds, parts.mode
    listed = parts.intervals is not None
    group = nheads // nheads_k
    heads_per_split = group // parts.splits
    grouped = heads_per_split > 1
    n_heads = parts.splits * batch * nheads_k
    mask = backward_config.mask_of(listed, bounds.has_left, bounds.has_right)
    if listed and config.halves:
        mask = 1  # the lists begin with what masks
    list_stride = 0 if parts.intervals is None or parts.intervals.shape[0] == 1 else parts.n_tiles_k
    softcap = parts.softcap
    block_m, keys_n = config.block_m, config.keys
    wide = parts.block_d > 128
    dim, v_dim = (64, 64) if wide else (parts.block_d, parts.v_block_d)  # of a copy
    row_bounds = buffers.row_bounds if buffers.row_bounds is not None else buffers.start  # unused without
    section = _section(parts) if section is None else section
    units = _units(parts, section)
    sums: tuple[Any, ...] = (None if buffers.dq_sums is None else _sums_descriptor(buffers.dq_sums),)
    if wide:
        sums = (*sums, _sums_descriptor(buffers.dq_sums, 32) if parts.block_d == 192 else None)
    if config.parts:
        sums = (_sums_descriptor(buffers.dq_sums, 16), None)
    arguments = (
        _descriptor(parts.q, block_m, dim), _descriptor(parts.k, keys_n, dim), _descriptor(parts.v, keys_n, v_dim),
        _descriptor(parts.dout, block_m, v_dim), _row_descriptor(buffers.start, block_m),
        _row_descriptor(buffers.minus_delta, block_m), _row_descriptor(row_bounds, block_m),
        *sums, dk, dv, buffers.entries, buffers.counts, buffers.summary, list_stride, nheads, nheads_k,
        heads_per_split, parts.splits, keys, dk.stride(1) // dk.stride(2), dk.stride(0) // dk.stride(2),
        parts.n_tiles_q, n_heads // units, section // units, bounds.right, bounds.left,
        parts.scale, parts.scale * LOG2E, 2.0 * LOG2E * parts.scale / softcap if softcap else 0.0, softcap * LOG2E,
    )  # fmt: skip
    options = {
        "HEAD_DIM": parts.q.shape[3],
        "V_HEAD_DIM": parts.v.shape[3],
        "BLOCK_M": block_m,
        "HAS_LEFT": bounds.has_left,
        "HAS_RIGHT": bounds.has_right,
        "LISTED": listed,
        "GROUPED": grouped,
        "HAS_SOFTCAP": softcap > 0.0,
        "TAIL": keys % config.keys != 0,
        "ROTATE": config.rotate and mask == 0 and mode == MODES["unordered"],
        "OTHER_REGISTERS": config.other_registers,
        "num_warps": 8,
    }
    # The diagonal runs through the corners of tiles where row i sees keys up to i. Only there it is known how many
    # steps mask; those get a loop of their own.
    corners = mask == 1 and bounds.right == 0
    if config.parts:
        assert mode and not listed, "no row intervals here"
        kind = "part"
        for name in ("BLOCK_M", "LISTED"):
            del options[name]
        q_stages, dout_stages = (config.stages, config.dout_stages) if with_dk else config.dv_stages
        options |= {"WIDTH": parts.block_d, "Q_STAGES": q_stages, "DOUT_STAGES": dout_stages, "WITH_DK": with_dk}
        options["MASK"] = 2 if mask == 1 and not corners else mask
    elif wide:
        assert mode, "at these head dimensions dq has no kernel of its own"
        kind = "wide"
        more = parts.block_d % 128
        options |= {"KEYS": keys_n, "WIDE": parts.block_d - more, "MORE": more, "V_WIDE": parts.v_block_d}
        options |= {"NARROW_FIRST": config.narrow_first, "Q_STAGES": config.stages, "DOUT_STAGES": config.dout_stages}
        options |= {"DP_EARLY": config.dp_early, "DV_LATE": config.dv_late}
        options |= {"MASK": 2 if mask == 1 and not corners else mask}
    else:
        kind = "main"
        options |= {"BLOCK_D": dim, "WITH_DQ": mode == MODES["unordered"]}
        options |= {"STAGES": config.stages, "MASK": mask, "ALIGNED": corners, "HALVES": config.halves}
        options |= {"UNITS": units}
    key = (parts.q.device.index, parts.q.dtype, dk.dtype)
    return _launch(kind, parts.n_tiles_k * n_heads // units, arguments, options, key)


def dq_rows_launch(parts: Parts, buffers: Buffers, dq: Tensor) -> Launch:
    """The launch that brings the sums of dq into rows; ``dq`` begins at the first row that takes part."""
    batch, nheads, _, rows, _ = parts.sizes
    arguments = (
        buffers.dq_sums, buffers.start, buffers.summary, dq, *dq.stride()[:3], nheads, rows, parts.n_tiles_q,
        0 if parts.intervals is None else parts.intervals.shape[0], parts.scale,
    )  # fmt: skip
    options = {
        "HEAD_DIM": parts.q.shape[3],
        "HAS_INTERVALS": parts.intervals is not None,
        "LAST_FIRST": LAST_FIRST,
        "BLOCK_M": parts.config.block_m,
        "BLOCK_D": parts.block_d,
    }
    n_parts = parts.config.block_m * parts.block_d // 4096
    key = (parts.q.device.index, parts.q.dtype, *stride_classes(dq.stride()[:3]))
    return _launch("dq_rows", batch * nheads * parts.n_tiles_q * n_parts, arguments, options, key)


_replays: dict[tuple[Any, ...], replay.Replay] = {}
_MOST_REPLAYS = 1024


def _likeness(inputs: AttentionInputs, given: tuple[Tensor | None, ...], mode: str) -> tuple[Any, ...] | None:
    """All that the launches of a call depend on but addresses; None on a device that nothing is launched on."""
    q, mask = inputs.query, inputs.mask
    if q.device.type != "cuda":
        return None
    layouts = tuple(None if tensor is None else (tensor.shape, tensor.stride()) for tensor in given)
    return (layouts, q.dtype, q.device, mask.causal, mask.window, inputs.softmax_scale, inputs.softcap, mode)


def _lists_key(inputs: AttentionInputs, mode: str) -> tuple[Any, ...]:
    """What :class:`Lists` depend on beside the row intervals: lengths, flags, and what tiles depend on."""
    q, v, mask = inputs.query, inputs.value, inputs.mask
    return ("hopper backward", q.shape[1], v.shape[1], mask.causal, mask.window, q.shape[3], v.shape[3], mode)


def _remember(
    likeness: tuple[Any, ...],
    launches: list[Launch],
    given: tuple[Tensor | None, ...],
    results: tuple[Tensor, ...],
    buffers: Buffers,
    kept: tuple[Tensor, ...],
) -> None:
    elsewhere = {id(tensor) for tensor in (*results, *kept)}
    own = tuple(buffer for buffer in buffers if buffer is not None and id(buffer) not in elsewhere)
    found = replay.record(launches, given, results, own, kept)
    if found is not None:
        if len(_replays) >= _MOST_REPLAYS:
            _replays.clear()
        _replays[likeness] = found


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    softmax_lse: Tensor,
    dout: Tensor,
    *,
    mode: str | None = None,
    config: Config | None = None,
    section: int | None = None,
) -> Gradients:
    """Gradients of a call that :func:`backward_reason` has nothing against.

    Args:
        out: the forward's output, (batch, seqlen_q, nheads, v_head_dim).
        softmax_lse: natural-log fp32 (batch, nheads, seqlen_q), contiguous; -inf on rows that see nothing.
        dout: gradient of ``out``, of any strides.
        mode: one of :data:`MODES`; None: :func:`mode_for`.
        config, section: for tuning.
    """
    q, v = inputs.query, inputs.value
    if layout_reason(dout):
        dout = dout.contiguous()
    tuning = config is not None or section is not None
    mode = mode_for(inputs) if mode is None else mode
    given = (q, inputs.key, v, out, dout, softmax_lse, inputs.mask.row_intervals)
    # With row intervals, what follows from them alone may be there from another layer's call, or be kept for the next.
    keeping, lists, lists_key = None, None, None
    if inputs.mask.row_intervals is not None and not tuning:
        keeping = shared(inputs.mask.row_intervals)
        if keeping is not None:
            lists_key = _lists_key(inputs, mode)
            lists = keeping.get(lists_key)
    likeness = None if tuning else _likeness(inputs, given, mode)
    if likeness is not None:
        likeness = (*likeness, keeping is not None, lists is not None)
    known = None if likeness is None else _replays.get(likeness)
    if known is not None:
        results = known((*given, *(lists or ())))
        if results is not None:
            dq, dk, dv, delta, *filled = results
            if filled and keeping is not None:
                keeping[lists_key] = Lists(*filled)
            return Gradients(dq, dk[0], dv[0], delta)
    parts = take_apart(inputs, out, softmax_lse, dout, mode, config)
    batch, seqlen_q, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, v_head_dim = v.shape
    dq = torch.empty((batch, seqlen_q, nheads, head_dim), dtype=q.dtype, device=q.device)
    delta = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    splits = 1 if parts is None else parts.splits
    dtype = q.dtype if splits == 1 else torch.float32
    dk = torch.empty((splits, batch, seqlen_k, nheads_k, head_dim), dtype=dtype, device=q.device)
    dv = torch.empty((splits, batch, seqlen_k, nheads_k, v_head_dim), dtype=dtype, device=q.device)
    if parts is None:
        return Gradients(dq.zero_(), dk[0].zero_(), dv[0].zero_(), delta.zero_())
    first_row, first_key = parts.bounds.first_row, parts.bounds.first_key
    if first_row:
        dq[:, :first_row].zero_()
        delta[:, :, :first_row].zero_()
    if first_key:
        dk[:, :, :first_key].zero_()
        dv[:, :, :first_key].zero_()
    buffers = allocate(parts, lists)
    launches = [rows_launch(parts, buffers, delta[:, :, first_row:], lists is None)]
    if parts.intervals is not None and lists is None:
        launches.append(lists_launch(parts, buffers))
    launches.append(main_launch(parts, buffers, dk[:, :, first_key:], dv[:, :, first_key:], section))
    if parts.config.parts:
        launches.append(main_launch(parts, buffers, dk[:, :, first_key:], dv[:, :, first_key:], section, False))
    if parts.mode:
        launches.append(dq_rows_launch(parts, buffers, dq[:, first_row:]))
    for each in launches:
        each.run()
    made: tuple[Tensor, ...] = ()
    if keeping is not None and lists is None:
        assert buffers.row_bounds is not None and buffers.summary is not None
        assert buffers.entries is not None and buffers.counts is not None
        made = keeping[lists_key] = Lists(buffers.row_bounds, buffers.summary, buffers.entries, buffers.counts)
    if parts.mode:
        if likeness is not None and splits == 1 and not (first_row or first_key):
            _remember(likeness, launches, given, (dq, dk, dv, delta, *made), buffers, lists or ())
    else:
        summary, last = backward_dq_launch.prepare(inputs, parts, buffers, dq[:, first_row:])
        if summary is not None:
            summary.run()
        last.run()
    if splits == 1:
        return Gradients(dq, dk[0], dv[0], delta)
    return Gradients(dq, dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype), delta)
