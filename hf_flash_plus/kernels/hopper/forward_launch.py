"""From one call to a launch of the Hopper forward kernel.

What depends on the structure of a call only is computed once (:class:`_Plan`). A call then makes four tensor
descriptors, allocates its outputs and launches. Later calls that differ from it in their addresses only do less
(:func:`recall`).
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...inputs import SHORT_QUERY, AttentionInputs
from ...interval_cache import shared
from . import config
from .config import CAUSAL, FULL, INTERVALS, TAIL, WINDOW, Config
from .launching import Launch, Plan, descriptor, layout_reason

if TYPE_CHECKING:
    from .direct import Direct

#: Versions of Triton whose Gluon these kernels were tested with. Gluon is experimental: 3.9 compiles the plain variants
#: (with more spills), and not those for row intervals.
TRITON_VERSIONS = ((3, 6),)

#: Keys and values of the heads in flight should stay in the L2 cache together.
L2_BUDGET = 32 * 2**20

#: Keys and values in flight in the forward: of so many heads that their long and their short tiles mix, and some find
#: their keys in the cache while others wait for memory. (512 causal tokens, head dimension 128, one H100: 261 TFLOP/s
#: with 32 MiB, 303 with 16, 289 with 4.)
IN_FLIGHT = 16 * 2**20

#: So many blocks of keys of each program must be spared for tiles to be cut into parts. (One H200, full calls of 2048
#: tiles: 31 spared +1.8 percent, 62 spared +2.4; 15 nothing; 7 a loss of 3.)
PARTS_FROM = 24

#: Compiler options. Fusion is the default of Triton up to 3.9; the scale belongs into the exponent's multiply-add.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

_LOG2E = 1.4426950408889634
_DTYPES = (torch.float16, torch.bfloat16)


@cache
def available_reason() -> str | None:
    """Why these kernels cannot run here at all; None if they can."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        return f"needs compute capability 9.x (Hopper), this is {capability[0]}.{capability[1]}"
    return gluon_reason()


@cache
def gluon_reason() -> str | None:
    """Why the installed Triton cannot compile these kernels; None if it can."""
    try:
        import triton
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version not in TRITON_VERSIONS:
        tested = ", ".join(f"{major}.{minor}" for major, minor in TRITON_VERSIONS)
        return f"was tested with Triton {tested} only, this is {triton.__version__}"
    try:
        from . import forward, intervals  # noqa: F401
    except Exception as error:  # experimental: what is there may differ between builds of one version
        return f"the Gluon of triton {triton.__version__} lacks something ({type(error).__name__}: {error})"
    return None


@cache
def _structure_reason(dtype: torch.dtype, head_dim: int, v_head_dim: int, nheads: int, nheads_k: int) -> str | None:
    if dtype not in _DTYPES:
        return f"dtype {str(dtype)[6:]}"
    if head_dim % 8 or v_head_dim % 8 or config.head_dim_class(head_dim, v_head_dim) is None:
        return f"head dim {head_dim}" + (f"/{v_head_dim}" if v_head_dim != head_dim else "")
    if nheads_k == 0 or nheads % nheads_k:
        return f"{nheads} heads to {nheads_k} key heads"
    return None


def forward_reason(inputs: AttentionInputs) -> str | None:
    """Why this call is not served; None if it is. (Availability is :func:`available_reason`'s question.)"""
    q, k, v, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    if inputs.dropout_p > 0.0:
        return "dropout"
    if mask.bias is not None:
        return "bias"
    if mask.key_mask is not None:
        return "key_mask"
    if inputs.alibi_slopes is not None:
        return "ALiBi"
    if inputs.sinks is not None and inputs.sinks.dim() != 1:
        return "sinks per row"
    _, seqlen_q, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, v_head_dim = v.shape
    reason = _structure_reason(q.dtype, head_dim, v_head_dim, nheads, nheads_k)
    if reason is not None:
        return reason
    if seqlen_q <= SHORT_QUERY:
        return f"seqlen_q {seqlen_q}"
    if seqlen_k == 0 or q.numel() == 0:
        return "nothing to compute"
    if not inputs.softmax_scale > 0.0:
        return f"softmax_scale {inputs.softmax_scale}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        reason = layout_reason(tensor)
        if reason is not None:
            return f"{name}: {reason}"
    return None


