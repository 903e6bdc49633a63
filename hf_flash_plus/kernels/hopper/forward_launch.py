"""From one call to a launch of the Hopper forward kernel.

What depends on the structure of a call only is computed once (:class:`_Plan`). A call then makes four tensor
descriptors, allocates its outputs and launches. Later calls that differ from it in their addresses only do less
(:func:`recall`).
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...inputs import SHORT_QUERY, AttentionInputs
from . import config
from .config import CAUSAL, FULL, INTERVALS, SHORT_CAUSAL, TAIL, WINDOW, Config
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
        early = {"launch_pdl": True} if c.mode == INTERVALS else {}  # while the summaries are made
        super().__init__(attention_forward, {"C": chosen, "PIECE": piece, **OPTIONS, **early})


@cache
def _plan(dims: tuple[int, int], mode: int, short: bool, softcap: bool, sinks: bool, dtype: torch.dtype) -> _Plan:
    return _Plan(config.select(dims, mode, short, softcap, sinks), dtype)


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


_counters: dict[tuple[int, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """Zeros for the kernels to count with, two for tiles and one for summaries; they leave them at zero.

    Launches of one stream follow one another and share them; streams must not. While a CUDA graph is captured every
    launch gets its own: the graph may be replayed on any stream, beside anything.
    """
    if device.type != "cuda":
        return torch.empty(3, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(3, dtype=torch.int32, device=device)
    key = (device.index, torch._C._cuda_getCurrentRawStream(device.index))
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(3, dtype=torch.int32, device=device)
    return counter


class SummaryLaunch:
    """The launch that summarises row intervals, and where it puts what it finds.

    With ``counter`` also the list of tiles is written, behind the summaries; ``section`` heads are in flight together.
    """

    def __init__(
        self,
        inputs: AttentionInputs,
        window: tuple[int, int],
        block_m: int,
        block_n: int,
        empty_rows_hide: bool,
        counter: Tensor | None = None,
        section: int = 1,
    ) -> None:
        intervals = inputs.mask.row_intervals
        assert intervals is not None
        seqlen_q, seqlen_k = inputs.query.shape[1], inputs.key.shape[1]
        batch = intervals.shape[0]
        tiles = -(-seqlen_q // block_m)
        entries = 0 if counter is None else config.ENTRY * (batch * tiles + 1)
        size = batch * tiles * (2 * block_m + config.CARD) + entries
        memory = torch.empty(size, dtype=torch.int32, device=intervals.device)
        split = batch * tiles * 2 * block_m
        self.bounds, self.summary = memory[:split], memory[split:]
        self.grid = (tiles, batch, 1)
        strides = (intervals.stride(0) if batch > 1 else 0, *intervals.stride()[1:])
        grouped = tiles * max(1, section // inputs.query.shape[2])
        counting = None if counter is None else counter[2:]
        self.arguments = (
            intervals, self.bounds, self.summary, counting, grouped, *strides, seqlen_q, seqlen_k, *window
        )  # fmt: skip
        self.options = {
            "ROWS": block_m, "BLOCK_M": 1 << (block_m - 1).bit_length(), "BLOCK_N": block_n,
            "EMPTY_ROWS_HIDE": empty_rows_hide, "LIST": counter is not None,
        }  # fmt: skip

    def run(self) -> Any:
        """Launch, and return what was compiled."""
        from .intervals import summarize_intervals

        return summarize_intervals[self.grid](*self.arguments, **self.options, **OPTIONS)

    def warm_up(self) -> Any:
        from .intervals import summarize_intervals

        return summarize_intervals.warmup(*self.arguments, **self.options, grid=self.grid, **OPTIONS)


def _section(n_heads: int, bytes_of_keys: int) -> int:
    """How many key heads are in flight together: a number that leaves no small section for the end, whose long tiles
    would begin when the other programs are about to finish."""
    fitting = min(max(1, IN_FLIGHT // bytes_of_keys), n_heads)
    sizes = range(max(1, fitting * 3 // 4), min(fitting * 5 // 4, n_heads) + 1)
    return min(sizes, key=lambda size: (-n_heads % size, abs(size - fitting)))


def prepare(inputs: AttentionInputs, out: Tensor, lse: Tensor) -> tuple[SummaryLaunch | None, Launch]:
    """The launches of a call that ``forward_reason`` has nothing against."""
    q, k, v, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    batch, seqlen_q, nheads, head_dim = q.shape
    _, seqlen_k, nheads_k, v_head_dim = v.shape
    mode = _mode(inputs, seqlen_q, seqlen_k)
    dims = config.head_dim_class(head_dim, v_head_dim)
    assert dims is not None
    softcap, scale = inputs.softcap, inputs.softmax_scale
    plan = _plan(dims, mode, seqlen_k <= SHORT_CAUSAL, softcap > 0.0, sinks is not None, q.dtype)
    window = (0, 0)
    summary = bounds = tiles = None
    n_heads, n_tiles = batch * nheads, -(-seqlen_q // plan.block_m)
    section = _section(batch * nheads_k, seqlen_k * (head_dim + v_head_dim) * q.itemsize) * (nheads // nheads_k)
    counter = _counter(q.device)
    if mode >= WINDOW:
        window = _window(inputs, seqlen_q, seqlen_k)
    if mode == INTERVALS:
        summary = SummaryLaunch(inputs, window, plan.block_m, plan.config.block_n, False, counter, section)
        bounds, tiles = summary.bounds, summary.summary
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
        0 if tiles is None or inputs.mask.row_intervals.shape[0] == 1 else 1,  # type: ignore[union-attr]
        0 if sinks is None else sinks.stride(0),
        factor,
        cap_factor,
    )
    n_programs = min(_n_programs(q.device.index), n_heads * n_tiles)
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

    def __init__(self, out: Tensor, summary: SummaryLaunch | None, summarize: Direct | None, launch: Launch,
                 main: Direct) -> None:  # fmt: skip
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
        self.summary = None
        if summary is not None and summarize is not None:
            memory = summary.bounds.numel() + summary.summary.numel()
            numbers = (*summary.arguments[4:], *(None for _ in summary.options))
            self.summary = summarize, memory, 4 * summary.bounds.numel(), summary.grid, numbers

    def launch(self, inputs: AttentionInputs, stream: int, counter: int) -> tuple[Tensor, Tensor]:
        q, mask, sinks = inputs.query, inputs.mask, inputs.sinks
        out, lse = q.new_empty(self.out_shape), q.new_empty(self.lse_shape, dtype=torch.float32)
        out_address = out.data_ptr()
        bounds = tiles = memory = None
        if self.summary is not None:
            summarize, size, split, grid, numbers = self.summary
            assert mask.row_intervals is not None
            memory = q.new_empty(size, dtype=torch.int32)
            bounds = memory.data_ptr()
            tiles = bounds + split
            summarize(grid, stream, mask.row_intervals.data_ptr(), bounds, tiles, counter + 8, *numbers)
        addresses = (q.data_ptr(), inputs.key.data_ptr(), inputs.value.data_ptr(), out_address)
        described: list[Any] = []
        for (encode, shape, strides), address in zip(self.encoders, addresses):
            described += encode(address, shape, strides)
        self.main(
            self.grid, stream, *described, None if memory is None else out_address, lse.data_ptr(), counter, bounds,
            tiles, None if sinks is None else sinks.data_ptr(), *self.numbers,
        )  # fmt: skip
        return out, lse


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
    summarize = None if summary is None else direct(compiled)
    if main is None or (summary is not None and summarize is None):
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[_likeness(inputs)] = _Known(out, summary, summarize, launch, main)


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