class _Plan(Plan):
    """What all calls of one structure share. Kernels are compiled by device and by the dtype of the sinks.

    Attributes:
        config: what the kernel is compiled for.
        directs: for direct launches of what was compiled, by the same keys.
        blocks, layouts: of the descriptors of q, k, v and out.
    """

    def __init__(self, chosen: Config, dtype: torch.dtype) -> None:
        from triton.experimental.gluon import language as gl

        from .forward import attention_forward

        gl_dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}[dtype]
        c = self.config = chosen
        self.block_m = 64 * c.consumers
        self.blocks = (
            [1, 64, 1, c.chunk_dim],
            [1, c.block_n, 1, c.chunk_dim],
            [1, c.block_n, 1, c.v_dim],
            [1, 64, 1, c.v_dim],
        )
        self.directs: dict[tuple[Any, ...], Direct | None] = {}
        self.layouts = tuple(gl.NVMMASharedLayout.get_default_for(block, gl_dtype) for block in self.blocks)
        piece = gl.NVMMASharedLayout.get_default_for([8, 64], gl_dtype)
        super().__init__(attention_forward, {"C": chosen, "PIECE": piece, **OPTIONS})


@cache
def _plan(
    dims: tuple[int, int],
    mode: int,
    short: bool,
    softcap: bool,
    sinks: bool,
    dtype: torch.dtype,
    halves: bool,
    parts: bool,
) -> _Plan:
    return _Plan(config.select(dims, mode, short, softcap, sinks, halves, parts), dtype)


def _mode(inputs: AttentionInputs, seqlen_q: int, seqlen_k: int) -> int:
    mask = inputs.mask
    if mask.row_intervals is not None:
        return INTERVALS
    if mask.windowed:
        return WINDOW
    if not mask.causal:
        return FULL if seqlen_k % 128 == 0 else TAIL
    offset = seqlen_k - seqlen_q
    return CAUSAL if offset >= 0 and offset % 128 == 0 else WINDOW


def _window(inputs: AttentionInputs, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """``(left, right)`` with causal folded in; a side that is unlimited is wider than anything."""
    mask = inputs.mask
    left, right = mask.window
    if mask.causal:
        right = 0
    limit = seqlen_q + seqlen_k
    return limit if left < 0 else min(left, limit), limit if right < 0 else min(right, limit)


@cache
def _n_programs(device_index: int | None) -> int:
    """One program to a multiprocessor. (On the meta device, for ahead-of-time compilation: an H200's.)"""
    if device_index is None:
        return 132
    return torch.cuda.get_device_properties(device_index).multi_processor_count


#: Two counters; from _FLAGS_AT on a flag for each warpgroup of each program.
_ZEROS, _FLAGS_AT = 1024, 64


def _parts(n_tiles: int, n_blocks: int, n_programs: int) -> tuple[int, int] | None:
    """How many tiles are computed whole, and how many blocks of the others make a chunk, such that every program gets
    about one; None where that gains little. A tile more costs half a block of each program, to leave a part and to add
    it about one block each."""
    size = -(-(n_tiles % n_programs) * n_blocks // n_programs)
    if n_tiles <= n_programs or 2 * n_programs > _ZEROS - _FLAGS_AT or size == 0 or n_blocks - size < PARTS_FROM:
        return None
    return n_tiles - n_tiles % n_programs, size


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """Zeros for the kernel to count with, and for flags; it leaves them at zero.

    Launches of one stream follow one another and share them; streams must not. While a CUDA graph is captured every
    launch gets its own: the graph may be replayed on any stream, beside anything.
    """
    if device.type != "cuda":
        return torch.empty(_ZEROS, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(_ZEROS, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = _lasting_zeros(device)
    return counter


def _lasting_zeros(device: torch.device) -> Tensor:
    """Zeros that may outlive any call, made on the current stream, but in a thread of their own.

    While torch warms up compiled code that is to become CUDA graphs (``mode="reduce-overhead"``), all that its thread
    allocates lies in the graphs' memory: what stayed there would be an error, or be overwritten.
    """
    stream = torch.cuda.current_stream(device)

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(_ZEROS, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


#: Tiles that are listed at a time, and summaries of earlier batch elements that are asked (``intervals.list_tiles``).
_CHUNKS = {"CHUNK": 128, "COUNTED": 1024}


class SummaryLaunch:
    """The launches that summarise row intervals, and where they put what they find.

    What they find is kept for other calls with the same intervals (``interval_cache``), which launch nothing.

    Attributes:
        bounds, summary: what ``intervals.summarize_intervals`` writes.
        listed: what ``intervals.list_tiles`` writes, for a forward kernel that wants it, else None.
        grid, arguments, options: of the first launch; ``list_grid`` and so on, of the second.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        window: tuple[int, int],
        block_m: int,
        block_n: int,
        empty_rows_hide: bool,
        listed: bool = False,
    ) -> None:
        intervals = inputs.mask.row_intervals
        assert intervals is not None
        seqlen_q, seqlen_k = inputs.query.shape[1], inputs.key.shape[1]
        batch = intervals.shape[0]
        tiles = -(-seqlen_q // block_m)
        n_listed = config.LISTED * (1 + batch * tiles) if listed else 0
        split = batch * tiles * 2 * block_m
        self.list_at = split + batch * tiles * config.CARD
        self.size = self.list_at + n_listed
        self.key = ("hopper summary", window, block_m, block_n, empty_rows_hide, listed, seqlen_q, seqlen_k)
        self._kept = shared(intervals)
        memory = None if self._kept is None else self._kept.get(self.key)
        self.known = memory is not None
        if memory is None:
            memory = torch.empty(self.size, dtype=torch.int32, device=intervals.device)
        self.memory = memory
        self.bounds, self.summary = memory[:split], memory[split : self.list_at]
        self.grid = (tiles, batch, 1)
        strides = (intervals.stride(0) if batch > 1 else 0, *intervals.stride()[1:])
        self.arguments = (intervals, self.bounds, self.summary, *strides, seqlen_q, seqlen_k, *window)
        self.options = {
            "ROWS": block_m, "BLOCK_M": 1 << (block_m - 1).bit_length(), "BLOCK_N": block_n,
            "EMPTY_ROWS_HIDE": empty_rows_hide,
        }  # fmt: skip
        self.listed = memory[self.list_at :] if listed else None
        self.list_grid = (batch, 1, 1)
        self.list_arguments = (self.summary, self.listed, tiles)
        self.list_options = {"ROWS": block_m, **_CHUNKS}

    def run(self) -> Any:
        """Launch what is not known, and return what was compiled: None, or as :meth:`warm_up`."""
        from .intervals import list_tiles, summarize_intervals

        if self.known:
            return None
        summarize = summarize_intervals[self.grid](*self.arguments, **self.options, **OPTIONS)
        listing = None
        if self.listed is not None:
            listing = list_tiles[self.list_grid](*self.list_arguments, **self.list_options, **OPTIONS)
        if self._kept is not None:
            self._kept[self.key] = self.memory
        return summarize, listing

    def warm_up(self) -> Any:
        """Compile, and launch nothing. Returns the kernel that summarises, and the one that lists or None."""
        from .intervals import list_tiles, summarize_intervals

        summarize = summarize_intervals.warmup(*self.arguments, **self.options, grid=self.grid, **OPTIONS)
        listing = None
        if self.listed is not None:
            listing = list_tiles.warmup(*self.list_arguments, **self.list_options, grid=self.list_grid, **OPTIONS)
        return summarize, listing


def _section(n_heads: int, bytes_of_keys: int) -> int:
    """How many key heads are in flight together: a number that leaves no small section for the end, whose long tiles
    would begin when the other programs are about to finish."""
    fitting = min(max(1, IN_FLIGHT // bytes_of_keys), n_heads)
    sizes = range(max(1, fitting * 3 // 4), min(fitting * 5 // 4, n_heads) + 1)
    return min(sizes, key=lambda size: (-n_heads % size, abs(size - fitting)))


def _left_size(c: Config, n_programs: int) -> int:
    """Numbers that parts of tiles leave, one of each program."""
    return n_programs * c.consumers * 64 * (c.v_dim + 2)


def prepare(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple[SummaryLaunch | None, Launch]:
    """The launches of a call that ``forward_reason`` has nothing against."""
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, seqlen_q, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, v_head_dim = v.shape
    mode = _mode(inputs, seqlen_q, seqlen_k)
    dims = config.head_dim_class(head_dim, v_head_dim)
    assert dims is not None
    softcap, scale = inputs.softcap, inputs.softmax_scale
    n_heads = batch * nheads
    parts = None
    if mode == FULL and dims == (128, 128) and sinks is None:
        parts = _parts(n_heads * -(-seqlen_q // 128), -(-seqlen_k // 128), _n_programs(q.device.index))
    window = (0, 0) if parts is None else parts
    summary = bounds = tiles = None
    if mode >= WINDOW:
        window = _window(inputs, seqlen_q, seqlen_k)
    halves = mode == WINDOW and config.regular_window(dims, *window, seqlen_k - seqlen_q)
    short = config.is_short(dims, mode, seqlen_q, seqlen_k)
    plan = _plan(dims, mode, short, softcap > 0.0, sinks is not None, q.dtype, halves, parts is not None)
    if mode == INTERVALS:
        summary = SummaryLaunch(inputs, window, plan.block_m, plan.config.block_n, False, plan.config.listed)
        bounds, tiles = summary.bounds, summary.summary if summary.listed is None else summary.listed
    n_tiles = -(-seqlen_q // plan.block_m)
    n_programs = min(_n_programs(q.device.index), n_heads * n_tiles)
    counter = _counter(q.device)
    if parts is not None:
        bounds, tiles = q.new_empty(_left_size(plan.config, n_programs), dtype=torch.float32), counter[_FLAGS_AT:]
    key_bytes = (head_dim + v_head_dim) * q.itemsize
    if plan.config.listed:
        section = max(1, IN_FLIGHT // (plan.config.block_n * key_bytes))
    else:
        together = nheads_k if plan.config.mode == config.INTERVALS else batch * nheads_k
        section = _section(together, seqlen_k * key_bytes) * (nheads // nheads_k)
    factor, cap_factor = (scale * _LOG2E, 0.0)
    if softcap > 0.0:
        # What the kernel's tanh wants: see forward._capped.
        factor, cap_factor = softcap * _LOG2E, scale / softcap
        if q.dtype != torch.bfloat16:
            cap_factor *= 2.0 * _LOG2E
    blocks, layouts = plan.blocks, plan.layouts
    arguments = (
        descriptor(q, blocks[0], layouts[0]),
        descriptor(k, blocks[1], layouts[1]),
        descriptor(v, blocks[2], layouts[2]),
        descriptor(out, blocks[3], layouts[3]),
        None if summary is None else out,
        lse,
        counter,
        bounds,
        tiles,
        sinks,
        seqlen_q,
        seqlen_k,
        nheads,
        nheads // nheads_k,
        n_heads,
        section,
        *window,
        0 if summary is None or inputs.mask.row_intervals.shape[0] == 1 else 1,  # type: ignore[union-attr]
        0 if sinks is None else sinks.stride(0),
        factor,
        cap_factor,
    )
    key = (q.device.index, None if sinks is None else sinks.dtype)
    return summary, Launch(plan, n_programs, arguments, key)


def forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """``out`` (batch, seqlen_q, nheads, v_head_dim) and ``lse`` (batch, nheads, seqlen_q) of one call.

    The current device must be that of the tensors.
    """
    q = inputs.query
    batch, seqlen_q, nheads, _ = q.shape
    out = torch.empty((batch, seqlen_q, nheads, inputs.value.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, nheads, seqlen_q), dtype=torch.float32, device=q.device)
    summary, launch = prepare(inputs, out, lse)
    compiled = None if summary is None else summary.run()
    launch.run()
    _remember(inputs, out, summary, compiled, launch)
    return out, lse


class _Known:
    """All of a call's launches but the addresses, for later calls that differ in nothing else."""

    def __init__(self, out: Tensor, summary: _KnownSummary | None, launch: Launch, main: Direct) -> None:
        self.out_shape, self.out_dtype, self.device = out.shape, out.dtype, out.device.index
        batch, seqlen_q, nheads, _ = out.shape
        self.lse_shape = (batch, nheads, seqlen_q)
        self.grid = (launch.n_programs, 1, 1)
        self.main = main
        # The descriptors of q, k, v and out are followed by six pointers.
        self.encoders = tuple(
            (encode, tuple(described.shape), tuple(described.strides))
            for encode, described in zip(main.descriptors, launch.arguments)
        )
        self.numbers = (*launch.arguments[10:], *(None for _ in launch.plan.constexprs))
        self.summary = summary
        config = cast(_Plan, launch.plan).config
        self.left = _left_size(config, launch.n_programs) if config.parts else 0

    def launch(self, inputs: AttentionInputs, stream: int, counter: int) -> tuple[Tensor, Tensor]:
        q, mask, sinks = inputs.query, inputs.mask, inputs.sinks
        out, lse = q.new_empty(self.out_shape), q.new_empty(self.lse_shape, dtype=torch.float32)
        out_address = out.data_ptr()
        bounds = tiles = memory = None
        if self.summary is not None:
            assert mask.row_intervals is not None
            memory = self.summary.launch(mask.row_intervals, stream)
            bounds = memory.data_ptr()
            tiles = bounds + (self.summary.summary_at if self.summary.listing is None else self.summary.list_at)
        elif self.left > 0:
            left = q.new_empty(self.left, dtype=torch.float32)
            bounds, tiles = left.data_ptr(), counter + 4 * _FLAGS_AT
        addresses = (q.data_ptr(), inputs.key.data_ptr(), inputs.value.data_ptr(), out_address)
        described: list[Any] = []
        for (encode, shape, strides), address in zip(self.encoders, addresses):
            described += encode(address, shape, strides)
        self.main(
            self.grid, stream, *described, None if memory is None else out_address, lse.data_ptr(), counter, bounds,
            tiles, None if sinks is None else sinks.data_ptr(), *self.numbers,
        )  # fmt: skip
        return out, lse


class _KnownSummary:
    """The launches that summarise row intervals (``listing`` only where these are listed), but for the addresses."""

    def __init__(self, summary: SummaryLaunch, summarize: Direct, listing: Direct | None) -> None:
        self.summarize, self.listing = summarize, listing
        self.key, self.size, self.grid, self.list_grid = summary.key, summary.size, summary.grid, summary.list_grid
        self.summary_at, self.list_at = 4 * summary.bounds.numel(), 4 * summary.list_at
        self.numbers = (*summary.arguments[3:], *(None for _ in summary.options))
        self.list_numbers = (*summary.list_arguments[2:], *(None for _ in summary.list_options))

    def launch(self, intervals: Tensor, stream: int) -> Tensor:
        """Bounds, summaries and maybe a list; launches nothing where they are known."""
        kept = shared(intervals)
        memory: Tensor | None = None if kept is None else kept.get(self.key)
        if memory is None:
            memory = intervals.new_empty(self.size, dtype=torch.int32)
            begin = memory.data_ptr()
            tiles = begin + self.summary_at
            self.summarize(self.grid, stream, intervals.data_ptr(), begin, tiles, *self.numbers)
            if self.listing is not None:
                self.listing(self.list_grid, stream, tiles, begin + self.list_at, *self.list_numbers)
            if kept is not None:
                kept[self.key] = memory
        return memory


#: The kernels that summarise and list row intervals, by device and options: a call that finds its intervals summarised
#: has not launched them.
_summaries: dict[tuple[Any, ...], tuple[Direct | None, ...]] = {}

_known: dict[tuple[Any, ...], _Known] = {}
_MOST_KNOWN = 1024


def _likeness(inputs: AttentionInputs) -> tuple[Any, ...]:
    """All that launches depend on, but addresses, of a call that ``forward_reason`` has nothing against.

    Strides are in it as they came, so that what a descriptor makes of odd ones in dimensions of size 1 is the same too.
    """
    q, k, v, mask, sinks = inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks
    intervals = mask.row_intervals
    return (
        q.shape,
        q.stride(),
        k.shape,
        k.stride(),
        v.shape,
        v.stride(),
        q.dtype,
        q.device,
        mask.causal,
        mask.window,
        inputs.softmax_scale,
        inputs.softcap,
        None if intervals is None else (intervals.shape, intervals.stride()),
        None if sinks is None else (sinks.stride(), sinks.dtype),
    )


def _remember(
    inputs: AttentionInputs, out: Tensor, summary: SummaryLaunch | None, compiled: Any, launch: Launch
) -> None:
    from .direct import direct

    plan = launch.plan
    assert isinstance(plan, _Plan)
    if launch.key not in plan.directs:
        plan.directs[launch.key] = direct(plan.compiled[launch.key])
    main = plan.directs[launch.key]
    known = None
    if summary is not None:
        key = (out.device.index, summary.listed is not None, *summary.options.values())
        if compiled is not None and key not in _summaries:
            _summaries[key] = tuple(None if kernel is None else direct(kernel) for kernel in compiled)
        summarize, listing = _summaries.get(key, (None, None))
        if summarize is None or (summary.listed is not None and listing is None):
            return
        known = _KnownSummary(summary, summarize, listing)
    if main is None:
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[_likeness(inputs)] = _Known(out, known, launch, main)


def recall(inputs: AttentionInputs) -> tuple[Tensor, Tensor] | None:
    """:func:`forward` of a call like one that was computed before, with a third of the work of the host.

    None: there was none, or this one needs the ordinary way. What may differ from the earlier call, and its guard:

    - addresses: q, k and v must be aligned as descriptors want, which is asked here; for row intervals, sinks, out and
      lse neither kernel is compiled for an alignment (``RUNTIME`` of both).
    - the device, the stream, the thread (autograd has its own): all three are asked for here. A stream that has no
      counter yet, and one that is being captured, get an ordinary launch. Two threads on one stream share its counter
      as two launches of one thread do: one runs after the other.
    - ``torch.inference_mode`` and gradients: outputs are made by ``new_empty``, and nothing here is differentiated.
    """
    mask = inputs.mask
    if (
        not _known
        or mask.bias is not None
        or mask.key_mask is not None
        or inputs.alibi_slopes is not None
        or inputs.dropout_p > 0.0
    ):
        return None
    found = _known.get(_likeness(inputs))
    if found is None or (inputs.query.data_ptr() | inputs.key.data_ptr() | inputs.value.data_ptr()) & 15:
        return None
    from .direct import hooked

    if found.device != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing() or hooked():
        return None
    stream = torch._C._cuda_getCurrentRawStream(found.device)
    counter = _counters.get((found.device, stream))
    return None if counter is None else found.launch(inputs, stream, counter.data_ptr())
